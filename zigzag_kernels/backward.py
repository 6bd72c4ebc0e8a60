"""The backward kernels: row statistics, then dK/dV (one program a key tile) and dQ (one program a query tile).

FlashAttention-2 (Dao, arXiv:2307.08691) without atomics: the scores are computed twice and every sum has one owner,
so that the same inputs give the same bits. dK/dV of a key tile sum over both chunks of the rank and over the query
heads of the group. Grids: (tiles, kv_heads).
"""

import triton
import triton.language as tl

from .base2 import LOG2_E
from .segments.lookup import load_half, load_segment, load_sequence, tile_and_head
from .tile import (
    cast,
    dot,
    key_rows,
    load_rows,
    query_offsets,
    store_rows,
    visible_keys,
)


@triton.jit(do_not_specialize=["T", "first_kv_head"])
def backward_delta(
    out_ptr,  # [T, HEADS, HEAD_DIM]
    dout_ptr,
    lse_ptr,  # [HEADS, T] float32
    dlse_ptr,  # [HEADS, T] float32, read if HAS_DLSE
    T,
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
    """Per row of the window's heads `delta = sum(out * dout) - dlse`, and `lse` in base 2.

    Both are in the row order of the other kernels.

    With p the probabilities, `d(lse)/d(score) = p`: a gradient arriving through `lse` only shifts delta.
    """
    window_head = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = rows < T * GROUP
    tokens = (rows // GROUP).to(tl.int64)
    head = (first_kv_head + window_head) * GROUP + rows % GROUP
    out = load_rows(out_ptr, (tokens * HEADS + head) * HEAD_DIM, inside, True, HEAD_DIM, BLOCK_D)
    dout = load_rows(dout_ptr, tokens * STRIDE_DOT + head * STRIDE_DOH, inside, True, HEAD_DIM, BLOCK_D)
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
    per_head = head * T + tokens
    if HAS_DLSE:
        delta -= tl.load(dlse_ptr + per_head, mask=inside, other=0.0)
    lse = tl.load(lse_ptr + per_head, mask=inside, other=0.0)
    destination = window_head * T * GROUP + rows
    tl.store(delta_ptr + destination, delta, mask=inside)
    tl.store(lse2_ptr + destination, lse * LOG2_E, mask=inside)


@triton.jit
def _dkdv_block(
    row,  # first row of the block inside the segment
    end_row,  # rows from here on are not of this block
    q_row,
    diagonal,
    kv_len,
    keys,  # [BLOCK_N] key indices of this program's tile
    k,
    v,
    q_ptr,
    dout_ptr,
    delta_ptr,
    lse2_ptr,
    dk,
    dv,
    MASKED: tl.constexpr,
    HAS_DK: tl.constexpr,
    HAS_DV: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SCALE_LOG2: tl.constexpr,
    STRIDE_QT: tl.constexpr,
    STRIDE_QH: tl.constexpr,
    STRIDE_DOT: tl.constexpr,
    STRIDE_DOH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """Add what BLOCK_M query rows contribute to dK and dV of the tile; scores are transposed, `[BLOCK_N, BLOCK_M]`."""
    rows = row + tl.arange(0, BLOCK_M)
    inside = rows < end_row
    q_start, q_offsets, tokens = query_offsets(row, q_row, GROUP, BLOCK_M, STRIDE_QT, STRIDE_QH)
    q = load_rows(q_ptr + q_start, q_offsets, inside, MASKED, HEAD_DIM, BLOCK_D)
    statistics = q_row * GROUP + rows
    scores = dot(k, tl.trans(q), None, INTERPRET)
    if MASKED:
        # Rows behind the last get probability exp2(-inf) = 0.
        lse2 = tl.load(lse2_ptr + statistics, mask=inside, other=float("inf"))
    else:
        lse2 = tl.load(lse2_ptr + statistics)
    p = tl.math.exp2(scores * SCALE_LOG2 - lse2[None, :])
    if MASKED:
        limit = tl.minimum(diagonal + tokens + 1, kv_len)
        p = tl.where(keys[:, None] < limit[None, :], p, 0.0)
    dout_start, dout_offsets, _ = query_offsets(row, q_row, GROUP, BLOCK_M, STRIDE_DOT, STRIDE_DOH)
    dout = load_rows(dout_ptr + dout_start, dout_offsets, inside, MASKED, HEAD_DIM, BLOCK_D)
    if HAS_DV:
        dv = dot(cast(p, dout.dtype, INTERPRET), dout, dv, INTERPRET)
    if HAS_DK:
        dp = dot(v, tl.trans(dout), None, INTERPRET)
        if MASKED:
            delta = tl.load(delta_ptr + statistics, mask=inside, other=0.0)
        else:
            delta = tl.load(delta_ptr + statistics)
        ds = p * (dp - delta[None, :])
        dk = dot(cast(ds, q.dtype, INTERPRET), q, dk, INTERPRET)
    return dk, dv


@triton.jit(do_not_specialize=["n_sequences", "T", "slot_rows", "first_kv_head"])
def backward_dkdv(
    q_ptr,  # [T, HEADS, HEAD_DIM]
    k_ptr,  # [SLOTS * slot_rows, KV_HEADS, HEAD_DIM]
    v_ptr,
    dout_ptr,  # [T, HEADS, HEAD_DIM]
    delta_ptr,  # [KV_HEADS, T * GROUP] float32
    lse2_ptr,
    sequences_ptr,
    into_dk_ptr,  # dk and dv themselves, or unused
    into_dv_ptr,
    n_sequences,
    T,
    slot_rows,
    first_kv_head,
    dk_ptr,  # [SLOTS * slot_rows, KV_HEADS, HEAD_DIM]
    dv_ptr,
    SLOTS: tl.constexpr,
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
    STRIDE_DOT: tl.constexpr,
    STRIDE_DOH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILES_TOGETHER: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    INTERPRET: tl.constexpr,
    HAS_DK: tl.constexpr,
    HAS_DV: tl.constexpr,
):
    """Write dK and dV of the window's KV heads, or what is asked for of them; `ACCUMULATE` adds to what is there."""
    tile, window_head = tile_and_head(KV_HEADS, TILES_TOGETHER)
    halves_ptr, first_key, n_keys, kv_row, kv_chunk, poison = load_sequence(
        sequences_ptr, n_sequences, tile, slot_rows, SLOTS, BLOCK_N
    )
    if first_key >= n_keys:
        return

    kv_head = (first_kv_head + window_head).to(tl.int64)
    window_head = window_head.to(tl.int64)
    keys = first_key + tl.arange(0, BLOCK_N)
    inside = keys < n_keys
    first_row, rows = key_rows(first_key, kv_row, kv_chunk, slot_rows, SLOTS, BLOCK_N, False)
    rows += first_row
    k = load_rows(k_ptr + window_head * STRIDE_KH, rows * STRIDE_KT, inside, True, HEAD_DIM, BLOCK_D)
    v = load_rows(v_ptr + window_head * STRIDE_VH, rows * STRIDE_VT, inside, True, HEAD_DIM, BLOCK_D)
    q_ptr += kv_head * GROUP * STRIDE_QH
    dout_ptr += kv_head * GROUP * STRIDE_DOH
    delta_ptr += window_head * T * GROUP
    lse2_ptr += window_head * T * GROUP

    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for half in range(2):
        q_row, q_len, diagonal, kv_len = load_half(halves_ptr, half, n_keys, CAUSAL)
        end_key = tl.minimum(first_key + BLOCK_N, n_keys)
        begin = tl.maximum(first_key - diagonal, 0)  # first token that sees the first key of the tile
        begin = tl.where(first_key < kv_len, tl.minimum(begin, q_len), q_len)
        begin_full = tl.maximum(end_key - 1 - diagonal, begin)  # first token that sees them all
        begin_full = tl.where(end_key <= kv_len, tl.minimum(begin_full, q_len), q_len)
        # Whole blocks that see every key end with the segment; the rows before them are masked.
        end_row = q_len * GROUP
        full_row = end_row - (q_len - begin_full) * GROUP // BLOCK_M * BLOCK_M
        for row in range(begin * GROUP, full_row, BLOCK_M):
            dk, dv = _dkdv_block(
                row, full_row, q_row, diagonal, kv_len, keys, k, v, q_ptr, dout_ptr, delta_ptr, lse2_ptr, dk, dv,
                True, HAS_DK, HAS_DV, GROUP, HEAD_DIM, SOFTMAX_SCALE * LOG2_E, STRIDE_QT, STRIDE_QH, STRIDE_DOT,
                STRIDE_DOH, BLOCK_M, BLOCK_D, INTERPRET,
            )  # fmt: skip
        for row in range(full_row, end_row, BLOCK_M):
            dk, dv = _dkdv_block(
                row, end_row, q_row, diagonal, kv_len, keys, k, v, q_ptr, dout_ptr, delta_ptr, lse2_ptr, dk, dv,
                False, HAS_DK, HAS_DV, GROUP, HEAD_DIM, SOFTMAX_SCALE * LOG2_E, STRIDE_QT, STRIDE_QH, STRIDE_DOT,
                STRIDE_DOH, BLOCK_M, BLOCK_D, INTERPRET,
            )  # fmt: skip

    dk *= SOFTMAX_SCALE
    if poison:
        dk = tl.full([BLOCK_N, BLOCK_D], float("nan"), tl.float32)
        dv = tl.full([BLOCK_N, BLOCK_D], float("nan"), tl.float32)
    destination = (rows * KV_HEADS + window_head) * HEAD_DIM
    if HAS_DK:
        if ACCUMULATE:
            dk += load_rows(dk_ptr, destination, inside, True, HEAD_DIM, BLOCK_D)
        store_rows(dk_ptr, destination, dk, inside, HEAD_DIM, BLOCK_D, INTERPRET)
    if HAS_DV:
        if ACCUMULATE:
            dv += load_rows(dv_ptr, destination, inside, True, HEAD_DIM, BLOCK_D)
        store_rows(dv_ptr, destination, dv, inside, HEAD_DIM, BLOCK_D, INTERPRET)


@triton.jit
def _dq_block(
    start,
    q,
    dout,
    lse2,
    delta,
    k_ptr,
    v_ptr,
    limit,
    kv_len,
    kv_row,
    kv_chunk,
    slot_rows,
    dq,
    MASKED: tl.constexpr,
    ALIGNED: tl.constexpr,
    SLOTS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SCALE_LOG2: tl.constexpr,
    STRIDE_KT: tl.constexpr,
    STRIDE_VT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """Add what the keys `[start, start + BLOCK_N)` contribute to dQ of the tile."""
    keys = start + tl.arange(0, BLOCK_N)
    row, rows = key_rows(start, kv_row, kv_chunk, slot_rows, SLOTS, BLOCK_N, ALIGNED)
    k = load_rows(k_ptr + row * STRIDE_KT, rows * STRIDE_KT, keys < kv_len, MASKED, HEAD_DIM, BLOCK_D)
    v = load_rows(v_ptr + row * STRIDE_VT, rows * STRIDE_VT, keys < kv_len, MASKED, HEAD_DIM, BLOCK_D)
    p = tl.math.exp2(dot(q, tl.trans(k), None, INTERPRET) * SCALE_LOG2 - lse2[:, None])
    if MASKED:
        p = tl.where(keys[None, :] < limit[:, None], p, 0.0)
    dp = dot(dout, tl.trans(v), None, INTERPRET)
    ds = p * (dp - delta[:, None])
    return dot(cast(ds, k.dtype, INTERPRET), k, dq, INTERPRET)


@triton.jit(do_not_specialize=["n_segments", "T", "slot_rows", "first_kv_head"])
def backward_dq(
    q_ptr,  # [T, HEADS, HEAD_DIM]
    k_ptr,  # [SLOTS * slot_rows, KV_HEADS, HEAD_DIM]
    v_ptr,
    dout_ptr,  # [T, HEADS, HEAD_DIM]
    delta_ptr,  # [KV_HEADS, T * GROUP] float32
    lse2_ptr,
    segments_ptr,
    into_dq_ptr,  # dq itself, or unused
    n_segments,
    T,
    slot_rows,
    first_kv_head,
    dq_ptr,  # [T, HEADS, HEAD_DIM]
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
    STRIDE_DOT: tl.constexpr,
    STRIDE_DOH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILES_TOGETHER: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """Write dQ of the window's query heads; `ACCUMULATE` adds it to what is there."""
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
    q_start, q_offsets, tokens = query_offsets(row, q_row, GROUP, BLOCK_M, STRIDE_QT, STRIDE_QH)
    q = load_rows(q_ptr + kv_head * GROUP * STRIDE_QH + q_start, q_offsets, inside, True, HEAD_DIM, BLOCK_D)
    dout_start, dout_offsets, _ = query_offsets(row, q_row, GROUP, BLOCK_M, STRIDE_DOT, STRIDE_DOH)
    dout = load_rows(
        dout_ptr + kv_head * GROUP * STRIDE_DOH + dout_start, dout_offsets, inside, True, HEAD_DIM, BLOCK_D
    )
    window_head = window_head.to(tl.int64)
    statistics = window_head * T * GROUP + q_row * GROUP + rows
    lse2 = tl.load(lse2_ptr + statistics, mask=inside, other=float("inf"))
    delta = tl.load(delta_ptr + statistics, mask=inside, other=0.0)
    k_ptr += window_head * STRIDE_KH
    v_ptr += window_head * STRIDE_VH
    limit, aligned_end, seen_by_all, seen_by_any = visible_keys(
        row, tokens, q_len, diagonal, kv_len, kv_chunk, SLOTS, GROUP, BLOCK_M, BLOCK_N
    )

    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(0, aligned_end, BLOCK_N):
        dq = _dq_block(
            start, q, dout, lse2, delta, k_ptr, v_ptr, limit, kv_len, kv_row, kv_chunk, slot_rows, dq, False, True,
            SLOTS, HEAD_DIM, SOFTMAX_SCALE * LOG2_E, STRIDE_KT, STRIDE_VT, BLOCK_N, BLOCK_D, INTERPRET,
        )  # fmt: skip
    if SLOTS > 1:
        for start in range(aligned_end, seen_by_all, BLOCK_N):
            dq = _dq_block(
                start, q, dout, lse2, delta, k_ptr, v_ptr, limit, kv_len, kv_row, kv_chunk, slot_rows, dq, False, False,
                SLOTS, HEAD_DIM, SOFTMAX_SCALE * LOG2_E, STRIDE_KT, STRIDE_VT, BLOCK_N, BLOCK_D, INTERPRET,
            )  # fmt: skip
    for start in range(seen_by_all, seen_by_any, BLOCK_N):
        dq = _dq_block(
            start, q, dout, lse2, delta, k_ptr, v_ptr, limit, kv_len, kv_row, kv_chunk, slot_rows, dq, True, False,
            SLOTS, HEAD_DIM, SOFTMAX_SCALE * LOG2_E, STRIDE_KT, STRIDE_VT, BLOCK_N, BLOCK_D, INTERPRET,
        )  # fmt: skip

    dq *= SOFTMAX_SCALE
    if kv_len < 0:
        dq = tl.full([BLOCK_M, BLOCK_D], float("nan"), tl.float32)
    dq_start, dq_offsets, _ = query_offsets(row, q_row, GROUP, BLOCK_M, HEADS * HEAD_DIM, HEAD_DIM)
    dq_start += kv_head * GROUP * HEAD_DIM
    if ACCUMULATE:
        dq += load_rows(dq_ptr + dq_start, dq_offsets, inside, True, HEAD_DIM, BLOCK_D)
    store_rows(dq_ptr + dq_start, dq_offsets, dq, inside, HEAD_DIM, BLOCK_D, INTERPRET)
