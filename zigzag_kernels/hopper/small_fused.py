"""The consumers of the fused backward kernel at head_dim up to 64, whose blocks have 128 rows.

Each consumer computes dQ of 64 of the rows.

The bandwidth of shared memory limits the kernel. A block of 128 rows takes a seventh less of it than two blocks of 64:
the products of scores read K and V once for 128 rows, and the products of dQ read dS of each row once, instead of once
in each consumer. Registers hold one block of scores and one of dP; exponentials and dS are computed 64 rows at a time.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from .geometry import product_layout
from .owned import own_key_rows
from .releases import struct, thread_barrier
from .row_numbers import read_numbers
from .stages import make_barrier


@struct
class HalvesOfDs:
    """dS of a block in shared memory, where the two consumers exchange it: each takes the dQ of 64 rows.

    A consumer uses buffers of even and odd blocks in turn, and needs no barrier for empty ones: the other consumer
    stores dS of block `i - 1` only after it has read dS of block `i - 2`.
    """

    first: gl.shared_memory_descriptor  # [4, 64 keys, 64 rows] for the first 64 rows: two for even blocks, two for odd
    second: gl.shared_memory_descriptor  # for the other rows
    from_first: gl.shared_memory_descriptor  # consumer 0 arrives
    from_second: gl.shared_memory_descriptor  # consumer 1 arrives

    @gluon.jit
    def put(self, warpgroup: gl.constexpr, half: gl.constexpr, ds, i):
        """Store `ds` of block `i`, for the keys of consumer `warpgroup` and for the rows of `half`."""
        # Even and odd blocks take different buffers: see the class for why no barrier says that they are empty.
        place = (i & 1) * 2 + warpgroup
        if half == 0:
            self.first.index(place).store(ds)
        else:
            self.second.index(place).store(ds)

    @gluon.jit
    def show(self, warpgroup: gl.constexpr):
        """Tell the other consumer that this one has stored dS of all rows of a block."""
        # Tensor cores read shared memory by another path than the stores of a thread: the fence orders the two.
        hopper.fence_async_shared()
        # The other consumer waits until this one has stored dS.
        if warpgroup == 0:
            hopper.mbarrier.arrive(self.from_first, count=1)
        else:
            hopper.mbarrier.arrive(self.from_second, count=1)

    @gluon.jit
    def wait(self, warpgroup: gl.constexpr, i):
        """Wait, as a consumer, until the other has stored dS of block `i`."""
        if warpgroup == 0:
            hopper.mbarrier.wait(self.from_second, i & 1)
        else:
            hopper.mbarrier.wait(self.from_first, i & 1)

    @gluon.jit
    def transposed(self, warpgroup: gl.constexpr, consumer: gl.constexpr, i):
        """Return dS of block `i` for the rows of consumer `warpgroup` and the keys of `consumer`: `[64, 64]`."""
        place = (i & 1) * 2 + consumer
        half = self.first.index(place) if warpgroup == 0 else self.second.index(place)
        return half.permute((1, 0))


@gluon.jit
def make_halves_of_ds(geometry):
    """Make the `HalvesOfDs` of a program."""
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, 64], geometry.dtype)
    return HalvesOfDs(
        first=gl.allocate_shared_memory(geometry.dtype, [4, 64, 64], LAYOUT),
        second=gl.allocate_shared_memory(geometry.dtype, [4, 64, 64], LAYOUT),
        from_first=make_barrier(1),
        from_second=make_barrier(1),
    )


@gluon.jit
def _halves(x):
    """Return both halves of `x [64, 128]`, by columns, each in the layout of a product; no value moves."""
    LAYOUT: gl.constexpr = product_layout(64)
    first, second = x.reshape([64, 2, 64]).permute((0, 2, 1)).split()
    return gl.convert_layout(first, LAYOUT, assert_trivial=True), gl.convert_layout(second, LAYOUT, assert_trivial=True)


@gluon.jit
def _numbers(stream, buffer, stage, half: gl.constexpr):
    """Read one number for each row of `half` of a block from `buffer`, which is one of the `RowStream`'s."""
    return read_numbers(buffer.index(stage).slice(half * 64, 64, 0))


@gluon.jit
def _probabilities(program, scores, i, half: gl.constexpr):
    """Return P of `half` of block `i`, `[64 keys, 64 rows]`."""
    stream = program.stream
    lse2 = _numbers(stream, stream.lse2, i % stream.geometry.STAGES, half)
    return gl.exp2(scores * program.SCALE_LOG2 - lse2[None, :])


@gluon.jit
def _sees(program, numbers, i, half: gl.constexpr):
    """Return whether each row of `half` of block `i` sees each of the keys `numbers`, `[64 keys, 64 rows]`."""
    stream = program.stream
    stage = i % stream.geometry.STAGES
    seen = numbers[:, None] < _numbers(stream, stream.limits, stage, half)[None, :]
    if stream.mask.RANGED:
        # The second half of `limits` has the first keys that rows see.
        begin = _numbers(stream, stream.limits, stream.geometry.STAGES + stage, half)
        seen = seen & (numbers[:, None] >= begin[None, :])
    return seen


