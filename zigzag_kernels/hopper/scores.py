"""Scores with a bound: what a softcap makes of products of queries and keys."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ..base2 import LOG2_E


@gluon.constexpr_function
def score_scale_log2(SOFTMAX_SCALE, SOFTCAP):
    """Return the factor of scores, or of those that `cap_scores` returns, whose exponential is taken in base 2."""
    return (SOFTCAP if SOFTCAP > 0 else SOFTMAX_SCALE) * LOG2_E


@gluon.jit
def cap_scores(scores, SOFTMAX_SCALE: gl.constexpr, SOFTCAP: gl.constexpr):
    """Return the hyperbolic tangent of the scaled scores divided by the cap: capped scores, divided by the cap.

    One instruction, whose relative error is at most 2^-11: all kernels of a backward pass must take the same one.
    """
    x = scores * (SOFTMAX_SCALE / SOFTCAP)
    return gl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], gl.float32, is_pure=True, pack=1)
