"""Commands that tests start as from a shell, several side by side."""

import os
import socket
import subprocess
import sys
from pathlib import Path

from tests.support.machine import CHOSEN

ROOT = Path(__file__).parents[2]


def shell_environment():
    """That of a shell: without what machine.py says to this process, and scripts are run from a checkout."""
    env = {name: value for name, value in os.environ.items() if name not in CHOSEN}
    return env | {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), env.get("PYTHONPATH")]))}


def start(*command, **environment):
    """Python with `command`, under way."""
    return subprocess.Popen(
        [sys.executable, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=shell_environment() | environment,
    )


def finish(*processes, timeout=240):
    """(exit code, lines of output without Gloo's own, errors) of each; none outlives the test."""
    try:
        results = [(*process.communicate(timeout=timeout), process.returncode) for process in processes]
        return [
            (code, [line for line in output.splitlines() if not line.startswith("[Gloo]")], errors)
            for output, errors, code in results
        ]
    finally:
        for process in processes:
            process.kill()


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
