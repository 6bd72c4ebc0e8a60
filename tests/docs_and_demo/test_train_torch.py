"""The example that trains in PyTorch gives the same losses on any number of ranks, and as that in JAX."""

import json

import numpy as np
import pytest

from tests.support.commands import finish, free_port, start
from tests.support.machine import GPU, GPUS, STEPS, TOLERANCE


def assert_right(processes):
    for code, _, errors in processes:
        assert code == 0, errors


@pytest.mark.slow
@pytest.mark.multigpu
def test_training_in_torch_is_the_same_on_one_rank_and_on_several(forks, tmp_path):
    """One process, four or all on one machine, and some on each of two, which torchrun starts."""
    files = {name: tmp_path / f"{name}.json" for name in ("alone", "ring", "allgather")}
    script = "examples/train_torch.py", "--steps", str(STEPS), "--seed", "1", "--json"
    assert_right(forks.run(*script, files["alone"]))
    assert_right(forks.run(*script, files["ring"], "--method", "ring", ranks=len(GPUS) or 4))
    half = len(GPUS) // 2 or 1
    place = "--nnodes=2", "--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{free_port()}", "--rdzv-id=1"
    torchrun = "-m", "torch.distributed.run", *place, f"--nproc_per_node={half}"
    machine = *torchrun, *script, str(files["allgather"])
    shares = [{"CUDA_VISIBLE_DEVICES": ",".join(x)} for x in (GPUS[:half], GPUS[half : 2 * half])] if GPU else [{}, {}]
    assert_right(finish(*[start(*machine, **share) for share in shares]))
    alone, *dealt_out = (json.loads(file.read_text())["losses"] for file in files.values())
    assert len(alone) == STEPS
    for losses in dealt_out:
        # Float32 summed in another order; see TOLERANCE in examples/demo.py for what mistakes make.
        np.testing.assert_allclose(losses, alone, rtol=0, atol=TOLERANCE)


@pytest.mark.slow
def test_both_frameworks_train_alike(forks, tmp_path):
    """From the same weights on the same text; `test_jax_processes` is the rest of it."""
    files = [tmp_path / "torch.json", tmp_path / "jax.json"]
    commands = ["examples/train_torch.py"], ["examples/train_jax.py", *([] if GPU else ["--devices", "1"])]
    common = "--steps", "4", "--seed", "1", "--json"
    environment = {"CUDA_VISIBLE_DEVICES": GPUS[0], "XLA_PYTHON_CLIENT_PREALLOCATE": "false"} if GPU else {}
    for command, file in zip(commands, files, strict=True):
        assert_right(forks.run(*command, *common, file, **environment))
    ours, theirs = (json.loads(file.read_text())["losses"] for file in files)
    assert len(ours) == 4
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCE)
