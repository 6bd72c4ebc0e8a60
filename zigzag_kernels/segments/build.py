"""The kernel that turns `cu_seqlens` and a rank into the tables that the attention kernels read.

Only this kernel, and the kernel of `halo.py`, depend on the K/V layout (`modes.KVLayout`). The tables say where keys
are, so the attention kernels that read the tables are the same for all layouts.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .dealt import keys_of_halo, load_held, local_row, make_form, part_in_chunk, read_batch
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
    SEGMENT_TOKENS_BEFORE,
    SEQUENCE_EARLY_KEYS,
    SEQUENCE_EARLY_POSITION,
    SEQUENCE_FIELDS,
    SEQUENCE_HALVES,
    SEQUENCE_KEYS,
    SEQUENCE_KEYS_BEFORE,
    SEQUENCE_KV_CHUNK,
    SEQUENCE_KV_ROW,
    SEQUENCE_LATE_POSITION,
    SEQUENCE_PLACE,
    SEQUENCE_REAL,
)


class HeldKeys(NamedTuple):
    """The places of the keys of `[BLOCK]` sequences in the K/V buffer: columns that both tables have."""

    kv_row: tl.tensor
    keys: tl.tensor
    early_position: tl.tensor
    early_keys: tl.tensor
    late_position: tl.tensor


class Segment(NamedTuple):
    """The columns of `[BLOCK]` entries of the segment table, and the weights that decide the order of entries."""

    q_row: tl.tensor
    q_len: tl.tensor
    position: tl.tensor
    kv_len: tl.tensor
    first_position: tl.tensor
    weight: tl.tensor  # number of keys that the last row sees
    keys: tl.tensor


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
    return Segment(
        q_row=batch.first_row + q_row,
        q_len=q_len,
        position=position,
        kv_len=kv_len,
        first_position=first_position,
        # Without a window the last row sees the most keys. With a window this weight is too large and the order less
        # good, but results do not depend on the order.
        weight=first_position + q_len if FORM.ROW or FORM.HALO else tl.minimum(position + q_len, kv_len),
        keys=keys,
    )


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

    The place of an entry is the number of heavier entries, and its first column is the sum of their tokens. Both are
    sums over all entries, so the kernel needs no sort. The weight of an entry is the cost of its heaviest tile: for a
    segment the number of keys that its last row sees, for a sequence its length.
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
    place = tl.zeros([BLOCK], tl.int32)
    rows_before = tl.zeros([BLOCK], tl.int32)
    sequence_place = tl.zeros([BLOCK], tl.int32)
    keys_before = tl.zeros([BLOCK], tl.int32)
    for first in range(0, 2 * n_sequences, BLOCK):
        other = first + offsets
        others = _make_segment(batch, other, FORM)
        earlier = other[None, :] < index[:, None]
        # Compare all pairs of entries, a block at a time. If two weights are equal, the entry with the lower number
        # comes first, so that no two entries get the same place.
        heavier = others.weight[None, :] > segment.weight[:, None]
        before = heavier | ((others.weight[None, :] == segment.weight[:, None]) & earlier)
        before = before & (other < 2 * n_sequences)[None, :]
        place += tl.sum(before.to(tl.int32), 1)
        rows_before += tl.sum(tl.where(before, others.q_len[None, :], 0), 1)
        # Compare sequences in the same way; their numbers are below n_sequences.
        longer = others.keys[None, :] > segment.keys[:, None]
        longer = longer | ((others.keys[None, :] == segment.keys[:, None]) & earlier)
        longer = longer & (other < n_sequences)[None, :]
        sequence_place += tl.sum(longer.to(tl.int32), 1)
        keys_before += tl.sum(tl.where(longer, others.keys[None, :], 0), 1)

    late = index < n_sequences
    number = tl.where(late, index, index - n_sequences)
    held = load_held(batch, number, number < n_readable, FORM)
    held_keys = _hold_keys(batch, held, FORM)
    # In the buffer of a peer, the keys of a sequence follow each other from its first key on, wherever chunks end.
    slot_place = tl.zeros_like(held.place) if PEER else held.place
    segment_ptrs = segments_ptr + place * SEGMENT_FIELDS
    is_segment = index < 2 * n_sequences
    tl.store(segment_ptrs + SEGMENT_TOKENS_BEFORE, rows_before, mask=is_segment)
    tl.store(segment_ptrs + SEGMENT_Q_ROW, segment.q_row, mask=is_segment)
    tl.store(segment_ptrs + SEGMENT_Q_LEN, segment.q_len, mask=is_segment)
    tl.store(segment_ptrs + SEGMENT_POSITION, segment.position, mask=is_segment)
    tl.store(segment_ptrs + SEGMENT_KV_LEN, segment.kv_len, mask=is_segment)
    tl.store(segment_ptrs + SEGMENT_KV_ROW, held_keys.kv_row, mask=is_segment)
    tl.store(segment_ptrs + SEGMENT_KV_CHUNK, held.chunk_length, mask=is_segment)
    tl.store(segment_ptrs + SEGMENT_KEYS, segment.keys, mask=is_segment)
    tl.store(segment_ptrs + SEGMENT_FIRST_POSITION, segment.first_position, mask=is_segment)
    tl.store(segment_ptrs + SEGMENT_REAL, held.real, mask=is_segment)
    tl.store(segment_ptrs + SEGMENT_EARLY_POSITION, held_keys.early_position, mask=is_segment)
    tl.store(segment_ptrs + SEGMENT_EARLY_KEYS, held_keys.early_keys, mask=is_segment)
    tl.store(segment_ptrs + SEGMENT_LATE_POSITION, held_keys.late_position, mask=is_segment)
    tl.store(segment_ptrs + SEGMENT_PLACE, slot_place, mask=is_segment)

    sequence_ptrs = sequences_ptr + sequence_place * SEQUENCE_FIELDS
    tl.store(sequence_ptrs + SEQUENCE_KEYS_BEFORE, keys_before, mask=late)
    tl.store(sequence_ptrs + SEQUENCE_KV_ROW, held_keys.kv_row, mask=late)
    tl.store(sequence_ptrs + SEQUENCE_KV_CHUNK, held.chunk_length, mask=late)
    tl.store(sequence_ptrs + SEQUENCE_KEYS, segment.keys, mask=late)
    tl.store(sequence_ptrs + SEQUENCE_REAL, held.real, mask=late)
    tl.store(sequence_ptrs + SEQUENCE_EARLY_POSITION, held_keys.early_position, mask=late)
    tl.store(sequence_ptrs + SEQUENCE_EARLY_KEYS, held_keys.early_keys, mask=late)
    tl.store(sequence_ptrs + SEQUENCE_LATE_POSITION, held_keys.late_position, mask=late)
    tl.store(sequence_ptrs + SEQUENCE_PLACE, slot_place, mask=late)
    # A program that owns a tile of keys needs the rows that see them: the entry of a sequence also has its two
    # segments, late and early.
    for half in tl.static_range(2):
        halved = _make_segment(batch, index + half * n_sequences, FORM)
        half_ptrs = sequence_ptrs + SEQUENCE_HALVES + HALF_FIELDS * half
        tl.store(half_ptrs + HALF_Q_ROW, halved.q_row, mask=late)
        tl.store(half_ptrs + HALF_Q_LEN, halved.q_len, mask=late)
        tl.store(half_ptrs + HALF_POSITION, halved.position, mask=late)
        tl.store(half_ptrs + HALF_KV_LEN, halved.kv_len, mask=late)
        tl.store(half_ptrs + HALF_FIRST_POSITION, halved.first_position, mask=late)

    if tl.program_id(0) == 0:
        # One program writes the last entry of each table: the rows and keys behind the last sequence.
        used = batch.total if ROW else tl.load(cu_seqlens_ptr + n_sequences)
        used = tl.where(valid, used, 0)
        # -1 keys tell every kernel that the batch is invalid: `load_segment` then gives all rows to this entry, and
        # they become NaN.
        no_keys = tl.where(valid, 0, -1)
        padding_ptr = segments_ptr + 2 * n_sequences * SEGMENT_FIELDS
        tl.store(padding_ptr + SEGMENT_TOKENS_BEFORE, used // WORLD_SIZE)
        tl.store(padding_ptr + SEGMENT_Q_ROW, first_row + used // WORLD_SIZE)
        for field in tl.static_range(SEGMENT_Q_LEN, SEGMENT_FIELDS):
            tl.store(padding_ptr + field, 0)
        tl.store(padding_ptr + SEGMENT_Q_LEN, end_row)
        tl.store(padding_ptr + SEGMENT_KV_LEN, no_keys)
        tl.store(padding_ptr + SEGMENT_KEYS, no_keys)
        padding_ptr = sequences_ptr + n_sequences * SEQUENCE_FIELDS
        tl.store(padding_ptr + SEQUENCE_KEYS_BEFORE, used // WORLD_SIZE if PEER else used)
        tl.store(padding_ptr + SEQUENCE_KV_ROW, used if CONTIGUOUS else used // WORLD_SIZE)
        for field in tl.static_range(SEQUENCE_KV_CHUNK, SEQUENCE_FIELDS):
            tl.store(padding_ptr + field, 0)
        tl.store(padding_ptr + SEQUENCE_KEYS, no_keys)
        tl.store(padding_ptr + SEQUENCE_HALVES + HALF_Q_ROW, first_row + used // WORLD_SIZE)
