"""The kernel that turns `cu_seqlens` and a rank into the tables that the attention kernels read.

What the tables say of the keys follows the K/V layout (`problem.KV_LAYOUTS`); everything behind them is the same.
"""

import triton
import triton.language as tl

from .tile import SEGMENT_FIELDS, SEQUENCE_FIELDS


@triton.jit
def _sequence(cu_seqlens_ptr, sequence, mask, WORLD_SIZE: tl.constexpr, PEER: tl.constexpr, CONTIGUOUS: tl.constexpr):
    """(start, length, chunk length, keys in the K/V buffer, row of the first one there) of the sequences `sequence`.

    One device holds a sequence as a single chunk.
    """
    start = tl.load(cu_seqlens_ptr + sequence, mask=mask, other=0)
    length = tl.load(cu_seqlens_ptr + sequence + 1, mask=mask, other=0) - start
    chunk_length = length if WORLD_SIZE == 1 else length // (2 * WORLD_SIZE)
    keys = 2 * chunk_length if PEER and WORLD_SIZE > 1 else length
    return start, length, chunk_length, keys, start if CONTIGUOUS else start // WORLD_SIZE


@triton.jit
def _segment(
    cu_seqlens_ptr,
    index,
    rank,
    step,
    n_sequences,
    n_readable,
    WORLD_SIZE: tl.constexpr,
    PEER: tl.constexpr,
    CONTIGUOUS: tl.constexpr,
):
    """(q_row, q_len, position, kv_len, weight, keys of the sequence) of segments: first all late chunks, then all
    early ones.

    Sequences from `n_readable` on count as empty. Keys of a peer rank are its early chunk and its late one, laid end to
    end: those of an earlier peer are seen up to its early chunk, those of a later peer by the late chunk alone, and the
    rank's own are seen as if they were a sequence of two chunks.
    """
    late = index < n_sequences
    sequence = tl.where(late, index, index - n_sequences)
    mask = (sequence < n_readable) & (index < 2 * n_sequences)
    start, length, chunk_length, keys, _ = _sequence(
        cu_seqlens_ptr, sequence, mask, WORLD_SIZE=WORLD_SIZE, PEER=PEER, CONTIGUOUS=CONTIGUOUS
    )
    q_row = start // WORLD_SIZE
    if WORLD_SIZE == 1:
        q_len = tl.where(late, length, 0)
        position = tl.zeros_like(length)
        kv_len = keys
    else:
        q_row += tl.where(late, chunk_length, 0)
        q_len = chunk_length
        if PEER:
            own = step == 0
            earlier = (step > 0) & (step <= rank)
            position = tl.where(own, tl.where(late, chunk_length, 0), keys)
            kv_len = tl.where(own | (late & (step > rank)), keys, tl.where(earlier, chunk_length, 0))
        else:
            position = tl.where(late, 2 * WORLD_SIZE - 1 - rank, rank) * chunk_length
            kv_len = keys
    return q_row, q_len, position, kv_len, tl.minimum(position + q_len, kv_len), keys


