"""The query rows that stream past keys: the order and places of their blocks, and the producer that loads them.

A block is a box, tokens by heads of one half of the sequence, that the copy engine loads. In shared memory it lies as
packed rows, whatever the strides are. The blocks of a half are counted back from the end of its segment, so only the
first can be partial. Under a ranged mask they are counted from the first row that sees the tile, so only the last can
be partial, or on a grid that all tiles share. Boxes are clipped to the rows of the sequence: rows outside are zero,
never another sequence's, nor padding.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper

from ..segments.lookup import load_document, load_half, load_ranged_half, load_sequence_rows
from ..segments.ranges import KeyRange, positions_seen, seeing_positions
from .geometry import Geometry
from .owned import Strided
from .releases import aggregate, struct
from .row_numbers import rows_of_places
from .stages import EmptyStages, Ring, make_empty_stages, make_ring


@aggregate
class Packing:
    """The shape of a box, tokens by query heads of one KV head, with the rows of one block.

    A box has as many heads as the largest power of two that divides the group; further boxes have the other heads.
    """

    HEADS: gl.constexpr  # of one box
    TOKENS: gl.constexpr  # of one box
    PARTS: gl.constexpr  # boxes that hold all heads of a group

    @gluon.constexpr_function
    def __init__(self, GROUP, BLOCK_M):
        power = GROUP & -GROUP  # the largest power of two that divides GROUP
        # A group larger than a block is cut into several boxes of one token.
        heads = power if power < BLOCK_M else BLOCK_M
        self.HEADS = gl.constexpr(heads)
        self.TOKENS = gl.constexpr(BLOCK_M // heads)
        self.PARTS = gl.constexpr(GROUP // heads)


@gluon.constexpr_function
def count_longest_walk(MASK, TOKENS, KEYS):
    """Return the blocks of TOKENS tokens that see a tile of KEYS keys under a window; 0 under other masks."""
    right = 0 if MASK.CAUSAL else MASK.RIGHT
    return -(-(MASK.LEFT + right + KEYS) // TOKENS) if MASK.CHUNK == 0 and min(MASK.LEFT, right) >= 0 else 0


@aggregate
class RowMask:
    """The mask of a kernel, with the fields of a `ranges.Mask`, and the shape of its tiles, tokens by keys."""

    RANGED: gl.constexpr
    CAUSAL: gl.constexpr
    LEFT: gl.constexpr
    RIGHT: gl.constexpr
    CHUNK: gl.constexpr
    TOKENS: gl.constexpr  # of a box
    KEYS: gl.constexpr  # of a program
    GRID: gl.constexpr  # under a ranged mask a row is in the same block for all tiles
    WALK: gl.constexpr  # `count_longest_walk`, or 0 for walks that begin with their own last rows

    @gluon.constexpr_function
    def __init__(self, MASK, RANGED, TOKENS, KEYS, GRID=False, WALK=0):
        self.RANGED = gl.constexpr(RANGED)
        self.CAUSAL = gl.constexpr(MASK.CAUSAL)
        self.LEFT = gl.constexpr(MASK.LEFT)
        self.RIGHT = gl.constexpr(MASK.RIGHT)
        self.CHUNK = gl.constexpr(MASK.CHUNK)
        self.TOKENS = gl.constexpr(TOKENS)
        self.KEYS = gl.constexpr(KEYS)
        self.GRID = gl.constexpr(GRID)
        self.WALK = gl.constexpr(WALK)


@struct
class HalfBlocks:
    """The blocks of one half of a sequence that have rows which see a key of a tile."""

    q_row: gl.tensor  # local row of token 0 of the half
    diagonal: gl.tensor  # under a ranged mask the position of token 0
    kv_len: gl.tensor  # under a ranged mask the number of real tokens of the document
    first: gl.tensor  # token with which the blocks begin: negative if the first is partial
    end: gl.tensor  # tokens from here on belong to no block
    end_of_half: gl.tensor  # behind its last token, under a ranged mask behind its last real one
    blocks: gl.tensor
    masked: gl.tensor  # number of the first blocks in which not all rows see all keys of the tile
    whole_end: gl.tensor  # under a ranged mask, blocks from this one on have such rows too

    @gluon.jit
    def last(self):
        """Return the number of masked blocks behind the whole ones."""
        return self.blocks - self.whole_end

    @gluon.jit
    def tokens(self, block, mask):
        """Return (begin, end) of the tokens of the half that belong to block `block`.

        The box of a block begins with `begin`. From `end` on its rows belong to the next block or lie behind the
        segment, and are hidden.
        """
        begin, end = block_begin(self.first, block, mask.TOKENS), self.first + (block + 1) * mask.TOKENS
        if mask.RANGED:
            end = gl.minimum(end, self.end)
        return begin, end

    @gluon.jit
    def seen_by(self, tokens, mask):
        """Return the `KeyRange` of `tokens` of the half, in key numbers, or in positions under a ranged mask."""
        if mask.RANGED:
            return positions_seen(self.diagonal + tokens, self.kv_len, mask)
        else:
            end = gl.minimum(self.diagonal + tokens + 1, self.kv_len)
            return KeyRange(begin=end, end=end)


@gluon.jit
def block_begin(first, block, TOKENS: gl.constexpr):
    """Return the first token of the box of block `block`; the blocks begin with token `first` of their half.

    It is never negative: the copy engine can add to a box that ends behind the last row, but not to one that begins
    before the first.
    """
    return gl.maximum(first + block * TOKENS, 0)


@gluon.jit
def tokens_before(half, position):
    """Return how many tokens of a `RangedHalf` lie before `position`."""
    return gl.minimum(gl.maximum(position - half.position, 0), half.q_len)


@gluon.jit
def find_half_blocks(tile, half, mask):
    """Find the `HalfBlocks` of a `KeyTile` in half 0, the late one, or 1, the early one."""
    TOKENS: gl.constexpr = mask.TOKENS
    if mask.RANGED:
        # Blocks begin with the first row that sees a key, or on the grid before it, and have no padding rows.
        found, document = load_ranged_half(tile.halves_ptr, half), load_document(tile)
        end_key = gl.minimum(tile.first_key + mask.KEYS, tile.n_keys)
        seeing = seeing_positions(tile.first_key, end_key, document, mask)
        real = tokens_before(found, document.real)
        begin = gl.minimum(tokens_before(found, seeing.begin), real)
        end = gl.maximum(gl.minimum(tokens_before(found, seeing.end), real), begin)
        if mask.GRID:
            # Rows before the first that sees a key are in a masked block: their ranges hide them.
            begin = gl.where(begin < end, begin // TOKENS * TOKENS, end)
        whole_begin = gl.maximum(gl.minimum(tokens_before(found, seeing.whole_begin), real) - begin, 0)
        whole_end = gl.maximum(gl.minimum(tokens_before(found, seeing.whole_end), real) - begin, 0)
        blocks = (end - begin + TOKENS - 1) // TOKENS
        # Counted in blocks from `begin`: rounded up and down, so that a whole block has no row that misses a key. A
        # narrow window may leave none; then every block is masked.
        first_whole, last_whole = (whole_begin + TOKENS - 1) // TOKENS, whole_end // TOKENS
        if mask.GRID:
            # Without a whole block too, rows that see the last keys are told from rows that see the first keys: the
            # latter come first.
            first_whole = gl.minimum(first_whole, blocks)
            last_whole = gl.maximum(first_whole, last_whole)
        else:
            has_whole = first_whole < last_whole
            first_whole = gl.where(has_whole, first_whole, blocks)
            last_whole = gl.where(has_whole, last_whole, blocks)
        return HalfBlocks(
            q_row=found.q_row, diagonal=found.position, kv_len=document.real, first=begin, end=end,
            end_of_half=real, blocks=blocks, masked=first_whole, whole_end=last_whole,
        )  # fmt: skip
    else:
        # Whole blocks end with the segment; the first may begin before the first row that sees the key, or before
        # token 0. A block that would begin before token 0 is one of the masked ones.
        q_row, q_len, diagonal, kv_len = load_half(tile.halves_ptr, half, tile.n_keys, mask.CAUSAL)
        # Token t sees the keys below diagonal + t + 1: token first_key - diagonal is the first to see a key of the
        # tile, token last_key - diagonal the first to see all of them.
        begin = gl.minimum(gl.maximum(tile.first_key - diagonal, 0), q_len)
        begin = gl.where(tile.first_key < kv_len, begin, q_len)
        blocks = (q_len - begin + TOKENS - 1) // TOKENS
        first = q_len - blocks * TOKENS
        last_key = gl.minimum(tile.first_key + mask.KEYS, tile.n_keys) - 1
        begin_full = gl.where(last_key < kv_len, gl.maximum(last_key - diagonal, 0), q_len)
        masked = gl.minimum((gl.maximum(begin_full - first, 0) + TOKENS - 1) // TOKENS, blocks)
        return HalfBlocks(
            q_row=q_row, diagonal=diagonal, kv_len=kv_len, first=first, end=q_len, end_of_half=q_len,
            blocks=blocks, masked=masked, whole_end=blocks,
        )  # fmt: skip


@struct
class SequenceRows:
    """The query rows of one sequence, which are adjacent: the early half, then the late half."""

    first: gl.tensor  # local row
    count: gl.tensor
    kv_head: gl.tensor  # the first head that the program serves, int64

    @gluon.jit
    def descriptor(self, array, geometry, BOX: gl.constexpr, COLUMNS: gl.constexpr):
        """Make the copy engine's descriptor of these rows of a `Strided` array, no others: [row, head, COLUMNS]."""
        heads = array.from_head(self.kv_head * geometry.GROUP)
        return hopper.tma.make_tensor_descriptor(
            heads.ptr + self.first.to(gl.int64) * array.STRIDE_T,
            [self.count, geometry.GROUP * geometry.HEADS_TOGETHER, COLUMNS],
            [array.STRIDE_T, array.STRIDE_H, 1], BOX,
            gl.NVMMASharedLayout.get_default_for(BOX, array.ptr.dtype.element_ty),
        )  # fmt: skip


