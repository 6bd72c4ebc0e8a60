"""Windows, chunks, caps, sinks, largest logits, real lengths and packed rows, in both frameworks bit for bit."""

from dataclasses import replace

import numpy as np
import pytest

from tests.support import oracle
from tests.support.cases import Case, make_inputs, select
from tests.support.closeness import assert_close
from tests.support.frameworks import attend_jax, attend_torch
from tests.support.rank import (
    assert_rank_is_right,
    batch_results,
    gathered_rows,
    rank_arrays,
    rank_results,
    rows_of_results,
)

RANGES = select("ranges")


def flushed(x):
    """`x` without the tiny numbers that XLA's threads on a CPU round to zero; NumPy interprets in some of them, and in
    Python's own."""
    return np.where(np.abs(x) < np.finfo(np.float32).tiny, 0, x)


@pytest.mark.usefixtures("each_launch_once")
@pytest.mark.parametrize("case", RANGES, ids=str)
def test_kernels_match_the_oracle_and_each_other(case, kernel_backend):
    inputs = make_inputs(case)
    sums = dict.fromkeys(("dk", "dv", "dsinks")[: 2 + case.sinks], 0.0)
    straightforward_sums = dict(sums)
    for rank in range(case.world_size):
        arguments = *rank_arrays(case, inputs, rank), rank, kernel_backend
        ours, theirs = (attend(case, *arguments, sinks=inputs.get("sinks")) for attend in (attend_torch, attend_jax))
        assert_rank_is_right(case, inputs, rank, {"torch": ours})
        straightforward = rank_results(case, inputs, rank, oracle.straightforward(case.dtype))
        for name in case.results:
            where = f"rank {rank} of {case.world_size}: {name}"
            assert ours[name].dtype == theirs[name].dtype, where
            assert flushed(ours[name]).tobytes() == flushed(theirs[name]).tobytes(), f"{where}: torch and JAX differ"
        for name in sums:
            sums[name] = sums[name] + ours[name].astype(np.float64)
            straightforward_sums[name] = straightforward_sums[name] + straightforward[name].astype(np.float64)

    # The ranks' contributions add up to the gradient of the whole, unsharded batch.
    whole = rows_of_results(batch_results(case, inputs, oracle.EXACT), gathered_rows(case))
    for name, total in sums.items():
        assert_close(f"sum over ranks: {name}", total, whole[name], straightforward_sums[name])


@pytest.mark.parametrize("case", RANGES, ids=str)
def test_the_reference_of_jax_matches_the_oracle(case):
    inputs = make_inputs(case, seed=1)
    for rank in range(case.world_size):
        result = attend_jax(case, *rank_arrays(case, inputs, rank), rank, "reference", sinks=inputs.get("sinks"))
        assert_rank_is_right(case, inputs, rank, {"reference": result})


@pytest.mark.parametrize("attend", [attend_torch, attend_jax])
@pytest.mark.parametrize("softcap", [1e3, 1e6])
def test_a_large_cap_leaves_small_scores_as_they_are(softcap, attend, kernel_backend):
    uncapped = Case(name="uncapped", world_size=1, lengths=(24,), head_dim=16, dtype="float32")
    arguments = *rank_arrays(uncapped, make_inputs(uncapped), 0), 0, kernel_backend
    ours, theirs = (attend(replace(uncapped, softcap=cap), *arguments) for cap in (softcap, 0.0))
    for name in uncapped.results:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=2e-5, atol=2e-5, err_msg=name)


@pytest.mark.parametrize("attend", [attend_torch, attend_jax])
@pytest.mark.parametrize("case", [case for case in RANGES if case.name in ("w2-all", "w2-row-all")], ids=str)
def test_what_is_in_the_padding_of_documents_reaches_nobody(case, attend, kernel_backend):
    inputs = make_inputs(case)
    padding = np.ones(case.total, bool)
    for start, real in zip(case.cu_seqlens, case.lengths_real, strict=False):
        padding[start : start + real] = False
    foul = {name: np.array(x) for name, x in inputs.items()}
    for name in ("q", "k", "v", "dout"):
        foul[name][padding] = np.nan
    foul["dlse"][:, padding] = np.inf
    for backend in ("reference", kernel_backend):
        ours, theirs = (
            attend(case, *rank_arrays(case, x, 1), 1, backend, sinks=inputs["sinks"]) for x in (inputs, foul)
        )
        for name in case.results:
            np.testing.assert_array_equal(flushed(ours[name]), flushed(theirs[name]), f"{name}, {backend}")
