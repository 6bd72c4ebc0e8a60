"""Products and casts, each with a mended form for Triton's interpreter, which has neither right for bfloat16."""

import triton
import triton.language as tl


@triton.jit
def dot(a, b, acc, INTERPRET: tl.constexpr):
    """Return `acc + a @ b` in float32.

    The interpreter multiplies bfloat16 bit patterns, hence the exact upcast there.
    """
    if INTERPRET:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def cast(x, DTYPE: tl.constexpr, INTERPRET: tl.constexpr):
    """Return float32 `x` rounded to the nearest `DTYPE`.

    The interpreter truncates to bfloat16, hence the carry there.
    """
    if INTERPRET and tl.bfloat16 == DTYPE:
        bits = x.to(tl.int32, bitcast=True)
        x = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).to(tl.float32, bitcast=True)
    return x.to(DTYPE)


@triton.jit
def cap_scores(scores, CAP_LOG2: tl.constexpr):
    """Return the hyperbolic tangent of `scores` times `CAP_LOG2 / (2 * log2(e))`: capped scores, divided by the cap.

    Both tails are exact, as exp2 becomes infinite or zero.
    """
    return 1.0 - 2.0 / (tl.math.exp2(scores * CAP_LOG2) + 1.0)
