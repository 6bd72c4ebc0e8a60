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
    CAP_LOG2: Any  # factor of scores whose exponential in base 2 is that of `2 * score / SOFTCAP`
    INTERPRET: Any
    RANGED: Any  # masks are ranges of keys; otherwise rows see all keys, or those up to their own
    CAUSAL: Any
    LEFT: Any  # tokens on each side that a row sees, -1 for all
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
    """Return the `Constants` of these `values`, each a constexpr again, so that kernels can use the fields as they are.

    The interpreter has no constexprs: there the values stay plain.
    """
    if not values["INTERPRET"]:
        values = {name: tl.constexpr(value) for name, value in values.items()}
    return Constants(**values)
