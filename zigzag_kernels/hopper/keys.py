"""The keys that stream past query rows: the order of their blocks, where those are, and the producer that brings them.

Keys are walked downwards from the last one that a tile sees, and a block ends with its chunk: no block has keys of two
chunks. Blocks are numbered through all heads that a program serves.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper

from ..segments.lookup import chunk_row
from .geometry import Geometry
from .releases import struct
from .stages import EmptyStages, Ring, make_empty_stages, make_ring


@gluon.jit
def count_keys(tile, geometry):
    """Return the number of keys that the last row of a `QueryTile` sees: no other row sees more."""
    last_row = gl.minimum(tile.row + geometry.OWNED - 1, tile.q_len * geometry.GROUP - 1)
    last_token = last_row // geometry.GROUP
    return gl.maximum(gl.minimum(tile.diagonal + last_token + 1, tile.kv_len), 0)


@struct
class KeyBlock:
    """The place of one block of keys in the sequence and in the K/V buffer."""

    chunk: gl.tensor
    start: gl.tensor  # the first key; the block has fewer than BLOCK_N keys if its chunk ends before
    head: gl.tensor  # of those that the program serves
    slot: gl.tensor
    row: gl.tensor  # in the slot


@struct
class Keys:
    """The blocks of the keys `[0, seen)` of one sequence."""

    seen: gl.tensor
    kv_row: gl.tensor  # of the sequence's first key, in the first slot
    kv_chunk: gl.tensor  # keys of a chunk
    SLOTS: gl.constexpr  # in one slot there are no chunks: keys follow each other
    BLOCK_N: gl.constexpr

    @gluon.jit
    def top(self):
        """Return (chunk, first key, number of blocks) of the block with the last key, from which the walk begins."""
        if self.SLOTS == 1:
            blocks = (self.seen + self.BLOCK_N - 1) // self.BLOCK_N
            chunk = blocks * 0
            start = (blocks - 1) * self.BLOCK_N
        else:
            chunk = gl.maximum(self.seen - 1, 0) // gl.maximum(self.kv_chunk, 1)
            inner = (self.seen - chunk * self.kv_chunk + self.BLOCK_N - 1) // self.BLOCK_N  # blocks of this chunk
            blocks = chunk * ((self.kv_chunk + self.BLOCK_N - 1) // self.BLOCK_N) + inner
            start = chunk * self.kv_chunk + (inner - 1) * self.BLOCK_N
        return chunk, start, blocks

    @gluon.jit
    def count_blocks(self):
        """Return the number of blocks."""
        _, _, blocks = self.top()
        return blocks

    @gluon.jit
    def locate(self, chunk, start, head):
        """Return the `KeyBlock` of `head` that begins with key `start` of `chunk`."""
        if self.SLOTS == 1:
            row = self.kv_row + start
            slot = start * 0
        else:
            row = self.kv_row + chunk_row(chunk, self.kv_chunk, 0, self.SLOTS) + start - chunk * self.kv_chunk
            slot = chunk_row(chunk, 0, 1, self.SLOTS)
        return KeyBlock(chunk=chunk, start=start, head=head, slot=slot, row=row)

    @gluon.jit
    def below(self, chunk, start):
        """Return (chunk, first key) of the block below the one that begins with key `start` of `chunk`."""
        below = start - self.BLOCK_N
        if self.SLOTS > 1:
            crossed = below < chunk * self.kv_chunk
            chunk = gl.where(crossed, chunk - 1, chunk)
            last_start = chunk * self.kv_chunk + (self.kv_chunk - 1) // self.BLOCK_N * self.BLOCK_N
            below = gl.where(crossed, last_start, below)
        return chunk, below

    @gluon.jit
    def next(self, before, i, blocks, HEADS_TOGETHER: gl.constexpr):
        """Return the `KeyBlock` number `i`, which follows `before`.

        It is the one below, or if `i` is a multiple of `blocks` the top block of the next head.
        """
        chunk, start = self.below(before.chunk, before.start)
        head = before.head
        if HEADS_TOGETHER > 1:
            top_chunk, top_start, _ = self.top()
            same_head = i - (head + 1) * blocks < 0
            chunk = gl.where(same_head, chunk, top_chunk)
            start = gl.where(same_head, start, top_start)
            head = gl.where(same_head, head, head + 1)
        return self.locate(chunk, start, head)

    @gluon.jit
    def descriptor(self, array, slot_rows, geometry):
        """Make the copy engine's descriptor of the keys, [slot, row, head * head_dim], for boxes [1, BLOCK_N, BLOCK_D].

        Rows end with the sequence in every slot, in one slot with the keys that are seen. Rows of a box behind the end
        are zero: never those of another sequence, nor padding, which may be NaN.
        """
        BOX: gl.constexpr = [1, self.BLOCK_N, geometry.BLOCK_D]
        LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for(BOX, geometry.dtype)
        end = self.kv_row + (self.seen if self.SLOTS == 1 else 2 * self.kv_chunk)
        return hopper.tma.make_tensor_descriptor(
            array.ptr, [self.SLOTS, end, geometry.HEADS_TOGETHER * geometry.HEAD_DIM],
            [slot_rows.to(gl.int64) * array.STRIDE_T, array.STRIDE_T, 1], BOX, LAYOUT,
        )  # fmt: skip


@struct
class KeyStream:
    """K and V of the keys that a tile sees, block by block, for all heads of the program."""

    geometry: Geometry
    keys: Keys
    k: Ring
    v: Ring
    numbers: gl.shared_memory_descriptor  # 0 to BLOCK_N - 1, for `HeadBlocks`
    empty: EmptyStages

    @gluon.jit
    def load(self, ring, descriptor, block, i):
        """Bring `block` as block `i` into `ring`."""
        ring.load(descriptor, [block.slot, block.row, block.head * self.geometry.HEAD_DIM], i)


@gluon.jit
def make_key_stream(tile, geometry):
    """Make the `KeyStream` of the keys that a `QueryTile` sees."""
    seen = count_keys(tile, geometry)
    BLOCK_N: gl.constexpr = geometry.STREAMED
    keys = Keys(seen=seen, kv_row=tile.kv_row, kv_chunk=tile.kv_chunk, SLOTS=geometry.SLOTS, BLOCK_N=BLOCK_N)
    k = make_ring([1, BLOCK_N, geometry.BLOCK_D], geometry, 1)
    v = make_ring([1, BLOCK_N, geometry.BLOCK_D], geometry, 1)
    numbers = gl.arange(0, BLOCK_N, gl.BlockedLayout([1], [32], [gl.num_warps()], [0]))
    return KeyStream(
        geometry=geometry,
        keys=keys,
        k=k,
        v=v,
        numbers=gl.allocate_shared_memory(gl.int32, [BLOCK_N], gl.SwizzledSharedLayout(1, 1, 1, [0]), numbers),
        empty=make_empty_stages(geometry),
    )


@gluon.jit
def produce_keys(stream, k, v, slot_rows, V_BEHIND: gl.constexpr):
    """Bring all blocks of K and V, in the order in which consumers use them.

    With V_BEHIND they use V of a block together with K of the next.
    """
    HEADS_TOGETHER: gl.constexpr = stream.geometry.HEADS_TOGETHER
    keys = stream.keys
    chunk, start, blocks = keys.top()
    if blocks > 0:
        # Descriptors are made while the consumers load their rows, that of V while the first K is on its way. The first
        # stage is empty: the producer waits for nobody.
        k_desc = keys.descriptor(k, slot_rows, stream.geometry)
        block = keys.locate(chunk, start, gl.to_tensor(0))
        stream.load(stream.k, k_desc, block, 0)
        v_desc = keys.descriptor(v, slot_rows, stream.geometry)
        if not V_BEHIND:
            stream.load(stream.v, v_desc, block, 0)
        for i in range(1, blocks * HEADS_TOGETHER):
            before = block
            block = keys.next(before, i, blocks, HEADS_TOGETHER)
            # The producer waits until all consumers have left block i - STAGES of K and the V that came with it.
            stream.empty.wait(i)
            stream.load(stream.k, k_desc, block, i)
            if V_BEHIND:
                stream.load(stream.v, v_desc, before, i - 1)
            else:
                stream.load(stream.v, v_desc, block, i)
        if V_BEHIND:
            # The producer waits until all consumers have left the V that the last one replaces.
            stream.empty.wait(blocks * HEADS_TOGETHER)
            stream.load(stream.v, v_desc, block, blocks * HEADS_TOGETHER - 1)
