"""The way of dQ from the fused backward kernel to its float32 sums, and kernels that clear and finish these.

In the sums the columns of a row stand in the order of `in_order_of_sums`.
"""

import triton
import triton.language as tl
from triton._C.libtriton import ir
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia import hopper

from ..segments.lookup import tables_are_invalid
from .releases import struct


@builtin
def _add_to_global(desc, place, buffer, _semantic=None):
    """Add `buffer` to the box of `desc` at `place`, by the copy engine, asynchronously."""
    # Triton 3.6 has this operation in its builder, but no function of Gluon for it, as later releases have.
    place = _semantic._convert_to_ir_values(place, require_i64=False)
    _semantic.builder.create_async_tma_reduce(ir.DESCRIPTOR_REDUCE_KIND.ADD, desc.handle, place, buffer.handle)


@gluon.jit
def in_order_of_sums(dq):
    """Return `dq` with the columns of each group of 32 in the order of the sums.

    Column 8 j + 4 h + x of a group becomes column 16 h + 4 j + x. No value moves. Of a row of a product a thread has
    two neighbours in each 8 columns. In their own order, the 4 rows that are stored together would use half of the
    banks, each twice; in this order they use all banks once.
    """
    SHAPE: gl.constexpr = dq.shape
    PARTS: gl.constexpr = [SHAPE[0], SHAPE[1] // 32, 4, 2, 4]
    return dq.reshape(PARTS).permute((0, 1, 3, 2, 4)).reshape(SHAPE)


@gluon.constexpr_function
def shape_of_half(packing, geometry):
    """Return (tokens, heads, columns) of the half of dQ of a block that one consumer computes.

    Of a block of 64 rows it has half of the columns, of a block of 128 half of the rows.
    """
    if geometry.STREAMED < 128:
        return [packing.TOKENS, packing.HEADS, geometry.BLOCK_D // 2]
    if packing.TOKENS == 1:
        return [1, packing.HEADS // 2, geometry.BLOCK_D]
    return [packing.TOKENS // 2, packing.HEADS, geometry.BLOCK_D]


@gluon.constexpr_function
def step_of_half(packing, geometry):
    """Return (tokens, heads, columns) from the first half of dQ of a block to the second."""
    half, whole = shape_of_half(packing, geometry), (packing.TOKENS, packing.HEADS, geometry.BLOCK_D)
    return [a if a < b else 0 for a, b in zip(half, whole, strict=True)]


@struct
class DqOut:
    """The buffers that take dQ of a block to a writer: each of the two consumers fills half.

    Even and odd blocks have a full barrier each, so that two writers can take them.
    """

    buffers: gl.shared_memory_descriptor  # [2, *shape_of_half] float32
    full: gl.shared_memory_descriptor  # [2, 1]; both consumers arrive
    empty: gl.shared_memory_descriptor  # the writer of the block arrives

    @gluon.jit
    def wait_empty(self, i, pred=True):
        """Wait, as a consumer, until the buffers are empty for block `i`; not at all if `pred` is false."""
        # This consumer waits until the writer has read dQ of block i - 1; for block 0 the buffers are empty.
        hopper.mbarrier.wait(self.empty, (i & 1) ^ 1, pred=pred)

    @gluon.jit
    def store(self, warpgroup: gl.constexpr, dq, i):
        """Store half of dQ of block `i` for the writer, into an empty buffer."""
        buffer = self.buffers.index(warpgroup)
        ROWS: gl.constexpr = [buffer.shape[0] * buffer.shape[1], buffer.shape[2]]
        buffer.reshape(ROWS).store(in_order_of_sums(dq))
        hopper.fence_async_shared()
        # The writer waits until both consumers have stored their half.
        hopper.mbarrier.arrive(self.full.index(i & 1), count=1)

    @gluon.jit
    def put(self, warpgroup: gl.constexpr, dq_token, i):
        """Store half of dQ of block `i` for the writer; `dq_token` is the second last product under way."""
        self.wait_empty(i)
        # Only the scores of the next block were issued behind dQ: they may still be under way.
        self.store(warpgroup, hopper.warpgroup_mma_wait(1, [dq_token]), i)

    @gluon.jit
    def wait(self, i):
        """Wait, as a writer, for dQ of block `i`."""
        # The writer waits until both consumers have stored their half.
        hopper.mbarrier.wait(self.full.index(i & 1), i >> 1 & 1)

    @gluon.jit
    def add_to(self, descriptor, row, head, STEP: gl.constexpr):
        """Let the copy engine add dQ to two boxes, at `row` and `head` and `STEP` behind, without waiting."""
        _add_to_global(descriptor, [row, head, 0], self.buffers.index(0))
        _add_to_global(descriptor, [row + STEP[0], head + STEP[1], STEP[2]], self.buffers.index(1))

    @gluon.jit
    def leave(self):
        """Give the buffers back to the consumers, as a writer, when the copy engine has read them."""
        hopper.tma.store_wait(0)
        # Both consumers wait until the buffers are empty.
        hopper.mbarrier.arrive(self.empty, count=1)


@triton.jit(do_not_specialize=["T"])
def clear_sums(
    q_ptr,  # [T, heads, head_dim], not read: the kernel runs on its device
    T,
    sums_ptr,  # [T, heads of the window, columns] float32 and, behind them, the counters of `turns`
    ROW: tl.constexpr,  # elements for each token: heads * columns, and heads if there are counters
    BLOCK: tl.constexpr,
):
    """Set `sums` and counters to zero before `backward_fused_hopper` adds to it. Grid: blocks of elements."""
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(sums_ptr + places, 0.0, mask=places < tl.cast(T, tl.int64) * ROW)


@triton.jit(do_not_specialize=["n_segments", "T", "first_kv_head"])
def finish_dq(
    sums_ptr,  # [T, heads of the window, COLUMNS] float32
    segments_ptr,
    into_dq_ptr,
    n_segments,
    T,
    first_kv_head,  # of the window
    dq_ptr,  # [T, HEADS, HEAD_DIM]
    ROW: tl.constexpr,  # heads of the window * COLUMNS
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    COLUMNS: tl.constexpr,
    SOFTMAX_SCALE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write dQ of a window's heads from the sums of `backward_fused_hopper`.

    All its rows are written; they are NaN if the tables are invalid, as in `load_segment`.
    """
    # The sums say nothing about invalid tables: NaN times any sum is NaN.
    invalid = tables_are_invalid(segments_ptr, n_segments, T)
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = places < tl.cast(T, tl.int64) * ROW
    sums = tl.load(sums_ptr + places, mask=inside) * tl.where(invalid, float("nan"), SOFTMAX_SCALE)
    # Back from `in_order_of_sums`.
    dq = sums.reshape([BLOCK // 32, 2, 4, 4]).permute([0, 2, 1, 3]).reshape([BLOCK])
    if ROW < HEADS * COLUMNS:  # place among the sums of all heads
        places = (places // ROW * HEADS + first_kv_head * GROUP) * COLUMNS + places % ROW
    if COLUMNS > HEAD_DIM:
        column = places % COLUMNS
        inside &= column < HEAD_DIM
        places = places // COLUMNS * HEAD_DIM + column
    tl.store(dq_ptr + places, dq.to(dq_ptr.dtype.element_ty), mask=inside)
