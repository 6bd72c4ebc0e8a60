"""The constants that a kernel is compiled for, as one constexpr that its helpers take."""

from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl


@dataclass(frozen=True)
class Constants:
    """Constexprs of a kernel that its helpers need, under the names that its entry point gives them."""

    GROUP: Any
    HEAD_DIM: Any
    BLOCK_M: Any
    BLOCK_N: Any
    BLOCK_D: Any  # HEAD_DIM rounded up to a power of two
    SCALE_LOG2: Any  # factor of scores, or of capped ones, whose exponential is taken in base 2
    CAP_LOG2: Any  # factor of scores: exp2(score * CAP_LOG2) is exp(2 * scaled score / SOFTCAP)
    INTERPRET: Any
    RANGED: Any  # each row sees a range of keys; otherwise all keys, or the keys up to its own
    CAUSAL: Any
    LEFT: Any  # tokens that a row sees on each side, -1 for all
    RIGHT: Any
    CHUNK: Any  # tokens of a chunk of attention, 0 for none
    SOFTCAP: Any  # bound of the scaled scores, 0.0 for none
    # None in kernels whose helpers do not need them.
    SLOTS: Any = None
    STRIDE_QT: Any = None
    STRIDE_QH: Any = None
    STRIDE_KT: Any = None
    STRIDE_VT: Any = None
    STRIDE_DOT: Any = None
    STRIDE_DOH: Any = None
    HAS_DK: Any = None
    HAS_DV: Any = None


@triton.constexpr_function
def bundle(**values):
    """Wrap each of `values` in a constexpr, as kernels need it, and return them as `Constants`.

    The interpreter has no constexprs: there the values stay plain.
    """
    if not values["INTERPRET"]:
        values = {name: tl.constexpr(value) for name, value in values.items()}
    return Constants(**values)
