"""Halos in both frameworks: the same bits, and the same choice."""

import numpy as np
import pytest
import torch.distributed as dist

import zigzag_jax
import zigzag_torch
from tests.support.cases import make_inputs
from tests.support.frameworks import call_options, prepare_torch
from tests.support.halos import HALOS, reach_options
from tests.support.machine import GPU, GPUS
from tests.support.processes import run_ranks
from tests.support.spread import halo_arrays, spread_halos
from tests.support.torch_ranks import KERNELS, attend, on_device
from zigzag_kernels import halo

NAMES = "out", "lse", "dq", "dk", "dv"


def save_results(rank, _, name, directory):
    case, common = find(name), {"group": dist.group.WORLD, "method": "halo"}
    tensors, sinks, cu_seqlens = on_device(case, make_inputs(case), rank)
    batch = prepare_torch(case, cu_seqlens, rank, KERNELS, **common, **reach_options(case))
    results = attend(tensors, sinks, batch, **common, **call_options(case), backend=KERNELS)
    np.savez(directory / f"{rank}.npz", **{name: results[name] for name in NAMES})


def find(name):
    return next(case for case in HALOS if case.name == name)


@pytest.mark.multigpu
@pytest.mark.parametrize("name", ["w2-few-rows", pytest.param("w4-row", marks=pytest.mark.slow)])
def test_both_frameworks_give_the_same_bits(name, tmp_path):
    case = find(name)
    if GPU and len(GPUS) < case.world_size:
        pytest.skip(f"needs {case.world_size} GPUs")
    run_ranks(case.world_size, tmp_path, save_results, name, tmp_path, backend="nccl" if GPU else "gloo")
    ranks = [np.load(tmp_path / f"{rank}.npz") for rank in range(case.world_size)]
    for result, of_jax in zip(NAMES, spread_halos(case, KERNELS)(*halo_arrays(case)), strict=False):
        of_torch = np.concatenate([x[result] for x in ranks], 1 if result == "lse" else 0)
        np.testing.assert_array_equal(of_torch, of_jax, err_msg=result)


@pytest.mark.skipif(GPU, reason="a list makes a batch of the CPU, whose kernels are interpreted")
@pytest.mark.parametrize("package", [zigzag_torch, zigzag_jax], ids=["torch", "jax"])
def test_a_call_that_sees_farther_takes_the_batch_without_its_halos(package):
    batch = package.prepare_batch([0, 48], 0, 2, window_size=(4, 0), backend="interpret")
    assert (batch.method, batch.halo) == ("halo", 4)
    rest = (1, 24), "document", 2, None
    same, method = halo.method_of_call(batch, (True, (4, 0), 0), *rest)
    assert same is batch
    assert method == "halo"
    other, method = halo.method_of_call(batch, (True, (5, 0), 0), *rest)
    assert (method, other.method, other.halo, other.segments, other.sequences) == (
        "allgather",
        "allgather",
        0,
        None,
        None,
    )
