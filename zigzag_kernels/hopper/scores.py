"""The softcap of scores, the factor of their exponentials, and probabilities from scores."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ..base2 import LOG2_E

# A score, in units of the cap, that gives probability 0 and has a finite square.
HIDDEN_SCORE = gl.constexpr(-(2.0**50))


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


@gluon.jit
def recompute_p(scores, lse2, program):
    """Return the probabilities of rows for dS, times the derivative of the cap, from their scores and `lse2 [64]`."""
    if program.SOFTCAP > 0:
        capped = cap_scores(scores, program.SOFTMAX_SCALE, program.SOFTCAP)
        return gl.exp2(capped * program.SCALE_LOG2 - lse2[:, None]) * (1.0 - capped * capped)
    else:
        return gl.exp2(scores * program.SCALE_LOG2 - lse2[:, None])


@gluon.jit
def transposed_p(program, scores, lse2, numbers, i, whole_end):
    """Return P of block `i` of rows, `[keys, rows]`: (for the product of dV, for dS).

    The first is an operand of that product, the second has the derivative of the cap as a factor. Blocks from
    `whole_end` on need a mask, which compares the `numbers` of the keys.
    """
    stream = program.stream
    if program.SOFTCAP > 0:
        scores = cap_scores(scores, program.results.SOFTMAX_SCALE, program.SOFTCAP)
        # With a cap the scores are used again below: a hidden one must be finite, so that 0 * (1 - score^2) is 0.
        if i >= whole_end:
            scores = gl.where(stream.sees(numbers, i), scores, HIDDEN_SCORE)
    p = gl.exp2(scores * program.SCALE_LOG2 - lse2[None, :])
    if program.SOFTCAP == 0:
        if i >= whole_end:
            p = gl.where(stream.sees(numbers, i), p, 0.0)
    # Transposed scores, [keys, rows], lie in the registers as a product over rows takes them: P and dS need no shared
    # memory.
    p_operand = gl.convert_layout(p.to(program.geometry.dtype), program.geometry.OPERAND)
    if program.SOFTCAP > 0:
        p *= 1.0 - scores * scores  # the derivative of tanh, for dS alone: dV takes P without it
    return p_operand, p
