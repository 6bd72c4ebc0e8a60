"""The stream of keys and the loop of the dQ kernel above head_dim 128.

Shared memory holds three blocks beside Q and dO. Blocks of V and K share them in one ring, and consumers leave each by
itself. V of a block comes before K, and dP before the scores: V is left early, so that the next blocks come while the
tensor cores work on the scores and on dQ.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper

from .geometry import Geometry
from .keys import box_shape, find_keys, next_block, store_numbers
from .releases import struct
from .scores import recompute_p
from .stages import EmptyStages, Ring, make_empty_stages, make_ring

# In the ring, V of block `i` of the keys has the number 2 * i, and K of the block the number 2 * i + 1.
V, K = gl.constexpr(0), gl.constexpr(1)


@struct
class ValuesAndKeys:
    """The blocks of V and K that a tile sees, for the one head that a program serves."""

    geometry: Geometry
    keys: gl.base_value  # `Keys` or `RangedKeys`
    ring: Ring
    numbers: gl.shared_memory_descriptor  # 0 to BLOCK_N - 1, for `HeadBlocks`
    empty: EmptyStages
    CHUNKS: gl.constexpr  # whether the descriptor has a dimension for chunks: see `RangedKeys.descriptor`

    @gluon.jit
    def load(self, descriptor, block, i, ARRAY: gl.constexpr):
        """Load `block` of K or V, block `i` of the keys."""
        # The producer waits until all consumers have left the block that has this one's stage.
        self.empty.wait(2 * i + ARRAY)
        if self.CHUNKS:
            late = gl.where(block.chunk < self.geometry.SLOTS, 0, 1)
            self.ring.load(descriptor, [block.slot, late, block.row, 0], 2 * i + ARRAY)
        else:
            self.ring.load(descriptor, [block.slot, block.row, 0], 2 * i + ARRAY)

    @gluon.jit
    def issue_scores(self, rows, i, zero, ARRAY: gl.constexpr):
        """Wait, as a consumer, for K or V of block `i`, and issue the product of `rows` and its rows."""
        return self.ring.issue_scores(rows, 2 * i + ARRAY, zero)

    @gluon.jit
    def leave(self, i, ARRAY: gl.constexpr):
        """Tell the producer, as one of the consumers, that this one has read K or V of block `i`."""
        self.empty.leave(2 * i + ARRAY)


@gluon.jit
def make_values_and_keys(tile, position, geometry, MASK: gl.constexpr):
    """Make the `ValuesAndKeys` that a `QueryTile` at `position` sees."""
    CHUNKS: gl.constexpr = MASK is not None and geometry.SLOTS > 1
    BOX: gl.constexpr = box_shape(4 if CHUNKS else 3, geometry.STREAMED, geometry.BLOCK_D)
    return ValuesAndKeys(
        geometry=geometry, keys=find_keys(tile, position, geometry, MASK), ring=make_ring(BOX, geometry, 1),
        numbers=store_numbers(geometry.STREAMED), empty=make_empty_stages(geometry), CHUNKS=CHUNKS,
    )  # fmt: skip


@gluon.jit
def produce_values_and_keys(stream, v, k, slot_rows):
    """Load all blocks of V and K, in the order in which consumers use them.

    K, which dS multiplies, must hold no padding even where the mask hides it: padding may be NaN. So the top block of
    K, which has the last key, has a bound of its own.
    """
    geometry = stream.geometry
    keys = stream.keys
    chunk, start, blocks = keys.top()
    if blocks > 0:
        # The producer makes descriptors while the consumers load their rows, and that of K while the first V is on its
        # way.
        v_desc = keys.descriptor(v, slot_rows, geometry, False)
        block = keys.locate(chunk, start, gl.to_tensor(0))
        stream.load(v_desc, block, 0, V)
        k_desc = keys.descriptor(k, slot_rows, geometry, True)
        stream.load(k_desc, block, 0, K)
        if stream.CHUNKS:
            k_desc = keys.descriptor(k, slot_rows, geometry, False)
        for i in range(1, blocks):
            block = next_block(keys, block, i, blocks, 1)
            stream.load(v_desc, block, i, V)
            stream.load(k_desc, block, i, K)


@gluon.jit
def _issue_dq(program, head, dq, scores, dp, i, ragged):
    """Issue the product that adds block `i`, whose scores and dP are complete, to dQ.

    Return (dQ, with this product still under way, the next ragged block).
    """
    geometry = program.geometry
    ds = recompute_p(scores, head.lse2, program) * (dp - head.delta[:, None])
    # P has no other use in this kernel, so that masking dS is enough.
    ds, ragged = head.blocks.hide(ds, 0.0, i, ragged)
    ds_operand = gl.convert_layout(ds.to(geometry.dtype), geometry.OPERAND)
    return hopper.warpgroup_mma(ds_operand, program.stream.ring.block(2 * i + K), dq, is_async=True), ragged


@gluon.jit
def sum_wide_blocks(program, head, q, dq):
    """Add all blocks of one head to dQ: dP of a block is queued behind dQ of the block before."""
    stream = program.stream
    blocks = head.blocks
    begin, end = blocks.begin, blocks.end
    if blocks.count > 0:
        # This consumer waits until the producer has brought the first V, then the first K.
        dp = stream.issue_scores(head.dout, begin, head.zero, V)
        scores = stream.issue_scores(q, begin, head.zero, K)
        dp = hopper.warpgroup_mma_wait(1, [dp])
        # The producer waits until all consumers have left the first V.
        stream.leave(begin, V)
        scores = hopper.warpgroup_mma_wait(0, [scores])
        dq_token, ragged = _issue_dq(program, head, dq, scores, dp, begin, blocks.ragged)
        for i in range(begin + 1, end):
            # This consumer waits until the producer has brought V of block i.
            dp = stream.issue_scores(head.dout, i, head.zero, V)
            # When only dP is left, dQ of the block before is complete.
            dq = hopper.warpgroup_mma_wait(1, [dq_token])
            # The producer waits until all consumers have left K of the block before.
            stream.leave(i - 1, K)
            # This consumer waits until the producer has brought K of block i.
            scores = stream.issue_scores(q, i, head.zero, K)
            dp = hopper.warpgroup_mma_wait(1, [dp])
            # The producer waits until all consumers have left V of block i.
            stream.leave(i, V)
            scores = hopper.warpgroup_mma_wait(0, [scores])
            dq_token, ragged = _issue_dq(program, head, dq, scores, dp, i, ragged)
        dq = hopper.warpgroup_mma_wait(0, [dq_token])
    return dq
