"""`Constants`: all constants that a kernel is compiled for, as one constexpr that the kernel passes to its helpers."""

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
    SCALE_LOG2: Any  # factor of scores, or of the results of cap_scores, before exp2
    CAP_LOG2: Any  # factor of scores in cap_scores: exp2(score * CAP_LOG2) is exp(2 * scaled score / SOFTCAP)
    INTERPRET: Any
    RANGED: Any  # each row sees a range of keys; otherwise all keys, or the keys up to its own
    CAUSAL: Any
    LEFT: Any  # positions before a row that it sees, -1 for all
    RIGHT: Any  # positions after a row that it sees, -1 for all
    CHUNK: Any  # tokens of a chunk of attention, 0 for none
    SOFTCAP: Any  # bound of the scaled scores, 0.0 for none
    # The constants below are None in kernels whose helpers do not use them.
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
    """Return `values` as `Constants`, each wrapped in a constexpr, because kernels cannot read plain Python values.

    In the interpreter, which has no constexprs, the values stay plain.
    """
    if not values["INTERPRET"]:
        values = {name: tl.constexpr(value) for name, value in values.items()}
    return Constants(**values)
