"""The fused backward kernel for Hopper also adds each block's dQ to a float32 array.

Scores are computed once instead of twice. dS goes through shared memory, where the keys of both consumers meet: each
multiplies half of head_dim. More partitions, the writers, let the copy engine add both halves to `sums`. They do so in
`turns`, which give the same bits in every run, or in no fixed order, which does not. `clear_sums` sets that array to
zero before, and `finish_dq` turns it into dQ.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from ..segments.lookup import load_sequence, tile_and_head
from ..segments.ranges import make_mask
from .geometry import Geometry, product_layout
from .order import find_start, order_blocks
from .owned import Strided, own_key_rows
from .releases import struct, thread_barrier
from .results import KeyGradients
from .rows import (
    Packing,
    RowArrays,
    RowMask,
    RowStream,
    SequenceRows,
    count_longest_walk,
    find_half_blocks,
    find_sequence_rows,
    make_row_stream,
    produce_rows,
)
from .scores import cap_scores, score_scale_log2
from .small_fused import consume_small, make_halves_of_ds
from .stages import make_barrier, make_barriers
from .sums import DqOut, shape_of_half, step_of_half
from .turns import Turns, tile_and_head_side_by_side, write_in_turns
from .warps import opaque, specialize_warps


@struct
class _SharedDs:
    """dS of a block in shared memory, where the two consumers exchange it.

    Each consumer stores the rows of its own keys, and both read all rows. A consumer uses two buffers in turn and needs
    no barrier for empty ones: the other consumer stores dS of block `i - 1` only after it has read dS of block `i - 2`.
    """

    buffers: gl.shared_memory_descriptor  # [4, 64, BLOCK_M]: two for even blocks, two for odd ones
    full: gl.shared_memory_descriptor  # both consumers arrive

    @gluon.jit
    def put(self, warpgroup: gl.constexpr, ds, i):
        """Store dS of block `i` for the keys of consumer `warpgroup`."""
        # Even and odd blocks take different buffers: see the class for why no barrier says that they are empty.
        self.buffers.index((i & 1) * 2 + warpgroup).store(ds)
        # Tensor cores read shared memory by another path than the stores of a thread: the fence orders the two.
        hopper.fence_async_shared()
        # Both consumers wait until both have stored dS.
        hopper.mbarrier.arrive(self.full, count=1)

    @gluon.jit
    def wait(self, i):
        """Wait, as a consumer, until both have stored dS of block `i`."""
        hopper.mbarrier.wait(self.full, i & 1)

    @gluon.jit
    def transposed(self, i, consumer: gl.constexpr):
        """Return dS of block `i` for the keys of `consumer`: `[BLOCK_M, 64]`."""
        return self.buffers.index((i & 1) * 2 + consumer).permute((1, 0))


@struct
class _Fused:
    """Everything that both consumers of one program share."""

    geometry: Geometry
    slot_rows: gl.tensor
    head: gl.tensor  # of the window
    tile: gl.tuple  # the `KeyTile`
    blocks: gl.tensor
    whole: gl.tensor  # number of the blocks that need no mask; in the order of runs they come first
    start: gl.tuple  # on a grid (number in the order of runs of the first block,), otherwise nothing
    k: Strided
    v: Strided
    k_buffers: gl.shared_memory_descriptor  # [2, 64, BLOCK_D]
    v_buffers: gl.shared_memory_descriptor
    stream: RowStream
    ds: gl.base_value  # `_SharedDs`, or `HalvesOfDs` for blocks of 128 rows
    dq: DqOut
    results: KeyGradients
    SOFTCAP: gl.constexpr
    SCALE_LOG2: gl.constexpr

    @gluon.jit
    def masks(self, i):
        """Return whether rows of block `i` may miss a key of the tile."""
        if len(self.start) > 0:
            number = i + self.start[0]
            return gl.where(number < self.blocks, number, number - self.blocks) >= self.whole
        else:
            return i >= self.whole


@struct
class _Keys:
    """The 64 keys of a consumer, and the zeros that its products begin with."""

    numbers: gl.tensor  # [64], key numbers in the sequence; under a ranged mask their positions
    zero: gl.tensor  # [64, BLOCK_M]
    no_dq: gl.tensor  # [BLOCK_M, BLOCK_D / 2]


@gluon.jit
def _halves(x):
    """Return the two halves of the columns of `x`; no value moves."""
    PARTS: gl.constexpr = [x.shape[0], 2, x.shape[1] // 2]
    return x.reshape(PARTS).permute((0, 2, 1)).split()


@gluon.jit
def _whole(first, second, LAYOUT: gl.constexpr):
    """Return the array whose `_halves` are given, in its own layout."""
    SHAPE: gl.constexpr = [first.shape[0], 2 * first.shape[1]]
    return gl.convert_layout(gl.join(first, second).permute((0, 2, 1)).reshape(SHAPE), LAYOUT)


@gluon.jit
def _block(warpgroup: gl.constexpr, program, own, scores, lse2, dk, dv, i):
    """Issue the products that add block `i`, whose scores are complete, to dV, then dK, and store its dS."""
    geometry = program.geometry
    stream = program.stream
    HALF_M: gl.constexpr = geometry.STREAMED // 2
    # The places of K and V are opaque: otherwise the addresses of all their parts are computed once, and spilled.
    v = program.v_buffers.index(opaque(gl.to_tensor(warpgroup)))
    dp = stream.dout.issue_scores_at_once(v, i, own.zero)
    if program.SOFTCAP > 0:
        scores = cap_scores(scores, program.results.SOFTMAX_SCALE, program.SOFTCAP)
        capped = _halves(scores)
    exponents = _halves(scores * program.SCALE_LOG2 - lse2[None, :])
    # dV of the first half of the rows is queued behind dP before the exponentials of the second half, so that the
    # tensor cores need not wait for these exponentials.
    halves = ()
    for half in gl.static_range(2):
        p = gl.exp2(exponents[half])
        if program.masks(i):
            p = gl.where(_halves(stream.sees(own.numbers, i))[half], p, 0.0)
        p_operand = gl.convert_layout(p.to(geometry.dtype), geometry.OPERAND)
        dv = hopper.warpgroup_mma(p_operand, stream.dout.block(i).slice(half * HALF_M, HALF_M, 0), dv, is_async=True)
        # dV takes P without the derivative of the cap, which is for dS.
        if program.SOFTCAP > 0:
            p *= 1.0 - capped[half] * capped[half]
        halves += (p,)
    p = _whole(halves[0], halves[1], geometry.SCORES)
    delta = stream.numbers(stream.delta, i)
    # When only the two products of dV are left, dP is complete.
    ds = p * (hopper.warpgroup_mma_wait(2, [dp]) - delta[None, :])
    if program.masks(i):
        # dP of a hidden key may be infinite or NaN, and 0 * infinity is NaN.
        ds = gl.where(stream.sees(own.numbers, i), ds, 0.0)
    ds = ds.to(geometry.dtype)
    ds_operand = gl.convert_layout(ds, geometry.OPERAND)
    program.ds.put(warpgroup, ds, i)
    return hopper.warpgroup_mma(ds_operand, stream.q.block(i), dk, is_async=True), dv


@gluon.jit
def _issue_dq(warpgroup: gl.constexpr, program, own, i):
    """Issue both products of half of the columns of dQ of block `i`: one for each consumer's keys."""
    HALF_D: gl.constexpr = program.geometry.BLOCK_D // 2
    # This consumer multiplies dS of all 128 keys and half of the columns of K: it waits until the other has stored dS.
    program.ds.wait(i)
    # Buffer 0 has the keys of consumer 0, buffer 1 the keys of consumer 1: the sum over both is the sum over all keys
    # of the tile.
    k_upper = program.k_buffers.index(0).slice(warpgroup * HALF_D, HALF_D, 1)
    k_lower = program.k_buffers.index(1).slice(warpgroup * HALF_D, HALF_D, 1)
    dq = hopper.warpgroup_mma(program.ds.transposed(i, 0), k_upper, own.no_dq, use_acc=False, is_async=True)
    return hopper.warpgroup_mma(program.ds.transposed(i, 1), k_lower, dq, is_async=True)


