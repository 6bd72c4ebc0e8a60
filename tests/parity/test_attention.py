"""Every rank's attention against the float64 oracle, torch against JAX bit for bit, the ranks against the whole."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import zigzag_jax
import zigzag_torch
from tests.support import frameworks, oracle
from tests.support.cases import BENCH, CASES, RESULTS, make_inputs
from tests.support.closeness import assert_close
from tests.support.frameworks import attend_jax, attend_torch
from tests.support.machine import GPU
from tests.support.rank import assert_rank_is_right, gathered_rows, rank_arrays, rank_results
from zigzag_kernels import plan

SELECTED = [case for case in CASES if case.tags.isdisjoint(BENCH if GPU else BENCH | {"gpu"})]
IN_CI = [case for case in CASES if "interpret" in case.tags]


@pytest.mark.usefixtures("each_launch_once")
@pytest.mark.parametrize("case", SELECTED, ids=str)
def test_kernels_match_the_oracle_and_each_other(case, kernel_backend):
    inputs = make_inputs(case)
    sums = dict.fromkeys(("dk", "dv"), 0.0)
    straightforward_sums = dict(sums)
    for rank in range(case.world_size):
        arguments = *rank_arrays(case, inputs, rank), rank, kernel_backend
        ours = attend_torch(case, *arguments)
        theirs = attend_jax(case, *arguments)
        exact = rank_results(case, inputs, rank, oracle.EXACT)
        straightforward = rank_results(case, inputs, rank, oracle.straightforward(case.dtype))
        for name in RESULTS:
            where = f"rank {rank} of {case.world_size}: {name}"
            assert_close(f"torch, {where}", ours[name], exact[name], straightforward[name])
            assert ours[name].dtype == theirs[name].dtype, where
            assert ours[name].tobytes() == theirs[name].tobytes(), f"{where}: torch and JAX differ"
        for name in sums:
            sums[name] = sums[name] + ours[name].astype(np.float64)
            straightforward_sums[name] = straightforward_sums[name] + straightforward[name].astype(np.float64)

    # The ranks' contributions add up to the gradient of the whole, unsharded batch.
    _, *whole = oracle.attention_gradients(
        inputs["q"],
        inputs["k"],
        inputs["v"],
        case.cu_seqlens,
        case.causal,
        case.softmax_scale,
        inputs["dout"],
        inputs["dlse"],
    )
    gathered = gathered_rows(case)
    for name, dense in zip(sums, whole, strict=True):
        assert_close(f"sum over ranks: {name}", sums[name], dense[gathered], straightforward_sums[name])


# What sizes of heads and tiles mean for kernels they do not mean for the reference.
OF_KERNELS = (
    "w1-many-tiles",
    "w2-several-tiles",
    "w2-odd-groups",
    "w2-d8-full",
    "w2-d64",
    "w2-d80",
    "w2-d128",
    "w2-d256",
)


@pytest.mark.parametrize("attend", [attend_torch, attend_jax])
@pytest.mark.parametrize(
    "case", [pytest.param(x, id=x.name, marks=[pytest.mark.slow] * (x.name in OF_KERNELS)) for x in IN_CI]
)
def test_reference_matches_the_oracle(case, attend):
    inputs = make_inputs(case, seed=1)
    for rank in range(case.world_size):
        result = attend(case, *rank_arrays(case, inputs, rank), rank, "reference")
        assert_rank_is_right(case, inputs, rank, {"reference": result})


def test_one_wrong_rank_is_found_out(kernel_backend):
    """The comparison above can fail: the result of rank 1 is not taken for that of rank 0."""
    case = next(case for case in CASES if case.name == "w2-uneven")
    inputs = make_inputs(case)
    exact = rank_results(case, inputs, 0, oracle.EXACT)
    straightforward = rank_results(case, inputs, 0, oracle.straightforward(case.dtype))
    wrong = attend_torch(case, *rank_arrays(case, inputs, 0), 1, kernel_backend)
    for name in RESULTS:
        with pytest.raises(AssertionError, match=name):
            assert_close(name, wrong[name], exact[name], straightforward[name])


@pytest.fixture
def asked(monkeypatch):
    """Whether each backward pass on one device was asked to be deterministic."""
    asked, backward = [], plan.backward

    def noted(run, problem, *arrays, **strides):
        asked.append(problem.call.deterministic)
        return backward(run, problem, *arrays, **strides)

    monkeypatch.setattr(plan, "backward", noted)
    frameworks._jax_attention.cache_clear()
    jax.clear_caches()  # a custom gradient remembers how it was traced
    return asked


@pytest.mark.parametrize("attend", [attend_torch, attend_jax])
def test_whether_to_be_deterministic_reaches_the_backward_pass(attend, kernel_backend, asked):
    """And where no other kernel serves, the same bits come of it."""
    case = replace(next(case for case in CASES if case.name == "w1"), lengths=(9, 2))
    arguments = *rank_arrays(case, make_inputs(case), 0), 0, kernel_backend
    fixed, free = (attend(case, *arguments, deterministic=deterministic) for deterministic in (True, False))
    assert asked == [True, False]
    for name in RESULTS:
        assert fixed[name].tobytes() == free[name].tobytes(), name


def test_so_does_it_on_one_device(kernel_backend, asked):
    x = torch.ones(4, 1, 16, device="cuda" if GPU else "cpu", requires_grad=True)

    def loss(attend, x, **options):
        return attend(x, x, x, backend=kernel_backend, **options).sum()

    for options in ({"deterministic": False}, {}):
        loss(zigzag_torch.zigzag_attention, x, **options).backward()
        jax.grad(functools.partial(loss, zigzag_jax.zigzag_attention, **options))(jnp.ones((4, 1, 16)))
    assert asked == [False, False, True, True]
