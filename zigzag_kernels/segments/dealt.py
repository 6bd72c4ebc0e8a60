"""Device functions that compute which rows of each sequence a rank holds, for the kernels that write the tables."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import triton
import triton.language as tl


class Batch(NamedTuple):
    """The sequences that a rank holds, and the ring step whose keys the tables describe."""

    cu_seqlens_ptr: tl.tensor  # [N + 1] int32
    lengths_ptr: tl.tensor  # [N] int32
    n_sequences: tl.tensor
    n_readable: tl.tensor  # sequences that may be read: n_sequences, or 0 if the batch is invalid
    rank: tl.tensor
    step: tl.tensor
    row_length: tl.tensor  # tokens of a packed row on all ranks; read in the row layout
    total: tl.tensor  # tokens of all packed rows; read in the row layout
    first_row: tl.tensor  # first local row of the batch
    halo: tl.tensor  # rows of a halo; read if FORM.HALO
    longest: tl.tensor  # most real tokens that a document may have, 0 for no limit; read if FORM.HALO


@dataclass(frozen=True)
class Form:
    """The layout of a batch and of its K/V buffer, as constants of a kernel."""

    WORLD_SIZE: Any
    PEER: Any  # the buffer has the keys of one rank
    CONTIGUOUS: Any  # the buffer has all keys, in position order
    ROW: Any  # the row layout; the last sequence is the padding of the last packed row
    HAS_LENGTHS: Any  # documents have real lengths
    HALO: Any  # each rank gets the halos of its chunks from its neighbours


@triton.constexpr_function
def make_form(WORLD_SIZE, PEER, CONTIGUOUS, ROW, HAS_LENGTHS, HALO):
    """Return the `Form` of these constants."""
    return Form(WORLD_SIZE, PEER, CONTIGUOUS, ROW, HAS_LENGTHS, HALO)


class Sequence(NamedTuple):
    """The places of `[BLOCK]` sequences in `cu_seqlens`, and the places of their rows on each rank."""

    start: tl.tensor
    length: tl.tensor
    real: tl.tensor  # tokens that are not padding
    place: tl.tensor  # tokens of the packed row that lie before the sequence; 0 in the document layout
    chunk_length: tl.tensor
    first_row: tl.tensor  # local row at which a rank's two chunks of the sequence, or of its packed row, begin


@triton.jit
def load_held(batch, sequence, mask, FORM: tl.constexpr):
    """Load the sequences numbered `sequence`; those not in `mask` are empty.

    With one rank a sequence is a single chunk.
    """
    start = tl.load(batch.cu_seqlens_ptr + sequence, mask=mask, other=0)
    if FORM.ROW:
        # The last sequence is the padding behind the documents; it ends where the last packed row ends.
        listed = mask & (sequence < batch.n_sequences - 1)
        end = tl.load(batch.cu_seqlens_ptr + sequence + 1, mask=listed, other=0)
        length = tl.where(mask & (sequence == batch.n_sequences - 1), batch.total, end) - start
        row = start // tl.maximum(batch.row_length, 1)  # row_length is 0 if there are no tokens
        place = start - row * batch.row_length
        chunk_length = tl.zeros_like(start) + batch.row_length // (2 * FORM.WORLD_SIZE)
        # A rank holds two chunks of packed row 0, then two chunks of packed row 1, and so on.
        first_row = row * (2 * chunk_length)
    else:
        # In the document layout every document is cut by itself, so there are no tokens of others before it.
        listed = mask
        length = tl.load(batch.cu_seqlens_ptr + sequence + 1, mask=mask, other=0) - start
        place = tl.zeros_like(start)
        chunk_length = length if FORM.WORLD_SIZE == 1 else length // (2 * FORM.WORLD_SIZE)
        first_row = start // FORM.WORLD_SIZE
    if FORM.HAS_LENGTHS:
        real = tl.load(batch.lengths_ptr + sequence, mask=listed, other=0)
    else:
        # Without real lengths every listed token is real.
        real = tl.where(listed, length, 0)
    return Sequence(start, length, real, place, chunk_length, first_row)


@triton.jit
def part_in_chunk(held, chunk):
    """Return (position of the first token, tokens) of the part of each sequence that lies in chunk number `chunk`."""
    begin = chunk * held.chunk_length - held.place
    # The positions are clipped to the document, so the part is empty if the chunk lies outside of it.
    end = tl.minimum(tl.maximum(begin + held.chunk_length, 0), held.length)
    begin = tl.minimum(tl.maximum(begin, 0), held.length)
    return begin, end - begin


@triton.jit
def local_row(held, chunk, late, position):
    """Return the local row of the token at `position`, which lies in chunk number `chunk`; `late` if that is late."""
    return held.first_row + tl.where(late, held.chunk_length, 0) + held.place + position - chunk * held.chunk_length


@triton.jit
def keys_of_halo(batch, held, chunk):
    """Return how many keys of each sequence, before chunk number `chunk`, the rows of that chunk need.

    The previous chunk has all of these keys; `lengths_are_valid` checks that. A sequence that does not continue into
    the chunk needs none.
    """
    begin, _ = part_in_chunk(held, chunk)
    keys = tl.minimum(tl.minimum(begin, held.chunk_length), batch.halo)
    return tl.where(begin < held.length, keys, 0)


@triton.jit
def lengths_are_valid(batch, FORM: tl.constexpr, BLOCK: tl.constexpr):
    """Return whether every sequence can be distributed over the ranks.

    With `HALO`, the halo of a chunk must also lie within the previous chunk. So chunks must be at least as long as a
    halo, unless the real tokens end with the second chunk. And no document may be longer than its promised length.
    """
    WORLD_SIZE: tl.constexpr = FORM.WORLD_SIZE
    offsets = tl.arange(0, BLOCK)
    faults = tl.zeros([BLOCK], tl.int32)
    for first in range(0, batch.n_sequences, BLOCK):
        sequence = first + offsets
        held = load_held(batch, sequence, sequence < batch.n_sequences, FORM)
        uneven = (held.length < 0) | ((held.start != 0) & (sequence == 0))
        # The difference of a negative offset and a positive one may wrap around to a valid length.
        uneven = uneven | (held.start < 0) | (held.start + held.length < 0)
        if FORM.ROW:
            crosses = (held.length > 0) & (held.place + held.length > batch.row_length)
            uneven = uneven | crosses
        elif WORLD_SIZE > 1:
            uneven = uneven | (held.chunk_length * (2 * WORLD_SIZE) != held.length)
        if FORM.HAS_LENGTHS:
            uneven = uneven | (held.real < 0) | (held.real > held.length)
        if FORM.HALO:
            uneven = uneven | ((held.chunk_length < batch.halo) & (held.real > 2 * held.chunk_length))
            uneven = uneven | ((batch.longest > 0) & (held.real > batch.longest))
        # Each lane counts its own faults; one sum after the loop adds the lanes.
        faults += uneven.to(tl.int32)
    return tl.sum(faults) == 0


@triton.jit
def read_batch(pointers, n_sequences, rank, step, rows, limits, FORM: tl.constexpr, BLOCK: tl.constexpr):
    """Return (the `Batch`, whether its lengths and its rank are valid).

    `pointers` are (cu_seqlens, lengths), `rows` (row_length, total, first_row, end_row), `limits` (halo, longest). An
    invalid batch has no readable sequence: all entries of its tables stay empty, so that all its rows count as padding
    and become NaN.
    """
    # jax-triton passes a scalar 1 as a constant, which a tuple cannot hold.
    n_all, step = tl.cast(n_sequences, tl.int32), tl.cast(step, tl.int32)
    row_length, total = tl.cast(rows[0], tl.int32), tl.cast(rows[1], tl.int32)
    first_row, end_row = tl.cast(rows[2], tl.int32), tl.cast(rows[3], tl.int32)
    halo, longest = tl.cast(limits[0], tl.int32), tl.cast(limits[1], tl.int32)
    batch = Batch(pointers[0], pointers[1], n_all, n_all, rank, step, row_length, total, first_row, halo, longest)
    valid = lengths_are_valid(batch, FORM, BLOCK) & (rank >= 0) & (rank < FORM.WORLD_SIZE)
    used = total if FORM.ROW else tl.load(pointers[0] + n_sequences)
    valid = valid & ((end_row == 0) | (used // FORM.WORLD_SIZE <= end_row - first_row))
    n_readable = tl.where(valid, n_all, 0)
    batch = Batch(pointers[0], pointers[1], n_all, n_readable, rank, step, row_length, total, first_row, halo, longest)
    return batch, valid
