"""The kernel that turns `cu_seqlens` and a rank into the tables that the attention kernels read."""

import triton
import triton.language as tl

from .tile import SEGMENT_FIELDS, SEQUENCE_FIELDS


@triton.jit
def _chunk_lengths(cu_seqlens_ptr, index, mask, WORLD_SIZE: tl.constexpr):
    """(start, length, chunk length) of the sequences `index`; one device holds a sequence as a single chunk."""
    start = tl.load(cu_seqlens_ptr + index, mask=mask, other=0)
    length = tl.load(cu_seqlens_ptr + index + 1, mask=mask, other=0) - start
    return start, length, length if WORLD_SIZE == 1 else length // (2 * WORLD_SIZE)


@triton.jit
def _segment(cu_seqlens_ptr, index, rank, n_sequences, n_readable, WORLD_SIZE: tl.constexpr):
    """(start, length, chunk length, chunk, rows) of segments: first all late chunks, then all early ones.

    Sequences from `n_readable` on count as empty.
    """
    late = index < n_sequences
    sequence = tl.where(late, index, index - n_sequences)
    mask = (sequence < n_readable) & (index < 2 * n_sequences)
    start, length, chunk_length = _chunk_lengths(cu_seqlens_ptr, sequence, mask, WORLD_SIZE)
    if WORLD_SIZE == 1:
        chunk = tl.where(late, 0, 0)
        rows = tl.where(late, chunk_length, 0)
    else:
        chunk = tl.where(late, 2 * WORLD_SIZE - 1 - rank, rank)
        rows = chunk_length
    return start, length, chunk_length, chunk, rows