@gluon.jit
def _consumer(warpgroup: gl.constexpr, program):
    """Compute dK and dV of 64 keys of the tile, and half of the columns of dQ of every block."""
    geometry = program.geometry
    stream = program.stream
    blocks = program.blocks
    BLOCK_M: gl.constexpr = geometry.STREAMED
    BLOCK_D: gl.constexpr = geometry.BLOCK_D
    RANGED: gl.constexpr = stream.mask.RANGED
    own = own_key_rows(warpgroup, program.tile, program.slot_rows, geometry, RANGED)
    k = program.k_buffers.index(warpgroup)
    v = program.v_buffers.index(warpgroup)
    head = program.head.to(gl.int64)
    # Copies are asynchronous: each thread waits for its own, and the fence then shows them to the tensor cores.
    own.copy(program.k.from_head(head), program.v.from_head(head), k, v)
    async_copy.wait_group(0)
    hopper.fence_async_shared()
    # The warps of this consumer wait for each other: a product reads keys that all of them copied.
    thread_barrier()

    keys = _Keys(
        numbers=own.positions(geometry.SCORES) if RANGED else own.numbers(geometry.SCORES),
        zero=gl.zeros([64, BLOCK_M], gl.float32, geometry.SCORES),
        no_dq=gl.zeros([BLOCK_M, BLOCK_D // 2], gl.float32, product_layout(BLOCK_D // 2)),
    )
    dk = gl.zeros([64, BLOCK_D], gl.float32, geometry.SUMS)
    dv = gl.zeros([64, BLOCK_D], gl.float32, geometry.SUMS)
    if blocks > 0:
        # This consumer waits until the producer has brought the first Q and its lse.
        scores = stream.q.issue_scores(k, 0, keys.zero)
        for i in range(blocks):
            # While the tensor cores are at work on the scores, this consumer waits until the producer has brought dO of
            # block i and its delta, and reads lse.
            stream.dout.wait(i)
            lse2 = stream.numbers(stream.lse2, i)
            scores = hopper.warpgroup_mma_wait(0, [scores])
            dk, dv = _block(warpgroup, program, keys, scores, lse2, dk, dv, i)
            # The stage is left before this consumer waits for dS of the other, so that the producer loads earlier.
            dk, dv = hopper.warpgroup_mma_wait(0, [dk, dv])
            # The producer waits until both consumers have left Q, dO and the numbers of block i.
            stream.empty.leave(i)
            dq_token = _issue_dq(warpgroup, program, keys, i)
            # This consumer waits until the producer has brought the next Q: its scores are queued behind dQ of this
            # block and run while dQ is written out. After the last block there is no wait: the product is of stale
            # data and is never read.
            k = program.k_buffers.index(opaque(gl.to_tensor(warpgroup)))
            scores = stream.q.issue_scores(k, i + 1, keys.zero, pred=i + 1 < blocks)
            program.dq.put(warpgroup, dq_token, i)
        scores = hopper.warpgroup_mma_wait(0, [scores])
    program.results.store(own, program.head, 0, dk, dv)


@gluon.jit
def _consume(warpgroup: gl.constexpr, program):
    """Compute dK and dV of 64 keys of the tile, and half of dQ of every block."""
    if program.geometry.STREAMED == 128:
        consume_small(warpgroup, program)
    else:
        _consumer(warpgroup, program)


@gluon.jit
def _writer(dq, sums, sequence, order, blocks, geometry, packing):
    """Let the copy engine add dQ of every block to the `Strided` array `sums`, in no fixed order."""
    BOX: gl.constexpr = shape_of_half(packing, geometry)
    STEP: gl.constexpr = step_of_half(packing, geometry)
    descriptor = sequence.descriptor(sums, geometry, BOX, sums.STRIDE_H)
    for i in range(blocks):
        # The same order as the producer's, computed from block numbers, as nothing tells the writer where a block is.
        row, head = order.place(i, packing)
        dq.wait(i)
        dq.add_to(descriptor, row, head, STEP)
        dq.leave()


@gluon.jit(do_not_specialize=["n_sequences", "T", "slot_rows", "first_kv_head"])
def backward_fused_hopper(
    q_ptr, k_ptr, v_ptr, dout_ptr, delta_ptr, lse2_ptr, sequences_ptr, into_dk_ptr, into_dv_ptr, into_sums_ptr,
    n_sequences, T, slot_rows, first_kv_head, dk_ptr, dv_ptr, sums_ptr,
    SLOTS: gl.constexpr, KV_HEADS: gl.constexpr, GROUP: gl.constexpr, HEAD_DIM: gl.constexpr,
    CAUSAL: gl.constexpr, SOFTMAX_SCALE: gl.constexpr, STRIDE_QT: gl.constexpr, STRIDE_QH: gl.constexpr,
    RANGED: gl.constexpr, LEFT: gl.constexpr, RIGHT: gl.constexpr, CHUNK: gl.constexpr, SOFTCAP: gl.constexpr,
    STRIDE_KT: gl.constexpr, STRIDE_KH: gl.constexpr, STRIDE_VT: gl.constexpr, STRIDE_VH: gl.constexpr,
    STRIDE_DOT: gl.constexpr, STRIDE_DOH: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
    BLOCK_D: gl.constexpr, STAGES: gl.constexpr, TILES_TOGETHER: gl.constexpr, ACCUMULATE: gl.constexpr,
    COLUMNS: gl.constexpr, SIDE: gl.constexpr, WRITERS: gl.constexpr,
):  # fmt: skip
    """Write dK and dV as `backward_dkdv_hopper` does, and add unscaled dQ to `sums`.

    `sums` is `[T, heads, COLUMNS]` float32, where heads are the query heads of the window, and COLUMNS is HEAD_DIM
    rounded up to a multiple of 32. BLOCK_M is 64 or, at BLOCK_D 64 and without a cap, 128. SIDE KV heads have their
    tiles in turn; if SIDE is 0, TILES_TOGETHER says the order of tiles. If WRITERS is 0, dQ is added in no fixed order.
    Otherwise tiles of keys take turns, with WRITERS writers each. The counters of `turns`, `[heads, T]` int32, then lie
    behind the sums.
    """
    if SIDE > 0:
        tile_number, window_head = tile_and_head_side_by_side(KV_HEADS, SIDE)
    else:
        tile_number, window_head = tile_and_head(KV_HEADS, TILES_TOGETHER)
    tile = load_sequence(sequences_ptr, n_sequences, tile_number, T, slot_rows, SLOTS, BLOCK_N)
    # The grid is an upper bound: this program may have no tile.
    if tile.first_key >= tile.n_keys:
        return

    SMALL: gl.constexpr = BLOCK_M == 128
    geometry = Geometry(
        dtype=q_ptr.dtype.element_ty, SLOTS=SLOTS, GROUP=GROUP, HEAD_DIM=HEAD_DIM, BLOCK_D=BLOCK_D, OWNED=BLOCK_N,
        STREAMED=BLOCK_M, STAGES=STAGES, HEADS_TOGETHER=1,
    )  # fmt: skip
    packing = Packing(GROUP, BLOCK_M)
    kv_head = (first_kv_head + window_head).to(gl.int64)
    MASK: gl.constexpr = make_mask(CAUSAL, LEFT, RIGHT, CHUNK)
    # Turns need a grid, and so do walks that begin at common blocks.
    WALK: gl.constexpr = count_longest_walk(MASK, packing.TOKENS, BLOCK_N) if RANGED else 0
    GRID: gl.constexpr = RANGED and (WRITERS > 0 or WALK > 0)
    mask = RowMask(MASK, RANGED, packing.TOKENS, BLOCK_N, GRID, WALK)
    sequence = find_sequence_rows(tile, kv_head, mask)
    late = find_half_blocks(tile, 0, mask)
    early = find_half_blocks(tile, 1, mask)
    blocks = (late.blocks + early.blocks) * packing.PARTS
    # Behind the last key dS has to be zero, or 0 * infinity would reach dQ: a tile that ends there masks all blocks.
    masked = (late.masked + late.last() + early.masked + early.last()) * packing.PARTS
    whole = gl.where(tile.first_key + BLOCK_N > tile.n_keys, 0, blocks - masked)
    start = find_start(late, early, mask) if GRID else ()
    # delta and lse in base 2 are [window, T * GROUP].
    lse2_ptr += window_head.to(gl.int64) * T * GROUP
    delta_ptr += window_head.to(gl.int64) * T * GROUP
    DS: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, BLOCK_M], geometry.dtype)
    DQ_BOX: gl.constexpr = shape_of_half(packing, geometry)
    DQ: gl.constexpr = gl.NVMMASharedLayout.get_default_for(DQ_BOX, gl.float32)
    k_buffers = gl.allocate_shared_memory(geometry.dtype, [2, 64, BLOCK_D], geometry.OWNED_BUFFER)
    v_buffers = gl.allocate_shared_memory(geometry.dtype, [2, 64, BLOCK_D], geometry.OWNED_BUFFER)
    ds_buffers = () if SMALL else gl.allocate_shared_memory(geometry.dtype, [4, 64, BLOCK_M], DS)
    dq_buffers = gl.allocate_shared_memory(gl.float32, [2, DQ_BOX[0], DQ_BOX[1], DQ_BOX[2]], DQ)
    stream = make_row_stream(geometry, packing, mask, SMALL)
    # Arrivals of a phase: two consumers for dS and for dQ, one writer for the empty buffers of dQ.
    ds = make_halves_of_ds(geometry) if SMALL else _SharedDs(buffers=ds_buffers, full=make_barrier(2))
    dq = DqOut(buffers=dq_buffers, full=make_barriers(2, 2), empty=make_barrier(1))
    hopper.fence_async_shared()
    program = _Fused(
        geometry=geometry, tile=tile, slot_rows=slot_rows, head=window_head, blocks=blocks, whole=whole,
        start=(start[2] * packing.PARTS,) if GRID else (),
        k=Strided(ptr=k_ptr, STRIDE_T=STRIDE_KT, STRIDE_H=STRIDE_KH),
        v=Strided(ptr=v_ptr, STRIDE_T=STRIDE_VT, STRIDE_H=STRIDE_VH), k_buffers=k_buffers, v_buffers=v_buffers,
        stream=stream, ds=ds, dq=dq, SOFTCAP=SOFTCAP, SCALE_LOG2=score_scale_log2(SOFTMAX_SCALE, SOFTCAP),
        results=KeyGradients(
            dk_ptr=dk_ptr, dv_ptr=dv_ptr, KV_HEADS=KV_HEADS, SOFTMAX_SCALE=SOFTMAX_SCALE, ACCUMULATE=ACCUMULATE
        ),
    )  # fmt: skip
    arrays = RowArrays(
        q=Strided(ptr=q_ptr, STRIDE_T=STRIDE_QT, STRIDE_H=STRIDE_QH),
        dout=Strided(ptr=dout_ptr, STRIDE_T=STRIDE_DOT, STRIDE_H=STRIDE_DOH),
        lse2_ptr=lse2_ptr, delta_ptr=delta_ptr, T=T,
    )  # fmt: skip
    # Q and dO have all heads, and the sums have the heads of the window.
    HEADS: gl.constexpr = KV_HEADS * GROUP
    sums = Strided(ptr=sums_ptr, STRIDE_T=HEADS * COLUMNS, STRIDE_H=COLUMNS)
    in_sums = SequenceRows(first=sequence.first, count=sequence.count, kv_head=window_head.to(gl.int64))
    order = order_blocks(late, early, sequence, mask, start)
    # Blocks go from the last rows down: programs that run side by side then read the same rows, and add to them, while
    # caches hold them.
    if WRITERS > 0:
        counters_ptr = (sums_ptr + T.to(gl.int64) * (HEADS * COLUMNS)).to(gl.pointer_type(gl.int32), bitcast=True)
        turns = Turns(
            sums=sums, counters_ptr=counters_ptr, T=T, number=tile.first_key // BLOCK_N, tile=tile if RANGED else (),
            mask=mask, WRITERS=WRITERS,
        )  # fmt: skip
        if WRITERS == 1:
            specialize_warps(
                _consume, (program,), 2,
                (produce_rows, (stream, tile, sequence, arrays, True, start), 1),
                (write_in_turns, (0, dq, turns, in_sums, order, blocks, geometry, packing), 1),
            )  # fmt: skip
        else:
            specialize_warps(
                _consume, (program,), 2,
                (produce_rows, (stream, tile, sequence, arrays, True, start), 1),
                (write_in_turns, (0, dq, turns, in_sums, order, blocks, geometry, packing), 1),
                (write_in_turns, (1, dq, turns, in_sums, order, blocks, geometry, packing), 1),
            )  # fmt: skip
    else:
        specialize_warps(
            _consume, (program,), 2,
            (produce_rows, (stream, tile, sequence, arrays, True, start), 1),
            (_writer, (dq, sums, in_sums, order, blocks, geometry, packing), 1),
        )  # fmt: skip
