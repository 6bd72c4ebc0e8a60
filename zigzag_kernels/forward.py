"""The forward kernel: one program attends one tile of query rows to the keys it sees, in place in the gathered buffer.

FlashAttention-2 (Dao, arXiv:2307.08691) over the segments of `tile.py`. Grid: (tiles, kv_heads).
"""

import triton
import triton.language as tl

from .tile import (
    LN_2,
    LOG2_E,
    cast,
    dot,
    key_rows,
    load_rows,
    load_segment,
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
    T,
    maximum,
    total,
    acc,
    MASKED: tl.constexpr,
    ALIGNED: tl.constexpr,
    WORLD_SIZE: tl.constexpr,
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
    row, rows = key_rows(start, kv_row, kv_chunk, T, WORLD_SIZE, BLOCK_N, ALIGNED)
    k = load_rows(k_ptr + row * STRIDE_KT, rows * STRIDE_KT, keys < kv_len, MASKED, HEAD_DIM, BLOCK_D)
    v = load_rows(v_ptr + row * STRIDE_VT, rows * STRIDE_VT, keys < kv_len, MASKED, HEAD_DIM, BLOCK_D)
    scores = dot(q, tl.trans(k), None, INTERPRET)  # [BLOCK_M, BLOCK_N]
    if MASKED:
        scores = tl.where(keys[None, :] < limit[:, None], scores, float("-inf"))
    p, maximum, total, rescale = online_softmax_update(scores, maximum, total, SCALE_LOG2)
    return maximum, total, dot(cast(p, v.dtype, INTERPRET), v, acc * rescale[:, None], INTERPRET)


@triton.jit(do_not_specialize=["n_segments", "T"])
def attention_forward(
    q_ptr,  # [T, heads, HEAD_DIM]
    k_ptr,  # [WORLD_SIZE * T, kv_heads, HEAD_DIM]
    v_ptr,
    segments_ptr,
    n_segments,
    T,
    out_ptr,  # [T, heads, HEAD_DIM]
    lse_ptr,  # [heads, T] float32
    WORLD_SIZE: tl.constexpr,
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
    INTERPRET: tl.constexpr,
):
    row, q_row, q_len, diagonal, kv_len, kv_row, kv_chunk = load_segment(
        segments_ptr, n_segments, tl.program_id(0), T, CAUSAL, GROUP, BLOCK_M
    )
    if row >= q_len * GROUP:
        return
    kv_head = tl.program_id(1).to(tl.int64)
    heads = tl.num_programs(1) * GROUP
    rows = row + tl.arange(0, BLOCK_M)
    inside = rows < q_len * GROUP
    head = kv_head * GROUP + rows % GROUP
    q_start, q_offsets, tokens = query_offsets(row, q_row, GROUP, BLOCK_M, STRIDE_QT, STRIDE_QH)
    q = load_rows(q_ptr + kv_head * GROUP * STRIDE_QH + q_start, q_offsets, inside, True, HEAD_DIM, BLOCK_D)
    k_ptr += kv_head * STRIDE_KH
    v_ptr += kv_head * STRIDE_VH
    limit, aligned_end, seen_by_all, seen_by_any = visible_keys(
        row, tokens, q_len, diagonal, kv_len, kv_chunk, WORLD_SIZE, GROUP, BLOCK_M, BLOCK_N
    )

    maximum = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(0, aligned_end, BLOCK_N):
        maximum, total, acc = _attend_block(
            start, q, k_ptr, v_ptr, limit, kv_len, kv_row, kv_chunk, T, maximum, total, acc, False, True,
            WORLD_SIZE, HEAD_DIM, BLOCK_N, BLOCK_D, SOFTMAX_SCALE * LOG2_E, STRIDE_KT, STRIDE_VT, INTERPRET,
        )  # fmt: skip
    if WORLD_SIZE > 1:
        for start in range(aligned_end, seen_by_all, BLOCK_N):
            maximum, total, acc = _attend_block(
                start, q, k_ptr, v_ptr, limit, kv_len, kv_row, kv_chunk, T, maximum, total, acc, False, False,
                WORLD_SIZE, HEAD_DIM, BLOCK_N, BLOCK_D, SOFTMAX_SCALE * LOG2_E, STRIDE_KT, STRIDE_VT, INTERPRET,
            )  # fmt: skip
    for start in range(seen_by_all, seen_by_any, BLOCK_N):
        maximum, total, acc = _attend_block(
            start, q, k_ptr, v_ptr, limit, kv_len, kv_row, kv_chunk, T, maximum, total, acc, True, False,
            WORLD_SIZE, HEAD_DIM, BLOCK_N, BLOCK_D, SOFTMAX_SCALE * LOG2_E, STRIDE_KT, STRIDE_VT, INTERPRET,
        )  # fmt: skip

    blind = total == 0.0  # rows that see no key
    total = tl.where(blind, 1.0, total)
    lse = tl.where(blind, float("-inf"), (maximum + tl.math.log2(total)) * LN_2)
    out = acc / total[:, None]
    if kv_len < 0:
        lse = tl.full([BLOCK_M], float("nan"), tl.float32)
        out = tl.full([BLOCK_M, BLOCK_D], float("nan"), tl.float32)
    tl.store(lse_ptr + head * T + q_row + tokens, lse, mask=inside)
    out_start, out_offsets, _ = query_offsets(row, q_row, GROUP, BLOCK_M, heads * HEAD_DIM, HEAD_DIM)
    store_rows(out_ptr + kv_head * GROUP * HEAD_DIM + out_start, out_offsets, out, inside, HEAD_DIM, BLOCK_D, INTERPRET)