@triton.jit(do_not_specialize=["n_sequences"])
def build_segments(
    cu_seqlens_ptr,  # [N + 1] int32, global
    rank_ptr,  # [1] int32
    n_sequences,
    segments_ptr,  # [2 * N + 1, SEGMENT_FIELDS] int32
    sequences_ptr,  # [N + 1, SEQUENCE_FIELDS] int32
    WORLD_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write both tables, heaviest entry first; the last entry of each is the padding behind the last sequence.

    An entry's place is the number of entries heavier than it, and its first field counts their tokens: both are sums
    over all entries, so no sort is needed. Weight is what the heaviest tile of an entry costs: the keys that the last
    row of a segment sees, the length of a sequence.
    """
    offsets = tl.arange(0, BLOCK)
    index = tl.program_id(0) * BLOCK + offsets
    rank = tl.load(rank_ptr)

    # Lengths that cannot be dealt out are never attended: all entries stay empty and the padding becomes NaN.
    faults = tl.zeros([BLOCK], tl.int32)
    for first in range(0, n_sequences, BLOCK):
        inside = first + offsets < n_sequences
        start, length, chunk_length = _chunk_lengths(cu_seqlens_ptr, first + offsets, inside, WORLD_SIZE)
        uneven = (length < 0) | ((start != 0) & (first + offsets == 0))
        if WORLD_SIZE > 1:
            uneven = uneven | (chunk_length * (2 * WORLD_SIZE) != length)
        faults += uneven.to(tl.int32)
    valid = (tl.sum(faults) == 0) & (rank >= 0) & (rank < WORLD_SIZE)
    n_readable = tl.where(valid, n_sequences, 0)

    start, length, chunk_length, chunk, rows = _segment(
        cu_seqlens_ptr, index, rank, n_sequences, n_readable, WORLD_SIZE=WORLD_SIZE
    )
    weight = (chunk + 1) * chunk_length
    place = tl.zeros([BLOCK], tl.int32)
    rows_before = tl.zeros([BLOCK], tl.int32)
    sequence_place = tl.zeros([BLOCK], tl.int32)
    keys_before = tl.zeros([BLOCK], tl.int32)
    for first in range(0, 2 * n_sequences, BLOCK):
        other = first + offsets
        _, other_length, other_chunk_length, other_chunk, other_rows = _segment(
            cu_seqlens_ptr, other, rank, n_sequences, n_readable, WORLD_SIZE=WORLD_SIZE
        )
        other_weight = (other_chunk + 1) * other_chunk_length
        earlier = other[None, :] < index[:, None]
        heavier = other_weight[None, :] > weight[:, None]
        before = heavier | ((other_weight[None, :] == weight[:, None]) & earlier)
        before = before & (other < 2 * n_sequences)[None, :]
        place += tl.sum(before.to(tl.int32), 1)
        rows_before += tl.sum(tl.where(before, other_rows[None, :], 0), 1)
        longer = other_length[None, :] > length[:, None]
        longer = longer | ((other_length[None, :] == length[:, None]) & earlier)
        longer = longer & (other < n_sequences)[None, :]
        sequence_place += tl.sum(longer.to(tl.int32), 1)
        keys_before += tl.sum(tl.where(longer, other_length[None, :], 0), 1)

    late = index < n_sequences
    q_row = start // WORLD_SIZE + tl.where(late & (WORLD_SIZE > 1), chunk_length, 0)
    entry_ptr = segments_ptr + place * SEGMENT_FIELDS
    store_mask = index < 2 * n_sequences
    tl.store(entry_ptr + 0, rows_before, mask=store_mask)
    tl.store(entry_ptr + 1, q_row, mask=store_mask)
    tl.store(entry_ptr + 2, rows, mask=store_mask)
    tl.store(entry_ptr + 3, chunk * chunk_length, mask=store_mask)
    tl.store(entry_ptr + 4, length, mask=store_mask)
    tl.store(entry_ptr + 5, start // WORLD_SIZE, mask=store_mask)
    tl.store(entry_ptr + 6, chunk_length, mask=store_mask)
    tl.store(entry_ptr + 7, 0, mask=store_mask)

    entry_ptr = sequences_ptr + sequence_place * SEQUENCE_FIELDS
    tl.store(entry_ptr + 0, keys_before, mask=late)
    tl.store(entry_ptr + 1, start // WORLD_SIZE, mask=late)
    tl.store(entry_ptr + 2, chunk_length, mask=late)
    tl.store(entry_ptr + 3, length, mask=late)
    for half in tl.static_range(2):
        _, _, _, chunk, rows = _segment(
            cu_seqlens_ptr, index + half * n_sequences, rank, n_sequences, n_readable, WORLD_SIZE=WORLD_SIZE
        )
        half_ptr = entry_ptr + 4 + 4 * half
        tl.store(half_ptr + 0, start // WORLD_SIZE + (chunk_length if WORLD_SIZE > 1 and half == 0 else 0), mask=late)
        tl.store(half_ptr + 1, rows, mask=late)
        tl.store(half_ptr + 2, chunk * chunk_length, mask=late)
        tl.store(half_ptr + 3, length, mask=late)

    if tl.program_id(0) == 0:
        used = tl.where(valid, tl.load(cu_seqlens_ptr + n_sequences), 0)
        kv_len = tl.where(valid, 0, -1)
        segment_ptr = segments_ptr + 2 * n_sequences * SEGMENT_FIELDS
        tl.store(segment_ptr + 0, used // WORLD_SIZE)
        tl.store(segment_ptr + 1, used // WORLD_SIZE)
        tl.store(segment_ptr + 4, kv_len)
        for field in tl.static_range(2, SEGMENT_FIELDS):
            if field != 4:
                tl.store(segment_ptr + field, 0)
        sequence_ptr = sequences_ptr + n_sequences * SEQUENCE_FIELDS
        tl.store(sequence_ptr + 0, used)
        tl.store(sequence_ptr + 1, used // WORLD_SIZE)
        tl.store(sequence_ptr + 3, kv_len)
        for field in tl.static_range(2, SEQUENCE_FIELDS):
            if field != 3:
                tl.store(sequence_ptr + field, 0)
