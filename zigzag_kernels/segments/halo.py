"""The kernel that writes the tables of halos: rows that need keys of a neighbour, and rows that are sent."""

from typing import NamedTuple

import triton
import triton.language as tl

from .dealt import keys_of_halo, load_held, local_row, make_form, part_in_chunk, read_batch
from .entries import Keys, Rows, store_half, store_sequences
from .fields import (
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
    SEGMENT_TOKENS_BEFORE,
    SEQUENCE_FIELDS,
    SEQUENCE_HALVES,
    SEQUENCE_KEYS,
    SEQUENCE_KEYS_BEFORE,
    SEQUENCE_KV_ROW,
)


class Sums(NamedTuple):
    """Sums over the segments, in their order: before each of `[BLOCK]` entries, and over `[BLOCK]` lanes of all."""

    rows: tl.tensor  # rows that need keys of a neighbour
    keys: tl.tensor
    sent: tl.tensor
    slot_row: tl.tensor  # rows of a slot that lie before the rows of the sequence
    all_keys: tl.tensor
    all_slot_keys: tl.tensor


@triton.jit
def _slot_keys(batch, held, FORM: tl.constexpr):
    """Return how many rows of a slot belong to each sequence, or in the row layout to its packed row.

    Slots of early and of late chunks have the same order of rows, on every rank.
    """
    return tl.zeros_like(held.start) + batch.halo if FORM.ROW else tl.minimum(held.chunk_length, batch.halo)


@triton.jit
def _halo(batch, index, FORM: tl.constexpr):
    """Return (late, held, chunk, own keys needed, other keys needed, rows sent) of the segments numbered `index`.

    The first half of the numbers are late chunks. On the last rank the early chunk directly precedes the late chunk, so
    its late chunk needs no keys of a neighbour.
    """
    WORLD_SIZE: tl.constexpr = FORM.WORLD_SIZE
    late = index < batch.n_sequences
    sequence = tl.where(late, index, index - batch.n_sequences)
    mask = (sequence < batch.n_readable) & (index < 2 * batch.n_sequences)
    held = load_held(batch, sequence, mask, FORM)
    chunk = tl.where(late, 2 * WORLD_SIZE - 1 - batch.rank, batch.rank)
    is_last = batch.rank == WORLD_SIZE - 1
    _, q_len = part_in_chunk(held, chunk)
    others = tl.where(late & is_last, 0, keys_of_halo(batch, held, chunk))
    own = tl.where(others > 0, tl.minimum(q_len, batch.halo), 0)
    sent = tl.where((index >= batch.n_sequences) & is_last, 0, keys_of_halo(batch, held, chunk + 1))
    return late, held, chunk, own, others, sent


@triton.jit
def _sum_before(batch, index, number, FORM: tl.constexpr, BLOCK: tl.constexpr):
    """Return the `Sums` for the segments numbered `index`, of the sequences `number`.

    The first columns of the tables are sums over all earlier entries; each program computes the sums for its entries.
    """
    rows_before = tl.zeros([BLOCK], tl.int32)
    keys_before = tl.zeros([BLOCK], tl.int32)
    sent_before = tl.zeros([BLOCK], tl.int32)
    slot_row = tl.zeros([BLOCK], tl.int32)
    all_keys = tl.zeros([BLOCK], tl.int32)
    all_slot_keys = tl.zeros([BLOCK], tl.int32)
    for first in range(0, 2 * batch.n_sequences, BLOCK):
        other = first + tl.arange(0, BLOCK)
        _, other_held, _, other_own, other_others, other_sent = _halo(batch, other, FORM)
        slot_keys = tl.where(other < batch.n_sequences, _slot_keys(batch, other_held, FORM), 0)
        before = other[None, :] < index[:, None]
        rows_before += tl.sum(tl.where(before, other_own[None, :], 0), 1)
        keys_before += tl.sum(tl.where(before, (other_own + other_others)[None, :], 0), 1)
        sent_before += tl.sum(tl.where(before, other_sent[None, :], 0), 1)
        slot_row += tl.sum(tl.where(other[None, :] < number[:, None], slot_keys[None, :], 0), 1)
        all_keys += other_own + other_others
        all_slot_keys += slot_keys
    return Sums(rows_before, keys_before, sent_before, slot_row, all_keys, all_slot_keys)


