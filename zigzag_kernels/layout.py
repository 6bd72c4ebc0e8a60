"""The arithmetic of the zigzag layouts: where a local row lies in its sequence, for ints and for arrays.

`W` ranks cut a sequence into `2 * W` chunks of `L` tokens; rank `r` holds chunk `r`, then chunk `2 * W - 1 - r`, of
every sequence in order. In the document layout the sequences are the documents. In the row layout they are the packed
rows, `row_length` tokens each, in which documents lie anywhere. With one rank a sequence stays whole, so that its
length may be odd, and both layouts are the same. Arguments may be Python ints or integer arrays of any framework: only
arithmetic and comparisons are used.
"""

MAX_OFFSET = 2**31 - 1  # `cu_seqlens` is int32


def chunk_length(length, world_size: int):
    """Tokens of one chunk of a sequence of `length` tokens; with one rank the whole sequence is the chunk."""
    return length if world_size == 1 else length // (2 * world_size)


def row_position(offset, length, rank, world_size: int):
    """Position in its sequence of the local row `offset` rows behind the sequence's first local row.

    `offset` in `[0, length / W)`; `rank` an int or an array.
    """
    if world_size == 1:
        return offset
    chunk = chunk_length(length, world_size)
    late = (offset >= chunk) * 1
    first = rank * (1 - late) + (2 * world_size - 2 - rank) * late  # the late chunk's offsets begin at `chunk`
    return first * chunk + offset


def gathered_row(position, start, length, tokens, world_size: int):
    """Row of the rank-major gathered buffer `[W * tokens, ...]` that holds `position` of a sequence.

    `start` and `length` are the sequence's place in the unsharded batch.
    """
    if world_size == 1:
        return start + position
    chunk_len = chunk_length(length, world_size) + (length == 0) * 1  # an empty sequence must not divide by zero
    chunk = position // chunk_len
    late = (chunk >= world_size) * 1
    slot = chunk * (1 - late) + (2 * world_size - 1 - chunk) * late
    return slot * tokens + start // world_size + late * chunk_len + position - chunk * chunk_len


def packed_row(row, row_length: int, rank, world_size: int):
    """Row of the unsharded batch that the local row `row` of `rank` holds in the row layout.

    `row_length` counts the tokens of one packed row over all ranks, a multiple of `2 * W`.
    """
    share = max(row_length // world_size, 1)  # of no tokens there are no rows
    number = row // share
    return number * row_length + row_position(row - number * share, row_length, rank, world_size)


def gathered_packed_row(row, row_length: int, tokens: int, world_size: int):
    """Row of the rank-major gathered buffer that holds the row `row` of the unsharded batch in the row layout."""
    start = row // max(row_length, 1) * row_length
    return gathered_row(row - start, start, row_length, tokens, world_size)


def piece_offsets(offset, row_length: int, rank, world_size: int):
    """Return (early, late, used) local rows of `rank` for the row `offset` of the unsharded batch, in the row layout.

    A document that begins at `offset` begins at `early` in the rank's early chunk of the packed row, and at `late` in
    the late one: at a chunk's border if it begins outside. `used` counts the local rows that hold rows before `offset`.
    """
    chunk = chunk_length(row_length, world_size)
    number = offset // max(row_length, 1)
    position = offset - number * row_length
    before_early = _clipped(position - rank * chunk, chunk)
    before_late = _clipped(position - (2 * world_size - 1 - rank) * chunk, chunk)
    first = 2 * number * chunk
    return first + before_early, first + chunk + before_late, first + before_early + before_late


def _clipped(x, most: int):
    return (x > 0) * (x < most) * x + (x >= most) * most


def padded_length(length: int, world_size: int) -> int:
    """The smallest length not below `length` that can be dealt out to `world_size` ranks."""
    step = 1 if world_size == 1 else 2 * world_size
    return -(-length // step) * step


def impossible(
    cu_seqlens,
    rank,
    world_size: int,
    tokens: int | None,
    row_length: int | None = None,
    lengths=None,
    halo: tuple[int, int] = (0, 0),
):
    """Return an array, true if `cu_seqlens [N + 1]` and `rank [1]` cannot describe `tokens` local rows.

    The arrays may be on a device: nothing is read. `tokens` None is any number of rows. `row_length` is None in the
    document layout, and in the row layout the tokens of a packed row, which no document leaves. `lengths [N]` are the
    real lengths of documents, None if all is real. `halo` is (rows before a chunk that alone move to its rank, promised
    most real tokens of a document); 0 is no limit.
    """
    starts, ends = cu_seqlens[:-1], cu_seqlens[1:]
    padded = ends - starts  # of offsets below 0 the difference may wrap around to a possible one
    wrong = padded < 0
    fault = (cu_seqlens[0] != 0) | (cu_seqlens < 0).any() | ((rank < 0) | (rank >= world_size)).any()
    if tokens is not None:
        fault = fault | (cu_seqlens[-1] > min(world_size * tokens, MAX_OFFSET))
    if lengths is not None:
        wrong = wrong | (lengths < 0) | (lengths > padded)
    if world_size > 1:
        wrong = wrong | _exceeds_halo(padded, padded if lengths is None else lengths, world_size, row_length, halo)
    if row_length is None or world_size == 1:
        step = 1 if world_size == 1 else 2 * world_size
        return fault | (wrong | (padded % step != 0)).any()
    row_length = max(row_length, 1)  # of no tokens there are no rows
    if tokens is not None:
        total = world_size * tokens
        uneven = row_length % (2 * world_size) != 0 or total % row_length != 0 or total > MAX_OFFSET
        padding = cu_seqlens[-1] < min(total - row_length, MAX_OFFSET)  # only the last row has any
        fault = fault | padding | (uneven and total > 0)
    return fault | (wrong | ((padded > 0) & (starts // row_length != (ends - 1) // row_length))).any()


def _exceeds_halo(padded, real, world_size: int, row_length: int | None, halo: tuple[int, int]):
    """Return an array, true for documents that need more than the previous chunk or are longer than promised."""
    rows, longest = halo
    too_long = (real > longest) & (longest > 0)
    if row_length is not None:  # where chunks have one length, which the host knows
        return too_long
    chunk = chunk_length(padded, world_size)
    return too_long | ((chunk < rows) & (real > 2 * chunk))