@gluon.jit
def _add_half(warpgroup: gl.constexpr, program, numbers, gradients, dk, dv, i, half: gl.constexpr):
    """Issue the products that add `half` of block `i` to dV, then dK, from (P, dP), both complete."""
    geometry = program.geometry
    p, dp = gradients
    stream = program.stream
    delta = _numbers(stream, stream.delta, i % geometry.STAGES, half)
    dp = dp - delta[None, :]
    if program.masks(i):
        seen = _sees(program, numbers, i, half)
        dp = gl.where(seen, dp, 0.0)  # dP of a hidden key may be infinite or NaN, and 0 * infinity is NaN
        p = gl.where(seen, p, 0.0)
    p_operand = gl.convert_layout(p.to(geometry.dtype), geometry.OPERAND)
    dv = hopper.warpgroup_mma(p_operand, stream.dout.block(i).slice(half * 64, 64, 0), dv, is_async=True)
    ds = (p * dp).to(geometry.dtype)
    program.ds.put(warpgroup, half, ds, i)
    ds_operand = gl.convert_layout(ds, geometry.OPERAND)
    if half == 1:
        program.ds.show(warpgroup)
    return hopper.warpgroup_mma(ds_operand, stream.q.block(i).slice(half * 64, 64, 0), dk, is_async=True), dv


@gluon.jit
def _issue_dq(warpgroup: gl.constexpr, program, zero, i):
    """Issue both products of dQ of block `i` for the rows of consumer `warpgroup`: one for each consumer's keys."""
    upper, lower = program.ds.transposed(warpgroup, 0, i), program.ds.transposed(warpgroup, 1, i)
    dq = hopper.warpgroup_mma(upper, program.k_buffers.index(0), zero, use_acc=False, is_async=True)
    return hopper.warpgroup_mma(lower, program.k_buffers.index(1), dq, is_async=True)


@gluon.jit
def consume_small(warpgroup: gl.constexpr, program):
    """Compute dK and dV of 64 keys of the tile, and dQ of 64 rows of every block.

    The scores of a block are queued behind dK of the block before, and dQ of that block behind them: the tensor cores
    work on dQ during the exponentials of the first 64 rows, and on dP during the exponentials of the others.
    """
    geometry = program.geometry
    stream = program.stream
    blocks = program.blocks
    HALF: gl.constexpr = product_layout(64)
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

    numbers = own.positions(HALF) if RANGED else own.numbers(HALF)
    # Products of scores and of dQ do not add to these zeros: they give them their layout.
    zero = gl.zeros([64, geometry.STREAMED], gl.float32, geometry.SCORES)
    no_dq = gl.zeros([64, geometry.BLOCK_D], gl.float32, geometry.SUMS)
    dk = gl.zeros([64, geometry.BLOCK_D], gl.float32, geometry.SUMS)
    dv = gl.zeros([64, geometry.BLOCK_D], gl.float32, geometry.SUMS)
    if blocks > 0:
        # This consumer waits until the producer has brought the first Q and its lse.
        stream.q.wait(0)
        scores = stream.q.issue_scores_at_once(k, 0, zero)
        # Nobody reads this product: the loop begins with one of dQ under way.
        dq_token = _issue_dq(warpgroup, program, no_dq, 0)
        scores = hopper.warpgroup_mma_wait(2, [scores])
        for i in range(blocks):
            s0, s1 = _halves(scores)
            p0 = _probabilities(program, s0, i, 0)
            # This consumer waits until the writer has read dQ of block i - 2, and then for dQ of block i - 1.
            program.dq.wait_empty(i - 1, i > 0)
            dq = hopper.warpgroup_mma_wait(0, [dq_token])
            # This consumer waits until the producer has brought dO of block i and its delta.
            stream.dout.wait(i)
            if i > 0:
                program.dq.store(warpgroup, dq, i - 1)
            dp = stream.dout.issue_scores_at_once(v, i, zero)
            p1 = _probabilities(program, s1, i, 1)
            # Q has arrived already; this second wait only keeps the assembler from moving the next one above the
            # exponentials.
            stream.q.wait(i)
            dp0, dp1 = _halves(hopper.warpgroup_mma_wait(0, [dp]))
            dk, dv = _add_half(warpgroup, program, numbers, (p0, dp0), dk, dv, i, 0)
            dk, dv = _add_half(warpgroup, program, numbers, (p1, dp1), dk, dv, i, 1)
            # All but the last product, of dK, have to be complete: registers have no room for their operands beside
            # the next scores.
            dv = hopper.warpgroup_mma_wait(1, [dv])
            # This consumer waits until the producer has brought the next Q. After the last block there is no wait: the
            # product is of stale data and is never read.
            stream.q.wait(i + 1, i + 1 < blocks)
            scores = stream.q.issue_scores_at_once(k, i + 1, zero)
            # When only the scores are left, dK is complete. dQ is issued after this wait: with dQ in the queue as well
            # the wait took a tenth of the kernel's time.
            dk, dv = hopper.warpgroup_mma_wait(1, [dk, dv])
            # The producer waits until both consumers have left Q, dO and the numbers of block i.
            stream.empty.leave(i)
            program.ds.wait(warpgroup, i)
            dq_token = _issue_dq(warpgroup, program, no_dq, i)
            # When only the two products of dQ are left, the scores are complete.
            scores = hopper.warpgroup_mma_wait(2, [scores])
        program.dq.wait_empty(blocks - 1)
        program.dq.store(warpgroup, hopper.warpgroup_mma_wait(0, [dq_token]), blocks - 1)
    program.results.store(own, program.head, 0, dk, dv)
