"""The online softmax (Milakov and Gimelshein, arXiv:1805.02867) in base 2, as one value that a loop carries."""

from typing import NamedTuple

import triton
import triton.language as tl

from .arithmetic import cast, dot


class RunningSoftmax(NamedTuple):
    """The attention of `BLOCK_M` rows to the keys added so far."""

    maximum: tl.tensor  # [BLOCK_M] maximum of the scaled scores, in base 2
    total: tl.tensor  # [BLOCK_M] sum of the exponentials
    acc: tl.tensor  # [BLOCK_M, BLOCK_D] sum of the values, each times its exponential


@triton.jit
def start_softmax(BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):
    """Return the `RunningSoftmax` before the first key."""
    return RunningSoftmax(
        maximum=tl.full([BLOCK_M], float("-inf"), tl.float32),
        total=tl.zeros([BLOCK_M], tl.float32),
        acc=tl.zeros([BLOCK_M, BLOCK_D], tl.float32),
    )


@triton.jit
def add_block(running, scores, v, SCALE_LOG2: tl.constexpr, MAY_BE_BLIND: tl.constexpr, INTERPRET: tl.constexpr):
    """Return `running` after adding a block of keys: `scores [BLOCK_M, BLOCK_N]` unscaled, `v [BLOCK_N, BLOCK_D]`.

    With `MAY_BE_BLIND` a row may have seen no key yet, neither in this block nor before.
    """
    maximum = tl.maximum(running.maximum, tl.max(scores, 1) * SCALE_LOG2)
    subtracted = maximum
    if MAY_BE_BLIND:  # -inf minus -inf would be NaN; subtracting 0 leaves exp2(-inf) = 0
        subtracted = tl.where(maximum == float("-inf"), 0.0, maximum)
    p = tl.math.exp2(scores * SCALE_LOG2 - subtracted[:, None])
    rescale = tl.math.exp2(running.maximum - subtracted)  # earlier sums were relative to the earlier maximum
    return RunningSoftmax(
        maximum=maximum,
        total=running.total * rescale + tl.sum(p, 1),
        # P is rounded to the type of V for the matrix instruction; the total above sums it unrounded, in float32.
        acc=dot(cast(p, v.dtype, INTERPRET), v, running.acc * rescale[:, None], INTERPRET),
    )


@triton.jit
def add_sinks(running, sinks):
    """Return `running` after adding `sinks [BLOCK_M]`, base 2, to the total of each row that sees a key."""
    maximum = tl.maximum(running.maximum, sinks)
    # For rows that see no key the maximum is at least the sink, so that exp2 does not overflow.
    maximum = tl.where(running.total == 0.0, tl.maximum(sinks, 0.0), maximum)
    rescale = tl.math.exp2(running.maximum - maximum)
    total = running.total * rescale + tl.math.exp2(sinks - maximum)
    return RunningSoftmax(
        maximum=maximum,
        total=tl.where(running.total == 0.0, 0.0, total),
        acc=running.acc * rescale[:, None],
    )


@triton.jit
def finish_softmax(running):
    """Return (out `[BLOCK_M, BLOCK_D]`, lse in base 2 `[BLOCK_M]`): zero and -inf for rows that see no key."""
    # No key was added: an average of nothing is zero, and not 0 / 0.
    blind = running.total == 0.0
    total = tl.where(blind, 1.0, running.total)
    lse2 = tl.where(blind, float("-inf"), running.maximum + tl.math.log2(total))
    return running.acc / total[:, None], lse2
