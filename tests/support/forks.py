"""Scripts that tests run in forks of one process, which has already imported both frameworks."""

import json
import os
import signal
import subprocess
import sys

from tests.support.commands import ROOT, Ended, free_port, shell_environment

# With what these import, and nothing that starts threads or looks for devices.
PRELOADED = ["torch.distributed", "torch._dynamo", "zigzag_torch", "zigzag_torch.hf", "zigzag_jax", "zigzag_jax.flax"]


class Forks:
    """Starts the process when a script is first run.

    Scripts see the environment of `shell_environment`. What a framework reads when it is imported, such as the settings
    of JAX and TRITON_INTERPRET, is as in that environment: a script that changes it needs a process of its own.
    """

    def __init__(self):
        self.process = None

    def run(self, script, *arguments, ranks=1, strict=False, ignored=(), **environment):
        """Return `Ended` of each of the `ranks` processes that run `script`; with several, as torchrun starts them.

        `strict` makes errors of warnings, except where a message begins with an `ignored` one.
        """
        self.process = self.process or self._start()
        of_ranks = [{}] if ranks == 1 else _as_launched(ranks)
        request = {"script": str(script), "arguments": [str(x) for x in arguments], "ranks": of_ranks}
        request |= {"strict": strict, "ignored": ignored, "environment": environment}
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        assert answer, "the process that forks is gone: its errors are those of the tests"
        return [
            Ended(code, [line for line in output.splitlines() if not line.startswith("[Gloo]")], errors)
            for code, output, errors in json.loads(answer)
        ]

    def _start(self):
        command = sys.executable, "-W", "error", "-m", "tests.programs.forked", *PRELOADED
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, cwd=ROOT, env=shell_environment(), start_new_session=True, **pipes)

    def end(self):
        """End the process and what it has started."""
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.communicate()


def _as_launched(ranks):
    """Return the environment that torchrun gives each of so many ranks on this machine."""
    common = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_PORT": str(free_port())}
    common |= {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_RUN_ID": "none", "OMP_NUM_THREADS": "1"}
    return [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
