"""The query rows that stream past keys: the order of their blocks, where those are, and the producer that brings them.

A block is a box, tokens by heads of one half of the sequence, that the copy engine brings: in shared memory it lies as
packed rows, whatever the strides are. The blocks of a half end with its segment, so that only the first can be partial.
Boxes are clipped to the rows of the sequence: rows behind them are zero, never another sequence's.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper

from ..segments.lookup import load_half
from .geometry import Geometry
from .owned import Strided
from .releases import aggregate, struct
from .stages import EmptyStages, Ring, make_empty_stages, make_ring


@aggregate
class Packing:
    """The shape of a box, tokens by query heads of one KV head, with the rows of one block.

    It has as many heads as the largest power of two that divides the group; the others are in further boxes.
    """

    HEADS: gl.constexpr  # of one box
    TOKENS: gl.constexpr  # of one box
    PARTS: gl.constexpr  # boxes that hold all heads of a group

    @gluon.constexpr_function
    def __init__(self, GROUP, BLOCK_M):
        power = GROUP & -GROUP
        heads = power if power < BLOCK_M else BLOCK_M
        self.HEADS = gl.constexpr(heads)
        self.TOKENS = gl.constexpr(BLOCK_M // heads)
        self.PARTS = gl.constexpr(GROUP // heads)


@struct
class HalfBlocks:
    """The blocks of one half of a sequence whose rows see the first key of a tile, or some of them do."""

    q_row: gl.tensor  # local row of token 0 of the half
    diagonal: gl.tensor
    kv_len: gl.tensor
    first: gl.tensor  # token with which the blocks begin: negative if the first is partial
    blocks: gl.tensor
    masked: gl.tensor  # the first few: not all of their rows see all keys of the tile


@gluon.jit
def find_half_blocks(tile, half, CAUSAL: gl.constexpr, BLOCK_N: gl.constexpr, TOKENS: gl.constexpr):
    """Find the `HalfBlocks` of a `KeyTile` in half 0, the late one, or 1, the early one.

    Whole blocks of TOKENS end with the segment; the first may begin before the first row that sees the key, or before
    token 0 (`block_tokens`). A block that would begin before token 0 is one of the masked ones.
    """
    q_row, q_len, diagonal, kv_len = load_half(tile.halves_ptr, half, tile.n_keys, CAUSAL)
    begin = gl.minimum(gl.maximum(tile.first_key - diagonal, 0), q_len)
    begin = gl.where(tile.first_key < kv_len, begin, q_len)
    blocks = (q_len - begin + TOKENS - 1) // TOKENS
    first = q_len - blocks * TOKENS
    last_key = gl.minimum(tile.first_key + BLOCK_N, tile.n_keys) - 1
    begin_full = gl.where(last_key < kv_len, gl.maximum(last_key - diagonal, 0), q_len)
    masked = gl.minimum((gl.maximum(begin_full - first, 0) + TOKENS - 1) // TOKENS, blocks)
    return HalfBlocks(q_row=q_row, diagonal=diagonal, kv_len=kv_len, first=first, blocks=blocks, masked=masked)


@gluon.jit
def block_tokens(first, block, TOKENS: gl.constexpr):
    """Return (begin, end) of the tokens of its half that block `block` is for, where blocks begin with token `first`.

    The box of a block begins with `begin`, which is never negative: the copy engine can add to a box that ends behind
    the last row, but not to one that begins before the first. From `end` on its rows are the next block's, or behind
    the segment, and hidden.
    """
    return gl.maximum(first + block * TOKENS, 0), first + (block + 1) * TOKENS


@struct
class SequenceRows:
    """The query rows of one sequence, which lie together: those of the early half, then those of the late one."""

    first: gl.tensor  # local row
    count: gl.tensor
    kv_head: gl.tensor  # the first that the program serves, int64

    @gluon.jit
    def descriptor(self, array, geometry, BOX: gl.constexpr):
        """Make the copy engine's descriptor of these rows of a `Strided` array, no others: [row, head, head_dim]."""
        heads = array.from_head(self.kv_head * geometry.GROUP)
        return hopper.tma.make_tensor_descriptor(
            heads.ptr + self.first.to(gl.int64) * array.STRIDE_T,
            [self.count, geometry.GROUP * geometry.HEADS_TOGETHER, geometry.HEAD_DIM],
            [array.STRIDE_T, array.STRIDE_H, 1], BOX,
            gl.NVMMASharedLayout.get_default_for(BOX, array.ptr.dtype.element_ty),
        )  # fmt: skip


@struct
class RowArrays:
    """What a producer reads of query rows."""

    q: Strided
    dout: Strided
    lse2_ptr: gl.tensor  # [heads of the program, T * GROUP]
    delta_ptr: gl.tensor
    T: gl.tensor


@struct
class RowStream:
    """The blocks of Q and dO whose rows see a tile of keys, with three numbers of each row beside them."""

    geometry: Geometry
    packing: Packing
    q: Ring
    dout: Ring
    lse2: gl.shared_memory_descriptor  # [STAGES, BLOCK_M] float32, full with `q`
    delta: gl.shared_memory_descriptor  # [STAGES, BLOCK_M] float32, full with `dout`
    limit: gl.shared_memory_descriptor  # [STAGES, BLOCK_M] int32, keys that a row sees, full with `q`
    empty: EmptyStages

    @gluon.jit
    def numbers(self, buffer, i):
        """Read from `buffer`, one of the three, the numbers of the rows of block `i`: a row of the scores' layout."""
        return buffer.index(i % self.geometry.STAGES).load(gl.SliceLayout(0, self.geometry.SCORES))


