"""Device functions with which all attention kernels find their work in the segment tables.

Portable kernels (Triton) and Hopper kernels (Gluon) both call these functions, so they use only features of both.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .fields import (
    HALF_FIELDS,
    HALF_FIRST_POSITION,
    HALF_KV_LEN,
    HALF_POSITION,
    HALF_Q_LEN,
    HALF_Q_ROW,
    SEGMENT_EARLY_KEYS,
    SEGMENT_EARLY_POSITION,
    SEGMENT_FIELDS,
    SEGMENT_FIRST_POSITION,
    SEGMENT_KEYS,
    SEGMENT_KV_CHUNK,
    SEGMENT_KV_LEN,
    SEGMENT_KV_ROW,
    SEGMENT_LATE_POSITION,
    SEGMENT_PLACE,
    SEGMENT_POSITION,
    SEGMENT_Q_LEN,
    SEGMENT_Q_ROW,
    SEGMENT_REAL,
    SEQUENCE_EARLY_KEYS,
    SEQUENCE_EARLY_POSITION,
    SEQUENCE_FIELDS,
    SEQUENCE_HALVES,
    SEQUENCE_KEYS,
    SEQUENCE_KV_CHUNK,
    SEQUENCE_KV_ROW,
    SEQUENCE_LATE_POSITION,
    SEQUENCE_PLACE,
    SEQUENCE_REAL,
)


class QueryTile(NamedTuple):
    """A tile of query rows and the segment that contains it. All fields are int32 scalars."""

    row: tl.tensor  # first row of the tile inside the segment; the tile is empty if the segment ends before it
    q_row: tl.tensor  # local row of the segment's first token
    q_len: tl.tensor  # tokens of the segment
    diagonal: tl.tensor  # token `t` of the segment sees the keys below `diagonal + t + 1`
    kv_len: tl.tensor  # ... and below `kv_len`; if `kv_len` is negative, every row becomes NaN
    kv_row: tl.tensor  # row of the sequence's first key in the first slot of the K/V buffer
    kv_chunk: tl.tensor  # keys of one chunk of the sequence


class KeyTile(NamedTuple):
    """A tile of keys and the sequence that contains it. All fields but the pointer are scalars."""

    halves_ptr: tl.tensor  # the sequence's two segments in the sequence table, for `load_half`
    first_key: tl.tensor  # first key of the tile, numbered in its sequence; an empty tile begins behind the last key
    n_keys: tl.tensor  # keys of the sequence
    kv_row: tl.tensor  # as in `QueryTile`
    kv_chunk: tl.tensor
    poison: tl.tensor  # true if the tables are invalid, so that all gradients become NaN


class Half(NamedTuple):
    """One of the two segments of a sequence, for a tile of keys; the fields mean what `QueryTile` says."""

    q_row: tl.tensor
    q_len: tl.tensor
    diagonal: tl.tensor
    kv_len: tl.tensor


class RangedHalf(NamedTuple):
    """One of the two segments of a sequence, for a tile of keys under a ranged mask."""

    q_row: tl.tensor
    q_len: tl.tensor
    position: tl.tensor  # position of the first token in its document


class Document(NamedTuple):
    """The document of a tile, for ranged masks. All fields are int32 scalars.

    The document's keys in the K/V buffer are an early part followed by a late part, each at consecutive positions.
    """

    real: tl.tensor  # tokens that are not padding
    early_position: tl.tensor  # position of the first key of the early part
    early_keys: tl.tensor  # keys of the early part
    late_position: tl.tensor  # position of the first key of the late part
    n_keys: tl.tensor  # keys of both parts
    place: tl.tensor  # tokens between the beginning of the first chunk and the first key


@triton.jit
def locate(table_ptr, n_entries, tile, FIELDS: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """Return (entry that tile number `tile` belongs to, number of the tile in that entry).

    The first column of a table is the number of tokens of all earlier entries. Entry `e` owns the tiles from
    `tokens_before * GROUP // BLOCK + e` on. Whatever the lengths are, these are enough tiles for its rows, and at most
    one of them is empty. So the table does not depend on the tile size.
    """
    low = 0
    high = n_entries - 1
    while low < high:
        # Each round divides the range into four parts instead of two: a round costs one memory latency, however many
        # loads it issues.
        step = (high - low) // 4 + 1
        passed = 0
        for i in tl.static_range(1, 4):  # three loads that do not wait for each other
            entry = tl.minimum(low + i * step, high)
            mine = tl.load(table_ptr + entry * FIELDS) * GROUP // BLOCK + entry <= tile
            passed += (mine & (low + i * step <= high)).to(tl.int32)
        low += passed * step
        high = tl.minimum(low + step - 1, high)
    return low, tile - (tl.load(table_ptr + low * FIELDS) * GROUP // BLOCK + low)


@triton.jit
def tile_and_head(KV_HEADS: tl.constexpr, TILES_TOGETHER: tl.constexpr):
    """Return (tile number, KV head of the window) of this program.

    `TILES_TOGETHER` tiles of one head come before the tiles of the next head; 0 means all tiles of a head.
    """
    program = tl.program_id(0)
    if TILES_TOGETHER == 0:
        tiles = tl.num_programs(0) // KV_HEADS
        return program % tiles, program // tiles
    else:
        head = program // TILES_TOGETHER
        return head // KV_HEADS * TILES_TOGETHER + program % TILES_TOGETHER, head % KV_HEADS


@triton.jit
def _load_segment(segments_ptr, n_segments, tile, T, CAUSAL: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr):
    """Return (`QueryTile` number `tile`, pointer to its segment's entry of the table).

    The tiles of a segment are numbered from its end: under a causal mask the last tile is the heaviest. It starts
    first, so that light tiles fill the gaps at the end of the launch.

    The last entry is the padding behind the last sequence. It ends at local row `T`, the end of the arrays, unless the
    table names another end. Its `kv_len` is negative if `build_segments` found the lengths or the rank invalid. In that
    case, or if the sequences need more than `T` rows, all rows belong to this entry and become NaN.
    """
    padding_ptr = segments_ptr + (n_segments - 1) * SEGMENT_FIELDS
    used = tl.load(padding_ptr + SEGMENT_Q_ROW)
    end = tl.load(padding_ptr + SEGMENT_Q_LEN)
    end = tl.where(end > 0, end, T)
    segment, block = locate(segments_ptr, n_segments, tile, SEGMENT_FIELDS, GROUP, BLOCK_M)
    # If the sequences need more rows than the arrays have, programs would write behind the end of the arrays.
    overfull = used > T
    segment = tl.where(overfull, n_segments - 1, segment)
    block = tl.where(overfull, tile, block)
    padding = segment == n_segments - 1
    entry_ptr = segments_ptr + segment * SEGMENT_FIELDS
    q_row = tl.where(overfull, 0, tl.load(entry_ptr + SEGMENT_Q_ROW))
    q_len = tl.where(padding, end - q_row, tl.load(entry_ptr + SEGMENT_Q_LEN))
    kv_len = tl.where(overfull, -1, tl.load(entry_ptr + (SEGMENT_KV_LEN if CAUSAL else SEGMENT_KEYS)))
    # Without a causal mask the diagonal lies behind all keys, so that only kv_len limits the keys of a row.
    diagonal = tl.load(entry_ptr + SEGMENT_POSITION) if CAUSAL else kv_len
    last_block = (q_len * GROUP - 1) // BLOCK_M
    # A program behind the last tile keeps its number: it finds no rows, and returns.
    block = tl.where(block <= last_block, last_block - block, block)
    queries = QueryTile(
        row=block * BLOCK_M,
        q_row=q_row,
        q_len=q_len,
        diagonal=diagonal,
        kv_len=kv_len,
        kv_row=tl.load(entry_ptr + SEGMENT_KV_ROW),
        kv_chunk=tl.load(entry_ptr + SEGMENT_KV_CHUNK),
    )
    return queries, entry_ptr


@triton.jit
def load_segment(segments_ptr, n_segments, tile, T, CAUSAL: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr):
    """Return the `QueryTile` number `tile`: see `_load_segment`."""
    queries, _ = _load_segment(segments_ptr, n_segments, tile, T, CAUSAL, GROUP, BLOCK_M)
    return queries


@triton.jit
def load_ranged_segment(
    segments_ptr, n_segments, tile, T, CAUSAL: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr
):
    """Return (`QueryTile` number `tile`, position of its segment's first token, `Document`).

    The tile's `diagonal` and `kv_len` do not describe a ranged mask, but a negative `kv_len` makes every row NaN.
    """
    queries, entry_ptr = _load_segment(segments_ptr, n_segments, tile, T, CAUSAL, GROUP, BLOCK_M)
    document = Document(
        real=tl.load(entry_ptr + SEGMENT_REAL),
        early_position=tl.load(entry_ptr + SEGMENT_EARLY_POSITION),
        early_keys=tl.load(entry_ptr + SEGMENT_EARLY_KEYS),
        late_position=tl.load(entry_ptr + SEGMENT_LATE_POSITION),
        n_keys=tl.maximum(tl.load(entry_ptr + SEGMENT_KEYS), 0),
        place=tl.load(entry_ptr + SEGMENT_PLACE),
    )
    return queries, tl.load(entry_ptr + SEGMENT_FIRST_POSITION), document


@triton.jit
def tables_are_invalid(segments_ptr, n_segments, T):
    """Return whether `load_segment` would make every row NaN, for kernels that do not call it."""
    padding_ptr = segments_ptr + (n_segments - 1) * SEGMENT_FIELDS
    return (tl.load(padding_ptr + SEGMENT_Q_ROW) > T) | (tl.load(padding_ptr + SEGMENT_KV_LEN) < 0)


@triton.jit
def load_sequence(sequences_ptr, n_sequences, tile, T, slot_rows, SLOTS: tl.constexpr, BLOCK_N: tl.constexpr):
    """Load the `KeyTile` number `tile` from the sequence table.

    The padding entry and invalid tables are treated as in `load_segment`.
    """
    padding_ptr = sequences_ptr + (n_sequences - 1) * SEQUENCE_FIELDS
    used, used_rows = tl.load(padding_ptr + SEQUENCE_KV_ROW), tl.load(padding_ptr + SEQUENCE_HALVES + HALF_Q_ROW)
    sequence, block = locate(sequences_ptr, n_sequences, tile, SEQUENCE_FIELDS, 1, BLOCK_N)
    overfull = (used > slot_rows) | (used_rows > T)
    sequence = tl.where(overfull, n_sequences - 1, sequence)
    block = tl.where(overfull, tile, block)
    entry_ptr = sequences_ptr + sequence * SEQUENCE_FIELDS
    kv_row = tl.where(overfull, 0, tl.load(entry_ptr + SEQUENCE_KV_ROW))
    padding = sequence == n_sequences - 1
    poison = overfull | (tl.load(entry_ptr + SEQUENCE_KEYS) < 0)
    # The padding fills the rest of each slot, like a sequence of SLOTS chunks with slot_rows - used keys each.
    kv_chunk = tl.where(padding, slot_rows - kv_row, tl.load(entry_ptr + SEQUENCE_KV_CHUNK))
    n_keys = tl.where(padding, kv_chunk * SLOTS, tl.load(entry_ptr + SEQUENCE_KEYS))
    return KeyTile(
        halves_ptr=entry_ptr + SEQUENCE_HALVES,
        first_key=block * BLOCK_N,
        n_keys=n_keys,
        kv_row=kv_row,
        kv_chunk=kv_chunk,
        poison=poison,
    )


@triton.jit
def load_half(halves_ptr, half, n_keys, CAUSAL: tl.constexpr):
    """Load one `Half` of the sequence of a `KeyTile`: 0 is the late chunk, 1 the early one."""
    half_ptr = halves_ptr + HALF_FIELDS * half
    q_row = tl.load(half_ptr + HALF_Q_ROW)
    q_len = tl.load(half_ptr + HALF_Q_LEN)
    kv_len = tl.load(half_ptr + HALF_KV_LEN) if CAUSAL else n_keys
    diagonal = tl.load(half_ptr + HALF_POSITION) if CAUSAL else kv_len
    return Half(q_row=q_row, q_len=q_len, diagonal=diagonal, kv_len=kv_len)


@triton.jit
def load_ranged_half(halves_ptr, half):
    """Load one half of the sequence of a `KeyTile` as a `RangedHalf`."""
    half_ptr = halves_ptr + HALF_FIELDS * half
    return RangedHalf(
        q_row=tl.load(half_ptr + HALF_Q_ROW),
        q_len=tl.load(half_ptr + HALF_Q_LEN),
        position=tl.load(half_ptr + HALF_FIRST_POSITION),
    )


@triton.jit
def load_document(found):
    """Load the `Document` of a `KeyTile`."""
    entry_ptr = found.halves_ptr - SEQUENCE_HALVES
    return Document(
        real=tl.load(entry_ptr + SEQUENCE_REAL),
        early_position=tl.load(entry_ptr + SEQUENCE_EARLY_POSITION),
        early_keys=tl.load(entry_ptr + SEQUENCE_EARLY_KEYS),
        late_position=tl.load(entry_ptr + SEQUENCE_LATE_POSITION),
        n_keys=found.n_keys,
        place=tl.load(entry_ptr + SEQUENCE_PLACE),
    )


@triton.jit
def load_sequence_rows(halves_ptr):
    """Load (first local row, number of rows) of the sequence of a `KeyTile`: its early chunk, then its late one."""
    first = tl.load(halves_ptr + HALF_FIELDS + HALF_Q_ROW)
    return first, tl.load(halves_ptr + HALF_Q_ROW) + tl.load(halves_ptr + HALF_Q_LEN) - first


@triton.jit
def key_index(document, position):
    """Return how many keys of the `Document` in the K/V buffer lie before `position`, a scalar or a vector."""
    early = tl.minimum(tl.maximum(position - document.early_position, 0), document.early_keys)
    # Other ranks hold the positions between both parts; such a position counts as the end of the early part.
    late = tl.minimum(tl.maximum(position - document.late_position, 0), document.n_keys - document.early_keys)
    return early + late


@triton.jit
def key_position(document, index):
    """Return the position of key number `index` of the `Document` in the K/V buffer."""
    late = document.late_position + index - document.early_keys
    return tl.where(index < document.early_keys, document.early_position + index, late)


@triton.jit
def chunk_row(chunk, kv_chunk, slot_rows, SLOTS: tl.constexpr):
    """Return the first row of chunk number `chunk`, counted from the sequence's first row in the K/V buffer."""
    return tl.where(chunk < SLOTS, chunk * slot_rows, (2 * SLOTS - 1 - chunk) * slot_rows + kv_chunk)
