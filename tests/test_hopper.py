"""The kernels for Hopper, asked for: against the oracle on every packing, and beside the portable ones."""

import numpy as np
import pytest
import torch
import triton

import oracle
from cases import BENCH, CASES, make_inputs
from closeness import assert_close
from conftest import GPU
from frameworks import attend_torch
from zigzag_kernels import hopper, plan
from zigzag_kernels.problem import make_problem

HERE = GPU and torch.cuda.get_device_capability() == (9, 0) and triton.__version__.startswith(hopper.TRITON)
SELECTED = [
    case
    for case in CASES
    if case.tags.isdisjoint(BENCH)
    and case.dtype != "float32"
    and hopper.MIN_HEAD_DIM <= case.head_dim <= hopper.MAX_HEAD_DIM
]
needs_hopper = pytest.mark.skipif(
    not HERE, reason="needs a Hopper GPU and the Triton that these kernels are written for"
)


@pytest.fixture
def asked_for(monkeypatch):
    monkeypatch.setenv(hopper.VARIABLE, "1")
    plan._forward_launch.cache_clear()
    yield
    plan._forward_launch.cache_clear()


def problem(tokens=8192, head_dim=128, dtype="bfloat16", stride=None, target="9.0", gluon=True, sequences=1):
    q = ((tokens, 32, head_dim), dtype, (32 * head_dim, head_dim))
    kv = ((8 * tokens, 8, head_dim), dtype, (stride or 8 * head_dim, head_dim))
    return make_problem(
        q, kv, kv, sequences=sequences, world_size=8, causal=True, softmax_scale=None, target=target, gluon=gluon
    )


def test_the_rule_that_takes_them(asked_for, monkeypatch):
    monkeypatch.setattr(triton, "__version__", hopper.TRITON + "0")
    assert hopper.forward_kernel(problem()) == "hopper_forward"
    assert hopper.forward_kernel(problem(tokens=2048)) == "hopper_forward_few"
    assert hopper.forward_kernel(problem(sequences=64)) == "hopper_forward_short"
    for cannot in (
        {"head_dim": 32}, {"head_dim": 136}, {"dtype": "float32"}, {"target": "8.0"}, {"target": "10.0"},
        {"gluon": False}, {"stride": 1028},
    ):  # fmt: skip
        assert hopper.forward_kernel(problem(**cannot)) == "forward", cannot
    monkeypatch.setattr(triton, "__version__", "3.9.0")
    assert hopper.forward_kernel(problem()) == "forward"
    monkeypatch.undo()
    assert hopper.forward_kernel(problem()) == "forward"


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("case", SELECTED, ids=str)
def test_they_match_the_oracle(case, asked_for):
    inputs = make_inputs(case)
    gathered = oracle.gathered_rows(case.cu_seqlens, case.world_size, case.padding)
    for rank in range(case.world_size):
        rows = oracle.zigzag_rows(case.cu_seqlens, rank, case.world_size, case.padding)
        results = attend_torch(
            case, inputs["q"][rows], inputs["k"][gathered], inputs["v"][gathered], inputs["dout"][rows],
            np.ascontiguousarray(inputs["dlse"][:, rows]), rank, "triton",
        )  # fmt: skip
        exact, straightforward = (
            oracle.rank_attention(
                inputs["q"], inputs["k"], inputs["v"], case.cu_seqlens, rank, case.world_size, case.causal,
                dout=inputs["dout"][rows], dlse=inputs["dlse"][:, rows], arithmetic=arithmetic,
            )._asdict()
            for arithmetic in (oracle.EXACT, oracle.straightforward(case.dtype))
        )  # fmt: skip
        for name, result in results.items():
            where = f"rank {rank} of {case.world_size}: {name}"
            assert_close(where, result, exact[name], straightforward[name])
    kernels = {launch.kernel.fn.__name__ for launch in _launches_of(case)}
    assert kernels == {"attention_forward_hopper"}


def _launches_of(case):
    """The forward launch of `case` as the front end asks for it."""
    strides = {n: (n * case.head_dim, case.head_dim) for n in (case.heads, case.kv_heads)}
    q = ((case.tokens, case.heads, case.head_dim), case.dtype, strides[case.heads])
    kv = ((case.total, case.kv_heads, case.head_dim), case.dtype, strides[case.kv_heads])
    made = make_problem(
        q, kv, kv, sequences=len(case.lengths), world_size=case.world_size, causal=case.causal, softmax_scale=None,
        target="9.0", gluon=True,
    )  # fmt: skip
    return [plan._forward_launch(made, plan.WHOLE)]
