"""Tiles of keys take turns at the sums of dQ, so that all runs give the same bits.

Each block of rows has a counter in global memory of the tiles that have added to it. The writers of a tile wait until
the counter counts all tiles before theirs that see the block. A program waits only for programs with lower numbers,
which a GPU starts first: they are under way or done whenever a program waits, whatever else the GPU runs. All tiles of
a sequence begin with its last rows, or under a window with a common block, so that a tile follows the one before it by
about one block.

A turn lasts until the copy engine's sums are in global memory and the next tile has read the counter. Two writers in a
program take blocks alternately, so that the next block need not wait for the turn of this one. `side` KV heads have
their tiles in turn, so that fewer programs wait for each other. With four heads side by side one writer is enough.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .order import find_first_tiles
from .owned import Strided
from .releases import struct
from .rows import RowMask
from .sums import shape_of_half, step_of_half


@gluon.jit
def tile_and_head_side_by_side(KV_HEADS: gl.constexpr, SIDE: gl.constexpr):
    """Return (tile number, KV head of the window) of this program, where `SIDE` KV heads have their tiles in turn."""
    program = gl.program_id(0)
    programs = gl.num_programs(0) // KV_HEADS * SIDE  # of the heads that run side by side
    place = program % programs
    return place // SIDE, program // programs * SIDE + place % SIDE


@struct
class Turns:
    """The sums of dQ, and for each block of rows the number of tiles that have added to it."""

    sums: Strided
    counters_ptr: gl.tensor  # [heads of the sums, T] int32: a block's counter is at its first head and its first row
    T: gl.tensor
    number: gl.tensor  # of the tile in its sequence
    tile: gl.tuple  # under a ranged mask the `KeyTile`; otherwise nothing, as all tiles before see what the tile sees
    mask: RowMask
    WRITERS: gl.constexpr  # of a program: 1 or 2

    @gluon.jit
    def address(self, head, row):
        """Return the address of the counter of the block that begins with `head` of the sums and local row `row`."""
        return (self.counters_ptr + (head * self.T + row)).to(gl.int64)

    @gluon.jit
    def read(self, address):
        """Return the counter at `address`; the sums of all tiles that it counts are in global memory."""
        return gl.inline_asm_elementwise(
            "ld.acquire.gpu.global.s32 $0, [$1];", "=r,l", [address], gl.int32, is_pure=False, pack=1
        )

    @gluon.jit
    def find_first(self, sequence):
        """Return (the `FirstTiles` of the sequence,) under a ranged mask, otherwise nothing."""
        return (find_first_tiles(self.tile, sequence, self.mask),) if len(self.tile) > 0 else ()

    @gluon.jit
    def before(self, first, row):
        """Return how many tiles add to the block at `row` before this one; `first` is from `find_first`."""
        if len(first) > 0:
            return self.number - first[0].of(row)
        else:
            return self.number

    @gluon.jit
    def wait(self, address, counted, before):
        """Wait until `before` tiles have added at `address`, whose counter was `counted` when it was last read."""
        while counted < before:
            counted = self.read(address)
        # The copy engine does not take the path by which the counter was read: the fence orders the two.
        gl.inline_asm_elementwise(
            "fence.proxy.async.global; mov.b32 $0, $1;", "=r,r", [counted], gl.int32, is_pure=False, pack=1
        )

    @gluon.jit
    def end(self, address):
        """Give the turn at `address` to the next tile, when the copy engine's sums are in global memory."""
        # By `wait_group` the thread that gave the copy engine its work waits for it; the others wait for that thread.
        gl.inline_asm_elementwise(
            """{
            .reg .pred first;
            .reg .b32 lane;
            cp.async.bulk.wait_group 0;
            bar.warp.sync 0xffffffff;
            mov.u32 lane, %laneid;
            setp.eq.u32 first, lane, 0;
            @first red.release.gpu.global.add.s32 [$1], 1;
            mov.b32 $0, 0;
            }""",
            "=r,l",
            [address],
            gl.int32,
            is_pure=False,
            pack=1,
        )


@gluon.jit
def write_in_turns(writer: gl.constexpr, dq, turns, sequence, order, blocks, geometry, packing):
    """Let the copy engine add dQ of one writer's blocks to the sums, in the turns of this tile."""
    BOX: gl.constexpr = shape_of_half(packing, geometry)
    STEP: gl.constexpr = step_of_half(packing, geometry)
    descriptor = sequence.descriptor(turns.sums, geometry, BOX, turns.sums.STRIDE_H)
    if blocks > writer:
        first_head = sequence.kv_head * geometry.GROUP
        first = turns.find_first(sequence)
        row, head = order.place(writer, packing)
        before = turns.before(first, row)
        counter = turns.address(first_head + head, sequence.first + row)
        counted = turns.read(counter)
        for i in range(writer, blocks, turns.WRITERS):
            dq.wait(i)
            # This writer waits until the writers of the tiles before it have added to the block.
            turns.wait(counter, counted, before)
            dq.add_to(descriptor, row, head, STEP)
            # The counter of this writer's next block is read while the copy engine is at work: usually that turn is
            # this tile's already.
            row, head = order.place(gl.minimum(i + turns.WRITERS, blocks - 1), packing)
            before = turns.before(first, row)
            following = turns.address(first_head + head, sequence.first + row)
            dq.leave()
            counted = turns.read(following)
            turns.end(counter)
            counter = following
