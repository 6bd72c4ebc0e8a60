"""Attention between real processes (gloo, on a CPU) against the float64 oracle of the batch that was dealt out."""

import numpy as np
import pytest
import torch
import torch.distributed as dist

import oracle
import zigzag_torch
from cases import CASES, Case, make_inputs
from closeness import assert_close
from conftest import GPU
from frameworks import RESULTS, torch_numpy
from processes import run_ranks

pytestmark = pytest.mark.skipif(GPU, reason="the ranks share one interpreter's CPU")
METHODS = ("allgather", "ring")
SELECTED = {
    1: ("w1", "w1-odd-group"),
    2: ("w2-uneven", "w2-full", "w2-padding", "w2-empty-runs", "w2-all-empty", "w2-no-rows", "w2-mqa"),
    3: ("w3", "w3-full"),
    4: ("w4",),
    8: ("w8", "w8-short"),
}


def local(case, inputs, rank):
    """(q, k, v, dout, dlse, cu_seqlens) of a rank as tensors."""
    rows = oracle.zigzag_rows(case.cu_seqlens, rank, case.world_size, case.padding)
    dtype = getattr(torch, case.dtype)
    q, k, v, dout = (torch.tensor(inputs[name][rows]).to(dtype) for name in ("q", "k", "v", "dout"))
    cu_seqlens = torch.tensor(case.cu_seqlens, dtype=torch.int32)
    return q, k, v, dout, torch.tensor(inputs["dlse"][:, rows]), cu_seqlens


def attend(q, k, v, dout, dlse, cu_seqlens, **options):
    """{name: tensor} for each of RESULTS."""
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    out, lse = zigzag_torch.zigzag_attention(*leaves, cu_seqlens, return_lse=True, **options)
    gradients = torch.autograd.grad((out, lse), leaves, (dout, dlse))
    return dict(zip(RESULTS, (out.detach(), lse.detach(), *gradients), strict=True))


def whole(case, inputs, arithmetic):
    """RESULTS of the batch that nobody dealt out."""
    return oracle.rank_attention(
        inputs["q"], inputs["k"], inputs["v"], case.cu_seqlens, 0, 1, case.causal,
        dout=inputs["dout"], dlse=inputs["dlse"], arithmetic=arithmetic,
    )._asdict()  # fmt: skip


def options_to_try(case):
    for backend in ("interpret", "reference"):
        yield {"method": "ring", "backend": backend}
        for stride in {None, 1, case.kv_heads}:
            yield {"method": "allgather", "backend": backend, "heads_k_stride": stride}
    if case.dtype != "float32":
        for method in METHODS:
            yield {"method": method, "backend": "interpret", "grad_reduce_dtype": getattr(torch, case.dtype)}


def check_cases(rank, world_size, expected):
    for name, (exact, straightforward) in expected.items():
        case = next(case for case in CASES if case.name == name)
        tensors = local(case, make_inputs(case), rank)
        rows = oracle.zigzag_rows(case.cu_seqlens, rank, case.world_size, case.padding)
        for options in options_to_try(case):
            results = attend(*tensors, group=dist.group.WORLD, causal=case.causal, **options)
            for result, x in results.items():
                mine = (slice(None), rows) if result == "lse" else rows
                # What is rounded at every hop may be as wrong as that many roundings of a plain computation.
                where = f"rank {rank} of {world_size}, {name}, {options}: {result}"
                assert_close(where, torch_numpy(x), exact[result][mine], straightforward[result][mine])


@pytest.mark.parametrize("world_size", SELECTED)
def test_ranks_match_the_oracle_of_the_whole_batch(world_size, tmp_path):
    expected = {}
    for name in SELECTED[world_size]:
        case = next(case for case in CASES if case.name == name)
        inputs = make_inputs(case)
        expected[name] = tuple(
            whole(case, inputs, arithmetic) for arithmetic in (oracle.EXACT, oracle.straightforward(case.dtype))
        )
    run_ranks(world_size, tmp_path, check_cases, expected)
