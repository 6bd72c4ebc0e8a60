"""The consumers of dK/dV above head_dim 128: one owns dV of 64 keys, the other their dK.

The registers of one consumer do not hold both sums. The owner of dV computes the probabilities, and hands them over
through shared memory to the owner of dK, so that no product is computed twice.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from .owned import own_key_rows
from .releases import struct, thread_barrier
from .scores import transposed_p
from .stages import make_barriers

BUFFERS = gl.constexpr(2)


@struct
class Handover:
    """Probabilities of blocks in shared memory, on their way from the owner of dV to the owner of dK."""

    buffers: gl.shared_memory_descriptor  # [BUFFERS, 64, BLOCK_M] float32
    full: gl.shared_memory_descriptor  # [BUFFERS, 1]; the owner of dV arrives
    empty: gl.shared_memory_descriptor  # [BUFFERS, 1]; the owner of dK arrives

    @gluon.jit
    def put(self, p, i):
        """Store `p [64, BLOCK_M]` of block `i`, as the owner of dV."""
        # The owner of dV waits until the other has read block i - BUFFERS.
        hopper.mbarrier.wait(self.empty.index(i % BUFFERS), ((i // BUFFERS) & 1) ^ 1)
        self.buffers.index(i % BUFFERS).store(p)
        # The owner of dK waits until the probabilities are there.
        hopper.mbarrier.arrive(self.full.index(i % BUFFERS), count=1)

    @gluon.jit
    def get(self, i, LAYOUT: gl.constexpr):
        """Return the probabilities of block `i`, as the owner of dK."""
        # The owner of dK waits until the other has stored them.
        hopper.mbarrier.wait(self.full.index(i % BUFFERS), (i // BUFFERS) & 1)
        p = self.buffers.index(i % BUFFERS).load(LAYOUT)
        # The owner of dV waits until the buffer is empty.
        hopper.mbarrier.arrive(self.empty.index(i % BUFFERS), count=1)
        return p


@gluon.jit
def make_handover(geometry):
    """Make the `Handover` of a program."""
    SHAPE: gl.constexpr = [64, geometry.STREAMED]
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for(SHAPE, gl.float32)
    return Handover(
        buffers=gl.allocate_shared_memory(gl.float32, [BUFFERS, 64, geometry.STREAMED], LAYOUT),
        full=make_barriers(BUFFERS, 1),
        empty=make_barriers(BUFFERS, 1),
    )


@gluon.jit
def _hand_over(program, numbers, scores, i):
    """Hand over the probabilities of block `i`, from its scores: return them for the product of dV."""
    stream = program.stream
    (handover,) = program.handover
    p_operand, p = transposed_p(program, scores, stream.numbers(stream.lse2, i), numbers, i, program.whole)
    # The producer waits until both consumers have left Q of block i and its numbers.
    stream.empty.leave(i)
    handover.put(p, i)
    return p_operand


@gluon.jit
def _sum_values(program, own, k, zero):
    """Return dV of the keys `k`: the scores of a block are queued behind dV of the block before."""
    geometry = program.geometry
    stream = program.stream
    numbers = own.positions(geometry.SCORES) if stream.mask.RANGED else own.numbers(geometry.SCORES)
    dv = gl.zeros([64, geometry.BLOCK_D], gl.float32, geometry.SUMS)
    if program.blocks > 0:
        # The owner of dV waits until the producer has brought the first Q and its lse, then the first dO.
        scores = stream.q.issue_scores(k, 0, zero)
        scores = hopper.warpgroup_mma_wait(0, [scores])
        p_operand = _hand_over(program, numbers, scores, 0)
        stream.dout.wait(0)
        dv_token = hopper.warpgroup_mma(p_operand, stream.dout.block(0), dv, is_async=True)
        for i in range(1, program.blocks):
            # The owner of dV waits until the producer has brought Q of block i and its lse.
            scores = stream.q.issue_scores(k, i, zero)
            # When only the product of the scores is left, dV of the block before is complete.
            dv = hopper.warpgroup_mma_wait(1, [dv_token])
            # The producer waits until both consumers have left dO of the block before.
            stream.dout_empty.leave(i - 1)
            scores = hopper.warpgroup_mma_wait(0, [scores])
            p_operand = _hand_over(program, numbers, scores, i)
            # The owner of dV waits until the producer has brought dO of block i.
            stream.dout.wait(i)
            dv_token = hopper.warpgroup_mma(p_operand, stream.dout.block(i), dv, is_async=True)
        dv = hopper.warpgroup_mma_wait(0, [dv_token])
    return dv


@gluon.jit
def _make_ds(program, dp, i):
    """Return dS of block `i` for the product of dK, from the gradient `dp` of the probabilities."""
    geometry = program.geometry
    stream = program.stream
    (handover,) = program.handover
    delta = stream.numbers(stream.delta, i)
    # The producer waits until both consumers have left dO of block i and its delta.
    stream.dout_empty.leave(i)
    ds = handover.get(i, geometry.SCORES) * (dp - delta[None, :])
    return gl.convert_layout(ds.to(geometry.dtype), geometry.OPERAND)


@gluon.jit
def _sum_keys(program, v, zero):
    """Return dK, not yet scaled, of the keys with the values `v`.

    dP of a block is queued behind dK of the block before.
    """
    geometry = program.geometry
    stream = program.stream
    dk = gl.zeros([64, geometry.BLOCK_D], gl.float32, geometry.SUMS)
    if program.blocks > 0:
        # The owner of dK waits until the producer has brought the first dO and its delta, then the first Q.
        dp = stream.dout.issue_scores(v, 0, zero)
        dp = hopper.warpgroup_mma_wait(0, [dp])
        ds_operand = _make_ds(program, dp, 0)
        stream.q.wait(0)
        dk_token = hopper.warpgroup_mma(ds_operand, stream.q.block(0), dk, is_async=True)
        for i in range(1, program.blocks):
            # The owner of dK waits until the producer has brought dO of block i and its delta.
            dp = stream.dout.issue_scores(v, i, zero)
            # When only dP is left, dK of the block before is complete.
            dk = hopper.warpgroup_mma_wait(1, [dk_token])
            # The producer waits until both consumers have left Q of the block before.
            stream.empty.leave(i - 1)
            dp = hopper.warpgroup_mma_wait(0, [dp])
            ds_operand = _make_ds(program, dp, i)
            # The owner of dK waits until the producer has brought Q of block i.
            stream.q.wait(i)
            dk_token = hopper.warpgroup_mma(ds_operand, stream.q.block(i), dk, is_async=True)
        dk = hopper.warpgroup_mma_wait(0, [dk_token])
    return dk


@gluon.jit
def consume_wide(warpgroup: gl.constexpr, program):
    """Compute dV of the 64 keys of the tile, as consumer 0, or their dK, as consumer 1."""
    geometry = program.geometry
    results = program.results
    own = own_key_rows(0, program.tile, program.slot_rows, geometry, program.stream.mask.RANGED)
    head = program.head.to(gl.int64)
    if warpgroup == 0:
        buffer = program.k_buffers.index(0)
        own.copy_rows(program.k.from_head(head), buffer)
    else:
        buffer = program.v_buffers.index(0)
        own.copy_rows(program.v.from_head(head), buffer)
    async_copy.commit_group()
    # Each thread waits for its own copies; the fence then shows them to the tensor cores.
    async_copy.wait_group(0)
    hopper.fence_async_shared()
    # The warps of this consumer wait for each other: a product reads rows that all of them copied.
    thread_barrier()
    zero = gl.zeros([64, geometry.STREAMED], gl.float32, geometry.SCORES)
    if warpgroup == 0:
        results.store_values(own, program.head, _sum_values(program, own, buffer, zero))
    else:
        results.store_keys(own, program.head, _sum_keys(program, buffer, zero))