@triton.jit
def _store_sent(ptrs, sent_before, q_row, q_len, sent, slots, mask):
    """Store segments of the last `sent` rows of chunks; `slots` are (row in a slot, rows of the slot, place)."""
    slot_row, slot_keys, place = slots
    for field in tl.static_range(SEGMENT_FIELDS):
        tl.store(ptrs + field, tl.zeros_like(sent), mask=mask)
    tl.store(ptrs + SEGMENT_TOKENS_BEFORE, sent_before, mask=mask)
    # The last rows of the chunk end, in the message, where the receiver's halo ends in its slot.
    tl.store(ptrs + SEGMENT_Q_ROW, q_row + q_len - sent, mask=mask)
    tl.store(ptrs + SEGMENT_Q_LEN, sent, mask=mask)
    tl.store(ptrs + SEGMENT_KV_ROW, slot_row + slot_keys - sent, mask=mask)
    tl.store(ptrs + SEGMENT_KV_CHUNK, slot_keys, mask=mask)
    tl.store(ptrs + SEGMENT_PLACE, place, mask=mask)


@triton.jit
def _store_padding(segments_ptr, sequences_ptr, batch, end_row, used, valid, sums, FORM: tl.constexpr):
    """Store the last entry of each table of halos, for the rows behind the `used` local rows."""
    no_keys = tl.where(valid, 0, -1)
    entries = 2 * batch.n_sequences + 1
    for table in tl.static_range(1, 3):
        padding_ptr = segments_ptr + (table * entries + 2 * batch.n_sequences) * SEGMENT_FIELDS
        for field in tl.static_range(SEGMENT_FIELDS):
            tl.store(padding_ptr + field, 0)
        tl.store(padding_ptr + SEGMENT_TOKENS_BEFORE, used)
        tl.store(padding_ptr + SEGMENT_Q_ROW, batch.first_row + used)
        tl.store(padding_ptr + SEGMENT_Q_LEN, end_row)
        tl.store(padding_ptr + SEGMENT_KV_LEN, no_keys)
        tl.store(padding_ptr + SEGMENT_KEYS, no_keys)
    padding_ptr = sequences_ptr + (entries + 2 * batch.n_sequences) * SEQUENCE_FIELDS
    for field in tl.static_range(SEQUENCE_FIELDS):
        tl.store(padding_ptr + field, 0)
    slots_end = tl.sum(sums.all_slot_keys)
    if FORM.ROW:
        slots_end = batch.total // tl.maximum(batch.row_length, 1) * batch.halo
    tl.store(padding_ptr + SEQUENCE_KEYS_BEFORE, tl.sum(sums.all_keys))
    tl.store(padding_ptr + SEQUENCE_KV_ROW, tl.where(valid, slots_end, 0))
    tl.store(padding_ptr + SEQUENCE_KEYS, no_keys)
    tl.store(padding_ptr + SEQUENCE_HALVES + HALF_Q_ROW, batch.first_row + used)


