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
from .owned import Strided, load_query_tile, own_query_rows
from .releases import struct, thread_barrier
from .results import cast_result, result_layout
from .scores import cap_scores, score_scale_log2
from .warps import specialize_warps

# The score of hidden keys, below all real scores. It is finite, so that a row whose first blocks are all hidden gives
# no NaN; the first key that the row sees scales their sums to zero. It is a power of two, so that it stays exact when
# scaled: otherwise the fused multiplication and subtraction of the maximum would leave a huge rounding error.
HIDDEN = gl.constexpr(-(2.0**100))


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
    q_buffers: gl.shared_memory_descriptor  # [consumers, 64, BLOCK_D]
    stream: KeyStream
    HEADS: gl.constexpr
    MASK: gl.constexpr  # the `Mask`, or None unless it is ranged
    SOFTMAX_SCALE: gl.constexpr
    SOFTCAP: gl.constexpr
    SCALE_LOG2: gl.constexpr
    HAS_SINKS: gl.constexpr
    HAS_MAX: gl.constexpr
    ACCUMULATE: gl.constexpr


@struct
class _RowResult:
    """The log-sum-exp of each row, its largest score, and the factor that turns its sum over V into its output."""

    factor: gl.tensor  # [64]
    lse2: gl.tensor  # [64], base 2
    largest2: gl.tensor  # [64], base 2


@struct
class _Softmax:
    """The online softmax (Milakov and Gimelshein, arXiv:1805.02867) of the rows, base 2, after the blocks so far."""

    maximum: gl.tensor  # [64], of the scaled scores
    total: gl.tensor  # [64], of the exponentials
    SCALE_LOG2: gl.constexpr

    @gluon.jit
    def add(self, scores):
        """Add a block: return (its exponentials, the factor for earlier sums, the next `_Softmax`)."""
        # Scores stay unscaled: the scale is a part of the one multiply-add before each exponential.
        maximum = gl.maximum(self.maximum, gl.max(scores, 1) * self.SCALE_LOG2)
        rescale = gl.exp2(self.maximum - maximum)
        p = gl.exp2(scores * self.SCALE_LOG2 - maximum[:, None])
        total = self.total * rescale + gl.sum(p, 1)
        return p, rescale, _Softmax(maximum=maximum, total=total, SCALE_LOG2=self.SCALE_LOG2)

    @gluon.jit
    def add_sinks(self, sinks):
        """Return the `_Softmax` after adding `sinks [64]`, base 2, to the total of each row."""
        maximum = gl.maximum(self.maximum, sinks)
        total = self.total * gl.exp2(self.maximum - maximum) + gl.exp2(sinks - maximum)
        return _Softmax(maximum=maximum, total=total, SCALE_LOG2=self.SCALE_LOG2)

    @gluon.jit
    def blind(self):
        """Return `[64]` true for rows that see no key, provided that every block was hidden from them."""
        # The maximum of a row that sees no key is HIDDEN, scaled. A row of NaN scores has the same maximum, but a NaN
        # total.
        return (self.maximum < HIDDEN * self.SCALE_LOG2 * 0.5) & (self.total == self.total)

    @gluon.jit
    def finish(self, blind, largest2, kv_len, factor):
        """Return the `_RowResult` of rows whose blocks have all been added. Sums over V still lack `factor`."""
        lse2 = gl.where(blind, float("-inf"), self.maximum + gl.log2(self.total))
        factor = gl.where(blind, 0.0, factor / self.total)
        largest2 = gl.where(blind, float("-inf"), largest2)
        if kv_len < 0:  # invalid tables: every result becomes NaN
            lse2 = lse2 + float("nan")
            factor = factor + float("nan")
        return _RowResult(factor=factor, lse2=lse2, largest2=largest2)


