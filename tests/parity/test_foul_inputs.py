"""NaN, infinities and scores in millions: backends agree, and no sequence hears of what is in another one."""

from itertools import product

import numpy as np
import pytest

from tests.support.cases import RESULTS, Case, make_inputs
from tests.support.frameworks import attend_jax, attend_torch
from tests.support.rank import rank_arrays

CASES = (
    Case(name="foul-w1", world_size=1, lengths=(9, 5, 12), padding=3, causal=True),
    Case(name="foul-w2", world_size=2, lengths=(8, 12, 16), padding=3, causal=False),
)
ARRAYS = "q", "k", "v", "dout", "dlse"
VALUES = float("nan"), float("inf"), -float("inf")


def foul_rows(case, name, place):
    """A row of `name` in that place of the rank-major rows, in its second rank where it has one."""
    first = case.cu_seqlens[1] // case.world_size + 1 if place == "sequence" else case.tokens - 1
    return first + (case.tokens if name in ("k", "v") and case.world_size > 1 else 0)


def rows_of_others(case, place, ranks):
    """Whether each of the rows of `ranks` ranks belongs to a sequence that is not foul."""
    bounds = [bound // case.world_size for bound in case.cu_seqlens]
    rows = np.arange(case.tokens)
    inside = rows < bounds[-1]
    if place == "sequence":
        inside &= (rows < bounds[1]) | (rows >= bounds[2])
    return np.tile(inside, ranks)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NumPy, in which the interpreter computes
@pytest.mark.parametrize("place", ["padding", "sequence"])
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("attend", [attend_torch, attend_jax])
def test_foul_values_reach_no_other_sequence_and_the_same_elements_on_every_backend(
    case, place, attend, kernel_backend
):
    arrays = dict(zip(ARRAYS, rank_arrays(case, make_inputs(case), 0), strict=True))
    backends = "reference", kernel_backend
    clean = {backend: attend(case, *arrays.values(), 0, backend) for backend in backends}
    for name, value in product(ARRAYS, VALUES):
        foul = {key: np.array(x) for key, x in arrays.items()}
        if name == "dlse":
            foul[name][0, foul_rows(case, name, place)] = value
        else:
            foul[name][foul_rows(case, name, place), 0, 1] = value
        results = {backend: attend(case, *foul.values(), 0, backend) for backend in backends}
        for result in RESULTS:
            where = f"{value} in {name}: {result}"
            rows = rows_of_others(case, place, case.world_size if result in ("dk", "dv") else 1)
            for backend in backends:
                ours, theirs = (of[backend][result] for of in (results, clean))
                ours, theirs = (x[:, rows] if result == "lse" else x[rows] for x in (ours, theirs))
                np.testing.assert_array_equal(ours, theirs, f"{where}, {backend}")
            ours, theirs = (results[backend][result] for backend in backends)
            if not case.causal:  # where a kernel multiplies a tile with zeros, rows before a foul one hear of it
                for kind in (np.isnan, np.isposinf, np.isneginf):
                    np.testing.assert_array_equal(kind(ours), kind(theirs), f"{where}, {kind.__name__}")


@pytest.mark.parametrize("attend", [attend_torch, attend_jax])
def test_equal_scores_in_millions_give_the_mean_of_the_values(attend, kernel_backend):
    """lse, which rounds to a sixteenth there, is no divisor."""
    case = Case(name="millions", world_size=1, lengths=(24,), causal=False, softmax_scale=1.0)
    q, k, v, dout, dlse = (np.array(x) for x in rank_arrays(case, make_inputs(case), 0))
    q[:], k[:], dlse[:] = 250, 250.3, 0
    for backend in ("reference", kernel_backend):
        results = attend(case, q, k, v, dout, dlse, 0, backend)
        mean = np.broadcast_to(v.mean(0), q.shape)
        np.testing.assert_allclose(results["out"], mean, atol=1e-5, err_msg=backend)
    results = attend(case, q, k, v, dout, dlse, 0, "reference")
    np.testing.assert_allclose(results["dv"], np.broadcast_to(dout.mean(0).sum(0), v.shape), atol=1e-5)
