"""The example that trains in PyTorch gives the same losses on any number of ranks, and as that in JAX."""

import json

import numpy as np
import pytest

from tests.support.commands import finish, free_port, start
from tests.support.machine import GPU, GPUS, STEPS, TOLERANCE


def assert_finished(*processes):
    for code, _, errors in finish(*processes):
        assert code == 0, errors


@pytest.mark.slow
@pytest.mark.multigpu
def test_training_in_torch_is_the_same_on_one_rank_and_on_several(tmp_path):
    """One process, all on one machine, and half of them on each of two, as torchrun sees them."""
    files = {name: tmp_path / f"{name}.json" for name in ("alone", "ring", "allgather")}
    script = "examples/train_torch.py", "--steps", str(STEPS), "--seed", "1", "--json"
    torchrun = "-m", "torch.distributed.run"
    ranks = len(GPUS) or 4
    assert_finished(start(*script, str(files["alone"])))
    ring = *script, str(files["ring"]), "--method", "ring"
    assert_finished(start(*torchrun, "--standalone", f"--nproc_per_node={ranks}", *ring))
    half = ranks // 2
    place = "--nnodes=2", "--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{free_port()}", "--rdzv-id=1"
    machine = *torchrun, *place, f"--nproc_per_node={half}", *script, str(files["allgather"])
    shares = [{"CUDA_VISIBLE_DEVICES": ",".join(x)} for x in (GPUS[:half], GPUS[half : 2 * half])] if GPU else [{}, {}]
    assert_finished(*[start(*machine, **share) for share in shares])
    alone, *dealt_out = (json.loads(file.read_text())["losses"] for file in files.values())
    assert len(alone) == STEPS
    for losses in dealt_out:
        # Float32 summed in another order; see TOLERANCE in examples/demo.py for what mistakes make.
        np.testing.assert_allclose(losses, alone, rtol=0, atol=TOLERANCE)


@pytest.mark.slow
def test_both_frameworks_train_alike(tmp_path):
    """From the same weights on the same text; `test_jax_processes` is the rest of it."""
    files = [tmp_path / "torch.json", tmp_path / "jax.json"]
    commands = ["examples/train_torch.py"], ["examples/train_jax.py", *([] if GPU else ["--devices", "1"])]
    common = "--steps", "4", "--seed", "1", "--json"
    environment = {"CUDA_VISIBLE_DEVICES": GPUS[0], "XLA_PYTHON_CLIENT_PREALLOCATE": "false"} if GPU else {}
    started = [start(*command, *common, str(x), **environment) for command, x in zip(commands, files, strict=True)]
    assert_finished(*started)
    ours, theirs = (json.loads(file.read_text())["losses"] for file in files)
    assert len(ours) == 4
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCE)