@gluon.jit
def _empty_softmax(SCALE_LOG2: gl.constexpr, ROWS: gl.constexpr):
    """Return the `_Softmax` of rows before their first block."""
    maximum = gl.full([64], float("-inf"), gl.float32, ROWS)
    return _Softmax(maximum=maximum, total=gl.zeros([64], gl.float32, ROWS), SCALE_LOG2=SCALE_LOG2)


@gluon.jit
def _first_softmax(scores, SCALE_LOG2: gl.constexpr):
    """Return (the exponentials of the first block, the `_Softmax` of this block)."""
    maximum = gl.max(scores, 1) * SCALE_LOG2
    p = gl.exp2(scores * SCALE_LOG2 - maximum[:, None])
    return p, _Softmax(maximum=maximum, total=gl.sum(p, 1), SCALE_LOG2=SCALE_LOG2)


@gluon.jit
def _cap(forward, scores):
    """Return `scores`, capped if there is a cap."""
    if forward.SOFTCAP > 0:
        return cap_scores(scores, forward.SOFTMAX_SCALE, forward.SOFTCAP)
    else:
        return scores


@gluon.jit
def _attend(forward, blocks, q_buffer, zero):
    """Attend to the `HeadBlocks` of one head: return (sums over V of the rows in `q_buffer`, their `_Softmax`)."""
    geometry = forward.geometry
    stream = forward.stream
    SUM_ROWS: gl.constexpr = gl.SliceLayout(1, geometry.SUMS)
    softmax = _empty_softmax(forward.SCALE_LOG2, gl.SliceLayout(1, geometry.SCORES))
    acc = gl.zeros([64, geometry.BLOCK_D], gl.float32, geometry.SUMS)
    begin, end = blocks.begin, blocks.end
    ragged = blocks.ragged
    if blocks.count > 0:
        # This consumer waits until the producer has brought the first K.
        scores = stream.k.issue_scores(q_buffer, begin, zero)
        scores = hopper.warpgroup_mma_wait(0, [scores])
        # The producer waits until all consumers have left the first K and, if there is one, the V before it: the last V
        # of the head before.
        stream.empty.leave(begin)
        scores = _cap(forward, scores)
        scores, ragged = blocks.hide(scores, HIDDEN, begin, ragged)
        p, softmax = _first_softmax(scores, forward.SCALE_LOG2)
        p_operand = gl.convert_layout(p.to(geometry.dtype), geometry.OPERAND)
        for i in range(begin + 1, end):
            # This consumer waits until the producer has brought K of block i, then V of the block before.
            s_token = stream.k.issue_scores(q_buffer, i, zero)
            stream.v.wait(i - 1)
            acc_token = hopper.warpgroup_mma(p_operand, stream.v.block(i - 1), acc, is_async=True)
            # Products complete in the order of issue: when only the one with V is left, the scores are complete, and
            # the softmax runs while the tensor cores multiply by V.
            scores = hopper.warpgroup_mma_wait(1, [s_token])
            scores = _cap(forward, scores)
            scores, ragged = blocks.hide(scores, HIDDEN, i, ragged)
            p, rescale, softmax = softmax.add(scores)
            # V has already arrived; this second wait only keeps the assembler from moving the next one above the
            # softmax.
            stream.v.wait(i - 1)
            acc = hopper.warpgroup_mma_wait(0, [acc_token])
            # The producer waits until all consumers have left K of block i and V of the block before.
            stream.empty.leave(i)
            # The sums over V so far are relative to the maximum before this block.
            acc = acc * gl.convert_layout(rescale, SUM_ROWS)[:, None]
            p_operand = gl.convert_layout(p.to(geometry.dtype), geometry.OPERAND)
        # This consumer waits until the producer has brought the last V. It leaves that V by its arrival for the first K
        # of the next head; after the last head the producer loads nothing.
        stream.v.wait(end - 1)
        acc = hopper.warpgroup_mma(p_operand, stream.v.block(end - 1), acc, is_async=True)
        acc = hopper.warpgroup_mma_wait(0, [acc])
    return acc, softmax


