"""The softcap of scores, and the factor of their exponentials."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ..base2 import LOG2_E


@gluon.constexpr_function
def score_scale_log2(SOFTMAX_SCALE, SOFTCAP):
    """Return the factor of scores, or of the results of `cap_scores`, for exponentials in base 2."""
    return (SOFTCAP if SOFTCAP > 0 else SOFTMAX_SCALE) * LOG2_E


@gluon.jit
def cap_scores(scores, SOFTMAX_SCALE: gl.constexpr, SOFTCAP: gl.constexpr):
    """Return the hyperbolic tangent of the scaled scores divided by the cap: capped scores, divided by the cap.

    The one instruction has a relative error of at most 2^-11. All kernels of a backward pass must take the same one.
    """
    x = scores * (SOFTMAX_SCALE / SOFTCAP)
    return gl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], gl.float32, is_pure=True, pack=1)
