"""The first kernel of the backward pass, which writes delta and lse2 of every query row for the later kernels.

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

    The kernel handles `n_rows` tokens from local row `first_row` on. Both results have the row order of the tiles of
    other kernels.

    A gradient of lse changes only delta: the derivative of lse by a score is the probability p of that score, so the
    gradient of the score is `p * (dp - sum(out * dout) + dlse)`.
    """
    window_head = tl.program_id(1).to(tl.int64)  # the results have the heads of the window, the inputs have all heads
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
    # The forward pass returned lse as [heads, T] in base e. Backward kernels read it in their row order and compute
    # exp2, so it is stored in that order and in base 2.
    lse = tl.load(lse_ptr + per_head, mask=inside, other=0.0)
    destination = window_head * T * GROUP + rows
    tl.store(delta_ptr + destination, delta, mask=inside)
    tl.store(lse2_ptr + destination, lse * LOG2_E, mask=inside)
