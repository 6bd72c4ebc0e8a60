"""Products, casts and capped scores, with workarounds for bfloat16 in Triton's interpreter."""

import triton
import triton.language as tl


@triton.jit
def dot(a, b, acc, INTERPRET: tl.constexpr):
    """Return `acc + a @ b` in float32.

    The interpreter would multiply the bit patterns of bfloat16, so the operands are converted to float32 there.
    """
    if INTERPRET:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def cast(x, DTYPE: tl.constexpr, INTERPRET: tl.constexpr):
    """Return float32 `x` rounded to the nearest `DTYPE`.

    The interpreter truncates to bfloat16, so a carry rounds the bits before the cast there.
    """
    if INTERPRET and tl.bfloat16 == DTYPE:
        bits = x.to(tl.int32, bitcast=True)
        x = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).to(tl.float32, bitcast=True)
    return x.to(DTYPE)


@triton.jit
def cap_scores(scores, CAP_LOG2: tl.constexpr, SOFTCAP: tl.constexpr):
    """Return the capped scores divided by the cap: tanh(x) for x = `scores * CAP_LOG2 / (2 * log2(e))`.

    The function computes tanh(x) as a quotient, `1 - 2 / (exp(2 * x) + 1)`. The quotient is exact for large positive
    and negative x, where exp2 becomes infinite or zero, but has an absolute error of 2^-24 near zero. The caller
    multiplies the result by the cap, and so the error. For large caps, a series replaces the quotient near zero.
    """
    capped = 1.0 - 2.0 / (tl.math.exp2(scores * CAP_LOG2) + 1.0)
    if SOFTCAP > 128.0:
        x = scores * (CAP_LOG2 * 0.34657359028)  # log(2) / 2
        square = x * x
        series = x * (1.0 - square * (0.33333333333 - square * 0.13333333333))  # the next term is below 2^-22 of x
        capped = tl.where(square < 0.015625, series, capped)
    return capped
