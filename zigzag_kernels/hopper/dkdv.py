"""The dK/dV kernel for Hopper: each consumer owns 64 keys and keeps their dK and dV in registers.

Above head_dim 128 two consumers share 64 keys: `wide_dkdv.py` has their work.

Rows, keys, windows and in-place results mean the same as in `portable.dkdv`. Scores are transposed, [keys, rows], so
that the products that take P and dS can read them from registers. A producer streams query rows: `rows.py` has the
order of their blocks.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from ..segments.lookup import load_sequence, tile_and_head
from ..segments.ranges import make_mask
from .geometry import Geometry
from .owned import Strided, own_key_rows
from .releases import struct, thread_barrier
from .results import KeyGradients
from .rows import (
    Packing,
    RowArrays,
    RowMask,
    RowStream,
    find_half_blocks,
    find_sequence_rows,
    make_row_stream,
    produce_rows,
)
from .scores import score_scale_log2, transposed_p
from .warps import opaque, specialize_warps
from .wide_dkdv import consume_wide, make_handover


@struct
class _Dkdv:
    """Everything that the consumers of one program share."""

    geometry: Geometry
    slot_rows: gl.tensor
    head: gl.tensor  # the first KV head of the window that the program serves
    tile: gl.tuple  # the `KeyTile`
    blocks: gl.tensor  # of one head
    whole: gl.tensor  # number of the blocks that need no mask; they come first
    k: Strided
    v: Strided
    k_buffers: gl.shared_memory_descriptor  # [BLOCK_N / 64, 64, BLOCK_D]
    v_buffers: gl.shared_memory_descriptor
    stream: RowStream
    handover: gl.tuple  # the `Handover` of two consumers that share 64 keys, or nothing
    results: KeyGradients
    SOFTCAP: gl.constexpr
    SCALE_LOG2: gl.constexpr


@struct
class _HeadKeys:
    """The 64 keys of a consumer, and the block numbers of the KV head that it is working on."""

    k: gl.shared_memory_descriptor  # [64, BLOCK_D]
    v: gl.shared_memory_descriptor
    numbers: gl.tensor  # [64], key numbers in the sequence; under a ranged mask their positions
    zero: gl.tensor  # [64, BLOCK_M]
    begin: gl.tensor  # the first block of this head; the producer numbers blocks through all heads
    end: gl.tensor  # the last one is before this
    whole_end: gl.tensor  # blocks from this one on need a mask


@gluon.jit
def _block(program, head, scores, dk, dv, i):
    """Issue the products that add block `i` to dV, then dK; the scores of the block are already under way."""
    geometry = program.geometry
    stream = program.stream
    # This consumer waits until the producer has brought dO of block i and its delta.
    dp = stream.dout.issue_scores(head.v, i, head.zero)
    lse2 = stream.numbers(stream.lse2, i)
    # Products complete in the order of issue: when only dP is left, the scores are complete, and the exponentials run
    # while the tensor cores compute dP.
    scores = hopper.warpgroup_mma_wait(1, [scores])
    p_operand, p = transposed_p(program, scores, lse2, head.numbers, i, head.whole_end)
    delta = stream.numbers(stream.delta, i)
    dp = hopper.warpgroup_mma_wait(0, [dp])
    ds_operand = gl.convert_layout((p * (dp - delta[None, :])).to(geometry.dtype), geometry.OPERAND)
    dv = hopper.warpgroup_mma(p_operand, stream.dout.block(i), dv, is_async=True)
    return hopper.warpgroup_mma(ds_operand, stream.q.block(i), dk, is_async=True), dv


@gluon.jit
def _sum_blocks(program, head, dk, dv):
    """Add all blocks of one head to dK and dV.

    The scores of a block are queued behind dK of the block before: the tensor cores work on them while this consumer
    waits for dK.
    """
    stream = program.stream
    HEADS_TOGETHER: gl.constexpr = program.geometry.HEADS_TOGETHER
    if program.blocks > 0:
        # The first block is a trip of its own: no product of an earlier block is under way.
        # This consumer waits until the producer has brought the first Q and its lse.
        scores = stream.q.issue_scores(head.k, head.begin, head.zero)
        dk_token, dv_token = _block(program, head, scores, dk, dv, head.begin)
        for i in range(head.begin + 1 if HEADS_TOGETHER == 1 else opaque(head.begin + 1), head.end):
            # This consumer waits until the producer has brought Q of block i and its lse.
            scores = stream.q.issue_scores(head.k, i, head.zero)
            # When only one product is left, the scores, dK and dV of the block before are complete.
            dk, dv = hopper.warpgroup_mma_wait(1, [dk_token, dv_token])
            # The producer waits until all consumers have left Q, dO and the numbers of the block before.
            stream.empty.leave(i - 1)
            dk_token, dv_token = _block(program, head, scores, dk, dv, i)
        dk, dv = hopper.warpgroup_mma_wait(0, [dk_token, dv_token])
        if HEADS_TOGETHER > 1:
            # The producer waits until all consumers have left the last Q and dO, to bring blocks of the next head. With
            # one head no producer waits here, and an arrival nevertheless made the loop above 10 % slower.
            stream.empty.leave(head.end - 1)
    return dk, dv


@gluon.jit
def _consumer(warpgroup: gl.constexpr, program):
    """Compute dK and dV of 64 keys of the tile, for one KV head after the other."""
    geometry = program.geometry
    BLOCK_D: gl.constexpr = geometry.BLOCK_D
    HEADS_TOGETHER: gl.constexpr = geometry.HEADS_TOGETHER
    RANGED: gl.constexpr = program.stream.mask.RANGED
    own = own_key_rows(warpgroup, program.tile, program.slot_rows, geometry, RANGED)
    k_buffer = program.k_buffers.index(warpgroup)
    v_buffer = program.v_buffers.index(warpgroup)
    k = program.k.from_head(program.head.to(gl.int64))
    v = program.v.from_head(program.head.to(gl.int64))
    # The copies run while this consumer sets up; inside of the loop it waits for them.
    own.copy(k, v, k_buffer, v_buffer)
    for n in range(HEADS_TOGETHER):
        begin, end = n * program.blocks, (n + 1) * program.blocks
        whole_end = begin + program.whole
        # Each thread waits for its own copies of keys; the fence then shows them to the tensor cores.
        async_copy.wait_group(0)
        hopper.fence_async_shared()
        # The warps of this consumer wait for each other: a product reads keys that all of them copied.
        thread_barrier()
        numbers = own.positions(geometry.SCORES) if RANGED else own.numbers(geometry.SCORES)
        # Products of scores do not add to `zero`: it gives them their layout.
        zero = gl.zeros([64, geometry.STREAMED], gl.float32, geometry.SCORES)
        head = _HeadKeys(
            k=k_buffer, v=v_buffer, numbers=numbers, zero=zero, begin=begin, end=end, whole_end=whole_end
        )  # fmt: skip
        dk = gl.zeros([64, BLOCK_D], gl.float32, geometry.SUMS)
        dv = gl.zeros([64, BLOCK_D], gl.float32, geometry.SUMS)
        dk, dv = _sum_blocks(program, head, dk, dv)
        if HEADS_TOGETHER > 1:
            k = k.from_head(1)
            v = v.from_head(1)
            # The warps of this consumer wait for each other: none still reads keys that the next head replaces.
            thread_barrier()
            if n < HEADS_TOGETHER - 1:  # the next keys are loaded while these results are stored
                own.copy(k, v, k_buffer, v_buffer)
        program.results.store(own, program.head, n, dk, dv)


@gluon.jit(do_not_specialize=["n_sequences", "T", "slot_rows", "first_kv_head"])
def backward_dkdv_hopper(
    q_ptr, k_ptr, v_ptr, dout_ptr, delta_ptr, lse2_ptr, sequences_ptr, into_dk_ptr, into_dv_ptr,
    n_sequences, T, slot_rows, first_kv_head, dk_ptr, dv_ptr,
    SLOTS: gl.constexpr, KV_HEADS: gl.constexpr, GROUP: gl.constexpr, HEAD_DIM: gl.constexpr, CAUSAL: gl.constexpr,
    SOFTMAX_SCALE: gl.constexpr, STRIDE_QT: gl.constexpr, STRIDE_QH: gl.constexpr, STRIDE_KT: gl.constexpr,
    RANGED: gl.constexpr, LEFT: gl.constexpr, RIGHT: gl.constexpr, CHUNK: gl.constexpr, SOFTCAP: gl.constexpr,
    STRIDE_KH: gl.constexpr, STRIDE_VT: gl.constexpr, STRIDE_VH: gl.constexpr, STRIDE_DOT: gl.constexpr,
    STRIDE_DOH: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr,
    STAGES: gl.constexpr, TILES_TOGETHER: gl.constexpr, HEADS_TOGETHER: gl.constexpr, ACCUMULATE: gl.constexpr,
):  # fmt: skip
    """Arguments and results: `portable.dkdv.backward_dkdv`. BLOCK_N is 64 keys for each consumer, or for two."""
    tile_number, heads = tile_and_head(KV_HEADS // HEADS_TOGETHER, TILES_TOGETHER)
    window_head = heads * HEADS_TOGETHER
    tile = load_sequence(sequences_ptr, n_sequences, tile_number, T, slot_rows, SLOTS, BLOCK_N)
    # The grid is an upper bound: this program may have no tile.
    if tile.first_key >= tile.n_keys:
        return

    geometry = Geometry(
        dtype=q_ptr.dtype.element_ty, SLOTS=SLOTS, GROUP=GROUP, HEAD_DIM=HEAD_DIM, BLOCK_D=BLOCK_D, OWNED=BLOCK_N,
        STREAMED=BLOCK_M, STAGES=STAGES, HEADS_TOGETHER=HEADS_TOGETHER, SHARED=2 if BLOCK_D > 128 else 1,
    )  # fmt: skip
    packing = Packing(GROUP, BLOCK_M)
    mask = RowMask(make_mask(CAUSAL, LEFT, RIGHT, CHUNK), RANGED, packing.TOKENS, BLOCK_N)
    late = find_half_blocks(tile, 0, mask)
    early = find_half_blocks(tile, 1, mask)
    # Consumers count blocks through both halves; `produce_rows` brings the blocks that need no mask first.
    blocks = (late.blocks + early.blocks) * packing.PARTS
    whole = blocks - (late.masked + late.last() + early.masked + early.last()) * packing.PARTS
    kv_head = (first_kv_head + window_head).to(gl.int64)
    sequence = find_sequence_rows(tile, kv_head, mask)
    # delta and lse in base 2 are [window, T * GROUP].
    lse2_ptr += window_head.to(gl.int64) * T * GROUP
    delta_ptr += window_head.to(gl.int64) * T * GROUP
    OWNED: gl.constexpr = [BLOCK_N // 64, 64, BLOCK_D]
    k_buffers = gl.allocate_shared_memory(geometry.dtype, OWNED, geometry.OWNED_BUFFER)
    v_buffers = gl.allocate_shared_memory(geometry.dtype, OWNED, geometry.OWNED_BUFFER)
    stream = make_row_stream(geometry, packing, mask)
    handover = (make_handover(geometry),) if geometry.WIDE else ()
    # The copy engine must see the barriers before the producer uses them.
    hopper.fence_async_shared()
    program = _Dkdv(
        geometry=geometry, tile=tile, slot_rows=slot_rows, head=window_head, blocks=blocks, whole=whole,
        k=Strided(ptr=k_ptr, STRIDE_T=STRIDE_KT, STRIDE_H=STRIDE_KH),
        v=Strided(ptr=v_ptr, STRIDE_T=STRIDE_VT, STRIDE_H=STRIDE_VH), k_buffers=k_buffers, v_buffers=v_buffers,
        stream=stream, handover=handover, SOFTCAP=SOFTCAP, SCALE_LOG2=score_scale_log2(SOFTMAX_SCALE, SOFTCAP),
        results=KeyGradients(
            dk_ptr=dk_ptr, dv_ptr=dv_ptr, KV_HEADS=KV_HEADS, SOFTMAX_SCALE=SOFTMAX_SCALE, ACCUMULATE=ACCUMULATE
        ),
    )  # fmt: skip
    arrays = RowArrays(
        q=Strided(ptr=q_ptr, STRIDE_T=STRIDE_QT, STRIDE_H=STRIDE_QH),
        dout=Strided(ptr=dout_ptr, STRIDE_T=STRIDE_DOT, STRIDE_H=STRIDE_DOH),
        lse2_ptr=lse2_ptr, delta_ptr=delta_ptr, T=T,
    )  # fmt: skip
    if geometry.WIDE:
        specialize_warps(
            consume_wide, (program,), geometry.WARPGROUPS, (produce_rows, (stream, tile, sequence, arrays), 4)
        )
    else:
        specialize_warps(
            _consumer, (program,), geometry.WARPGROUPS, (produce_rows, (stream, tile, sequence, arrays), 4)
        )
