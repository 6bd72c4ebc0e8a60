"""The masks of the kernels that stream keys: which blocks have keys that a row does not see, and what replaces them."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .keys import Keys
from .releases import struct


@gluon.jit
def blocks_to_hide(keys, blocks, seen_by_all):
    """Count the blocks, from the top on, with keys that not all rows see: return (their number, first ragged block).

    Where chunks are not whole blocks, the last block of each runs over the end of its chunk: it is *ragged*. If none
    is, the second is -1. The top block has number 0.
    """
    whole = gl.maximum(seen_by_all, 0)
    if keys.SLOTS == 1:
        return blocks - whole // keys.BLOCK_N, -1
    else:
        length = gl.maximum(keys.kv_chunk, 1)
        per_chunk = (length + keys.BLOCK_N - 1) // keys.BLOCK_N
        below = whole // length
        masked = blocks - below * per_chunk - (whole - below * length) // keys.BLOCK_N
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

        Return (`x` with INSTEAD for those, the next ragged block). Whole blocks skip this, and only in here the
        consumer computes where in the sequence the block is. The numbers of its keys are read in here too: in registers
        they would take one for every four keys during the loop.
        """
        if (i < self.masked) | (i == ragged):
            limit = self.limit
            left = self.end - 1 - i
            start = left * self.keys.BLOCK_N
            if self.keys.SLOTS > 1:
                kv_chunk = self.keys.kv_chunk
                per_chunk = (kv_chunk + self.keys.BLOCK_N - 1) // self.keys.BLOCK_N
                chunk = left // per_chunk
                start = chunk * kv_chunk + (left - chunk * per_chunk) * self.keys.BLOCK_N
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