@gluon.jit
def find_sequence_rows(tile, kv_head, mask):
    """Find the `SequenceRows` of a `KeyTile`; a ranged mask leaves out padding rows, which may hold any bits."""
    if mask.RANGED:
        real = load_document(tile).real
        late, early = load_ranged_half(tile.halves_ptr, 0), load_ranged_half(tile.halves_ptr, 1)
        # Without its padding the early half may be empty, or end before the late half begins: then nothing of the late
        # half is real.
        late_tokens, early_tokens = tokens_before(late, real), tokens_before(early, real)
        first = gl.where(early_tokens > 0, early.q_row, late.q_row)
        end = gl.where(late_tokens > 0, late.q_row + late_tokens, early.q_row + early_tokens)
        return SequenceRows(first=first, count=gl.maximum(end - first, 0), kv_head=kv_head)
    else:
        first, count = load_sequence_rows(tile.halves_ptr)
        return SequenceRows(first=first, count=count, kv_head=kv_head)


@struct
class RowArrays:
    """The arrays that a producer reads by query row."""

    q: Strided
    dout: Strided
    lse2_ptr: gl.tensor  # [heads of the program, T * GROUP]
    delta_ptr: gl.tensor
    T: gl.tensor


@struct
class RowStream:
    """The blocks of Q and dO whose rows see a tile of keys, and three numbers for each row."""

    geometry: Geometry
    packing: Packing
    q: Ring
    dout: Ring
    # Numbers of a block lie in the order of its rows, and in the order of `rows_of_places` if PAIRED.
    lse2: gl.shared_memory_descriptor  # [STAGES, BLOCK_M] float32, full with `q`
    delta: gl.shared_memory_descriptor  # [STAGES, BLOCK_M] float32, full with `dout`
    # [STAGES, BLOCK_M] int32, full with `q`: the row sees no key from this one on. Under a ranged mask they are
    # positions, and STAGES more rows have the first key that the row sees.
    limits: gl.shared_memory_descriptor
    mask: RowMask
    PAIRED: gl.constexpr
    empty: EmptyStages
    dout_empty: EmptyStages  # of dO and delta, where heads are wide; otherwise `empty` covers them

    @gluon.jit
    def numbers(self, buffer, i):
        """Read one number for each row of block `i` from `buffer`, in the layout of a row of the scores.

        `buffer` is `lse2`, `delta` or `limits`, and not PAIRED.
        """
        return buffer.index(i % self.geometry.STAGES).load(gl.SliceLayout(0, self.geometry.SCORES))

    @gluon.jit
    def sees(self, keys, i):
        """Return whether each row of block `i` sees each of `keys`: `[keys, rows]` in the scores' layout."""
        limit = self.numbers(self.limits, i)
        seen = keys[:, None] < limit[None, :]
        if self.mask.RANGED:
            # The second half of `limits` has the first keys that rows see.
            first = self.geometry.STAGES + i % self.geometry.STAGES
            begin = self.limits.index(first).load(gl.SliceLayout(0, self.geometry.SCORES))
            seen = seen & (keys[:, None] >= begin[None, :])
        return seen


