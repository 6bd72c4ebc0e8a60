"""The forward kernel: one program attends one tile of query rows to the keys it sees, in place in the K/V buffer.

FlashAttention-2 (Dao, arXiv:2307.08691) over the tables of `segments`. Grid: tiles × KV heads of the window.
"""

import triton
import triton.language as tl

from .base2 import LN_2, LOG2_E
from .segments.lookup import load_segment, tile_and_head
from .tile import (
    cast,
    dot,
    key_rows,
    load_rows,
    online_softmax_update,
    query_offsets,
    store_rows,
    visible_keys,
)


@triton.jit
def _attend_block(
    start,
    q,
    k_ptr,
    v_ptr,
    limit,  # [BLOCK_M] keys seen by each row
    kv_len,
    kv_row,
    kv_chunk,
    slot_rows,
    maximum,
    total,
    acc,
    MASKED: tl.constexpr,
    ALIGNED: tl.constexpr,
    SLOTS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SCALE_LOG2: tl.constexpr,
    STRIDE_KT: tl.constexpr,
    STRIDE_VT: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """Fold the keys `[start, start + BLOCK_N)` into the running softmax; only `MASKED` blocks look at `limit`."""
    keys = start + tl.arange(0, BLOCK_N)
    row, rows = key_rows(start, kv_row, kv_chunk, slot_rows, SLOTS, BLOCK_N, ALIGNED)
    k = load_rows(k_ptr + row * STRIDE_KT, rows * STRIDE_KT, keys < kv_len, MASKED, HEAD_DIM, BLOCK_D)
    v = load_rows(v_ptr + row * STRIDE_VT, rows * STRIDE_VT, keys < kv_len, MASKED, HEAD_DIM, BLOCK_D)
    scores = dot(q, tl.trans(k), None, INTERPRET)  # [BLOCK_M, BLOCK_N]
    if MASKED:
        scores = tl.where(keys[None, :] < limit[:, None], scores, float("-inf"))
    p, maximum, total, rescale = online_softmax_update(scores, maximum, total, SCALE_LOG2)
    return maximum, total, dot(cast(p, v.dtype, INTERPRET), v, acc * rescale[:, None], INTERPRET)


@triton.jit
def _fold(out, lse2, out_ptr, lse_ptr, offsets, statistics, inside, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """(out, lse in base 2) over these keys and those that the results so far have seen."""
    before = tl.load(lse_ptr + statistics, mask=inside, other=0.0) * LOG2_E
    maximum = tl.maximum(lse2, before)
    maximum = tl.where(maximum == float("-inf"), 0.0, maximum)
    now, then = tl.math.exp2(lse2 - maximum), tl.math.exp2(before - maximum)
    total = now + then
    blind = total == 0.0
    total = tl.where(blind, 1.0, total)
    so_far = load_rows(out_ptr, offsets, inside, True, HEAD_DIM, BLOCK_D)
    out = out * (now / total)[:, None] + so_far * (then / total)[:, None]
    return out, tl.where(blind, float("-inf"), maximum + tl.math.log2(total))


@triton.jit(do_not_specialize=["n_segments", "T", "slot_rows", "first_kv_head"])
def attention_forward(
    q_ptr,  # [T, HEADS, HEAD_DIM]
    k_ptr,  # [SLOTS * slot_rows, KV_HEADS, HEAD_DIM]
    v_ptr,
    segments_ptr,
    into_out_ptr,  # out and lse themselves, or unused: jax-triton 0.3 passes results that are written in place twice
    into_lse_ptr,
    n_segments,
    T,
    slot_rows,
    first_kv_head,
    out_ptr,  # [T, HEADS, HEAD_DIM]
    lse_ptr,  # [HEADS, T] float32
    SLOTS: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    CAUSAL: tl.constexpr,
    SOFTMAX_SCALE: tl.constexpr,
    STRIDE_QT: tl.constexpr,
    STRIDE_QH: tl.constexpr,
    STRIDE_KT: tl.constexpr,
    STRIDE_KH: tl.constexpr,
    STRIDE_VT: tl.constexpr,
    STRIDE_VH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILES_TOGETHER: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """Write out and lse of the window's query heads; `ACCUMULATE` folds them into what is there, and rows that see no
    key are left as they are."""
    tile, window_head = tile_and_head(KV_HEADS, TILES_TOGETHER)
    row, q_row, q_len, diagonal, kv_len, kv_row, kv_chunk = load_segment(
        segments_ptr, n_segments, tile, T, CAUSAL, GROUP, BLOCK_M
    )
    if row >= q_len * GROUP:
        return
    if ACCUMULATE and kv_len == 0:
        return
    kv_head = (first_kv_head + window_head).to(tl.int64)
    rows = row + tl.arange(0, BLOCK_M)
    inside = rows < q_len * GROUP
    head = kv_head * GROUP + rows % GROUP
    q_start, q_offsets, tokens = query_offsets(row, q_row, GROUP, BLOCK_M, STRIDE_QT, STRIDE_QH)
    q = load_rows(q_ptr + kv_head * GROUP * STRIDE_QH + q_start, q_offsets, inside, True, HEAD_DIM, BLOCK_D)
    k_ptr += window_head.to(tl.int64) * STRIDE_KH
    v_ptr += window_head.to(tl.int64) * STRIDE_VH
    limit, aligned_end, seen_by_all, seen_by_any = visible_keys(
        row, tokens, q_len, diagonal, kv_len, kv_chunk, SLOTS, GROUP, BLOCK_M, BLOCK_N
    )

    maximum = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(0, aligned_end, BLOCK_N):
        maximum, total, acc = _attend_block(
            start, q, k_ptr, v_ptr, limit, kv_len, kv_row, kv_chunk, slot_rows, maximum, total, acc, False, True,
            SLOTS, HEAD_DIM, BLOCK_N, BLOCK_D, SOFTMAX_SCALE * LOG2_E, STRIDE_KT, STRIDE_VT, INTERPRET,
        )  # fmt: skip
    if SLOTS > 1:
        for start in range(aligned_end, seen_by_all, BLOCK_N):
            maximum, total, acc = _attend_block(
                start, q, k_ptr, v_ptr, limit, kv_len, kv_row, kv_chunk, slot_rows, maximum, total, acc, False, False,
                SLOTS, HEAD_DIM, BLOCK_N, BLOCK_D, SOFTMAX_SCALE * LOG2_E, STRIDE_KT, STRIDE_VT, INTERPRET,
            )  # fmt: skip
    for start in range(seen_by_all, seen_by_any, BLOCK_N):
        maximum, total, acc = _attend_block(
            start, q, k_ptr, v_ptr, limit, kv_len, kv_row, kv_chunk, slot_rows, maximum, total, acc, True, False,
            SLOTS, HEAD_DIM, BLOCK_N, BLOCK_D, SOFTMAX_SCALE * LOG2_E, STRIDE_KT, STRIDE_VT, INTERPRET,
        )  # fmt: skip

    blind = total == 0.0  # rows that see no key
    total = tl.where(blind, 1.0, total)
    lse2 = tl.where(blind, float("-inf"), maximum + tl.math.log2(total))
    out = acc / total[:, None]
    statistics = head * T + q_row + tokens
    out_start, out_offsets, _ = query_offsets(row, q_row, GROUP, BLOCK_M, HEADS * HEAD_DIM, HEAD_DIM)
    out_start += kv_head * GROUP * HEAD_DIM
    if ACCUMULATE:
        out, lse2 = _fold(out, lse2, out_ptr + out_start, lse_ptr, out_offsets, statistics, inside, HEAD_DIM, BLOCK_D)
    lse = lse2 * LN_2
    if kv_len < 0:
        lse = tl.full([BLOCK_M], float("nan"), tl.float32)
        out = tl.full([BLOCK_M, BLOCK_D], float("nan"), tl.float32)
    tl.store(lse_ptr + statistics, lse, mask=inside)
    store_rows(out_ptr + out_start, out_offsets, out, inside, HEAD_DIM, BLOCK_D, INTERPRET)
