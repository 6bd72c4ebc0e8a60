"""Writers of dQ learn here the order of blocks of query rows, and the first tile of each block."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ..segments.lookup import load_document, load_ranged_half
from ..segments.ranges import keys_of_positions
from .releases import struct
from .rows import RowMask, block_begin


@gluon.jit
def find_start(late, early, mask):
    """Return (run of `produce_rows`, block of its half, number in the order of runs) with which a walk begins.

    `late` and `early` are the `HalfBlocks` of a tile on a grid. Under a window the programs that run together see
    different rows. If each began with its last rows, they would all read other rows at a time, more than caches hold.
    So walks begin at blocks that are as far apart as a walk is long, counted from the end of a half: from each on, all
    programs that see the same rows read them together.
    """
    is_late = late.blocks > 0
    masked, whole_end = gl.where(is_late, late.masked, early.masked), gl.where(is_late, late.whole_end, early.whole_end)
    blocks = gl.where(is_late, late.blocks, early.blocks)
    block = blocks - 1
    if mask.WALK > 0:
        first, end = gl.where(is_late, late.first, early.first), gl.where(is_late, late.end_of_half, early.end_of_half)
        last = (end - 1) // mask.TOKENS - first // mask.TOKENS
        common = last - (last - block + mask.WALK - 1) // mask.WALK * mask.WALK
        block = gl.where(common >= 0, common, block)
    whole = late.whole_end - late.masked + early.whole_end - early.masked
    run = gl.where(block >= whole_end, 4, gl.where(block >= masked, 0, 2))
    # No run of the late half has blocks if a walk begins in the early one.
    end = gl.where(run == 0, whole_end, gl.where(run == 2, whole + masked, whole + late.masked + early.masked + blocks))
    return run + gl.where(is_late, 0, 1), block, end - 1 - block


@struct
class BlockOrder:
    """The order in which `produce_rows`, DESCENDING, loads the blocks of one head, for the writer of dQ."""

    late_row: gl.tensor  # row of the sequence at which its late half begins; the early half begins at row 0
    late_first: gl.tensor  # of `HalfBlocks`
    late_whole: gl.tensor  # blocks of the late half that are not masked
    late_masked: gl.tensor
    early_first: gl.tensor
    early_whole: gl.tensor
    early_masked: gl.tensor
    last: gl.tuple  # under a ranged mask the masked blocks behind the whole ones, (late, early); otherwise nothing
    start: gl.tuple  # on a grid (number of all blocks, number from `find_start`); otherwise nothing

    @gluon.jit
    def place(self, i, packing):
        """Return (row of the sequence, head of the group) of the beginning of block `i`."""
        number = i // packing.PARTS
        if len(self.start) > 0:
            blocks, start = self.start
            number += start
            number = gl.where(number < blocks, number, number - blocks)
        whole = self.late_whole + self.early_whole
        # Within a run the number of a block rises while its place in the half falls, so that their sum is constant: one
        # less than `late` in a run of the late half, one less than `early` in a run of the early half.
        late = gl.where(number < self.late_whole, self.late_masked + self.late_whole, whole + self.late_masked)
        early = gl.where(number < whole, self.early_masked + whole, whole + self.late_masked + self.early_masked)
        is_late = (number < self.late_whole) | ((number >= whole) & (number < whole + self.late_masked))
        if len(self.last) > 0:
            late_last, early_last = self.last
            begin = whole + self.late_masked + self.early_masked
            end = begin + late_last
            late = gl.where(number < begin, late, self.late_masked + self.late_whole + end)
            early = gl.where(number < begin, early, self.early_masked + self.early_whole + early_last + end)
            is_late = is_late | ((number >= begin) & (number < end))
        late_begin = block_begin(self.late_first, late - 1 - number, packing.TOKENS)
        early_begin = block_begin(self.early_first, early - 1 - number, packing.TOKENS)
        return gl.where(is_late, self.late_row + late_begin, early_begin), i % packing.PARTS * packing.HEADS


@gluon.jit
def order_blocks(late, early, sequence, mask, start):
    """Return the `BlockOrder` of the `HalfBlocks` of both halves of a sequence; `start` is as in `produce_rows`."""
    last = (late.last(), early.last()) if mask.RANGED else ()
    start = (late.blocks + early.blocks, start[2]) if mask.GRID else ()
    return BlockOrder(
        late_row=late.q_row - sequence.first, late_first=late.first, late_whole=late.whole_end - late.masked,
        late_masked=late.masked, early_first=early.first, early_whole=early.whole_end - early.masked,
        early_masked=early.masked, last=last, start=start,
    )  # fmt: skip


@struct
class FirstTiles:
    """The first tile of keys that adds to each block of a sequence, under a ranged mask."""

    late_row: gl.tensor  # row of the sequence at which its late half begins; behind all rows if no row of it is real
    late_position: gl.tensor  # position of the first token of the late half
    early_position: gl.tensor
    document: gl.tuple  # the `Document`
    mask: RowMask

    @gluon.jit
    def of(self, row):
        """Return the number, in its sequence, of the first tile of keys that adds to the block at `row`.

        It has the first key that this row sees: first keys never decrease from row to row. All tiles from this one to
        the last one that the block sees add to the block, as both ends of the rows that see a tile never decrease.
        """
        late = self.late_position + row - self.late_row
        position = gl.where(row >= self.late_row, late, self.early_position + row)
        return keys_of_positions(position, self.document, self.mask).begin // self.mask.KEYS


@gluon.jit
def find_first_tiles(tile, sequence, mask):
    """Find the `FirstTiles` of the sequence of a `KeyTile`, whose `SequenceRows` are `sequence`."""
    late, early = load_ranged_half(tile.halves_ptr, 0), load_ranged_half(tile.halves_ptr, 1)
    return FirstTiles(
        late_row=gl.where(late.q_len > 0, late.q_row - sequence.first, sequence.count), late_position=late.position,
        early_position=early.position, document=load_document(tile), mask=mask,
    )  # fmt: skip
