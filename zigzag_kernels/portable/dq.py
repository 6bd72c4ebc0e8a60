"""The dQ kernel: one program sums dQ of one tile of query rows over the keys that they see.

Grid: tiles × KV heads of the window.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from ..base2 import LOG2_E
from ..segments.lookup import key_index, load_ranged_segment, load_segment, tile_and_head
from .arithmetic import cap_scores, cast, dot
from .constants import bundle
from .ranges import ALIGNED_KEYS, KEY_RUNS, has_key_run, is_edge, key_run, sees, visible_key_range, visible_keys
from .rows import Keys, load_keys, load_rows, make_key_rows, query_places, store_rows


class QueryRows(NamedTuple):
    """A tile of query rows, with the two statistics of each row that `delta.py` wrote."""

    q: tl.tensor  # [BLOCK_M, BLOCK_D]
    dout: tl.tensor  # [BLOCK_M, BLOCK_D]
    lse2: tl.tensor  # [BLOCK_M] lse in base 2
    delta: tl.tensor  # [BLOCK_M] sum(out * dout) - dlse


@triton.jit
def _add_keys(dq, rows, by_row, keys, start, CONSTANTS: tl.constexpr, RUN: tl.constexpr):
    """Return `dq` after adding the keys `[start, start + BLOCK_N)`, a block of run number `RUN`."""
    EDGE: tl.constexpr = is_edge(RUN)
    block = load_keys(keys, start, CONSTANTS, EDGE, RUN == ALIGNED_KEYS)
    scores = dot(rows.q, tl.trans(block.k), None, CONSTANTS.INTERPRET)  # [BLOCK_M, BLOCK_N]
    if CONSTANTS.SOFTCAP > 0:
        scores = cap_scores(scores, CONSTANTS.CAP_LOG2, CONSTANTS.SOFTCAP)
    # lse from the forward pass replaces the running maximum and total: these are the final probabilities.
    p = tl.math.exp2(scores * CONSTANTS.SCALE_LOG2 - rows.lse2[:, None])
    # A masked score may be larger than lse, and its exponential infinite. So p is replaced by 0: infinity times 0 would
    # be NaN.
    if EDGE:
        p = tl.where(sees(by_row, block.keys, CONSTANTS.RANGED, False), p, 0.0)
    dp = dot(rows.dout, tl.trans(block.v), None, CONSTANTS.INTERPRET)
    ds = p * (dp - rows.delta[:, None])
    if CONSTANTS.SOFTCAP > 0:
        # Multiply by the derivative of the cap, 1 - tanh^2; `scores` are the tanh.
        ds *= 1.0 - scores * scores
    return dot(cast(ds, block.k.dtype, CONSTANTS.INTERPRET), block.k, dq, CONSTANTS.INTERPRET)


@triton.jit(do_not_specialize=["n_segments", "T", "slot_rows", "first_kv_head"])
def backward_dq(
    q_ptr,  # [T, HEADS, HEAD_DIM]
    k_ptr,  # [SLOTS * slot_rows, KV_HEADS, HEAD_DIM]
    v_ptr,
    dout_ptr,  # [T, HEADS, HEAD_DIM]
    delta_ptr,  # [KV_HEADS, T * GROUP] float32
    lse2_ptr,
    segments_ptr,
    into_dq_ptr,  # the same memory as dq, or unused
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
    RANGED: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    CHUNK: tl.constexpr,
    SOFTCAP: tl.constexpr,
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
    """Write dQ of the window's query heads; `ACCUMULATE` adds to the gradients that are already in memory."""
    CONSTANTS: tl.constexpr = bundle(
        SLOTS=SLOTS,
        GROUP=GROUP,
        HEAD_DIM=HEAD_DIM,
        BLOCK_M=BLOCK_M,
        BLOCK_N=BLOCK_N,
        BLOCK_D=BLOCK_D,
        SCALE_LOG2=(SOFTCAP if SOFTCAP > 0 else SOFTMAX_SCALE) * LOG2_E,
        CAP_LOG2=2 * SOFTMAX_SCALE * LOG2_E / SOFTCAP if SOFTCAP > 0 else 0.0,
        STRIDE_KT=STRIDE_KT,
        STRIDE_VT=STRIDE_VT,
        RANGED=RANGED,
        CAUSAL=CAUSAL,
        LEFT=LEFT,
        RIGHT=RIGHT,
        CHUNK=CHUNK,
        SOFTCAP=SOFTCAP,
        INTERPRET=INTERPRET,
    )
    tile, window_head = tile_and_head(KV_HEADS, TILES_TOGETHER)
    if RANGED:
        queries, position, document = load_ranged_segment(segments_ptr, n_segments, tile, T, CAUSAL, GROUP, BLOCK_M)
    else:
        queries = load_segment(segments_ptr, n_segments, tile, T, CAUSAL, GROUP, BLOCK_M)
    # The grid is an upper bound: this program may have no tile.
    if queries.row >= queries.q_len * GROUP:
        return
    # A segment without keys keeps the dQ of earlier launches.
    if ACCUMULATE and queries.kv_len == 0:
        return
    kv_head = (first_kv_head + window_head).to(tl.int64)
    rows = queries.row + tl.arange(0, BLOCK_M)
    inside = rows < queries.q_len * GROUP
    loaded_rows = inside
    if RANGED:  # padding rows may hold any bits
        loaded_rows = inside & (position + rows // GROUP < document.real)
    q_places = query_places(queries.row, queries.q_row, GROUP, BLOCK_M, STRIDE_QT, STRIDE_QH)
    q = load_rows(
        q_ptr + kv_head * GROUP * STRIDE_QH + q_places.start, q_places.offsets, loaded_rows, True, HEAD_DIM, BLOCK_D
    )
    places = query_places(queries.row, queries.q_row, GROUP, BLOCK_M, STRIDE_DOT, STRIDE_DOH)
    dout = load_rows(
        dout_ptr + kv_head * GROUP * STRIDE_DOH + places.start, places.offsets, loaded_rows, True, HEAD_DIM, BLOCK_D
    )
    # delta and lse in base 2 are [window, T * GROUP]: packed rows of one KV head lie one after another.
    window_head = window_head.to(tl.int64)
    statistics = window_head * T * GROUP + queries.q_row * GROUP + rows
    # Rows that are not loaded get lse2 = inf, and so the probability exp2(-inf) = 0: they add nothing.
    lse2 = tl.load(lse2_ptr + statistics, mask=loaded_rows, other=float("inf"))
    delta = tl.load(delta_ptr + statistics, mask=loaded_rows, other=0.0)
    loaded = QueryRows(q=q, dout=dout, lse2=lse2, delta=delta)
    if RANGED:
        visible = visible_key_range(queries, position, document, q_places.tokens, CONSTANTS)
        n_keys, place = key_index(document, document.real), document.place
    else:
        visible = visible_keys(queries, q_places.tokens, CONSTANTS)
        n_keys, place = queries.kv_len, 0
    keys = Keys(
        k_ptr=k_ptr + window_head * STRIDE_KH,
        v_ptr=v_ptr + window_head * STRIDE_VH,
        n_keys=n_keys,
        rows=make_key_rows(queries.kv_row, queries.kv_chunk, slot_rows, place),
    )

    # Each run of blocks has its own loop, compiled with or without the mask, so that whole blocks skip the mask.
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for RUN in tl.static_range(KEY_RUNS):
        if has_key_run(RUN, SLOTS, RANGED):
            begin, end = key_run(visible, RANGED, RUN)
            for start in range(begin, end, BLOCK_N):
                dq = _add_keys(dq, loaded, visible.by_row, keys, start, CONSTANTS, RUN)

    # The scores were scaled inside exp2, so by the chain rule their gradient is scaled too: once, after the sum.
    dq *= SOFTMAX_SCALE
    if queries.kv_len < 0:  # invalid tables: every result becomes NaN
        dq = tl.full([BLOCK_M, BLOCK_D], float("nan"), tl.float32)
    places = query_places(queries.row, queries.q_row, GROUP, BLOCK_M, HEADS * HEAD_DIM, HEAD_DIM)
    dq_ptr += places.start + kv_head * GROUP * HEAD_DIM
    if ACCUMULATE:
        dq += load_rows(dq_ptr, places.offsets, inside, True, HEAD_DIM, BLOCK_D)
    store_rows(dq_ptr, places.offsets, dq, inside, HEAD_DIM, BLOCK_D, INTERPRET)
