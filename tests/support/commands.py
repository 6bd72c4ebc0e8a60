"""Commands and programs that tests start in processes of their own, as from a shell."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from tests.support.machine import CHOSEN, GPU, HANGS, XLA_ON_CPU

ROOT = Path(__file__).parents[2]


class Ended(NamedTuple):
    """A process that is over: its exit code, its lines of output without Gloo's own, and its errors."""

    code: int
    lines: list[str]
    errors: str


def shell_environment():
    """Return the environment of a shell: without the settings that machine.py makes for this process.

    Scripts find the packages of this checkout, and on a CPU XLA compiles quickly there too.
    """
    env = {name: value for name, value in os.environ.items() if name not in CHOSEN}
    if not GPU:
        env["XLA_FLAGS"] = " ".join(XLA_ON_CPU)
    return env | {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), env.get("PYTHONPATH")]))}


def start(*command, **environment):
    """Start Python with the arguments `command`, and return the process."""
    return subprocess.Popen(
        [sys.executable, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=shell_environment() | environment,
    )


def finish(*processes):
    """`Ended` for each of the processes; none outlives the test."""
    try:
        results = [(*process.communicate(timeout=HANGS), process.returncode) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [
        Ended(code, [line for line in output.splitlines() if not line.startswith("[Gloo]")], errors)
        for output, errors, code in results
    ]


def start_program(name, *arguments, **environment):
    """The program `name` of `tests/programs`, under way."""
    return start("-m", f"tests.programs.{name}", *arguments, **environment)


def run_program(name, *arguments, **environment):
    """`Ended` for the program `name` of `tests/programs`."""
    return finish(start_program(name, *arguments, **environment))[0]


def lines_of(name, *arguments, **environment):
    """The lines that the program `name` prints; `AssertionError` with its errors if it fails."""
    ended = run_program(name, *arguments, **environment)
    assert ended.code == 0, ended.errors[-4000:]
    return ended.lines


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
