"""Runs Python scripts in forks of this process, which has imported the frameworks before: an import takes seconds.

    python -m tests.programs.forked MODULE...

Each line of standard input is a request as JSON, and each line of standard output an answer to it;
`tests/support/forks.py` says what both have in them. As with torchrun, the first rank that fails ends the others.
"""

import importlib
import json
import multiprocessing
import os
import runpy
import sys
import tempfile
import warnings
from multiprocessing.connection import wait
from pathlib import Path


def run(request, environment, files):
    """Run the script of a request as Python would, in a process of its own."""
    for descriptor, file in zip((1, 2), files, strict=True):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), descriptor)
    os.environ |= environment
    script = request["script"]
    sys.argv = [script, *request["arguments"]]
    sys.path[0] = os.path.dirname(os.path.abspath(script))
    warnings.resetwarnings()
    warnings.simplefilter("error" if request["strict"] else "default")
    for message in request["ignored"]:
        warnings.filterwarnings("ignore", message)
    runpy.run_path(script, run_name="__main__")


def answer(request, directory):
    """Run the script on all ranks, and return [exit code, output, errors] of each."""
    fork, ranks = multiprocessing.get_context("fork"), []
    for rank, of_rank in enumerate(request["ranks"]):
        files = [os.path.join(directory, f"{rank}.{what}") for what in ("output", "errors")]
        ranks.append((fork.Process(target=run, args=(request, request["environment"] | of_rank, files)), files))
    processes = [process for process, _ in ranks]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # JAX warns of threads, which it has once there are devices
        for process in processes:
            process.start()
    running = set(processes)
    while running:
        wait([process.sentinel for process in running])
        running = {process for process in running if process.exitcode is None}
        if any(process.exitcode for process in processes):
            for process in running:
                process.kill()
    return [[process.exitcode, *(Path(file).read_text() for file in files)] for process, files in ranks]


if __name__ == "__main__":
    for module in sys.argv[1:]:
        importlib.import_module(module)
    for line in sys.stdin:
        with tempfile.TemporaryDirectory() as directory:
            print(json.dumps(answer(json.loads(line), directory)), flush=True)