@gluon.jit
def _fold(result, before):
    """Merge `result` with earlier results of the same rows, whose log-sum-exp is `before`, base 2.

    Return (the merged `_RowResult`, the factor for the earlier output).
    """
    largest = gl.maximum(result.lse2, before)
    largest = gl.where(largest == float("-inf"), 0.0, largest)
    # Each output is an average by its own total: together they weigh as much as their share of both totals.
    now, then = gl.exp2(result.lse2 - largest), gl.exp2(before - largest)
    sums = now + then
    none = sums == 0.0
    sums = gl.where(none, 1.0, sums)
    lse2 = gl.where(none, float("-inf"), largest + gl.log2(sums))
    return _RowResult(factor=result.factor * (now / sums), lse2=lse2, largest2=result.largest2), then / sums


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
        result, kept = _fold(result, before)
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
    """Return the `_RowResult` of the rows `own`, with `sinks [64]`, base 2, if there are any."""
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
    GROUP: gl.constexpr = geometry.GROUP
    HEADS_TOGETHER: gl.constexpr = geometry.HEADS_TOGETHER
    own = own_query_rows(warpgroup, forward.tile, forward.position, geometry, forward.MASK)
    q_buffer = forward.q_buffers.index(warpgroup)
    q = own.load(forward.q, forward.first_kv_head, own.real_end())
    mask = mask_rows(own, geometry.SCORES)
    zero = gl.zeros([64, geometry.STREAMED], gl.float32, geometry.SCORES)
    for n in range(HEADS_TOGETHER):
        kv_head = forward.first_kv_head + n
        q_buffer.store(q)
        hopper.fence_async_shared()
        # The warps of this consumer wait for each other: a product reads rows that all of them stored.
        thread_barrier()
        count = stream.keys.count_blocks()
        blocks = mask.number(stream, n, count, mask.count(stream.keys, count))
        acc, softmax = _attend(forward, blocks, q_buffer, zero)
        sinks = softmax.maximum
        if forward.HAS_SINKS:  # loaded before the blocks, sinks would take registers from the loop: 11 to 18 % slower
            heads = kv_head * GROUP + own.numbers(geometry.SCORES) % GROUP
            sinks = gl.load(forward.sinks_ptr + heads) * LOG2_E
        if HEADS_TOGETHER > 1:  # the next queries are loaded while these results are stored
            q = own.load(forward.q, kv_head + 1, gl.where(n < HEADS_TOGETHER - 1, own.real_end(), 0))
        _store(forward, own, kv_head, acc, _finish(forward, own, mask, softmax, sinks))


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
    q_buffers = gl.allocate_shared_memory(geometry.dtype, [geometry.WARPGROUPS, 64, BLOCK_D], geometry.OWNED_BUFFER)
    stream = make_key_stream(tile, position, geometry, MASK)
    # The copy engine must see the barriers before the producer uses them.
    hopper.fence_async_shared()
    forward = _Forward(
        geometry=geometry, tile=tile, position=position, first_kv_head=kv_head, T=T,
        q=Strided(ptr=q_ptr, STRIDE_T=STRIDE_QT, STRIDE_H=STRIDE_QH), sinks_ptr=sinks_ptr, out_ptr=out_ptr,
        lse_ptr=lse_ptr, q_buffers=q_buffers, stream=stream, HEADS=HEADS, MASK=MASK, SOFTMAX_SCALE=SOFTMAX_SCALE,
        SOFTCAP=SOFTCAP, SCALE_LOG2=score_scale_log2(SOFTMAX_SCALE, SOFTCAP), HAS_SINKS=HAS_SINKS, HAS_MAX=HAS_MAX,
        ACCUMULATE=ACCUMULATE,
    )  # fmt: skip
    specialize_warps(_consumer, (forward,), geometry.WARPGROUPS, (produce_keys, (stream, k, v, slot_rows, True), 4))