@triton.jit(do_not_specialize=["n_sequences", "row_length", "total", "first_row", "end_row", "halo", "longest"])
def build_halos(
    cu_seqlens_ptr,  # [N + 1] int32, global
    rank_ptr,  # [1] int32
    lengths_ptr,  # [N] int32, read if HAS_LENGTHS
    into_segments_ptr,  # the same memory as segments and sequences, or unused
    into_sequences_ptr,
    n_sequences,  # N, and with ROW one more
    row_length,
    total,
    first_row,
    end_row,
    halo,
    longest,
    segments_ptr,  # [3, 2 * n_sequences + 1, SEGMENT_FIELDS] int32
    sequences_ptr,  # [2, 2 * n_sequences + 1, SEQUENCE_FIELDS] int32
    WORLD_SIZE: tl.constexpr,
    ROW: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the tables of halos behind the tables of a rank's own keys, in the order of the segments.

    Grid: blocks of entries.

    Segment table 1 has the first rows of each chunk, up to `halo`, if they need keys of a neighbour. Their keys lie
    next to each other in a K/V buffer of four slots: the halo of the early chunk, the first rows of the early chunk,
    the halo of the late chunk, the first rows of the late chunk. A halo ends where its slot ends, so that the chunk's
    first rows follow it. In sequence table 1 each chunk is a sequence with one segment.

    Segment table 2 has the last rows of each chunk, which a neighbour needs; KV_ROW is their first row in the message.
    """
    FORM: tl.constexpr = make_form(WORLD_SIZE, True, False, ROW, HAS_LENGTHS, True)
    offsets = tl.arange(0, BLOCK)
    index = tl.program_id(0) * BLOCK + offsets
    rank = tl.load(rank_ptr)
    pointers, rows = (cu_seqlens_ptr, lengths_ptr), (row_length, total, first_row, end_row)
    batch, valid = read_batch(pointers, n_sequences, rank, 1, rows, (halo, longest), FORM, BLOCK)
    late, held, chunk, own, others, sent = _halo(batch, index, FORM)
    number = tl.where(late, index, index - n_sequences)
    sums = _sum_before(batch, index, number, FORM, BLOCK)
    slot_keys = _slot_keys(batch, held, FORM)
    slot_row = sums.slot_row
    if ROW:
        # In the row layout every packed row has `halo` rows of a slot, whichever documents it contains.
        slot_row = held.start // tl.maximum(batch.row_length, 1) * batch.halo

    first_position, q_len = part_in_chunk(held, chunk)
    q_row = batch.first_row + local_row(held, chunk, late, first_position)
    keys = own + others
    # The keys of an early chunk lie in slots 0 and 1, of a late chunk in slots 2 and 3. They begin so that the halo
    # ends where its slot ends.
    place = tl.where(late, 2 * slot_keys, 0) + slot_keys - others
    is_segment = index < 2 * n_sequences
    entries = 2 * n_sequences + 1
    segment_ptrs = segments_ptr + (entries + index) * SEGMENT_FIELDS
    tl.store(segment_ptrs + SEGMENT_TOKENS_BEFORE, sums.rows, mask=is_segment)
    tl.store(segment_ptrs + SEGMENT_Q_ROW, q_row, mask=is_segment)
    tl.store(segment_ptrs + SEGMENT_Q_LEN, own, mask=is_segment)
    tl.store(segment_ptrs + SEGMENT_POSITION, others, mask=is_segment)
    tl.store(segment_ptrs + SEGMENT_KV_LEN, keys, mask=is_segment)
    tl.store(segment_ptrs + SEGMENT_KV_ROW, slot_row, mask=is_segment)
    tl.store(segment_ptrs + SEGMENT_KV_CHUNK, slot_keys, mask=is_segment)
    tl.store(segment_ptrs + SEGMENT_KEYS, keys, mask=is_segment)
    tl.store(segment_ptrs + SEGMENT_FIRST_POSITION, first_position, mask=is_segment)
    tl.store(segment_ptrs + SEGMENT_REAL, held.real, mask=is_segment)
    tl.store(segment_ptrs + SEGMENT_EARLY_POSITION, first_position - others, mask=is_segment)
    tl.store(segment_ptrs + SEGMENT_EARLY_KEYS, keys, mask=is_segment)
    tl.store(segment_ptrs + SEGMENT_LATE_POSITION, first_position + own, mask=is_segment)
    tl.store(segment_ptrs + SEGMENT_PLACE, place, mask=is_segment)

    sequence_ptrs = sequences_ptr + (entries + index) * SEQUENCE_FIELDS
    columns = Keys(
        kv_row=slot_row,
        kv_chunk=slot_keys,
        keys=keys,
        real=held.real,
        early_position=first_position - others,
        early_keys=keys,
        late_position=first_position + own,
        place=place,
    )
    store_sequences(sequence_ptrs, sums.keys, columns, is_segment)
    for half in tl.static_range(2):  # the second has no rows
        store_half(sequence_ptrs, half, Rows(q_row, own * (1 - half), others, keys, first_position), is_segment)
    sent_ptrs = segments_ptr + (2 * entries + index) * SEGMENT_FIELDS
    slots = slot_row, slot_keys, tl.where(late, 2 * slot_keys, 0)
    _store_sent(sent_ptrs, sums.sent, q_row, q_len, sent, slots, is_segment)

    if tl.program_id(0) == 0:
        used = total if ROW else tl.load(cu_seqlens_ptr + n_sequences)
        used = tl.where(valid, used, 0) // WORLD_SIZE
        _store_padding(segments_ptr, sequences_ptr, batch, end_row, used, valid, sums, FORM)
