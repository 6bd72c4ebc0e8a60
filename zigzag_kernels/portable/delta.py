"""The first kernel of the backward pass writes two statistics of every query row, which the later kernels read.

Grid: blocks of rows × KV heads of the window.
"""

import triton
import triton.language as tl

from ..base2 import LOG2_E
from .rows import load_rows


@triton.jit(do_not_specialize=["T", "first_row", "n_rows", "first_kv_head"])
def backward_delta(
    out_ptr,  # [T, HEADS, HEAD_DIM]
    dout_ptr,
    lse_ptr,  # [HEADS, T] float32
    dlse_ptr,  # [HEADS, T] float32, read if HAS_DLSE
    T,
    first_row,
    n_rows,
    first_kv_head,
    delta_ptr,  # [window, T * GROUP] float32
    lse2_ptr,  # [window, T * GROUP] float32, base 2
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HAS_DLSE: tl.constexpr,
    STRIDE_DOT: tl.constexpr,
    STRIDE_DOH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Write `delta = sum(out * dout) - dlse`, and `lse` in base 2, for each row of the window's heads.

    The rows are `n_rows` from `first_row` on. Both results are in the row order of the other kernels.

    With p the probabilities, `d(lse)/d(score) = p`: a gradient arriving through `lse` only shifts delta.
    """
    window_head = tl.program_id(1).to(tl.int64)  # the results have the heads of the window, the inputs all heads
    # Row r is token r // GROUP and query head r % GROUP of a KV head, the order of rows in the tiles of other kernels.
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = rows < n_rows * GROUP
    rows += first_row * GROUP
    tokens = (rows // GROUP).to(tl.int64)
    head = (first_kv_head + window_head) * GROUP + rows % GROUP
    out = load_rows(out_ptr, (tokens * HEADS + head) * HEAD_DIM, inside, True, HEAD_DIM, BLOCK_D)
    dout = load_rows(dout_ptr, tokens * STRIDE_DOT + head * STRIDE_DOH, inside, True, HEAD_DIM, BLOCK_D)
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
    per_head = head * T + tokens
    if HAS_DLSE:
        delta -= tl.load(dlse_ptr + per_head, mask=inside, other=0.0)
    # Callers get lse as [heads, T]. The kernels read it by packed row, and in base 2, as they compute exp2.
    lse = tl.load(lse_ptr + per_head, mask=inside, other=0.0)
    destination = window_head * T * GROUP + rows
    tl.store(delta_ptr + destination, delta, mask=inside)
    tl.store(lse2_ptr + destination, lse * LOG2_E, mask=inside)
