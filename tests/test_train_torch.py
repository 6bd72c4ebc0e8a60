"""The example that trains in PyTorch gives the same losses on any number of ranks."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from conftest import CHOSEN, GPU

ROOT = Path(__file__).parents[1]


def start(*command):
    """As from a shell: without what conftest.py says to this process."""
    env = {name: value for name, value in os.environ.items() if name not in CHOSEN}
    return subprocess.Popen(
        [sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=env
    )


def finish(process):
    try:
        stdout, stderr = process.communicate(timeout=280)
    finally:
        process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def run(*command):
    return finish(start(*command))


@pytest.mark.skipif(GPU, reason="four processes want four GPUs")
def test_training_in_torch_is_the_same_on_one_rank_and_on_four(tmp_path):
    """Four processes on one machine, and two on each of two, as torchrun sees them."""
    script = "examples/train_torch.py", "--steps", "4", "--seed", "1"
    files = {name: tmp_path / f"{name}.json" for name in ("alone", "ring", "allgather")}
    result = run(*script, "--json", str(files["alone"]))
    assert result.returncode == 0, result.stderr
    torchrun = "-m", "torch.distributed.run"
    ring = *script, "--method", "ring", "--json", str(files["ring"])
    result = run(*torchrun, "--standalone", "--nproc_per_node=4", *ring)
    assert result.returncode == 0, result.stderr
    with socket.socket() as free:
        free.bind(("localhost", 0))
        endpoint = f"localhost:{free.getsockname()[1]}"
    machine = "--nnodes=2", "--nproc_per_node=2", "--rdzv-backend=c10d", f"--rdzv-endpoint={endpoint}", "--rdzv-id=1"
    machines = [start(*torchrun, *machine, *script, "--json", str(files["allgather"])) for _ in range(2)]
    for result in [finish(machine) for machine in machines]:
        assert result.returncode == 0, result.stderr
    alone, *dealt_out = (json.loads(file.read_text())["losses"] for file in files.values())
    assert len(alone) == 4
    for losses in dealt_out:
        # Float32 summed in another order; see TOLERANCE in examples/demo.py for what mistakes make.
        np.testing.assert_allclose(losses, alone, rtol=0, atol=2e-5)
