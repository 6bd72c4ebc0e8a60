"""The kernel that turns `cu_seqlens` and a rank into the tables that the attention kernels read.

The K/V layout (`modes.KVLayout`) decides where the tables say that keys are; everything behind the tables is the same
for all layouts.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .fields import (
    HALF_FIELDS,
    HALF_KV_LEN,
    HALF_POSITION,
    HALF_Q_LEN,
    HALF_Q_ROW,
    SEGMENT_FIELDS,
    SEGMENT_KEYS,
    SEGMENT_KV_CHUNK,
    SEGMENT_KV_LEN,
    SEGMENT_KV_ROW,
    SEGMENT_POSITION,
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


class Batch(NamedTuple):
    """The sequences that a rank holds, and the ring step whose keys the tables describe."""

    cu_seqlens_ptr: tl.tensor  # [N + 1] int32
    n_sequences: tl.tensor
    n_readable: tl.tensor  # sequences from here on count as empty
    rank: tl.tensor
    step: tl.tensor


class Sequence(NamedTuple):
    """Sequences `[BLOCK]` of a batch: where they are in `cu_seqlens`, and where their keys are in the K/V buffer."""

    start: tl.tensor
    length: tl.tensor
    chunk_length: tl.tensor
    keys: tl.tensor  # in the K/V buffer
    kv_row: tl.tensor  # of the first of them


class Segment(NamedTuple):
    """Segments `[BLOCK]` of a batch: their columns of `SegmentColumn`, and what orders them."""

    q_row: tl.tensor
    q_len: tl.tensor
    position: tl.tensor
    kv_len: tl.tensor
    weight: tl.tensor  # keys that the last row sees
    keys: tl.tensor


@triton.jit
def _load_sequence(
    cu_seqlens_ptr, sequence, mask, WORLD_SIZE: tl.constexpr, PEER: tl.constexpr, CONTIGUOUS: tl.constexpr
):
    """Load the sequences numbered `sequence`; those not in `mask` are empty.

    With one rank a sequence is a single chunk.
    """
    start = tl.load(cu_seqlens_ptr + sequence, mask=mask, other=0)
    length = tl.load(cu_seqlens_ptr + sequence + 1, mask=mask, other=0) - start
    chunk_length = length if WORLD_SIZE == 1 else length // (2 * WORLD_SIZE)
    return Sequence(
        start=start,
        length=length,
        chunk_length=chunk_length,
        keys=2 * chunk_length if PEER and WORLD_SIZE > 1 else length,
        kv_row=start if CONTIGUOUS else start // WORLD_SIZE,
    )


@triton.jit
def _make_segment(batch, index, WORLD_SIZE: tl.constexpr, PEER: tl.constexpr, CONTIGUOUS: tl.constexpr):
    """Make the segments numbered `index`: all late chunks come first, then all early ones.

    Keys of a peer rank are its early chunk and its late one, laid end to end: those of an earlier peer are seen up to
    its early chunk, those of a later peer by the late chunk alone, and the rank's own are seen as if they were a
    sequence of two chunks.
    """
    late = index < batch.n_sequences
    sequence = tl.where(late, index, index - batch.n_sequences)
    mask = (sequence < batch.n_readable) & (index < 2 * batch.n_sequences)
    held = _load_sequence(batch.cu_seqlens_ptr, sequence, mask, WORLD_SIZE, PEER, CONTIGUOUS)
    q_row = held.start // WORLD_SIZE
    if WORLD_SIZE == 1:
        q_len = tl.where(late, held.length, 0)
        position = tl.zeros_like(held.length)
        kv_len = held.keys
    else:
        q_row += tl.where(late, held.chunk_length, 0)
        q_len = held.chunk_length
        if PEER:
            own = batch.step == 0
            earlier = (batch.step > 0) & (batch.step <= batch.rank)
            position = tl.where(own, tl.where(late, held.chunk_length, 0), held.keys)
            seen_late = own | (late & (batch.step > batch.rank))
            kv_len = tl.where(seen_late, held.keys, tl.where(earlier, held.chunk_length, 0))
        else:
            position = tl.where(late, 2 * WORLD_SIZE - 1 - batch.rank, batch.rank) * held.chunk_length
            kv_len = held.keys
    return Segment(
        q_row=q_row,
        q_len=q_len,
        position=position,
        kv_len=kv_len,
        weight=tl.minimum(position + q_len, kv_len),
        keys=held.keys,
    )


@triton.jit
def _lengths_are_valid(cu_seqlens_ptr, n_sequences, WORLD_SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Return whether every sequence can be dealt out to the ranks."""
    offsets = tl.arange(0, BLOCK)
    faults = tl.zeros([BLOCK], tl.int32)
    for first in range(0, n_sequences, BLOCK):
        sequence = first + offsets
        held = _load_sequence(cu_seqlens_ptr, sequence, sequence < n_sequences, WORLD_SIZE, False, False)
        uneven = (held.length < 0) | ((held.start != 0) & (sequence == 0))
        # The difference of an offset below 0 and one above may wrap around to a length that is possible.
        uneven = uneven | (held.start < 0) | (held.start + held.length < 0)
        if WORLD_SIZE > 1:
            uneven = uneven | (held.chunk_length * (2 * WORLD_SIZE) != held.length)
        faults += uneven.to(tl.int32)
    return tl.sum(faults) == 0


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

    An entry's place is the number of entries heavier than it, and its first column counts their tokens: both are sums
    over all entries, so no sort is needed. Weight is the cost of an entry's heaviest tile: the keys that the last
    row of a segment sees, the length of a sequence.
    """
    offsets = tl.arange(0, BLOCK)
    index = tl.program_id(0) * BLOCK + offsets
    step = tl.program_id(1)
    segments_ptr += step * (2 * n_sequences + 1) * SEGMENT_FIELDS
    sequences_ptr += step * (n_sequences + 1) * SEQUENCE_FIELDS
    rank = tl.load(rank_ptr)

    # Invalid lengths are never attended: all entries stay empty and the padding becomes NaN.
    valid = _lengths_are_valid(cu_seqlens_ptr, n_sequences, WORLD_SIZE, BLOCK) & (rank >= 0) & (rank < WORLD_SIZE)
    n_readable = tl.where(valid, n_sequences, 0)
    # jax-triton passes a scalar 1 as a constant, which a tuple cannot hold.
    batch = Batch(cu_seqlens_ptr, tl.cast(n_sequences, tl.int32), n_readable, rank, step)

    segment = _make_segment(batch, index, WORLD_SIZE, PEER, CONTIGUOUS)
    place = tl.zeros([BLOCK], tl.int32)
    rows_before = tl.zeros([BLOCK], tl.int32)
    sequence_place = tl.zeros([BLOCK], tl.int32)
    keys_before = tl.zeros([BLOCK], tl.int32)
    for first in range(0, 2 * n_sequences, BLOCK):
        other = first + offsets
        others = _make_segment(batch, other, WORLD_SIZE, PEER, CONTIGUOUS)
        earlier = other[None, :] < index[:, None]
        heavier = others.weight[None, :] > segment.weight[:, None]
        before = heavier | ((others.weight[None, :] == segment.weight[:, None]) & earlier)
        before = before & (other < 2 * n_sequences)[None, :]
        place += tl.sum(before.to(tl.int32), 1)
        rows_before += tl.sum(tl.where(before, others.q_len[None, :], 0), 1)
        longer = others.keys[None, :] > segment.keys[:, None]
        longer = longer | ((others.keys[None, :] == segment.keys[:, None]) & earlier)
        longer = longer & (other < n_sequences)[None, :]
        sequence_place += tl.sum(longer.to(tl.int32), 1)
        keys_before += tl.sum(tl.where(longer, others.keys[None, :], 0), 1)

    late = index < n_sequences
    number = tl.where(late, index, index - n_sequences)
    held = _load_sequence(cu_seqlens_ptr, number, number < n_readable, WORLD_SIZE, PEER, CONTIGUOUS)
    segment_ptrs = segments_ptr + place * SEGMENT_FIELDS
    is_segment = index < 2 * n_sequences
    tl.store(segment_ptrs + SEGMENT_TOKENS_BEFORE, rows_before, mask=is_segment)
    tl.store(segment_ptrs + SEGMENT_Q_ROW, segment.q_row, mask=is_segment)
    tl.store(segment_ptrs + SEGMENT_Q_LEN, segment.q_len, mask=is_segment)
    tl.store(segment_ptrs + SEGMENT_POSITION, segment.position, mask=is_segment)
    tl.store(segment_ptrs + SEGMENT_KV_LEN, segment.kv_len, mask=is_segment)
    tl.store(segment_ptrs + SEGMENT_KV_ROW, held.kv_row, mask=is_segment)
    tl.store(segment_ptrs + SEGMENT_KV_CHUNK, held.chunk_length, mask=is_segment)
    tl.store(segment_ptrs + SEGMENT_KEYS, segment.keys, mask=is_segment)

    sequence_ptrs = sequences_ptr + sequence_place * SEQUENCE_FIELDS
    tl.store(sequence_ptrs + SEQUENCE_KEYS_BEFORE, keys_before, mask=late)
    tl.store(sequence_ptrs + SEQUENCE_KV_ROW, held.kv_row, mask=late)
    tl.store(sequence_ptrs + SEQUENCE_KV_CHUNK, held.chunk_length, mask=late)
    tl.store(sequence_ptrs + SEQUENCE_KEYS, segment.keys, mask=late)
    for half in tl.static_range(2):
        halved = _make_segment(batch, index + half * n_sequences, WORLD_SIZE, PEER, CONTIGUOUS)
        half_ptrs = sequence_ptrs + SEQUENCE_HALVES + HALF_FIELDS * half
        tl.store(half_ptrs + HALF_Q_ROW, halved.q_row, mask=late)
        tl.store(half_ptrs + HALF_Q_LEN, halved.q_len, mask=late)
        tl.store(half_ptrs + HALF_POSITION, halved.position, mask=late)
        tl.store(half_ptrs + HALF_KV_LEN, halved.kv_len, mask=late)

    if tl.program_id(0) == 0:
        used = tl.where(valid, tl.load(cu_seqlens_ptr + n_sequences), 0)
        no_keys = tl.where(valid, 0, -1)
        padding_ptr = segments_ptr + 2 * n_sequences * SEGMENT_FIELDS
        tl.store(padding_ptr + SEGMENT_TOKENS_BEFORE, used // WORLD_SIZE)
        tl.store(padding_ptr + SEGMENT_Q_ROW, used // WORLD_SIZE)
        tl.store(padding_ptr + SEGMENT_Q_LEN, 0)
        tl.store(padding_ptr + SEGMENT_POSITION, 0)
        tl.store(padding_ptr + SEGMENT_KV_LEN, no_keys)
        tl.store(padding_ptr + SEGMENT_KV_ROW, 0)
        tl.store(padding_ptr + SEGMENT_KV_CHUNK, 0)
        tl.store(padding_ptr + SEGMENT_KEYS, no_keys)
        padding_ptr = sequences_ptr + n_sequences * SEQUENCE_FIELDS
        tl.store(padding_ptr + SEQUENCE_KEYS_BEFORE, used // WORLD_SIZE if PEER else used)
        tl.store(padding_ptr + SEQUENCE_KV_ROW, used if CONTIGUOUS else used // WORLD_SIZE)
        tl.store(padding_ptr + SEQUENCE_KV_CHUNK, 0)
        tl.store(padding_ptr + SEQUENCE_KEYS, no_keys)
        for field in tl.static_range(SEQUENCE_HALVES, SEQUENCE_FIELDS):
            tl.store(padding_ptr + field, 0)