@gluon.jit
def make_row_stream(geometry, packing, mask, PAIRED: gl.constexpr = False):
    """Make the `RowStream` of a program."""
    BOX: gl.constexpr = [packing.TOKENS, packing.HEADS, geometry.BLOCK_D]
    NUMBERS: gl.constexpr = [geometry.STAGES, geometry.STREAMED]
    LIMITS: gl.constexpr = [geometry.STAGES * (2 if mask.RANGED else 1), geometry.STREAMED]
    NUMBERS_LAYOUT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    # The producer arrives twice for each buffer: for the rows, which the copy engine loads, and for their numbers.
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
        limits=gl.allocate_shared_memory(gl.int32, LIMITS, NUMBERS_LAYOUT),
        mask=mask,
        PAIRED=PAIRED,
        empty=empty,
        dout_empty=make_empty_stages(geometry) if geometry.WIDE else empty,
    )


@gluon.jit
def produce_rows(stream, tile, sequence, arrays, DESCENDING: gl.constexpr = False, start=None):
    """Load all blocks of rows that see a `KeyTile`, head after head.

    The whole blocks of the late half and of the early half come first, then the masked blocks of both. So consumers
    compare the number of a block with one count, and only the producer knows tables, halves and heads. Each of these
    runs of blocks begins with its first rows or, DESCENDING, with its last rows, which every tile of keys sees. On a
    grid the walk through all runs begins at `start`, from `order.find_start`, and ends before it.
    """
    geometry = stream.geometry
    mask = stream.mask
    GROUP: gl.constexpr = geometry.GROUP
    PACK: gl.constexpr = stream.packing.HEADS
    PARTS: gl.constexpr = stream.packing.PARTS
    TOKENS: gl.constexpr = stream.packing.TOKENS
    BOX: gl.constexpr = [TOKENS, PACK, geometry.BLOCK_D]
    RUNS: gl.constexpr = 6 if mask.RANGED else 4
    # Descriptors are made while the consumers load their keys.
    q_desc = sequence.descriptor(arrays.q, geometry, BOX, geometry.HEAD_DIM)
    dout_desc = sequence.descriptor(arrays.dout, geometry, BOX, geometry.HEAD_DIM)
    # Packed row r of a block is token r // PACK and head r % PACK of its box, as the box lies in shared memory.
    packed = gl.arange(0, geometry.STREAMED, gl.BlockedLayout([1], [32], [gl.num_warps()], [0]))
    if stream.PAIRED:
        packed = rows_of_places(packed)
    i = 0
    # On a grid the first run comes in two parts.
    TRIPS: gl.constexpr = RUNS + 1 if mask.GRID else RUNS
    for run in range(TRIPS * geometry.HEADS_TOGETHER):
        # Runs 0 and 1 of a head are the whole blocks of the late and of the early half, runs 2 and 3 the masked blocks
        # before the whole ones. Under a ranged mask runs 4 and 5 are the masked blocks behind them.
        head, place = run // TRIPS, run % TRIPS
        if mask.GRID:
            place = (place + start[0]) % RUNS
        half = find_half_blocks(tile, place % 2, mask)
        is_whole = place < 2
        low, high = gl.where(is_whole, half.masked, 0), gl.where(is_whole, half.whole_end, half.masked)
        if mask.RANGED:
            is_last = place >= 4
            low, high = gl.where(is_last, half.whole_end, low), gl.where(is_last, half.blocks, high)
        if mask.GRID:
            high = gl.where(run % TRIPS == 0, start[1] + 1, high)
            low = gl.where(run % TRIPS == RUNS, start[1] + 1, low)
        for number in range(low, high):
            block = low + high - 1 - number if DESCENDING else number
            begin, end = half.tokens(block, mask)
            tokens = begin + packed // PACK
            seen = half.seen_by(tokens, mask)
            # Rows of the box that are not of this block see no key. In whole blocks, where no mask is applied, there
            # are none.
            limit = gl.where(tokens < end, seen.end, 0)
            row = half.q_row + begin - sequence.first
            for part in range(PARTS):
                statistics = (
                    head * arrays.T.to(gl.int64) * GROUP
                    + (half.q_row + tokens) * GROUP + part * PACK + packed % PACK
                )  # fmt: skip
                # With lse infinite such a row has probability exp2(-inf) = 0.
                lse2 = gl.load(arrays.lse2_ptr + statistics, mask=tokens < end, other=float("inf"))
                delta = gl.load(arrays.delta_ptr + statistics, mask=tokens < end, other=0.0)
                stage = i % geometry.STAGES
                box = [row, head * GROUP + part * PACK, 0]
                # The producer waits until all consumers have left Q, dO and the numbers of block i - STAGES.
                stream.empty.wait(i)
                stream.q.load(q_desc, box, i)
                stream.lse2.index(stage).store(lse2)
                stream.limits.index(stage).store(limit)
                if mask.RANGED:
                    stream.limits.index(geometry.STAGES + stage).store(seen.begin)
                # The consumers wait for these numbers and for Q by the same barrier.
                stream.q.arrive(i)
                if geometry.WIDE:
                    # The producer waits until all consumers have left dO and delta of block i - STAGES.
                    stream.dout_empty.wait(i)
                stream.dout.load(dout_desc, box, i)
                stream.delta.index(stage).store(delta)
                # The consumers wait for this number and for dO by the same barrier.
                stream.dout.arrive(i)
                i += 1
