"""Rings of buffers between a producer and consumers, and the barriers by which they wait for each other.

Blocks come by the copy engine (TMA) into *stages*, buffers that are used in turn: block `i` uses stage `i % STAGES`.
Two kinds of block come side by side, K and V or Q and dO. Each kind has one barrier per stage that says that its buffer
is full. One barrier per stage says that both buffers are empty: every arrival costs a consumer two barriers of its own
warps, so that a barrier for each buffer would cost twice as much.

A barrier completes a phase when it has had as many arrivals as it was made for. A wait names the parity of the phase:
the parity of the round, `i // STAGES`.
"""

import math

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper

from .releases import load_box, struct


@gluon.constexpr_function
def _stage_shape(stages, box):
    """Return the shape of `stages` buffers for one `box` each."""
    return [stages, *box]


@gluon.constexpr_function
def _block_shape(shape):
    """Return the shape of one of several buffers `shape`, as rows."""
    return [math.prod(shape[1:-1]), shape[-1]]


@gluon.jit
def make_barrier(arrivals: gl.constexpr):
    """Make one barrier; `arrivals` arrivals complete a phase."""
    barrier = gl.allocate_shared_memory(gl.int64, [1], hopper.mbarrier.MBarrierLayout())
    hopper.mbarrier.init(barrier, arrivals)
    return barrier


@gluon.jit
def make_barriers(STAGES: gl.constexpr, arrivals: gl.constexpr):
    """Make a barrier for each stage; `arrivals` arrivals complete a phase."""
    barriers = gl.allocate_shared_memory(gl.int64, [STAGES, 1], hopper.mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        hopper.mbarrier.init(barriers.index(i), arrivals)
    return barriers


@struct
class Ring:
    """The buffers for one kind of block, and the barriers that say that they are full."""

    buffers: gl.shared_memory_descriptor  # [STAGES, box]
    full: gl.shared_memory_descriptor  # [STAGES, 1]
    STAGES: gl.constexpr
    BLOCK_BYTES: gl.constexpr  # that the copy engine loads for each block

    @gluon.jit
    def load(self, descriptor, place, i):
        """Load the box of `descriptor` at `place` into the stage of block `i`, which must be empty."""
        stage = i % self.STAGES
        # The producer arrives here, and the copy engine completes the phase when BLOCK_BYTES have come: the consumers
        # wait for both.
        hopper.mbarrier.expect(self.full.index(stage), self.BLOCK_BYTES)
        load_box(descriptor, place, self.full.index(stage), self.buffers.index(stage))

    @gluon.jit
    def arrive(self, i):
        """Tell the consumers that wait for block `i` that the producer has stored its numbers."""
        hopper.mbarrier.arrive(self.full.index(i % self.STAGES), count=1)

    @gluon.jit
    def wait(self, i, pred=True):
        """Wait, as a consumer, until the producer has brought block `i`; not at all if `pred` is false."""
        hopper.mbarrier.wait(self.full.index(i % self.STAGES), (i // self.STAGES) & 1, pred=pred)

    @gluon.jit
    def block(self, i):
        """Return the buffer of block `i` as rows `[_, BLOCK_D]`."""
        SHAPE: gl.constexpr = _block_shape(self.buffers.shape)
        return self.buffers.index(i % self.STAGES).reshape(SHAPE)

    @gluon.jit
    def issue_scores(self, rows, i, zero, pred=True):
        """Wait for block `i`, and issue the product of `rows` and the block's rows, in the layout of `zero`."""
        self.wait(i, pred)
        return self.issue_scores_at_once(rows, i, zero)

    @gluon.jit
    def issue_scores_at_once(self, rows, i, zero):
        """Issue the product of `rows` and the rows of block `i`, for which the caller has waited."""
        # A view: the tensor cores read the transposed block from the same memory.
        columns = self.block(i).permute((1, 0))
        return hopper.warpgroup_mma(rows, columns, zero, use_acc=False, is_async=True)


@gluon.jit
def make_ring(box: gl.constexpr, geometry, arrivals: gl.constexpr):
    """Make a `Ring` for blocks of the shape `box`; `arrivals` arrivals make a stage full."""
    SHAPE: gl.constexpr = _stage_shape(geometry.STAGES, box)
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for(box, geometry.dtype)
    return Ring(
        buffers=gl.allocate_shared_memory(geometry.dtype, SHAPE, LAYOUT),
        full=make_barriers(geometry.STAGES, arrivals),
        STAGES=geometry.STAGES,
        BLOCK_BYTES=geometry.BLOCK_BYTES,
    )


@struct
class EmptyStages:
    """The barriers by which consumers give stages back to the producer: one for the buffers of both rings."""

    barriers: gl.shared_memory_descriptor  # [STAGES, 1]; every consumer arrives
    STAGES: gl.constexpr

    @gluon.jit
    def wait(self, i):
        """Wait, as the producer, until all consumers have left block `i - STAGES`, whose stage block `i` takes.

        In the first round all stages are empty: the parity names the phase before the first, which counts as complete.
        """
        hopper.mbarrier.wait(self.barriers.index(i % self.STAGES), ((i // self.STAGES) & 1) ^ 1)

    @gluon.jit
    def leave(self, i):
        """Tell the producer, as one of the consumers, that this one has read block `i`."""
        hopper.mbarrier.arrive(self.barriers.index(i % self.STAGES), count=1)


@gluon.jit
def make_empty_stages(geometry):
    """Make `EmptyStages` for all consumers."""
    return EmptyStages(barriers=make_barriers(geometry.STAGES, geometry.WARPGROUPS), STAGES=geometry.STAGES)
