"""The masks of kernels that stream keys: they find blocks with hidden keys, and replace those keys' scores."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .keys import Keys, RangedKeys
from .releases import struct


@gluon.jit
def blocks_to_hide(keys, blocks, seen_by_all):
    """Return (number of blocks, from the top on, with keys that not all rows see; first ragged block).

    If chunks are not whole blocks, the last block of each chunk extends past the end of its chunk: it is *ragged*. The
    second number is -1 if no block is ragged. The top block has number 0.
    """
    # Blocks below key `whole` are seen by all rows. The walk goes down, so masked blocks come first.
    whole = gl.maximum(seen_by_all, 0)
    if keys.SLOTS == 1:
        return blocks - whole // keys.BLOCK_N, -1
    else:
        length = gl.maximum(keys.kv_chunk, 1)
        per_chunk = (length + keys.BLOCK_N - 1) // keys.BLOCK_N
        # Chunks below that all rows see entirely, with `per_chunk` blocks each; then the whole blocks of the chunk
        # above.
        below = whole // length
        masked = blocks - below * per_chunk - (whole - below * length) // keys.BLOCK_N
        # The ragged block of a chunk is its last one, which the walk meets first. If the walk begins inside of a chunk,
        # the blocks that it has there come before the first ragged one.
        return masked, gl.where(length % keys.BLOCK_N == 0, -1, blocks % per_chunk)


@struct
class HeadBlocks:
    """The blocks of keys of one head, and the mask for them. Blocks are numbered through all heads of the program."""

    keys: Keys
    numbers: gl.shared_memory_descriptor  # 0 to BLOCK_N - 1
    limit: gl.tensor  # keys that each row sees
    count: gl.tensor
    begin: gl.tensor  # the first block
    end: gl.tensor  # the last one is before this
    masked: gl.tensor  # blocks before this one have keys that not all rows see
    ragged: gl.tensor  # the first block that runs over the end of its chunk, or none of this head's

    @gluon.jit
    def hide(self, x, INSTEAD: gl.constexpr, i, ragged):
        """Hide keys of block `i` that a row does not see, or that lie behind the end of the chunk.

        Return (`x` with INSTEAD in the place of hidden keys, the next ragged block). Whole blocks skip this branch, so
        only here the consumer computes the place of the block in the sequence, and reads the numbers of its keys: kept
        in registers, they would take one register for every four keys during the loop.
        """
        if (i < self.masked) | (i == ragged):
            limit = self.limit
            left = self.end - 1 - i  # the walk goes down: blocks of this head that come later, thus lie below
            start = left * self.keys.BLOCK_N
            if self.keys.SLOTS > 1:
                kv_chunk = self.keys.kv_chunk
                per_chunk = (kv_chunk + self.keys.BLOCK_N - 1) // self.keys.BLOCK_N
                chunk = left // per_chunk
                start = chunk * kv_chunk + (left - chunk * per_chunk) * self.keys.BLOCK_N
                # Rows of the box behind the chunk are keys of another chunk, or zeros.
                limit = gl.minimum(limit, (chunk + 1) * kv_chunk)
                ragged = gl.where(i == ragged, ragged + per_chunk, ragged)
            numbers = self.numbers.load(gl.SliceLayout(0, x.type.layout))
            x = gl.where((start + numbers)[None, :] < limit[:, None], x, INSTEAD)
        return x, ragged


@gluon.jit
def number_blocks(stream, n, count, hidden, ragged, limit):
    """Return the `HeadBlocks` of head `n` of the program: `count` blocks, `hidden` and `ragged` by `blocks_to_hide`."""
    begin, end = n * count, (n + 1) * count
    return HeadBlocks(
        keys=stream.keys, numbers=stream.numbers, limit=limit, count=count, begin=begin, end=end, masked=begin + hidden,
        ragged=begin + ragged,
    )  # fmt: skip


@struct
class RangedHeadBlocks:
    """The same as `HeadBlocks` for ranged masks: each row sees the keys `[first, limit)`."""

    keys: RangedKeys
    numbers: gl.shared_memory_descriptor  # 0 to BLOCK_N - 1
    first: gl.tensor
    limit: gl.tensor
    count: gl.tensor
    begin: gl.tensor  # the first block
    end: gl.tensor  # the last one is before this
    mirror: gl.tensor  # block `i` has the number `mirror - i` in the document
    masked: gl.tensor  # blocks before this one have keys that not all rows see
    low: gl.tensor  # blocks from this one on have keys that not all rows see
    ragged: gl.tensor  # the first block that runs over the end of its chunk, or none of this head's

    @gluon.jit
    def hide(self, x, INSTEAD: gl.constexpr, i, ragged):
        """Hide keys of block `i`: see `HeadBlocks.hide`.

        Most blocks with hidden keys lie at one end of the range only, and need one comparison.
        """
        is_low = i >= self.low
        is_high = (i < self.masked) | (i == ragged)
        if is_low | is_high:
            # Block numbers of the document rise with the keys, and the walk goes down.
            start, chunk_end = self.keys.find(self.mirror - i)
            numbers = self.numbers.load(gl.SliceLayout(0, x.type.layout))
            if is_high:
                limit = self.limit
                if self.keys.SLOTS > 1:
                    limit = gl.minimum(limit, chunk_end)
                    ragged = gl.where(i == ragged, ragged + self.keys.blocks_of(self.keys.kv_chunk), ragged)
                x = gl.where(numbers[None, :] < (limit - start)[:, None], x, INSTEAD)
            if is_low:
                x = gl.where(numbers[None, :] >= (self.first - start)[:, None], x, INSTEAD)
        return x, ragged


@struct
class RowMask:
    """The keys that the rows of one consumer see, for the blocks of every head."""

    limit: gl.tensor  # [64] keys that each row sees
    seen_by_all: gl.tensor

    @gluon.jit
    def count(self, keys, blocks):
        """Return the argument that `number` takes, from the `blocks` of one head."""
        return blocks_to_hide(keys, blocks, self.seen_by_all)

    @gluon.jit
    def number(self, stream, n, count, counted):
        """Return the `HeadBlocks` of head `n` of the program."""
        hidden, ragged = counted
        return number_blocks(stream, n, count, hidden, ragged, self.limit)


@struct
class RangedRowMask:
    """The same as `RowMask` for ranged masks."""

    first: gl.tensor  # [64] the first key that each row sees
    limit: gl.tensor  # [64] keys up to this one, exclusive
    whole_begin: gl.tensor  # the first key that all rows see, apart from padding rows
    whole_end: gl.tensor  # to before this

    @gluon.jit
    def count(self, keys, blocks):
        """Return the argument that `number` takes, from the `blocks` of one head.

        It is (first whole block, first block behind the whole ones, first ragged block, number of the top block in
        the document). If chunks are not whole blocks, the last block of each chunk counts as ragged.
        """
        # `top` is block 0 of the walk. A block with a key from whole_end on, or below whole_begin, is masked.
        top = keys.number(gl.maximum(keys.seen - 1, 0))
        whole = top + 1 - keys.number(self.whole_end)
        low = top - keys.number(gl.maximum(self.whole_begin - 1, 0))
        low = gl.where(self.whole_begin > 0, low, blocks)
        ragged = top * 0 - 1
        if keys.SLOTS > 1:
            aligned = (keys.kv_chunk % keys.BLOCK_N == 0) & (keys.place % keys.BLOCK_N == 0)
            ragged = gl.where(aligned, -1, (top + 1) % keys.blocks_of(keys.kv_chunk))
        return whole, low, ragged, top

    @gluon.jit
    def number(self, stream, n, count, counted):
        """Return the `RangedHeadBlocks` of head `n` of the program."""
        whole, low, ragged, top = counted
        begin = n * count
        return RangedHeadBlocks(
            keys=stream.keys, numbers=stream.numbers, first=self.first, limit=self.limit, count=count, begin=begin,
            end=begin + count, mirror=begin + top, masked=begin + whole, low=begin + low, ragged=begin + ragged,
        )  # fmt: skip


@gluon.jit
def mask_rows(own, LAYOUT: gl.constexpr):
    """Return the `RowMask` or `RangedRowMask` of a consumer's `QueryRows`, for a tile in `LAYOUT`."""
    rows = own.numbers(LAYOUT)
    if own.MASK is None:
        return RowMask(limit=own.keys_seen(rows), seen_by_all=own.keys_seen(own.first))
    else:
        seen = own.range_seen(rows)
        # Both ends of a range grow with the position: all rows see from where the last row begins to where the first
        # one ends.
        last = gl.minimum(own.first + 63, own.real_end() - 1)
        whole_begin, whole_end = own.range_seen(last).begin, own.range_seen(own.first).end
        return RangedRowMask(first=seen.begin, limit=seen.end, whole_begin=whole_begin, whole_end=whole_end)
