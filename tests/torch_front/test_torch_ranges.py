"""Windows, chunks, caps, sinks, real lengths and the row layout in PyTorch, against the float64 oracle."""

import pytest

from tests.support.cases import make_inputs, select
from tests.support.frameworks import attend_torch
from tests.support.rank import assert_rank_is_right, rank_arrays

RANGES = select("ranges")


@pytest.mark.parametrize("case", RANGES, ids=str)
def test_reference_matches_the_oracle(case):
    inputs = make_inputs(case)
    for rank in range(case.world_size):
        results = attend_torch(case, *rank_arrays(case, inputs, rank), rank, "reference", sinks=inputs.get("sinks"))
        assert_rank_is_right(case, inputs, rank, {"reference": results})


@pytest.mark.parametrize("case", RANGES, ids=str)
def test_kernels_match_the_oracle(case, kernel_backend):
    inputs = make_inputs(case)
    for rank in range(case.world_size):
        results = attend_torch(case, *rank_arrays(case, inputs, rank), rank, kernel_backend, sinks=inputs.get("sinks"))
        assert_rank_is_right(case, inputs, rank, {kernel_backend: results})
