"""The tolerance rule accepts another sound computation and rejects each kind of wrong one."""

import contextlib
from functools import cache

import numpy as np
import pytest

from tests.support import oracle
from tests.support.cases import RESULTS, Case, make_inputs
from tests.support.closeness import assert_close, assert_sums_close

QUANTITIES = RESULTS
DTYPES = ("float32", "float16", "bfloat16")
LENGTH = 300


@cache
def compute(dtype, arithmetic, use_dlse=True):
    """One sequence of `LENGTH` rows, whose late rows are small, and two rows of padding."""
    case = Case(name=dtype, world_size=1, lengths=(LENGTH,), heads=4, kv_heads=2, head_dim=32, dtype=dtype, padding=2)
    inputs = make_inputs(case)
    dlse = inputs["dlse"] if use_dlse else None
    operands = inputs["q"], inputs["k"], inputs["v"], case.cu_seqlens
    gradients = {"dout": inputs["dout"], "dlse": dlse, "arithmetic": arithmetic}
    return oracle.rank_attention(*operands, 0, 1, True, None, **gradients)


def check(quantity, dtype, result):
    exact = compute(dtype, oracle.EXACT)
    straightforward = compute(dtype, oracle.straightforward(dtype))
    assert_close(quantity, result, getattr(exact, quantity), getattr(straightforward, quantity))


def sound(quantity, dtype):
    """A fresh copy of a result that the rule accepts, rows first."""
    x = getattr(compute(dtype, oracle.straightforward(dtype)), quantity).copy()
    return x, np.moveaxis(x, -1, 0) if quantity == "lse" else x


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quantity", QUANTITIES)
def test_accepts_noise_of_a_float32_rounding(quantity, dtype):
    x, _ = sound(quantity, dtype)
    noise = np.random.default_rng(1).uniform(-1, 1, x.shape) * np.finfo(np.float32).eps
    check(quantity, dtype, x * (1 + noise))


@pytest.mark.parametrize(("error", "accepted"), [(1e-6, True), (5e-6, False)])
def test_terms_that_cancel_may_leave_a_few_roundings_of_the_largest_row(error, accepted):
    """Even where the straightforward computation cancels exactly, as it may with one key."""
    exact = np.array([0.01, 1.0]).reshape(2, 1, 1)
    result = exact + np.array([error, 0.0]).reshape(2, 1, 1)
    with contextlib.nullcontext() if accepted else pytest.raises(AssertionError, match="dq: error"):
        assert_close("dq", result, exact, exact + 1e-7)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quantity", QUANTITIES)
@pytest.mark.parametrize("mistake", ["zero", "negated", "another row's", "uninitialised"])
def test_rejects_one_wrong_row(quantity, dtype, mistake):
    x, rows = sound(quantity, dtype)
    late = LENGTH - 2
    rows[late] = {"zero": 0, "negated": -rows[late], "another row's": rows[late - 1], "uninitialised": np.nan}[mistake]
    with pytest.raises(AssertionError, match="NaN" if mistake == "uninitialised" else f"{quantity}: error .* exceeds"):
        check(quantity, dtype, x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quantity", QUANTITIES)
def test_rejects_a_small_bias_everywhere(quantity, dtype):
    x, _ = sound(quantity, dtype)
    precision = "float32" if quantity == "lse" else dtype
    bias = {"float32": 2.0**-17, "float16": 2.0**-9, "bfloat16": 2.0**-6}[precision]
    with pytest.raises(AssertionError, match=f"{quantity}: error .* exceeds"):
        check(quantity, dtype, x * (1 + bias))


@pytest.mark.parametrize("value", [np.inf, 0.0, np.nan])
def test_rejects_padding_whose_lse_is_not_minus_infinity(value):
    x, rows = sound("lse", "float32")
    rows[-1] = value
    with pytest.raises(AssertionError, match="lse: 4 "):
        check("lse", "float32", x)


def test_rejects_an_unexpected_infinity():
    x, rows = sound("dk", "float16")
    rows[7, 0, 0] = np.inf
    with pytest.raises(AssertionError, match=r"dk: 1 elements .* \(7, 0, 0\): expected .*, got inf"):
        check("dk", "float16", x)


def test_rejects_another_shape():
    x, _ = sound("out", "float32")
    with pytest.raises(AssertionError, match=r"out: expected shape \(302, 4, 32\), got \(1, 302, 4, 32\)"):
        check("out", "float32", x[None])


def test_rejects_anything_but_zero_where_all_is_zero():
    nothing = np.zeros((4, 2, 16))
    assert_close("dq", nothing, nothing, nothing)
    with pytest.raises(AssertionError, match="dq: error inf"):
        assert_close("dq", nothing + 1e-30, nothing, nothing)


@pytest.mark.parametrize("quantity", ["out", "dq", "dk", "dv"])
def test_rejects_sums_in_half_precision(quantity):
    half = np.dtype("float16")
    with pytest.raises(AssertionError, match="exceeds"):
        check(quantity, "float16", getattr(compute("float16", oracle.Arithmetic(half, half)), quantity))


@pytest.mark.parametrize("quantity", ["out", "dq", "dk", "dv"])
def test_rejects_half_precision_operands_for_float32(quantity):
    """TF32, which keeps as many bits as float16, is not float32."""
    with pytest.raises(AssertionError, match="exceeds"):
        check(quantity, "float32", getattr(compute("float32", oracle.straightforward("float16")), quantity))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quantity", ["dq", "dk"])
def test_rejects_a_dropped_cotangent_of_lse(quantity, dtype):
    result = getattr(compute(dtype, oracle.straightforward(dtype), use_dlse=False), quantity)
    with pytest.raises(AssertionError, match="exceeds"):
        check(quantity, dtype, result)


@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_are_judged_by_their_terms(dtype):
    exact = compute(dtype, oracle.EXACT).lse[:, :LENGTH]
    rounded = exact.astype(dtype).astype(np.float64)
    rng = np.random.default_rng(2)
    other = exact * (1 + rng.uniform(-1, 1, exact.shape) * np.spacing(np.ones((), dtype)).astype(np.float64) / 2)
    assert_sums_close("sound", other.sum(1), exact, rounded)
    for name, x in {"sign": -exact, "a row less": exact[:, :-1], "twice": exact * 2, "NaN": exact * np.nan}.items():
        with pytest.raises(AssertionError, match=name):
            assert_sums_close(name, x.sum(1), exact, rounded)
