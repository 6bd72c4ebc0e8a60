"""The kernel that turns `cu_seqlens` and a rank into the tables that the attention kernels read.

Only this kernel, and the kernel of `halo.py`, depend on the K/V layout (`modes.KVLayout`). The tables say where keys
are, so the attention kernels that read the tables are the same for all layouts.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .dealt import keys_of_halo, load_held, local_row, make_form, part_in_chunk, read_batch
from .entries import Keys, Rows, store_half, store_segments, store_sequences
from .fields import (
    HALF_Q_ROW,
    SEGMENT_FIELDS,
    SEGMENT_KEYS,
    SEGMENT_KV_LEN,
    SEGMENT_Q_LEN,
    SEGMENT_Q_ROW,
    SEGMENT_TOKENS_BEFORE,
    SEQUENCE_FIELDS,
    SEQUENCE_HALVES,
    SEQUENCE_KEYS,
    SEQUENCE_KEYS_BEFORE,
    SEQUENCE_KV_CHUNK,
    SEQUENCE_KV_ROW,
)


class HeldKeys(NamedTuple):
    """The keys of `[BLOCK]` sequences that are in the K/V buffer, and their places there."""

    kv_row: tl.tensor
    keys: tl.tensor
    early_position: tl.tensor
    early_keys: tl.tensor
    late_position: tl.tensor


class Segment(NamedTuple):
    """`[BLOCK]` segments, and the weights that decide the order of entries."""

    rows: Rows
    weight: tl.tensor  # number of keys that the last row sees
    keys: tl.tensor
    key_weight: tl.tensor  # keys of the sequence; in the row layout its rows on this rank


class Places(NamedTuple):
    """The places of `[BLOCK]` entries in the tables, by weight, and the tokens of all entries before them."""

    segment: tl.tensor
    rows_before: tl.tensor
    sequence: tl.tensor
    keys_before: tl.tensor


@triton.jit
def _hold_keys(batch, held, FORM: tl.constexpr):
    """Return the `HeldKeys` of the sequences `held`.

    The buffer of one peer has the early part of a sequence, then its late part. There are no other keys between the two
    parts: a sequence with both parts fills the early chunk up to its end, and the late chunk from its beginning.
    """
    WORLD_SIZE: tl.constexpr = FORM.WORLD_SIZE
    nothing = tl.zeros_like(held.length)
    if FORM.PEER and WORLD_SIZE > 1:
        peer = (batch.rank - batch.step + WORLD_SIZE) % WORLD_SIZE
        early_position, early_keys = part_in_chunk(held, peer)
        late_position, late_keys = part_in_chunk(held, 2 * WORLD_SIZE - 1 - peer)
        keys = early_keys + late_keys
        kv_row = held.first_row
        if FORM.ROW:
            early_row = local_row(held, peer, False, early_position)
            late_row = local_row(held, 2 * WORLD_SIZE - 1 - peer, True, late_position)
            # The row of the first key in the buffer; any row will do for a document without tokens on the peer.
            kv_row = tl.where(early_keys > 0, early_row, tl.where(late_keys > 0, late_row, 0))
        return HeldKeys(kv_row, keys, early_position, early_keys, late_position)
    else:
        # All keys are in the buffer: the early part is the whole sequence, and nothing follows it.
        kv_row = held.start if FORM.CONTIGUOUS else held.first_row
        return HeldKeys(kv_row, held.length, nothing, held.length, held.length)


@triton.jit
def _make_segment(batch, index, FORM: tl.constexpr):
    """Make the segments numbered `index`: all late chunks come first, then all early chunks.

    The keys of a peer rank are its early chunk followed by its late chunk. Under a causal mask both segments of this
    rank see the early chunk of an earlier peer, and neither sees its late chunk. The late segment sees both chunks of a
    later peer, and the early segment sees neither. The rank's own two chunks behave like one sequence of two chunks.
    `position` and `kv_len` express these four cases for sequences that are cut into chunks.
    """
    WORLD_SIZE: tl.constexpr = FORM.WORLD_SIZE
    late = index < batch.n_sequences
    sequence = tl.where(late, index, index - batch.n_sequences)
    mask = (sequence < batch.n_readable) & (index < 2 * batch.n_sequences)
    held = load_held(batch, sequence, mask, FORM)
    keys = _hold_keys(batch, held, FORM).keys
    kv_len = keys
    key_weight = keys
    if WORLD_SIZE == 1:
        # One rank has whole sequences: the late segment is the sequence, the early one is empty.
        q_row = held.first_row
        q_len = tl.where(late, held.length, 0)
        first_position = tl.zeros_like(held.length)
        position = first_position
    else:
        chunk = tl.where(late, 2 * WORLD_SIZE - 1 - batch.rank, batch.rank)
        first_position, q_len = part_in_chunk(held, chunk)
        q_row = local_row(held, chunk, late, first_position)
        position = first_position
        if FORM.ROW:
            q_row = tl.where(q_len > 0, q_row, 0)
            _, others = part_in_chunk(held, 2 * WORLD_SIZE - 1 - chunk)  # rows of the sequence's other segment
            key_weight = q_len + others
        elif FORM.PEER:
            own = batch.step == 0
            earlier = (batch.step > 0) & (batch.step <= batch.rank)
            # `position` and `kv_len` count keys of the peer, not of the sequence. A chunk of another rank lies entirely
            # before or entirely behind a chunk of this rank. So `position` hides no key of another rank, and `kv_len`
            # says how many of its keys are seen.
            position = tl.where(own, tl.where(late, held.chunk_length, 0), keys)
            seen_late = own | (late & (batch.step > batch.rank))
            kv_len = tl.where(seen_late, keys, tl.where(earlier, held.chunk_length, 0))
        if FORM.HALO:
            # The first rows of a chunk may see keys of another rank. `halo.py` has segments for these rows, so the
            # segment here begins behind them.
            chunk_before = tl.where(late & (batch.rank == WORLD_SIZE - 1), 0, chunk)  # chunk 0 needs no keys
            apart = tl.where(keys_of_halo(batch, held, chunk_before) > 0, tl.minimum(q_len, batch.halo), 0)
            q_row, q_len, first_position = q_row + apart, q_len - apart, first_position + apart
    rows = Rows(
        q_row=batch.first_row + q_row,
        q_len=q_len,
        position=position,
        kv_len=kv_len,
        first_position=first_position,
    )
    return Segment(
        rows=rows,
        # Without a window the last row sees the most keys. With a window this weight is too large and the order less
        # good, but results do not depend on the order.
        weight=first_position + q_len if FORM.ROW or FORM.HALO else tl.minimum(position + q_len, kv_len),
        keys=keys,
        key_weight=key_weight,
    )


@triton.jit
def _rank_entries(batch, index, segment, FORM: tl.constexpr, BLOCK: tl.constexpr):
    """Return the `Places` of the entries numbered `index`, heaviest first.

    The place of an entry is the number of heavier entries, and its first column is the sum of their tokens. Both are
    sums over all entries, so the kernel needs no sort. The weight of an entry is the cost of its heaviest tile: for a
    segment the number of keys that its last row sees, for a sequence the number of rows that see its first key. In the
    row layout these are its rows on this rank; in all others they grow with its length.
    """
    place = tl.zeros([BLOCK], tl.int32)
    rows_before = tl.zeros([BLOCK], tl.int32)
    sequence_place = tl.zeros([BLOCK], tl.int32)
    keys_before = tl.zeros([BLOCK], tl.int32)
    for first in range(0, 2 * batch.n_sequences, BLOCK):
        other = first + tl.arange(0, BLOCK)
        others = _make_segment(batch, other, FORM)
        earlier = other[None, :] < index[:, None]
        # Compare all pairs of entries, a block at a time. If two weights are equal, the entry with the lower number
        # comes first, so that no two entries get the same place.
        heavier = others.weight[None, :] > segment.weight[:, None]
        before = heavier | ((others.weight[None, :] == segment.weight[:, None]) & earlier)
        before = before & (other < 2 * batch.n_sequences)[None, :]
        place += tl.sum(before.to(tl.int32), 1)
        rows_before += tl.sum(tl.where(before, others.rows.q_len[None, :], 0), 1)
        # Compare sequences in the same way; their numbers are below batch.n_sequences.
        heavier = others.key_weight[None, :] > segment.key_weight[:, None]
        before = heavier | ((others.key_weight[None, :] == segment.key_weight[:, None]) & earlier)
        before = before & (other < batch.n_sequences)[None, :]
        sequence_place += tl.sum(before.to(tl.int32), 1)
        keys_before += tl.sum(tl.where(before, others.keys[None, :], 0), 1)
    return Places(place, rows_before, sequence_place, keys_before)


@triton.jit
def _store_padding(segments_ptr, sequences_ptr, batch, end_row, used, valid, FORM: tl.constexpr):
    """Store the last entry of each table: the rows and keys behind the last sequence, after `used` tokens."""
    # -1 keys tell every kernel that the batch is invalid: `load_segment` then gives all rows to this entry, and they
    # become NaN.
    no_keys = tl.where(valid, 0, -1)
    padding_ptr = segments_ptr + 2 * batch.n_sequences * SEGMENT_FIELDS
    tl.store(padding_ptr + SEGMENT_TOKENS_BEFORE, used // FORM.WORLD_SIZE)
    tl.store(padding_ptr + SEGMENT_Q_ROW, batch.first_row + used // FORM.WORLD_SIZE)
    for field in tl.static_range(SEGMENT_Q_LEN, SEGMENT_FIELDS):
        tl.store(padding_ptr + field, 0)
    tl.store(padding_ptr + SEGMENT_Q_LEN, end_row)
    tl.store(padding_ptr + SEGMENT_KV_LEN, no_keys)
    tl.store(padding_ptr + SEGMENT_KEYS, no_keys)
    padding_ptr = sequences_ptr + batch.n_sequences * SEQUENCE_FIELDS
    tl.store(padding_ptr + SEQUENCE_KEYS_BEFORE, used // FORM.WORLD_SIZE if FORM.PEER else used)
    tl.store(padding_ptr + SEQUENCE_KV_ROW, used if FORM.CONTIGUOUS else used // FORM.WORLD_SIZE)
    for field in tl.static_range(SEQUENCE_KV_CHUNK, SEQUENCE_FIELDS):
        tl.store(padding_ptr + field, 0)
    tl.store(padding_ptr + SEQUENCE_KEYS, no_keys)
    tl.store(padding_ptr + SEQUENCE_HALVES + HALF_Q_ROW, batch.first_row + used // FORM.WORLD_SIZE)


@triton.jit(do_not_specialize=["n_sequences", "row_length", "total", "first_row", "end_row", "halo", "longest"])
def build_segments(
    cu_seqlens_ptr,  # [N + 1] int32, global
    rank_ptr,  # [1] int32
    lengths_ptr,  # [N] int32, read if HAS_LENGTHS
    n_sequences,  # N, and with ROW one more
    row_length,
    total,
    first_row,  # first local row of the batch
    end_row,  # local row behind the batch; 0 is the end of the arrays
    halo,
    longest,
    segments_ptr,  # [steps, 2 * n_sequences + 1, SEGMENT_FIELDS] int32
    sequences_ptr,  # [steps, n_sequences + 1, SEQUENCE_FIELDS] int32
    WORLD_SIZE: tl.constexpr,
    PEER: tl.constexpr,
    CONTIGUOUS: tl.constexpr,
    ROW: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    HALO: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write both tables, heaviest entry first; the last entry of each is the padding behind the last sequence.

    Grid: (blocks of entries, steps). With `PEER`, step `s` writes the tables for the keys of rank
    `(rank - s) % WORLD_SIZE`.

    With `ROW`, `total // row_length` packed rows are cut into chunks. The padding behind the last sequence may lie in
    both chunks of a rank, and counts as one more sequence, without real tokens.

    With `HALO` there is one step. Its tables have the rank's own keys and the rows that need no other keys; the kernel
    of `halo.py` writes the tables for all other rows. Memory for `2 * n_sequences + 1` entries is reserved for this
    sequence table, and it fills the last `n_sequences + 1` of them.
    """
    FORM: tl.constexpr = make_form(WORLD_SIZE, PEER, CONTIGUOUS, ROW, HAS_LENGTHS, HALO)
    offsets = tl.arange(0, BLOCK)
    index = tl.program_id(0) * BLOCK + offsets
    step = tl.program_id(1)
    segments_ptr += step * (2 * n_sequences + 1) * SEGMENT_FIELDS
    # The tables of the steps follow each other in memory.
    sequences_ptr += (n_sequences if HALO else step * (n_sequences + 1)) * SEQUENCE_FIELDS
    rank = tl.load(rank_ptr)
    pointers, rows = (cu_seqlens_ptr, lengths_ptr), (row_length, total, first_row, end_row)
    batch, valid = read_batch(pointers, n_sequences, rank, step, rows, (halo, longest), FORM, BLOCK)
    n_readable = batch.n_readable

    segment = _make_segment(batch, index, FORM)
    places = _rank_entries(batch, index, segment, FORM, BLOCK)
    late = index < n_sequences
    number = tl.where(late, index, index - n_sequences)
    held = load_held(batch, number, number < n_readable, FORM)
    held_keys = _hold_keys(batch, held, FORM)
    keys = Keys(
        kv_row=held_keys.kv_row,
        kv_chunk=held.chunk_length,
        keys=segment.keys,
        real=held.real,
        early_position=held_keys.early_position,
        early_keys=held_keys.early_keys,
        late_position=held_keys.late_position,
        # In the buffer of a peer, the keys of a sequence follow each other from its first key on, wherever chunks end.
        place=tl.zeros_like(held.place) if PEER else held.place,
    )
    segment_ptrs = segments_ptr + places.segment * SEGMENT_FIELDS
    store_segments(segment_ptrs, places.rows_before, segment.rows, keys, index < 2 * n_sequences)
    sequence_ptrs = sequences_ptr + places.sequence * SEQUENCE_FIELDS
    store_sequences(sequence_ptrs, places.keys_before, keys, late)
    # A program that owns a tile of keys needs the rows that see them: the entry of a sequence also has its two
    # segments, late and early.
    for half in tl.static_range(2):
        halved = _make_segment(batch, index + half * n_sequences, FORM)
        store_half(sequence_ptrs, half, halved.rows, late)

    if tl.program_id(0) == 0:
        used = batch.total if ROW else tl.load(cu_seqlens_ptr + n_sequences)
        _store_padding(segments_ptr, sequences_ptr, batch, end_row, tl.where(valid, used, 0), valid, FORM)
