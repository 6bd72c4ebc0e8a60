"""The gradient of the sinks: two kernels sum one number of every query row, always in the same order.

A sink adds a logit to each row of its head, with probability `exp(sink - lse)` and a value vector of zeros. Therefore
`d(loss)/d(sink)` is the sum over rows of `-exp(sink - lse) * delta`, where `delta.py` writes `delta`.
"""

import triton
import triton.language as tl

from ..base2 import LOG2_E


@triton.jit(do_not_specialize=["T", "first_row", "n_rows", "first_kv_head", "n_parts"])
def sum_sink_rows(
    delta_ptr,  # [window, T * GROUP] float32
    lse2_ptr,
    sinks_ptr,  # [HEADS] float32
    T,
    first_row,
    n_rows,
    first_kv_head,
    n_parts,
    parts_ptr,  # [window * GROUP, n_parts] float32
    GROUP: tl.constexpr,
    HEADS_PADDED: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Write one partial sum for every `BLOCK_T` tokens, of `n_rows` tokens from local row `first_row` on.

    A sink does not count in rows that see no key, so these rows add nothing.
    Grid: parts × KV heads of the window. `HEADS_PADDED` is GROUP rounded up to a power of two.
    """
    part = tl.program_id(0)
    window_head = tl.program_id(1).to(tl.int64)
    tokens = part * BLOCK_T + tl.arange(0, BLOCK_T)
    heads = tl.arange(0, HEADS_PADDED)
    # Rows behind `n_rows` belong to another part of the batch, or do not exist. Heads from GROUP on would belong to the
    # next KV head.
    inside = (tokens < n_rows)[:, None] & (heads < GROUP)[None, :]
    rows = (window_head * T + first_row + tokens)[:, None] * GROUP + heads[None, :]
    delta = tl.load(delta_ptr + rows, mask=inside, other=0.0)
    lse2 = tl.load(lse2_ptr + rows, mask=inside, other=float("inf"))
    sinks = tl.load(sinks_ptr + (first_kv_head + window_head) * GROUP + heads, mask=heads < GROUP, other=0.0)
    blind = lse2 == float("-inf")  # a row that sees no key has no sink either
    probability = tl.math.exp2(sinks[None, :] * LOG2_E - tl.where(blind, float("inf"), lse2))
    sums = tl.sum(tl.where(blind, 0.0, -probability * delta), 0)
    # Each program writes its own sums, one for each head. Without atomics, every run adds in the same order.
    tl.store(parts_ptr + (window_head * GROUP + heads) * n_parts + part, sums, mask=heads < GROUP)


@triton.jit(do_not_specialize=["first_kv_head", "n_parts"])
def sum_sink_parts(
    parts_ptr,  # [window * GROUP, n_parts] float32
    into_dsinks_ptr,  # the same memory as dsinks, or unused
    first_kv_head,
    n_parts,
    dsinks_ptr,  # [HEADS] float32
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add up the partial sums of each query head. Grid: query heads of the window."""
    head = tl.program_id(0)
    sums = tl.zeros([BLOCK], tl.float32)
    for first in range(0, n_parts, BLOCK):
        parts = first + tl.arange(0, BLOCK)
        # Each lane adds every BLOCK-th part, and the last statement adds the lanes. Only `n_parts` decides the order.
        sums += tl.load(parts_ptr + head.to(tl.int64) * n_parts + parts, mask=parts < n_parts, other=0.0)
    tl.store(dsinks_ptr + first_kv_head * GROUP + head, tl.sum(sums, 0))