@triton.jit(do_not_specialize=["n_sequences"])
def build_segments(
    cu_seqlens_ptr,  # [N + 1] int32, global
    rank_ptr,  # [1] int32
    n_sequences,
    segments_ptr,  # [steps, 2 * N + 1, SEGMENT_FIELDS] int32
    sequences_ptr,  # [steps, N + 1, SEQUENCE_FIELDS] int32
    WORLD_SIZE: tl.constexpr,
    PEER: tl.constexpr,
    CONTIGUOUS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write both tables, heaviest entry first; the last entry of each is the padding behind the last sequence.

    Grid: (blocks of entries, steps); with `PEER`, step `s` is for the keys of rank `(rank - s) % WORLD_SIZE`.

    An entry's place is the number of entries heavier than it, and its first field counts their tokens: both are sums
    over all entries, so no sort is needed. Weight is what the heaviest tile of an entry costs: the keys that the last
    row of a segment sees, the length of a sequence.
    """
    offsets = tl.arange(0, BLOCK)
    index = tl.program_id(0) * BLOCK + offsets
    step = tl.program_id(1)
    segments_ptr += step * (2 * n_sequences + 1) * SEGMENT_FIELDS
    sequences_ptr += step * (n_sequences + 1) * SEQUENCE_FIELDS
    rank = tl.load(rank_ptr)

    # Lengths that cannot be dealt out are never attended: all entries stay empty and the padding becomes NaN.
    faults = tl.zeros([BLOCK], tl.int32)
    for first in range(0, n_sequences, BLOCK):
        other = first + offsets
        start, length, chunk_length, _, _ = _sequence(
            cu_seqlens_ptr, other, other < n_sequences, WORLD_SIZE=WORLD_SIZE, PEER=PEER, CONTIGUOUS=CONTIGUOUS
        )
        uneven = (length < 0) | ((start != 0) & (other == 0))
        if WORLD_SIZE > 1:
            uneven = uneven | (chunk_length * (2 * WORLD_SIZE) != length)
        faults += uneven.to(tl.int32)
    valid = (tl.sum(faults) == 0) & (rank >= 0) & (rank < WORLD_SIZE)
    n_readable = tl.where(valid, n_sequences, 0)

    q_row, q_len, position, kv_len, weight, keys = _segment(
        cu_seqlens_ptr, index, rank, step, n_sequences, n_readable,
        WORLD_SIZE=WORLD_SIZE, PEER=PEER, CONTIGUOUS=CONTIGUOUS,
    )  # fmt: skip
    place = tl.zeros([BLOCK], tl.int32)
    rows_before = tl.zeros([BLOCK], tl.int32)
    sequence_place = tl.zeros([BLOCK], tl.int32)
    keys_before = tl.zeros([BLOCK], tl.int32)
    for first in range(0, 2 * n_sequences, BLOCK):
        other = first + offsets
        _, other_q_len, _, _, other_weight, other_keys = _segment(
            cu_seqlens_ptr, other, rank, step, n_sequences, n_readable,
            WORLD_SIZE=WORLD_SIZE, PEER=PEER, CONTIGUOUS=CONTIGUOUS,
        )  # fmt: skip
        earlier = other[None, :] < index[:, None]
        heavier = other_weight[None, :] > weight[:, None]
        before = heavier | ((other_weight[None, :] == weight[:, None]) & earlier)
        before = before & (other < 2 * n_sequences)[None, :]
        place += tl.sum(before.to(tl.int32), 1)
        rows_before += tl.sum(tl.where(before, other_q_len[None, :], 0), 1)
        longer = other_keys[None, :] > keys[:, None]
        longer = longer | ((other_keys[None, :] == keys[:, None]) & earlier)
        longer = longer & (other < n_sequences)[None, :]
        sequence_place += tl.sum(longer.to(tl.int32), 1)
        keys_before += tl.sum(tl.where(longer, other_keys[None, :], 0), 1)

    late = index < n_sequences
    sequence = tl.where(late, index, index - n_sequences)
    _, _, chunk_length, _, kv_row = _sequence(
        cu_seqlens_ptr, sequence, sequence < n_readable, WORLD_SIZE=WORLD_SIZE, PEER=PEER, CONTIGUOUS=CONTIGUOUS
    )
    entry_ptr = segments_ptr + place * SEGMENT_FIELDS
    store_mask = index < 2 * n_sequences
    tl.store(entry_ptr + 0, rows_before, mask=store_mask)
    tl.store(entry_ptr + 1, q_row, mask=store_mask)
    tl.store(entry_ptr + 2, q_len, mask=store_mask)
    tl.store(entry_ptr + 3, position, mask=store_mask)
    tl.store(entry_ptr + 4, kv_len, mask=store_mask)
    tl.store(entry_ptr + 5, kv_row, mask=store_mask)
    tl.store(entry_ptr + 6, chunk_length, mask=store_mask)
    tl.store(entry_ptr + 7, keys, mask=store_mask)

    entry_ptr = sequences_ptr + sequence_place * SEQUENCE_FIELDS
    tl.store(entry_ptr + 0, keys_before, mask=late)
    tl.store(entry_ptr + 1, kv_row, mask=late)
    tl.store(entry_ptr + 2, chunk_length, mask=late)
    tl.store(entry_ptr + 3, keys, mask=late)
    for half in tl.static_range(2):
        q_row, q_len, position, kv_len, _, _ = _segment(
            cu_seqlens_ptr, index + half * n_sequences, rank, step, n_sequences, n_readable,
            WORLD_SIZE=WORLD_SIZE, PEER=PEER, CONTIGUOUS=CONTIGUOUS,
        )  # fmt: skip
        half_ptr = entry_ptr + 4 + 4 * half
        tl.store(half_ptr + 0, q_row, mask=late)
        tl.store(half_ptr + 1, q_len, mask=late)
        tl.store(half_ptr + 2, position, mask=late)
        tl.store(half_ptr + 3, kv_len, mask=late)

    if tl.program_id(0) == 0:
        used = tl.where(valid, tl.load(cu_seqlens_ptr + n_sequences), 0)
        no_keys = tl.where(valid, 0, -1)
        segment_ptr = segments_ptr + 2 * n_sequences * SEGMENT_FIELDS
        for field in tl.static_range(SEGMENT_FIELDS):
            value = no_keys if field == 4 or field == 7 else 0
            tl.store(segment_ptr + field, used // WORLD_SIZE if field < 2 else value)
        sequence_ptr = sequences_ptr + n_sequences * SEQUENCE_FIELDS
        kv_used = used if CONTIGUOUS else used // WORLD_SIZE
        tl.store(sequence_ptr + 0, used // WORLD_SIZE if PEER else used)
        tl.store(sequence_ptr + 1, kv_used)
        for field in tl.static_range(2, SEQUENCE_FIELDS):
            tl.store(sequence_ptr + field, no_keys if field == 3 else 0)
