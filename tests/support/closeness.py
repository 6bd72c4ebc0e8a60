"""The one tolerance rule: how close to the float64 oracle a result has to be.

The limit is the error of a straightforward computation in the result's own precision (`oracle.straightforward`), times
a factor, plus `FLOAT32_ROUNDINGS`. The factor allows for another order of summation, whose error is another random draw
of the same size. The constant allows for a straightforward error that is small by luck. The rule is the same for all
cases, dtypes, shapes and devices.
"""

import numpy as np

# The norm averages the errors of all elements, and tests precision. The largest error of a row varies more; it tests
# whether every row is correct at all.
FACTORS = {"Frobenius norm": 2, "worst element": 10}
# Scores in base 2, a hardware exp2, rescaled and sequential sums: what float32 kernels round and NumPy does not.
FLOAT32_ROUNDINGS = 32 * 2.0**-24
# A row whose terms cancel carries the noise of its terms: below this part of the largest row, size says nothing.
SMALLEST_ROW = 1 / 32


def errors(result, exact, forgiven=0.0):
    """Return two measures of error by name: of the whole array, and of its worst element.

    The worst element has the largest error relative to the size of its row.

    The second measure ignores errors up to the part `forgiven` of the largest row, which terms that cancel may leave.

    A row is the last axis of `[rows, heads, head_dim]`. The second measure finds a wrong one that drowns in the whole,
    such as one of the small values late in a long sequence. `lse [heads, rows]` is a logarithm: its size is at least 1.
    """
    error = np.abs(result - exact)
    size = np.abs(exact)
    if exact.ndim == 3:
        row = size.max(axis=2, keepdims=True)
        size = np.maximum(row, SMALLEST_ROW * row.max(initial=0))
    else:
        size = np.maximum(size, 1)
    remaining = np.where(error > forgiven * size.max(initial=0), error, 0)
    return {
        "Frobenius norm": _relative(np.linalg.norm(error), np.linalg.norm(exact)),
        "worst element": _relative(remaining, size).max(initial=0),
    }


def assert_close(name, result, exact, straightforward):
    """Assert that `result` is as close to `exact` as the rule says, given the `straightforward` result.

    Infinities must be the same in the same places, and NaN is never right.
    """
    result, exact, straightforward = (np.asarray(x).astype(np.float64) for x in (result, exact, straightforward))
    assert result.shape == exact.shape, f"{name}: expected shape {exact.shape}, got {result.shape}"
    nan = np.isnan(result)
    assert not nan.any(), f"{name}: {nan.sum()} of {nan.size} elements are NaN, the first at {_first(nan)}"
    infinite = np.isinf(exact)
    misplaced = (infinite | np.isinf(result)) & (result != exact)
    assert not misplaced.any(), (
        f"{name}: {misplaced.sum()} elements that are infinite or should be differ, the first at {_first(misplaced)}: "
        f"expected {exact[misplaced][0]}, got {result[misplaced][0]}"
    )
    result, exact, straightforward = (np.where(infinite, 0, x) for x in (result, exact, straightforward))
    found, expected = errors(result, exact, FLOAT32_ROUNDINGS), errors(straightforward, exact)
    for measure, factor in FACTORS.items():
        if exact.ndim == 1 and measure == "Frobenius norm":
            continue  # one number a head: too few draws for an average
        bound = factor * expected[measure] + FLOAT32_ROUNDINGS
        if found[measure] > bound:
            worst = np.unravel_index(np.abs(result - exact).argmax(), exact.shape)
            raise AssertionError(
                f"{name}: error {found[measure]:.2e} by {measure} exceeds {bound:.2e} "
                f"({factor} x {expected[measure]:.2e} of the straightforward computation + {FLOAT32_ROUNDINGS:.2e}); "
                f"largest difference at {tuple(map(int, worst))}: expected {exact[worst]:.6g}, got {result[worst]:.6g}"
            )


def assert_sums_close(name, result, exact_terms, straightforward_terms):
    """Assert that `result [heads]` is as close to the sums of `exact_terms [heads, rows]` as the rule says.

    There are few sums, and the straightforward error of one of them is a single draw, which may be small by luck. The
    expected error of the sum follows from the errors of its terms, if these are independent.
    """
    result, exact_terms, straightforward_terms = (
        np.asarray(x).astype(np.float64) for x in (result, exact_terms, straightforward_terms)
    )
    exact = exact_terms.sum(axis=1)
    assert result.shape == exact.shape, f"{name}: expected shape {exact.shape}, got {result.shape}"
    expected = np.linalg.norm(straightforward_terms - exact_terms, axis=1)
    bound = FACTORS["worst element"] * expected + FLOAT32_ROUNDINGS * np.maximum(np.abs(exact_terms).sum(axis=1), 1)
    wrong = ~(np.abs(result - exact) <= bound)
    assert not wrong.any(), (
        f"{name}: expected {exact[wrong]} up to {bound[wrong]}, the errors of the terms of a straightforward "
        f"computation, got {result[wrong]} of heads {np.flatnonzero(wrong)}"
    )


def _relative(error, size):
    """`error / size`, where no error is right for any size and any error of nothing is infinitely wrong."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(error == 0, 0, error / size)


def _first(mask):
    return tuple(int(index) for index in np.argwhere(mask)[0])
