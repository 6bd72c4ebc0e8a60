"""The keys that stream past query rows: the order and places of their blocks, and the producer that loads them.

A tile of query rows walks through its keys from the last key that it sees down to the first. A block ends with its
chunk: no block has keys of two chunks. Blocks are numbered through all heads that a program serves.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper

from ..segments.lookup import chunk_row, key_index
from ..segments.ranges import keys_of_positions
from .geometry import Geometry
from .releases import struct
from .stages import EmptyStages, Ring, make_empty_stages, make_ring


@gluon.constexpr_function
def box_shape(dimensions, BLOCK_N, BLOCK_D):
    """Return the shape of the boxes that the copy engine loads: rows at one place of all other dimensions."""
    return [1] * (dimensions - 2) + [BLOCK_N, BLOCK_D]


@gluon.jit
def count_keys(tile, geometry):
    """Return the number of keys that the last row of a `QueryTile` sees; no other row sees more."""
    # The segment may end inside of the tile. A negative kv_len, which marks invalid tables, gives no keys.
    last_row = gl.minimum(tile.row + geometry.OWNED - 1, tile.q_len * geometry.GROUP - 1)
    last_token = last_row // geometry.GROUP
    return gl.maximum(gl.minimum(tile.diagonal + last_token + 1, tile.kv_len), 0)


@gluon.jit
def find_key_range(tile, position, geometry, MASK: gl.constexpr):
    """Return (begin, end) of the keys that the rows of a ranged `QueryTile` see."""
    # Both ends of a range grow with the position: the first row has the lowest range, the last real row the highest.
    document = position.document
    last_row = gl.minimum(tile.row + geometry.OWNED - 1, tile.q_len * geometry.GROUP - 1)
    first = position.first + tile.row // geometry.GROUP
    last = gl.minimum(position.first + last_row // geometry.GROUP, document.real - 1)
    end = keys_of_positions(last, document, MASK).end
    # A tile of padding rows alone sees no key.
    end = gl.where(first <= last, end, 0)
    return gl.minimum(keys_of_positions(first, document, MASK).begin, end), end


@struct
class KeyBlock:
    """The place of one block of keys in the sequence and in the K/V buffer."""

    chunk: gl.tensor
    start: gl.tensor  # the first key; the block has fewer than BLOCK_N keys if its chunk ends before
    head: gl.tensor  # numbered among the heads that the program serves
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
            # Zero as a tensor: the walk carries the chunk through a loop.
            chunk = blocks * 0
            start = (blocks - 1) * self.BLOCK_N
        else:
            # Every chunk below the last one has the same number of blocks, the last of them possibly ragged.
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
            # The descriptor has slots as a dimension of their own. `chunk_row` with slots of no rows is the row inside
            # of a slot; with slots of one row, and chunks of none, it is the number of the slot.
            row = self.kv_row + chunk_row(chunk, self.kv_chunk, 0, self.SLOTS) + start - chunk * self.kv_chunk
            slot = chunk_row(chunk, 0, 1, self.SLOTS)
        return KeyBlock(chunk=chunk, start=start, head=head, slot=slot, row=row)

    @gluon.jit
    def below(self, chunk, start):
        """Return (chunk, first key) of the block below the one that begins with key `start` of `chunk`."""
        below = start - self.BLOCK_N
        if self.SLOTS > 1:
            # Below the first block of a chunk is the last block of the chunk before, which may be ragged.
            crossed = below < chunk * self.kv_chunk
            chunk = gl.where(crossed, chunk - 1, chunk)
            # The last block of a chunk has what is left of it, at least one key.
            last_start = chunk * self.kv_chunk + (self.kv_chunk - 1) // self.BLOCK_N * self.BLOCK_N
            below = gl.where(crossed, last_start, below)
        return chunk, below

    @gluon.jit
    def descriptor(self, array, slot_rows, geometry, TOP: gl.constexpr):
        """Make the copy engine's descriptor of the keys, [slot, row, head * head_dim], for boxes [1, BLOCK_N, BLOCK_D].

        The same descriptor serves the TOP block and all others. Its rows end with the sequence in every slot; with one
        slot they end with the last key that is seen. Rows of a box behind the end are zero: they never hold another
        sequence's keys, nor padding, which may be NaN.
        """
        BOX: gl.constexpr = box_shape(3, self.BLOCK_N, geometry.BLOCK_D)
        LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for(BOX, geometry.dtype)
        # Each of several slots has an early and a late chunk of the sequence, one behind the other: 2 * kv_chunk keys.
        end = self.kv_row + (self.seen if self.SLOTS == 1 else 2 * self.kv_chunk)
        return hopper.tma.make_tensor_descriptor(
            # The heads of a program lie one behind the other in a row, so that `KeyStream.load` chooses a head by its
            # column.
            array.ptr, [self.SLOTS, end, geometry.HEADS_TOGETHER * geometry.HEAD_DIM],
            [slot_rows.to(gl.int64) * array.STRIDE_T, array.STRIDE_T, 1], BOX, LAYOUT,
        )  # fmt: skip


@struct
class RangedKeys:
    """The blocks of the keys `[begin, seen)` of one document, for ranged masks.

    In gathered K/V the first chunk may begin before the document, by `lead` keys. Blocks of that chunk are counted
    from the document's first key, blocks of other chunks from the chunk's first key. Block numbers rise with the keys.
    """

    begin: gl.tensor
    seen: gl.tensor
    real: gl.tensor  # keys of the document that are not padding
    kv_row: gl.tensor  # of the document's first key in one slot; of the first chunk of all, in several
    kv_chunk: gl.tensor  # keys of a chunk, at least 1
    place: gl.tensor
    SLOTS: gl.constexpr  # in one slot there are no chunks: keys follow each other
    BLOCK_N: gl.constexpr

    @gluon.jit
    def lead(self):
        """Return the number of keys by which the document's first chunk begins before the document."""
        return self.place % self.kv_chunk

    @gluon.jit
    def blocks_of(self, keys):
        """Return the number of blocks that `keys` of one chunk fill."""
        return (keys + self.BLOCK_N - 1) // self.BLOCK_N

    @gluon.jit
    def number(self, key):
        """Return the number of the block that `key` lies in."""
        number = key // self.BLOCK_N
        if self.SLOTS > 1:
            per_chunk, lead = self.blocks_of(self.kv_chunk), self.lead()
            chunk = (key + lead) // self.kv_chunk
            later = chunk * per_chunk + (key + lead - chunk * self.kv_chunk) // self.BLOCK_N
            # Chunk 0 has fewer keys of the document than others, and so maybe fewer blocks. It takes the last numbers
            # of the first `per_chunk`, so that no number is left out between it and chunk 1.
            number = gl.where(chunk == 0, per_chunk - self.blocks_of(self.kv_chunk - lead) + number, later)
        return number

    @gluon.jit
    def find(self, number):
        """Return (first key of a block, end of its chunk)."""
        if self.SLOTS == 1:
            return number * self.BLOCK_N, self.seen
        else:
            per_chunk, lead = self.blocks_of(self.kv_chunk), self.lead()
            chunk = number // per_chunk
            # Keys are counted from the document's first key, which lies `lead` keys behind the beginning of chunk 0.
            end = (chunk + 1) * self.kv_chunk - lead
            start = end - self.kv_chunk + (number - chunk * per_chunk) * self.BLOCK_N
            # The first chunk has fewer blocks: they take the highest numbers of a chunk.
            first = (number - per_chunk + self.blocks_of(end)) * self.BLOCK_N
            return gl.where(chunk == 0, first, start), end

    @gluon.jit
    def top(self):
        """Return (chunk, first key, number of blocks) of the block with the last key, from which the walk begins."""
        # If no key is seen the number of blocks is 0, and the block that is returned is never loaded.
        number = self.number(gl.maximum(self.seen - 1, 0))
        start, _ = self.find(number)
        chunk = number * 0
        if self.SLOTS > 1:
            chunk = (start + self.place) // self.kv_chunk
        return chunk, start, gl.where(self.begin < self.seen, number - self.number(self.begin) + 1, 0)

    @gluon.jit
    def count_blocks(self):
        """Return the number of blocks."""
        _, _, blocks = self.top()
        return blocks

    @gluon.jit
    def locate(self, chunk, start, head):
        """Return the `KeyBlock` of `head` that begins with key `start` of `chunk`; in several slots, by its chunk."""
        if self.SLOTS == 1:
            slot, row = start * 0, self.kv_row + start
        else:
            slot, row = chunk_row(chunk, 0, 1, self.SLOTS), self.place + start - chunk * self.kv_chunk
        return KeyBlock(chunk=chunk, start=start, head=head, slot=slot, row=row)

    @gluon.jit
    def below(self, chunk, start):
        """Return (chunk, first key) of the block below the one that begins with key `start` of `chunk`."""
        below = start - self.BLOCK_N
        if self.SLOTS > 1:
            end = chunk * self.kv_chunk - self.place  # of the chunk below
            crossed = below < end
            # The chunk below begins with the document if it is the first one. Its last block may be ragged.
            begin = gl.maximum(end - self.kv_chunk, 0)
            chunk = gl.where(crossed, chunk - 1, chunk)
            below = gl.where(crossed, begin + (end - begin - 1) // self.BLOCK_N * self.BLOCK_N, below)
        return chunk, below

    @gluon.jit
    def descriptor(self, array, slot_rows, geometry, TOP: gl.constexpr):
        """Make the copy engine's descriptor of the keys. Rows of a box behind the end are zero.

        With one slot its dimensions are [1, row, head * head_dim], and rows end with the last key that is seen. With
        several slots they are [slot, early or late chunk, row, head * head_dim], and rows end with each chunk. The TOP
        block, which has the last key, has a descriptor of its own, whose rows also end where padding begins.
        """
        columns = geometry.HEADS_TOGETHER * geometry.HEAD_DIM
        slot_stride = slot_rows.to(gl.int64) * array.STRIDE_T
        if self.SLOTS == 1:
            BOX: gl.constexpr = box_shape(3, self.BLOCK_N, geometry.BLOCK_D)
            return hopper.tma.make_tensor_descriptor(
                array.ptr, [1, self.kv_row + self.seen, columns], [slot_stride, array.STRIDE_T, 1], BOX,
                gl.NVMMASharedLayout.get_default_for(BOX, geometry.dtype),
            )  # fmt: skip
        else:
            BOX: gl.constexpr = box_shape(4, self.BLOCK_N, geometry.BLOCK_D)
            # Rows behind a chunk belong to another chunk or document: the copy engine fills in zeros for them.
            rows = self.kv_chunk
            if TOP:
                chunk, _, _ = self.top()
                rows = gl.minimum(rows, self.place + self.real - chunk * self.kv_chunk)
            return hopper.tma.make_tensor_descriptor(
                array.ptr + self.kv_row.to(gl.int64) * array.STRIDE_T, [self.SLOTS, 2, rows, columns],
                [slot_stride, self.kv_chunk.to(gl.int64) * array.STRIDE_T, array.STRIDE_T, 1], BOX,
                gl.NVMMASharedLayout.get_default_for(BOX, geometry.dtype),
            )  # fmt: skip


@gluon.jit
def next_block(keys, before, i, blocks, HEADS_TOGETHER: gl.constexpr):
    """Return the `KeyBlock` number `i`, which follows `before`.

    That is the block below, or the top block of the next head if `i` is a multiple of `blocks`.
    """
    chunk, start = keys.below(before.chunk, before.start)
    head = before.head
    if HEADS_TOGETHER > 1:
        top_chunk, top_start, _ = keys.top()
        # Every head has the same blocks, in the same order.
        same_head = i - (head + 1) * blocks < 0
        chunk = gl.where(same_head, chunk, top_chunk)
        start = gl.where(same_head, start, top_start)
        head = gl.where(same_head, head, head + 1)
    return keys.locate(chunk, start, head)


@struct
class KeyStream:
    """The blocks of K and V that a tile sees, for all heads of the program."""

    geometry: Geometry
    keys: gl.base_value  # `Keys` or `RangedKeys`
    k: Ring
    v: Ring
    numbers: gl.shared_memory_descriptor  # 0 to BLOCK_N - 1, for `HeadBlocks`
    empty: EmptyStages
    CHUNKS: gl.constexpr  # whether the descriptor has a dimension for chunks: see `RangedKeys.descriptor`

    @gluon.jit
    def load(self, ring, descriptor, block, i):
        """Load `block` into `ring` as block `i`."""
        column = block.head * self.geometry.HEAD_DIM
        if self.CHUNKS:
            late = gl.where(block.chunk < self.geometry.SLOTS, 0, 1)
            ring.load(descriptor, [block.slot, late, block.row, column], i)
        else:
            ring.load(descriptor, [block.slot, block.row, column], i)


@gluon.jit
def find_keys(tile, position, geometry, MASK: gl.constexpr):
    """Return the `Keys` or `RangedKeys` that a `QueryTile` at `position` sees."""
    BLOCK_N: gl.constexpr = geometry.STREAMED
    if MASK is None:
        seen = count_keys(tile, geometry)
        return Keys(seen=seen, kv_row=tile.kv_row, kv_chunk=tile.kv_chunk, SLOTS=geometry.SLOTS, BLOCK_N=BLOCK_N)
    else:
        begin, seen = find_key_range(tile, position, geometry, MASK)
        document = position.document
        return RangedKeys(
            begin=begin, seen=seen, real=key_index(document, document.real), kv_row=tile.kv_row,
            kv_chunk=gl.maximum(tile.kv_chunk, 1), place=document.place, SLOTS=geometry.SLOTS, BLOCK_N=BLOCK_N,
        )  # fmt: skip


@gluon.jit
def store_numbers(BLOCK_N: gl.constexpr):
    """Return a buffer with the numbers of the keys of a block.

    Consumers read them from shared memory where they mask, and need no registers for them elsewhere.
    """
    numbers = gl.arange(0, BLOCK_N, gl.BlockedLayout([1], [32], [gl.num_warps()], [0]))
    return gl.allocate_shared_memory(gl.int32, [BLOCK_N], gl.SwizzledSharedLayout(1, 1, 1, [0]), numbers)


@gluon.jit
def make_key_stream(tile, position, geometry, MASK: gl.constexpr):
    """Make the `KeyStream` of the keys that a `QueryTile` at `position` sees."""
    keys = find_keys(tile, position, geometry, MASK)
    CHUNKS: gl.constexpr = MASK is not None and geometry.SLOTS > 1
    BOX: gl.constexpr = box_shape(4 if CHUNKS else 3, geometry.STREAMED, geometry.BLOCK_D)
    k = make_ring(BOX, geometry, 1)
    v = make_ring(BOX, geometry, 1)
    return KeyStream(
        geometry=geometry, keys=keys, k=k, v=v, numbers=store_numbers(geometry.STREAMED),
        empty=make_empty_stages(geometry), CHUNKS=CHUNKS,
    )  # fmt: skip


@gluon.jit
def produce_keys(stream, k, v, slot_rows, V_BEHIND: gl.constexpr):
    """Load all blocks of K and V, in the order in which consumers use them.

    With V_BEHIND consumers use V of a block together with K of the next block. The operand that probabilities multiply,
    V with V_BEHIND and otherwise K, must hold no padding even where the mask hides it: padding may be NaN.
    """
    HEADS_TOGETHER: gl.constexpr = stream.geometry.HEADS_TOGETHER
    CHUNKS: gl.constexpr = stream.CHUNKS
    keys = stream.keys
    chunk, start, blocks = keys.top()
    if blocks > 0:
        # The producer makes descriptors while the consumers load their rows, and the descriptor of V while the first K
        # is on its way. The first stage is empty: the producer does not wait.
        k_desc = keys.descriptor(k, slot_rows, stream.geometry, not V_BEHIND)
        block = keys.locate(chunk, start, gl.to_tensor(0))
        stream.load(stream.k, k_desc, block, 0)
        v_desc = keys.descriptor(v, slot_rows, stream.geometry, V_BEHIND)
        if not V_BEHIND:
            stream.load(stream.v, v_desc, block, 0)
        # The bound of the top descriptor fits the chunk of the last real key alone: with chunks, all other blocks need
        # a descriptor whose rows are whole chunks.
        top_desc = v_desc if V_BEHIND else k_desc
        if CHUNKS:
            if V_BEHIND:
                v_desc = keys.descriptor(v, slot_rows, stream.geometry, False)
            else:
                k_desc = keys.descriptor(k, slot_rows, stream.geometry, False)
        for i in range(1, blocks * HEADS_TOGETHER):
            before = block
            block = next_block(keys, before, i, blocks, HEADS_TOGETHER)
            # The producer waits until all consumers have left K of block i - STAGES and the V that came with it.
            stream.empty.wait(i)
            if V_BEHIND:
                stream.load(stream.k, k_desc, block, i)
                _load_bounded(stream, stream.v, v_desc, top_desc, before, i - 1, blocks)
            else:
                _load_bounded(stream, stream.k, k_desc, top_desc, block, i, blocks)
                stream.load(stream.v, v_desc, block, i)
        if V_BEHIND:
            # The producer waits until all consumers have left the V that the last one replaces.
            stream.empty.wait(blocks * HEADS_TOGETHER)
            _load_bounded(stream, stream.v, v_desc, top_desc, block, blocks * HEADS_TOGETHER - 1, blocks)


@gluon.jit
def _load_bounded(stream, ring, descriptor, top_descriptor, block, i, blocks):
    """Load `block` into `ring` as block `i`; `top_descriptor` serves a block with the last key of a head."""
    if stream.CHUNKS:
        if i == block.head * blocks:
            stream.load(ring, top_descriptor, block, i)
        else:
            stream.load(ring, descriptor, block, i)
    else:
        stream.load(ring, descriptor, block, i)
