"""Attention between real processes, gloo or NCCL, against the float64 oracle of the batch that was dealt out."""

import numpy as np
import pytest
import torch
import torch.distributed as dist

import zigzag_torch
from tests.support import oracle
from tests.support.cases import CASES, RESULTS, Case, make_inputs
from tests.support.closeness import assert_close
from tests.support.machine import GPU, GPUS
from tests.support.processes import run_ranks, torch_numpy
from tests.support.rank import batch_results, gathered_rows, rank_arrays, rank_results, rank_rows, rows_of_results
from tests.support.windows import LEAST_HEAD_DIM, STANDS_IN, in_one_kernel

pytestmark = pytest.mark.multigpu
METHODS = ("allgather", "ring")
DEVICE, KERNELS = ("cuda", "triton") if GPU else ("cpu", "interpret")
# How many options are tried with the kernels, and how many with the reference; None: all. The interpreter takes about a
# second for one rank of one case, and the ranks share the cores. On GPUs every option costs compiling, in seconds.
if GPU:
    TRIED = {
        2: {"w2-uneven": (None, 2), "w2-edges": (3, 0), "w2-padding": (2, 0), "w2-no-rows": (2, 0)},
        3: {"w3": (2, 0), "w3-d96": (2, 0)},
        4: {"w4-llama": (3, 2), "w4-d24": (2, 0)},
        5: {"w5-d40": (2, 0)},
        8: {"w8": (None, 2), "w8-64-uneven": (3, 0), "w8-one-token-chunks": (2, 0)},
    }
else:
    TRIED = {
        1: {"w1": (1, None), "w1-odd-group": (1, None)},
        2: {
            "w2-uneven": (3, None),
            "w2-full": (2, None),
            "w2-padding": (2, None),
            "w2-empty-runs": (2, None),
            "w2-all-empty": (2, None),
            "w2-no-rows": (2, None),
        },
        3: {"w3": (3, None), "w3-full": (2, None)},
        4: {"w4": (2, None)},
        5: {"w5": (0, None)},
        8: {"w8": (2, None), "w8-short": (0, None)},
    }
# On GPUs compiling is most of the time, so that each case is a test of its own, for pytest-xdist to spread.
TESTS = [
    pytest.param(
        world_size,
        names,
        id="-".join((str(world_size), *(names if GPU else ()))),
        marks=[pytest.mark.slow] * (world_size in (3, 8) and not GPU),  # the processes share the cores
    )
    for world_size, cases in TRIED.items()
    for names in ([[name] for name in cases] if GPU else [list(cases)])
]


def find(name):
    return next(case for case in CASES if case.name == name)


def local(case, inputs, rank):
    """(q, k, v, dout, dlse, cu_seqlens) of a rank as tensors."""
    *arrays, dlse = rank_arrays(case, inputs, rank, key_rows=rank_rows(case, rank))
    q, k, v, dout = (torch.tensor(x).to(DEVICE, getattr(torch, case.dtype)) for x in arrays)
    cu_seqlens = torch.tensor(case.cu_seqlens, dtype=torch.int32, device=DEVICE)
    return q, k, v, dout, torch.tensor(dlse, device=DEVICE), cu_seqlens


def attend(q, k, v, dout, dlse, cu_seqlens, function=zigzag_torch.zigzag_attention, **options):
    """{name: tensor} for each of RESULTS."""
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    out, lse = function(*leaves, cu_seqlens, return_lse=True, **options)
    gradients = torch.autograd.grad((out, lse), leaves, (dout, dlse))
    return dict(zip(RESULTS, (out.detach(), lse.detach(), *gradients), strict=True))


def rounded_sums(case, inputs):
    """dk and dv as a plain computation that adds up the contributions of the ranks in the case's own type."""
    arithmetic = oracle.straightforward(case.dtype)
    sums = {name: np.zeros(inputs["k"].shape, np.float32) for name in ("dk", "dv")}
    gathered = gathered_rows(case)
    for rank in range(case.world_size):
        contribution = rank_results(case, inputs, rank, arithmetic)
        for name, total in sums.items():
            total[gathered] = arithmetic.rounded(total[gathered] + contribution[name])
    return sums


