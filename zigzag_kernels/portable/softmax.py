"""The online softmax (Milakov and Gimelshein, arXiv:1805.02867) in base 2, as one value that a loop carries."""

from typing import NamedTuple

import triton
import triton.language as tl

from .arithmetic import cast, dot


class RunningSoftmax(NamedTuple):
    """Attention of `BLOCK_M` rows to the keys so far."""

    maximum: tl.tensor  # [BLOCK_M] of the scaled scores
    total: tl.tensor  # [BLOCK_M] of the exponentials
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
def add_block(running, scores, v, SCALE_LOG2: tl.constexpr, INTERPRET: tl.constexpr):
    """Return `running` with a block of keys more: `scores [BLOCK_M, BLOCK_N]` unscaled, `v [BLOCK_N, BLOCK_D]`."""
    maximum = tl.maximum(running.maximum, tl.max(scores, 1) * SCALE_LOG2)
    p = tl.math.exp2(scores * SCALE_LOG2 - maximum[:, None])
    rescale = tl.math.exp2(running.maximum - maximum)
    return RunningSoftmax(
        maximum=maximum,
        total=running.total * rescale + tl.sum(p, 1),
        acc=dot(cast(p, v.dtype, INTERPRET), v, running.acc * rescale[:, None], INTERPRET),
    )


@triton.jit
def finish_softmax(running):
    """Return (out `[BLOCK_M, BLOCK_D]`, lse in base 2 `[BLOCK_M]`): zero and -inf for rows that see no key."""
    blind = running.total == 0.0
    total = tl.where(blind, 1.0, running.total)
    lse2 = tl.where(blind, float("-inf"), running.maximum + tl.math.log2(total))
    return running.acc / total[:, None], lse2
