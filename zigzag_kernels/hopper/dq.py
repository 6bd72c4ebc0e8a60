"""The dQ kernel for Hopper: each consumer owns 64 query rows and keeps their dQ in registers.

Rows, segments, windows and in-place results mean the same as in `portable.dq`. A producer streams K and V as in
the forward kernel: `keys.py` has the order of blocks.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper

from ..segments.lookup import tile_and_head
from ..segments.ranges import make_mask
from .geometry import Geometry
from .keys import make_key_stream, produce_keys
from .masks import mask_rows
from .owned import Strided, load_query_tile, own_query_rows
from .releases import SINCE_3_8, struct, thread_barrier
from .results import result_layout, store_tile
from .scores import recompute_p, score_scale_log2
from .warps import opaque, specialize_warps
from .wide_dq import make_values_and_keys, produce_values_and_keys, sum_wide_blocks


@struct
class _Dq:
    """Everything that the consumers of one program share."""

    geometry: Geometry
    tile: gl.tuple  # the `QueryTile`
    position: gl.tuple  # its `Position`, or nothing unless the mask is ranged
    first_kv_head: gl.tensor  # int64
    T: gl.tensor
    q: Strided
    dout: Strided
    delta_ptr: gl.tensor  # first head that the program serves
    lse2_ptr: gl.tensor
    dq_ptr: gl.tensor
    q_buffers: gl.shared_memory_descriptor  # [consumers, 64, BLOCK_D]
    dout_buffers: gl.shared_memory_descriptor
    stream: gl.base_value  # `KeyStream`, or `ValuesAndKeys` where heads are wide
    HEADS: gl.constexpr
    MASK: gl.constexpr  # the `Mask`, or None unless it is ranged
    SOFTMAX_SCALE: gl.constexpr
    SOFTCAP: gl.constexpr
    SCALE_LOG2: gl.constexpr
    ACCUMULATE: gl.constexpr


@struct
class _HeadRows:
    """The 64 rows of a consumer, and their statistics, for the KV head that it is working on."""

    dout: gl.shared_memory_descriptor  # [64, BLOCK_D]
    lse2: gl.tensor  # [64]
    delta: gl.tensor  # [64]
    zero: gl.tensor  # [64, BLOCK_N]
    blocks: gl.base_value  # `HeadBlocks` or `RangedHeadBlocks`


@gluon.jit
def _block(program, head, scores, dq, i, ragged):
    """Issue the product that adds block `i` to dQ; the scores of the block are already under way.

    Return (dQ, with this product still under way, the next ragged block).
    """
    geometry = program.geometry
    stream = program.stream
    # This consumer waits until the producer has brought V of block i.
    dp = stream.v.issue_scores(head.dout, i, head.zero)
    # Products complete in the order of issue: when only dP is left, the scores are complete, and the exponentials run
    # while the tensor cores compute dP.
    scores = hopper.warpgroup_mma_wait(1, [scores])
    p = recompute_p(scores, head.lse2, program)
    # V has already arrived; this second wait only keeps the assembler from moving the next one above the exponentials.
    stream.v.wait(i)
    dp = hopper.warpgroup_mma_wait(0, [dp])
    ds = p * (dp - head.delta[:, None])
    # P has no other use in this kernel, so that masking dS is enough.
    ds, ragged = head.blocks.hide(ds, 0.0, i, ragged)
    ds_operand = gl.convert_layout(ds.to(geometry.dtype), geometry.OPERAND)
    return hopper.warpgroup_mma(ds_operand, stream.k.block(i), dq, is_async=True), ragged


@gluon.jit
def _sum_blocks(program, head, q, dq):
    """Add all blocks of one head to dQ.

    The scores of a block are queued behind dQ of the block before: the tensor cores work on them while this consumer
    waits for dQ.
    """
    stream = program.stream
    blocks = head.blocks
    begin, end = blocks.begin, blocks.end
    HEADS_TOGETHER: gl.constexpr = program.geometry.HEADS_TOGETHER
    if blocks.count > 0:
        # This consumer waits until the producer has brought the first K.
        scores = stream.k.issue_scores(q, begin, head.zero)
        dq_token, ragged = _block(program, head, scores, dq, begin, blocks.ragged)
        for i in range(begin + 1 if HEADS_TOGETHER == 1 else opaque(begin + 1), end):
            # This consumer waits until the producer has brought K of block i.
            scores = stream.k.issue_scores(q, i, head.zero)
            # When only the product of the scores is left, dQ of the block before is complete.
            dq = hopper.warpgroup_mma_wait(1, [dq_token])
            # The producer waits until all consumers have left K and V of the block before.
            stream.empty.leave(i - 1)
            dq_token, ragged = _block(program, head, scores, dq, i, ragged)
        dq = hopper.warpgroup_mma_wait(0, [dq_token])
        if HEADS_TOGETHER > 1:
            # The producer waits until all consumers have left the last K and V, to bring blocks of the next head. With
            # one head no producer waits here, and an arrival nevertheless made the loop above 10 % slower.
            stream.empty.leave(end - 1)
    return dq


@gluon.jit
def _consumer(warpgroup: gl.constexpr, program):
    """Compute dQ of 64 rows of the tile, for one KV head after the other."""
    geometry = program.geometry
    stream = program.stream
    SCORES: gl.constexpr = geometry.SCORES
    GROUP: gl.constexpr = geometry.GROUP
    BLOCK_D: gl.constexpr = geometry.BLOCK_D
    HEADS_TOGETHER: gl.constexpr = geometry.HEADS_TOGETHER
    # With `result_layout` the loop over blocks of 64 keys was 4 % slower, and a program of one head stores little. From
    # Triton 3.8 on the loop uses all registers; without `result_layout` it would then wait for every product.
    PLAIN: gl.constexpr = HEADS_TOGETHER == 1 and geometry.STREAMED == 64 and not (geometry.WIDE or SINCE_3_8)
    RESULT: gl.constexpr = geometry.SUMS if PLAIN else result_layout(BLOCK_D, program.dq_ptr.dtype.element_ty)
    own = own_query_rows(warpgroup, program.tile, program.position, geometry, program.MASK)
    end = own.real_end()
    q = program.q_buffers.index(warpgroup)
    dout = program.dout_buffers.index(warpgroup)
    q_rows = own.load(program.q, program.first_kv_head, end)
    dout_rows = own.load(program.dout, program.first_kv_head, end)
    rows = own.numbers(SCORES)
    mask = mask_rows(own, SCORES)
    zero = gl.zeros([64, geometry.STREAMED], gl.float32, SCORES)
    count = stream.keys.count_blocks()
    counted = mask.count(stream.keys, count)
    scale = gl.where(own.kv_len < 0, float("nan"), program.SOFTMAX_SCALE)  # invalid tables: every result becomes NaN
    for n in range(HEADS_TOGETHER):
        kv_head = program.first_kv_head + n
        blocks = mask.number(stream, n, count, counted)
        q.store(q_rows)
        dout.store(dout_rows)
        hopper.fence_async_shared()
        # The warps of this consumer wait for each other: a product reads rows that all of them stored.
        thread_barrier()
        statistics = n * program.T.to(gl.int64) * GROUP + own.q_row * GROUP + rows
        # Rows behind the last one, and padding rows, have probability exp2(-inf) = 0.
        lse2 = gl.load(program.lse2_ptr + statistics, mask=rows < end, other=float("inf"))
        delta = gl.load(program.delta_ptr + statistics, mask=rows < end, other=0.0)
        head = _HeadRows(dout=dout, lse2=lse2, delta=delta, zero=zero, blocks=blocks)
        dq = gl.zeros([64, BLOCK_D], gl.float32, geometry.SUMS)
        dq = sum_wide_blocks(program, head, q, dq) if geometry.WIDE else _sum_blocks(program, head, q, dq)
        if HEADS_TOGETHER > 1:  # the next rows are loaded while these results are stored
            last = gl.where(n < HEADS_TOGETHER - 1, end, 0)
            q_rows = own.load(program.q, kv_head + 1, last)
            dout_rows = own.load(program.dout, kv_head + 1, last)
        out_rows, places = own.result_places(kv_head, program.HEADS, RESULT)
        store_tile(program.dq_ptr, places, out_rows < own.end, dq * scale, geometry.HEAD_DIM, program.ACCUMULATE)


@gluon.jit(do_not_specialize=["n_segments", "T", "slot_rows", "first_kv_head"])
def backward_dq_hopper(
    q_ptr, k_ptr, v_ptr, dout_ptr, delta_ptr, lse2_ptr, segments_ptr, into_dq_ptr,
    n_segments, T, slot_rows, first_kv_head, dq_ptr,
    SLOTS: gl.constexpr, HEADS: gl.constexpr, KV_HEADS: gl.constexpr, GROUP: gl.constexpr, HEAD_DIM: gl.constexpr,
    CAUSAL: gl.constexpr, SOFTMAX_SCALE: gl.constexpr, STRIDE_QT: gl.constexpr, STRIDE_QH: gl.constexpr,
    RANGED: gl.constexpr, LEFT: gl.constexpr, RIGHT: gl.constexpr, CHUNK: gl.constexpr, SOFTCAP: gl.constexpr,
    STRIDE_KT: gl.constexpr, STRIDE_KH: gl.constexpr, STRIDE_VT: gl.constexpr, STRIDE_VH: gl.constexpr,
    STRIDE_DOT: gl.constexpr, STRIDE_DOH: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
    BLOCK_D: gl.constexpr, STAGES: gl.constexpr, TILES_TOGETHER: gl.constexpr, HEADS_TOGETHER: gl.constexpr,
    ACCUMULATE: gl.constexpr,
):  # fmt: skip
    """Arguments and results: `portable.dq.backward_dq`. BLOCK_M is 64 rows for each consumer."""
    tile_number, heads = tile_and_head(KV_HEADS // HEADS_TOGETHER, TILES_TOGETHER)
    window_head = heads * HEADS_TOGETHER
    MASK: gl.constexpr = make_mask(CAUSAL, LEFT, RIGHT, CHUNK) if RANGED else None
    tile, position = load_query_tile(segments_ptr, n_segments, tile_number, T, GROUP, BLOCK_M, CAUSAL, RANGED)
    # The grid is an upper bound: this program may have no tile.
    if tile.row >= tile.q_len * GROUP:
        return
    # A segment without keys keeps the dQ of earlier launches.
    if ACCUMULATE and tile.kv_len == 0:
        return
    geometry = Geometry(
        dtype=k_ptr.dtype.element_ty, SLOTS=SLOTS, GROUP=GROUP, HEAD_DIM=HEAD_DIM, BLOCK_D=BLOCK_D, OWNED=BLOCK_M,
        STREAMED=BLOCK_N, STAGES=STAGES, HEADS_TOGETHER=HEADS_TOGETHER,
    )  # fmt: skip
    first_kv_head = (first_kv_head + window_head).to(gl.int64)
    head = window_head.to(gl.int64)
    k = Strided(ptr=k_ptr, STRIDE_T=STRIDE_KT, STRIDE_H=STRIDE_KH).from_head(head)
    v = Strided(ptr=v_ptr, STRIDE_T=STRIDE_VT, STRIDE_H=STRIDE_VH).from_head(head)
    # delta and lse in base 2 are [window, T * GROUP].
    delta_ptr += head * T * GROUP
    lse2_ptr += head * T * GROUP
    OWNED: gl.constexpr = [geometry.WARPGROUPS, 64, BLOCK_D]
    q_buffers = gl.allocate_shared_memory(geometry.dtype, OWNED, geometry.OWNED_BUFFER)
    dout_buffers = gl.allocate_shared_memory(geometry.dtype, OWNED, geometry.OWNED_BUFFER)
    if geometry.WIDE:
        stream = make_values_and_keys(tile, position, geometry, MASK)
    else:
        stream = make_key_stream(tile, position, geometry, MASK)
    # The copy engine must see the barriers before the producer uses them.
    hopper.fence_async_shared()
    program = _Dq(
        geometry=geometry, tile=tile, position=position, first_kv_head=first_kv_head, T=T,
        q=Strided(ptr=q_ptr, STRIDE_T=STRIDE_QT, STRIDE_H=STRIDE_QH),
        dout=Strided(ptr=dout_ptr, STRIDE_T=STRIDE_DOT, STRIDE_H=STRIDE_DOH), delta_ptr=delta_ptr, lse2_ptr=lse2_ptr,
        dq_ptr=dq_ptr, q_buffers=q_buffers, dout_buffers=dout_buffers, stream=stream, HEADS=HEADS,
        MASK=MASK, SOFTMAX_SCALE=SOFTMAX_SCALE, SOFTCAP=SOFTCAP, SCALE_LOG2=score_scale_log2(SOFTMAX_SCALE, SOFTCAP),
        ACCUMULATE=ACCUMULATE,
    )  # fmt: skip
    if geometry.WIDE:
        specialize_warps(
            _consumer, (program,), geometry.WARPGROUPS, (produce_values_and_keys, (stream, v, k, slot_rows), 4)
        )
    else:
        specialize_warps(
            _consumer, (program,), geometry.WARPGROUPS, (produce_keys, (stream, k, v, slot_rows, False), 4)
        )