def options_of(case):
    """Ways to call attention, the most telling first."""
    yield {"method": "ring"}
    strides = [stride for stride in range(1, case.kv_heads + 1) if case.kv_heads % stride == 0]
    for stride in (*strides, None):
        yield {"method": "allgather", "heads_k_stride": stride}
    if case.dtype != "float32":
        for method in METHODS:
            yield {"method": method, "grad_reduce_dtype": getattr(torch, case.dtype), "heads_k_stride": 1}


def check_cases(rank, world_size, expected):
    for name, (exact, straightforward, sums) in expected.items():
        case = find(name)
        *tensors, cu_seqlens = local(case, make_inputs(case), rank)
        rows = rank_rows(case, rank)
        options = list(options_of(case))
        for backend, count in zip((KERNELS, "reference"), TRIED[world_size][name], strict=True):
            for chosen in options[:count]:
                common = {"group": dist.group.WORLD, "backend": backend}
                batch = zigzag_torch.prepare_batch(cu_seqlens, method=chosen["method"], **common)
                mask = {"causal": case.causal, "softmax_scale": case.softmax_scale}
                results = attend(*tensors, batch, **mask, **chosen, **common)
                plain = straightforward | (sums if "grad_reduce_dtype" in chosen else {})
                exact_mine, plain_mine = (rows_of_results(x, rows) for x in (exact, plain))
                for result, x in results.items():
                    where = f"rank {rank} of {world_size}, {name}, {backend}, {chosen}: {result}"
                    assert_close(where, torch_numpy(x), exact_mine[result], plain_mine[result])


@pytest.mark.parametrize(("world_size", "names"), TESTS)
def test_ranks_match_the_oracle_of_the_whole_batch(world_size, names, tmp_path):
    if GPU and world_size > len(GPUS):
        pytest.skip(f"needs {world_size} GPUs")
    expected = {}
    for name in names:
        case = find(name)
        inputs = make_inputs(case)
        exact, straightforward = (
            batch_results(case, inputs, x) for x in (oracle.EXACT, oracle.straightforward(case.dtype))
        )
        expected[name] = exact, straightforward, rounded_sums(case, inputs)
    run_ranks(world_size, tmp_path, check_cases, expected, backend="nccl" if GPU else "gloo")


ONE_KERNEL = Case(
    name="one-kernel", world_size=2, lengths=(12, 0, 28), heads=6, kv_heads=3, head_dim=LEAST_HEAD_DIM, padding=2,
    dtype="bfloat16",
)  # fmt: skip


def check_windows(rank, world_size, case, *expected):
    *tensors, cu_seqlens = local(case, make_inputs(case), rank)
    common = {"group": dist.group.WORLD, "backend": KERNELS, "method": "allgather"}
    batch = zigzag_torch.prepare_batch(cu_seqlens, **common)
    pair = attend(*tensors, batch, heads_k_stride=1, **common)
    with in_one_kernel():
        results, again = (attend(*tensors, batch, heads_k_stride=1, **common) for _ in range(2))
    wanted = [rows_of_results(x, rank_rows(case, rank)) for x in expected]
    for name, x in results.items():
        where = f"rank {rank} of {world_size}: {name}"
        assert_close(where, torch_numpy(x), *(of_all[name] for of_all in wanted))
        assert torch.equal(x, again[name]), f"{where} is not repeated"
        if STANDS_IN:
            assert torch.equal(x, pair[name]), where


def test_windows_in_one_kernel_match_the_oracle_and_repeat(tmp_path):
    if GPU and len(GPUS) < ONE_KERNEL.world_size:
        pytest.skip(f"needs {ONE_KERNEL.world_size} GPUs")
    inputs = make_inputs(ONE_KERNEL)
    arithmetics = oracle.EXACT, oracle.straightforward(ONE_KERNEL.dtype)
    expected = [batch_results(ONE_KERNEL, inputs, x) for x in arithmetics]
    backend = "nccl" if GPU else "gloo"
    run_ranks(ONE_KERNEL.world_size, tmp_path, check_windows, ONE_KERNEL, *expected, backend=backend)
