"""The forward kernel for Hopper: a producer streams K and V past consumers of 64 query rows each.

FlashAttention-3 (Shah et al., arXiv:2407.08608): the softmax of one block runs beside the product of the block before.
Rows, segments, windows and in-place results mean the same as in `portable.forward`; `keys.py` has the order of blocks.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper

from ..base2 import LN_2, LOG2_E
from ..segments.lookup import tile_and_head
from ..segments.ranges import make_mask
from .geometry import Geometry
from .keys import KeyStream, make_key_stream, produce_keys
from .masks import mask_rows
from .owned import QueryBuffers, Strided, load_query_tile, make_query_buffers, own_query_rows
from .releases import struct, thread_barrier
from .results import cast_result, result_layout
from .scores import cap_scores, score_scale_log2
from .softmax import HIDDEN, empty_softmax, first_softmax, fold, rescale_sums
from .warps import opaque, specialize_warps


@struct
class _Forward:
    """Everything that the consumers of one program share."""

    geometry: Geometry
    tile: gl.tuple  # the `QueryTile`
    position: gl.tuple  # its `Position`, or nothing unless the mask is ranged
    first_kv_head: gl.tensor  # int64
    T: gl.tensor
    q: Strided
    sinks_ptr: gl.tensor
    out_ptr: gl.tensor
    lse_ptr: gl.tensor
    queries: QueryBuffers
    stream: KeyStream
    HEADS: gl.constexpr
    MASK: gl.constexpr  # the `Mask`, or None unless it is ranged
    SOFTMAX_SCALE: gl.constexpr
    SOFTCAP: gl.constexpr
    SCALE_LOG2: gl.constexpr
    HAS_SINKS: gl.constexpr
    HAS_MAX: gl.constexpr
    ACCUMULATE: gl.constexpr


@gluon.jit
def _cap(forward, scores):
    """Return `scores`, capped if there is a cap."""
    if forward.SOFTCAP > 0:
        return cap_scores(scores, forward.SOFTMAX_SCALE, forward.SOFTCAP)
    else:
        return scores


@gluon.jit
def _operand(forward, p):
    """Return exponentials as the operand of a product that lies in registers."""
    return gl.convert_layout(p.to(forward.geometry.dtype), forward.geometry.OPERAND)


@gluon.jit
def _first_block(forward, blocks, scores):
    """Return (the exponentials of the first block of a head, its `Softmax`, the next ragged block)."""
    scores, ragged = blocks.hide(_cap(forward, scores), HIDDEN, blocks.begin, blocks.ragged)
    p, softmax = first_softmax(scores, forward.SCALE_LOG2)
    return p, softmax, ragged


@gluon.jit
def _enter(forward, blocks, q_buffer, zero):
    """Attend to the first block of the first head: see `_first_block`."""
    stream = forward.stream
    # This consumer waits until the producer has brought the first K.
    scores = stream.k.issue_scores(q_buffer, blocks.begin, zero)
    scores = hopper.warpgroup_mma_wait(0, [scores])
    # The producer waits until all consumers have left the first K.
    stream.empty.leave(blocks.begin)
    return _first_block(forward, blocks, scores)


@gluon.jit
def _walk(forward, blocks, q_buffer, zero, p_operand, softmax, ragged):
    """Attend to all blocks of a head but the first, whose exponentials are `p_operand`.

    Return (sums over V of all blocks but the last, the exponentials of the last block, the `Softmax` of all blocks).
    """
    geometry = forward.geometry
    stream = forward.stream
    SUM_ROWS: gl.constexpr = gl.SliceLayout(1, geometry.SUMS)
    acc = gl.zeros([64, geometry.BLOCK_D], gl.float32, geometry.SUMS)
    rescale = gl.full([64], 1.0, gl.float32, gl.SliceLayout(1, geometry.SCORES))
    for i in range(blocks.begin + 1, blocks.end):
        # This consumer waits until the producer has brought K of block i, then V of the block before.
        s_token = stream.k.issue_scores(q_buffer, i, zero)
        stream.v.wait(i - 1)
        # While the tensor cores compute scores, the sums over V so far become relative to the maximum of block i - 1.
        acc = rescale_sums(acc, gl.convert_layout(rescale, SUM_ROWS))
        acc_token = hopper.warpgroup_mma(p_operand, stream.v.block(i - 1), acc, is_async=True)
        # Products complete in the order of issue: when only the one with V is left, the scores are complete, and the
        # softmax runs while the tensor cores multiply by V.
        scores = hopper.warpgroup_mma_wait(1, [s_token])
        scores, ragged = blocks.hide(_cap(forward, scores), HIDDEN, i, ragged)
        p, rescale, softmax = softmax.add(scores)
        # V has already arrived; this second wait only keeps the assembler from moving the next one above the softmax.
        stream.v.wait(i - 1)
        acc = hopper.warpgroup_mma_wait(0, [acc_token])
        # The producer waits until all consumers have left K of block i and V of the block before.
        stream.empty.leave(i)
        p_operand = _operand(forward, p)
    return rescale_sums(acc, gl.convert_layout(rescale, SUM_ROWS)), p_operand, softmax


@gluon.jit
def _cross(forward, following, q_buffer, zero, p_operand, acc):
    """Complete the sums over V of one head beside the first block of the `following` one, whose rows `q_buffer` has.

    Return (the sums, the exponentials of the first block, its `Softmax`, the next ragged block).
    """
    stream = forward.stream
    i = following.begin
    # Consumers and the producer wait for each other as in `_walk`.
    s_token = stream.k.issue_scores(q_buffer, i, zero)
    stream.v.wait(i - 1)
    acc_token = hopper.warpgroup_mma(p_operand, stream.v.block(i - 1), acc, is_async=True)
    scores = hopper.warpgroup_mma_wait(1, [s_token])
    p, softmax, ragged = _first_block(forward, following, scores)
    stream.v.wait(i - 1)
    acc = hopper.warpgroup_mma_wait(0, [acc_token])
    stream.empty.leave(i)
    return acc, _operand(forward, p), softmax, ragged


@gluon.jit
def _complete(forward, blocks, p_operand, acc):
    """Return the sums over V of the last head: those so far, and the product of the last block."""
    stream = forward.stream
    # This consumer waits until the producer has brought the last V. The producer brings nothing behind it.
    stream.v.wait(blocks.end - 1)
    acc = hopper.warpgroup_mma(p_operand, stream.v.block(blocks.end - 1), acc, is_async=True)
    return hopper.warpgroup_mma_wait(0, [acc])


@gluon.jit
def _store(forward, own, kv_head, acc, result):
    """Write output and log-sum-exp of one head; ACCUMULATE merges them with the results of earlier launches."""
    geometry = forward.geometry
    GROUP: gl.constexpr = geometry.GROUP
    SUMS: gl.constexpr = geometry.SUMS
    # At head_dim 64, with three and four consumers, `result_layout` made the loop 6 to 11 % slower.
    RESULT: gl.constexpr = (
        result_layout(geometry.BLOCK_D, forward.out_ptr.dtype.element_ty) if geometry.BLOCK_D >= 128 else SUMS
    )
    rows = own.numbers(geometry.SCORES)
    statistics = (kv_head * GROUP + rows % GROUP) * forward.T + own.q_row + rows // GROUP
    inside = rows < own.end
    out_rows, places = own.result_places(kv_head, forward.HEADS, RESULT)
    out_dims = gl.arange(0, geometry.BLOCK_D, gl.SliceLayout(0, RESULT))
    out_mask = (out_rows < own.end)[:, None] & (out_dims < geometry.HEAD_DIM)[None, :]
    out_ptrs = forward.out_ptr + places[:, None] + out_dims[None, :]
    if forward.ACCUMULATE:
        before = gl.load(forward.lse_ptr + statistics, mask=inside, other=0.0) * LOG2_E
        result, kept = fold(result, before)
        kept = gl.convert_layout(kept, gl.SliceLayout(1, RESULT))
    out = acc * gl.convert_layout(result.factor, gl.SliceLayout(1, SUMS))[:, None]
    if forward.ACCUMULATE:
        out = gl.convert_layout(out, RESULT) + gl.load(out_ptrs, mask=out_mask, other=0.0) * kept[:, None]
    if forward.HAS_MAX:
        # The largest scores lie behind lse, in an array of the same shape.
        max_ptr = forward.lse_ptr + forward.HEADS * forward.T.to(gl.int64)
        largest = result.largest2 * LN_2
        if forward.ACCUMULATE:
            largest = gl.maximum(largest, gl.load(max_ptr + statistics, mask=inside, other=0.0))
        largest = gl.where(result.lse2 == result.lse2, largest, result.lse2)  # gl.maximum drops NaN; lse keeps it
        gl.store(max_ptr + statistics, largest, mask=inside)
    gl.store(forward.lse_ptr + statistics, result.lse2 * LN_2, mask=inside)
    gl.store(out_ptrs, cast_result(out, forward.out_ptr.dtype.element_ty, RESULT), mask=out_mask)


@gluon.jit
def _finish(forward, own, mask, softmax, sinks):
    """Return the `RowResult` of the rows `own`, with `sinks [64]`, base 2, if there are any."""
    if forward.MASK is None:
        blind = softmax.blind()
    else:  # a block that all real rows see is not masked, so that padding rows may have added keys: go by the range
        blind = mask.first >= mask.limit
    if forward.HAS_SINKS:
        with_sinks = softmax.add_sinks(sinks)
        # The sums over V are relative to the maximum without the sinks.
        factor = gl.exp2(softmax.maximum - with_sinks.maximum)
        return with_sinks.finish(blind, softmax.maximum, own.kv_len, factor)
    else:
        return softmax.finish(blind, softmax.maximum, own.kv_len, 1.0)


@gluon.jit
def _consumer(warpgroup: gl.constexpr, forward):
    """Compute the output of 64 rows of the tile, for one KV head after the other."""
    geometry = forward.geometry
    stream = forward.stream
    queries = forward.queries
    GROUP: gl.constexpr = geometry.GROUP
    HEADS_TOGETHER: gl.constexpr = geometry.HEADS_TOGETHER
    own = own_query_rows(warpgroup, forward.tile, forward.position, geometry, forward.MASK)
    first_q = own.load(forward.q, forward.first_kv_head, own.real_end())
    if HEADS_TOGETHER > 1:
        second_q = own.load(forward.q, forward.first_kv_head + 1, own.real_end())
        queries.of(warpgroup, 1).store(second_q)
    queries.of(warpgroup, 0).store(first_q)
    mask = mask_rows(own, geometry.SCORES)
    zero = gl.zeros([64, geometry.STREAMED], gl.float32, geometry.SCORES)
    hopper.fence_async_shared()
    # The warps of this consumer wait for each other: a product reads rows that all of them stored.
    thread_barrier()
    count = stream.keys.count_blocks()
    counted = mask.count(stream.keys, count)
    p_operand = _operand(forward, zero)
    softmax = empty_softmax(forward.SCALE_LOG2, gl.SliceLayout(1, geometry.SCORES))
    ragged = count * 0
    if count > 0:
        blocks = mask.number(stream, 0, count, counted)
        p, softmax, ragged = _enter(forward, blocks, queries.of(warpgroup, 0), zero)
        p_operand = _operand(forward, p)
    for number in range(HEADS_TOGETHER):
        # Opaque: of two heads that it can tell apart, the compiler keeps the values of both in registers.
        n = opaque(number) if HEADS_TOGETHER > 1 else number
        kv_head = forward.first_kv_head + n
        blocks = mask.number(stream, n, count, counted)
        q_buffer = queries.of(warpgroup, n)
        acc, p_operand, softmax = _walk(forward, blocks, q_buffer, zero, p_operand, softmax, ragged)
        next_softmax = softmax
        if count > 0:
            if n < HEADS_TOGETHER - 1:
                following = mask.number(stream, n + 1, count, counted)
                next_buffer = queries.of(warpgroup, n + 1)
                acc, p_operand, next_softmax, ragged = _cross(forward, following, next_buffer, zero, p_operand, acc)
            else:
                acc = _complete(forward, blocks, p_operand, acc)
        rows = own.anew() if HEADS_TOGETHER > 1 else own
        sinks = softmax.maximum
        if forward.HAS_SINKS:  # loaded before the blocks, sinks would take registers from the loop: 11 to 18 % slower
            heads = kv_head * GROUP + rows.numbers(geometry.SCORES) % GROUP
            sinks = gl.load(forward.sinks_ptr + heads) * LOG2_E
        if HEADS_TOGETHER > 2:  # the queries after the next are loaded while these results are stored
            q = rows.load(forward.q, kv_head + 2, gl.where(n < HEADS_TOGETHER - 2, rows.real_end(), 0))
        _store(forward, rows, kv_head, acc, _finish(forward, own, mask, softmax, sinks))
        softmax = next_softmax
        if HEADS_TOGETHER > 2:
            q_buffer.store(q)
            hopper.fence_async_shared()
            # The warps of this consumer wait for each other, as above.
            thread_barrier()


@gluon.jit(do_not_specialize=["n_segments", "T", "slot_rows", "first_kv_head"])
def attention_forward_hopper(
    q_ptr, k_ptr, v_ptr, sinks_ptr, segments_ptr, into_out_ptr, into_lse_ptr, n_segments, T, slot_rows, first_kv_head,
    out_ptr, lse_ptr,
    SLOTS: gl.constexpr, HEADS: gl.constexpr, KV_HEADS: gl.constexpr, GROUP: gl.constexpr, HEAD_DIM: gl.constexpr,
    CAUSAL: gl.constexpr, SOFTMAX_SCALE: gl.constexpr, STRIDE_QT: gl.constexpr, STRIDE_QH: gl.constexpr,
    RANGED: gl.constexpr, LEFT: gl.constexpr, RIGHT: gl.constexpr, CHUNK: gl.constexpr, SOFTCAP: gl.constexpr,
    HAS_SINKS: gl.constexpr, HAS_MAX: gl.constexpr,
    STRIDE_KT: gl.constexpr, STRIDE_KH: gl.constexpr, STRIDE_VT: gl.constexpr, STRIDE_VH: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr, STAGES: gl.constexpr,
    TILES_TOGETHER: gl.constexpr, HEADS_TOGETHER: gl.constexpr, ACCUMULATE: gl.constexpr,
):  # fmt: skip
    """Arguments and results: `portable.forward.attention_forward`. BLOCK_M is 64 rows for each consumer."""
    tile_number, heads = tile_and_head(KV_HEADS // HEADS_TOGETHER, TILES_TOGETHER)
    window_head = heads * HEADS_TOGETHER
    MASK: gl.constexpr = make_mask(CAUSAL, LEFT, RIGHT, CHUNK) if RANGED else None
    tile, position = load_query_tile(segments_ptr, n_segments, tile_number, T, GROUP, BLOCK_M, CAUSAL, RANGED)
    # The grid is an upper bound: this program may have no tile.
    if tile.row >= tile.q_len * GROUP:
        return
    # A segment without keys keeps the results of earlier launches.
    if ACCUMULATE and tile.kv_len == 0:
        return
    # K and V have the heads of the window, and Q and the results all heads: `kv_head` counts all, `window_head` the
    # heads of the window.
    kv_head = (first_kv_head + window_head).to(gl.int64)
    geometry = Geometry(
        dtype=k_ptr.dtype.element_ty, SLOTS=SLOTS, GROUP=GROUP, HEAD_DIM=HEAD_DIM, BLOCK_D=BLOCK_D, OWNED=BLOCK_M,
        STREAMED=BLOCK_N, STAGES=STAGES, HEADS_TOGETHER=HEADS_TOGETHER,
    )  # fmt: skip
    head = window_head.to(gl.int64)
    k = Strided(ptr=k_ptr, STRIDE_T=STRIDE_KT, STRIDE_H=STRIDE_KH).from_head(head)
    v = Strided(ptr=v_ptr, STRIDE_T=STRIDE_VT, STRIDE_H=STRIDE_VH).from_head(head)
    queries = make_query_buffers(geometry)
    stream = make_key_stream(tile, position, geometry, MASK)
    # The copy engine must see the barriers before the producer uses them.
    hopper.fence_async_shared()
    forward = _Forward(
        geometry=geometry, tile=tile, position=position, first_kv_head=kv_head, T=T,
        q=Strided(ptr=q_ptr, STRIDE_T=STRIDE_QT, STRIDE_H=STRIDE_QH), sinks_ptr=sinks_ptr, out_ptr=out_ptr,
        lse_ptr=lse_ptr, queries=queries, stream=stream, HEADS=HEADS, MASK=MASK, SOFTMAX_SCALE=SOFTMAX_SCALE,
        SOFTCAP=SOFTCAP, SCALE_LOG2=score_scale_log2(SOFTMAX_SCALE, SOFTCAP), HAS_SINKS=HAS_SINKS, HAS_MAX=HAS_MAX,
        ACCUMULATE=ACCUMULATE,
    )  # fmt: skip
    specialize_warps(_consumer, (forward,), geometry.WARPGROUPS, (produce_keys, (stream, k, v, slot_rows, True), 4))