@gluon.jit
def make_row_stream(geometry, packing):
    """Make the `RowStream` of a program."""
    BOX: gl.constexpr = [packing.TOKENS, packing.HEADS, geometry.BLOCK_D]
    NUMBERS: gl.constexpr = [geometry.STAGES, geometry.STREAMED]
    NUMBERS_LAYOUT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    # The producer arrives twice for each buffer: with the rows, that the copy engine brings, and with their numbers.
    q = make_ring(BOX, geometry, 2)
    dout = make_ring(BOX, geometry, 2)
    empty = make_empty_stages(geometry)
    return RowStream(
        geometry=geometry,
        packing=packing,
        q=q,
        dout=dout,
        lse2=gl.allocate_shared_memory(gl.float32, NUMBERS, NUMBERS_LAYOUT),
        delta=gl.allocate_shared_memory(gl.float32, NUMBERS, NUMBERS_LAYOUT),
        limit=gl.allocate_shared_memory(gl.int32, NUMBERS, NUMBERS_LAYOUT),
        empty=empty,
    )


@gluon.jit
def produce_rows(stream, tile, sequence, arrays, CAUSAL: gl.constexpr, DESCENDING: gl.constexpr = False):
    """Bring all blocks of rows that see a `KeyTile`, head after head.

    First come the whole blocks of the late half and of the early one, then the masked ones of both: consumers compare
    the number of a block with one count, and the producer alone knows tables, halves and heads. Each of these runs of
    blocks begins with its first rows or, DESCENDING, with its last, which every tile of keys sees.
    """
    geometry = stream.geometry
    GROUP: gl.constexpr = geometry.GROUP
    PACK: gl.constexpr = stream.packing.HEADS
    PARTS: gl.constexpr = stream.packing.PARTS
    TOKENS: gl.constexpr = stream.packing.TOKENS
    BOX: gl.constexpr = [TOKENS, PACK, geometry.BLOCK_D]
    # Descriptors are made while the consumers load their keys.
    q_desc = sequence.descriptor(arrays.q, geometry, BOX)
    dout_desc = sequence.descriptor(arrays.dout, geometry, BOX)
    packed = gl.arange(0, geometry.STREAMED, gl.BlockedLayout([1], [32], [gl.num_warps()], [0]))
    i = 0
    for run in range(4 * geometry.HEADS_TOGETHER):
        half = find_half_blocks(tile, run % 2, CAUSAL, geometry.OWNED, TOKENS)
        head, is_whole = run // 4, run % 4 < 2
        low, high = gl.where(is_whole, half.masked, 0), gl.where(is_whole, half.blocks, half.masked)
        for number in range(low, high):
            block = low + high - 1 - number if DESCENDING else number
            begin, end = block_tokens(half.first, block, TOKENS)
            tokens = begin + packed // PACK
            limit = gl.where(tokens < end, gl.minimum(half.diagonal + tokens + 1, half.kv_len), 0)
            row = half.q_row + begin - sequence.first
            for part in range(PARTS):
                statistics = (
                    head * arrays.T.to(gl.int64) * GROUP
                    + (half.q_row + tokens) * GROUP + part * PACK + packed % PACK
                )  # fmt: skip
                lse2 = gl.load(arrays.lse2_ptr + statistics, mask=tokens < end, other=float("inf"))
                delta = gl.load(arrays.delta_ptr + statistics, mask=tokens < end, other=0.0)
                stage = i % geometry.STAGES
                place = [row, head * GROUP + part * PACK, 0]
                # The producer waits until all consumers have left Q, dO and the numbers of block i - STAGES.
                stream.empty.wait(i)
                stream.q.load(q_desc, place, i)
                stream.lse2.index(stage).store(lse2)
                stream.limit.index(stage).store(limit)
                # The consumers wait for these numbers as they wait for Q.
                stream.q.arrive(i)
                stream.dout.load(dout_desc, place, i)
                stream.delta.index(stage).store(delta)
                # The consumers wait for this number as they wait for dO.
                stream.dout.arrive(i)
                i += 1


@struct
class BlockOrder:
    """The order in which `produce_rows`, DESCENDING, brings the blocks of one head, for a partition that seeks them."""

    late_row: gl.tensor  # of the sequence, with which its late half begins; the early one begins with row 0
    late_first: gl.tensor  # of `HalfBlocks`
    late_whole: gl.tensor  # blocks of the late half that are not masked
    late_masked: gl.tensor
    early_first: gl.tensor
    early_whole: gl.tensor
    early_masked: gl.tensor

    @gluon.jit
    def place(self, i, packing):
        """Return (row of the sequence, head of the group) with which block `i` begins."""
        number = i // packing.PARTS
        whole = self.late_whole + self.early_whole
        # Within a run of blocks their numbers rise as their places in the half fall: the sum is one less than these.
        late = gl.where(number < self.late_whole, self.late_masked + self.late_whole, whole + self.late_masked)
        early = gl.where(number < whole, self.early_masked + whole, whole + self.late_masked + self.early_masked)
        is_late = (number < self.late_whole) | ((number >= whole) & (number < whole + self.late_masked))
        late_begin, _ = block_tokens(self.late_first, late - 1 - number, packing.TOKENS)
        early_begin, _ = block_tokens(self.early_first, early - 1 - number, packing.TOKENS)
        return gl.where(is_late, self.late_row + late_begin, early_begin), i % packing.PARTS * packing.HEADS
