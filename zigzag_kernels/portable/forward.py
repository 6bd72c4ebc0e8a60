"""The forward kernel: one program computes attention of one tile of query rows, and reads K/V without copying them.

Grid: tiles × KV heads of the window.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from ..base2 import LN_2, LOG2_E
from ..segments.lookup import key_index, load_ranged_segment, load_segment, tile_and_head
from .arithmetic import cap_scores, dot
from .constants import bundle
from .ranges import ALIGNED_KEYS, KEY_RUNS, has_key_run, is_edge, key_run, sees, visible_key_range, visible_keys
from .rows import Keys, load_keys, load_rows, make_key_rows, query_places, store_rows
from .softmax import add_block, add_sinks, finish_softmax, start_softmax


class Results(NamedTuple):
    """The places in memory where a tile of rows has its results."""

    out_ptr: tl.tensor  # the tile's first row in out
    out_places: tl.tensor  # [BLOCK_M] elements from out_ptr to each row
    lse_ptr: tl.tensor  # the beginning of lse
    lse_places: tl.tensor  # [BLOCK_M] elements from lse_ptr to each row
    inside: tl.tensor  # [BLOCK_M] false for rows behind the last one


@triton.jit
def _attend_block(running, q, by_row, keys, start, CONSTANTS: tl.constexpr, RUN: tl.constexpr):
    """Return `running` after adding the keys `[start, start + BLOCK_N)`, a block of run number `RUN`."""
    EDGE: tl.constexpr = is_edge(RUN)
    # Only blocks at an edge of the mask can extend behind the last key, so only these blocks load with a mask.
    block = load_keys(keys, start, CONSTANTS, EDGE, RUN == ALIGNED_KEYS)
    scores = dot(q, tl.trans(block.k), None, CONSTANTS.INTERPRET)  # [BLOCK_M, BLOCK_N]
    if CONSTANTS.SOFTCAP > 0:
        scores = cap_scores(scores, CONSTANTS.CAP_LOG2, CONSTANTS.SOFTCAP)
    if EDGE:
        scores = tl.where(sees(by_row, block.keys, CONSTANTS.RANGED, False), scores, float("-inf"))
    return add_block(running, scores, block.v, CONSTANTS.SCALE_LOG2, EDGE and CONSTANTS.RANGED, CONSTANTS.INTERPRET)


@triton.jit
def _merge(out, lse2, results, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Merge (out, lse in base 2) with the `results` in memory, which earlier launches wrote for other keys."""
    # Each output is an average of values, whose weights sum to exp(lse). The merged output weighs the two outputs by
    # their shares of the common total. The larger lse is subtracted before exp2, so that nothing overflows.
    before = tl.load(results.lse_ptr + results.lse_places, mask=results.inside, other=0.0) * LOG2_E
    maximum = tl.maximum(lse2, before)
    maximum = tl.where(maximum == float("-inf"), 0.0, maximum)
    now, then = tl.math.exp2(lse2 - maximum), tl.math.exp2(before - maximum)
    total = now + then
    # A row that has seen no key, in this launch or earlier, keeps output 0 and lse -inf.
    blind = total == 0.0
    total = tl.where(blind, 1.0, total)
    out_before = load_rows(results.out_ptr, results.out_places, results.inside, True, HEAD_DIM, BLOCK_D)
    out = out * (now / total)[:, None] + out_before * (then / total)[:, None]
    return out, tl.where(blind, float("-inf"), maximum + tl.math.log2(total))


@triton.jit(do_not_specialize=["n_segments", "T", "slot_rows", "first_kv_head"])
def attention_forward(
    q_ptr,  # [T, HEADS, HEAD_DIM]
    k_ptr,  # [SLOTS * slot_rows, KV_HEADS, HEAD_DIM]
    v_ptr,
    sinks_ptr,  # [HEADS] float32, read if HAS_SINKS
    segments_ptr,
    into_out_ptr,  # the same memory as out and lse, or unused: jax-triton 0.3 passes in-place results twice
    into_lse_ptr,
    n_segments,
    T,
    slot_rows,
    first_kv_head,
    out_ptr,  # [T, HEADS, HEAD_DIM]
    lse_ptr,  # [HEADS, T] float32; with HAS_MAX [2, HEADS, T], the largest score of each row behind lse
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
    HAS_SINKS: tl.constexpr,
    HAS_MAX: tl.constexpr,
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
    """Write out and lse of the window's query heads.

    `ACCUMULATE` merges them with the results that are already in memory; a row that sees no key in this launch keeps
    its result. A sink adds one logit, which has no value vector, to the total of each row. Only a launch without
    `ACCUMULATE` counts sinks, so that they count once.
    """
    CONSTANTS: tl.constexpr = bundle(
        SLOTS=SLOTS,
        GROUP=GROUP,
        HEAD_DIM=HEAD_DIM,
        BLOCK_M=BLOCK_M,
        BLOCK_N=BLOCK_N,
        BLOCK_D=BLOCK_D,
        # `cap_scores` returns the capped scores divided by the cap, so that their factor is then the cap.
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
    # A segment without keys keeps the results of earlier launches.
    if ACCUMULATE and queries.kv_len == 0:
        return
    kv_head = (first_kv_head + window_head).to(tl.int64)
    rows = queries.row + tl.arange(0, BLOCK_M)
    inside = rows < queries.q_len * GROUP
    # Row r of the segment is token r // GROUP and query head r % GROUP: the heads that share a KV head share its keys.
    head = kv_head * GROUP + rows % GROUP
    places = query_places(queries.row, queries.q_row, GROUP, BLOCK_M, STRIDE_QT, STRIDE_QH)
    # Q has all heads, which `kv_head` counts; K and V have the heads of the window, which `window_head` counts.
    q = load_rows(q_ptr + kv_head * GROUP * STRIDE_QH + places.start, places.offsets, inside, True, HEAD_DIM, BLOCK_D)
    if RANGED:
        visible = visible_key_range(queries, position, document, places.tokens, CONSTANTS)
        # Keys from the document's real length on are padding, which may hold any bits: they are never read.
        n_keys, place = key_index(document, document.real), document.place
    else:
        visible = visible_keys(queries, places.tokens, CONSTANTS)
        n_keys, place = queries.kv_len, 0
    keys = Keys(
        k_ptr=k_ptr + window_head.to(tl.int64) * STRIDE_KH,
        v_ptr=v_ptr + window_head.to(tl.int64) * STRIDE_VH,
        n_keys=n_keys,
        rows=make_key_rows(queries.kv_row, queries.kv_chunk, slot_rows, place),
    )

    # Each run of blocks has its own loop, compiled with or without the mask, so that whole blocks skip the mask.
    running = start_softmax(BLOCK_M, BLOCK_D)
    for RUN in tl.static_range(KEY_RUNS):
        if has_key_run(RUN, SLOTS, RANGED):
            begin, end = key_run(visible, RANGED, RUN)
            for start in range(begin, end, BLOCK_N):
                running = _attend_block(running, q, visible.by_row, keys, start, CONSTANTS, RUN)

    largest = running.maximum * LN_2  # before the sink, which is no score of a key
    if HAS_SINKS:
        running = add_sinks(running, tl.load(sinks_ptr + head, mask=inside, other=0.0) * LOG2_E)
    out, lse2 = finish_softmax(running)
    lse_places = head * T + queries.q_row + places.tokens
    # Results are contiguous, whatever the strides of Q are.
    places = query_places(queries.row, queries.q_row, GROUP, BLOCK_M, HEADS * HEAD_DIM, HEAD_DIM)
    out_start = places.start + kv_head * GROUP * HEAD_DIM
    if ACCUMULATE:
        results = Results(out_ptr + out_start, places.offsets, lse_ptr, lse_places, inside)
        out, lse2 = _merge(out, lse2, results, HEAD_DIM, BLOCK_D)
    lse = lse2 * LN_2
    if queries.kv_len < 0:  # invalid tables: every result becomes NaN
        lse = tl.full([BLOCK_M], float("nan"), tl.float32)
        out = tl.full([BLOCK_M, BLOCK_D], float("nan"), tl.float32)
    if HAS_MAX:
        # The largest scores lie behind lse, in an array of the same shape.
        max_ptr = lse_ptr + HEADS * tl.cast(T, tl.int64)
        if ACCUMULATE:
            largest = tl.maximum(largest, tl.load(max_ptr + lse_places, mask=inside, other=0.0))
        largest = tl.where(lse == lse, largest, lse)  # tl.maximum drops NaN; lse keeps it
        tl.store(max_ptr + lse_places, largest, mask=inside)
    tl.store(lse_ptr + lse_places, lse, mask=inside)
    store_rows(out_ptr + out_start, places.offsets, out, inside, HEAD_DIM, BLOCK_D, INTERPRET)
