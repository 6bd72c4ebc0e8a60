"""The arithmetic of the zigzag layouts: where a local row lies in its sequence, for ints and for arrays.

`W` ranks cut a sequence into `2 * W` chunks of equal length; rank `r` holds chunk `r`, then chunk `2 * W - 1 - r`, of
every sequence in order. In the document layout the sequences are the documents. In the row layout the sequences are
packed rows of `row_length` tokens, and documents lie anywhere in them. A single rank does not cut sequences: any length
is valid, and both layouts are the same. Arguments may be Python ints or integer arrays of any framework, because the
functions use arithmetic and comparisons only.
"""

MAX_OFFSET = 2**31 - 1  # `cu_seqlens` is int32


def chunk_length(length, world_size: int):
    """Return the tokens of one chunk of a sequence of `length` tokens: the whole sequence if there is one rank."""
    return length if world_size == 1 else length // (2 * world_size)


def row_position(offset, length, rank, world_size: int):
    """Return the position in its sequence of one local row of `rank`.

    `offset`, from 0 to `length / W - 1`, counts local rows from the first one of the sequence. `length` is the number
    of tokens of the sequence on all ranks.
    """
    if world_size == 1:
        return offset
    chunk = chunk_length(length, world_size)
    late = (offset >= chunk) * 1
    first = rank * (1 - late) + (2 * world_size - 2 - rank) * late  # the late chunk's offsets begin at `chunk`
    return first * chunk + offset


def gathered_row(position, start, length, tokens, world_size: int):
    """Return the row of the gathered buffer `[W * tokens, ...]`, rank after rank, that holds one token.

    The token is at `position` of the sequence that has `length` rows from row `start` of the unsharded batch on.
    """
    if world_size == 1:
        return start + position
    chunk_len = chunk_length(length, world_size) + (length == 0) * 1  # an empty sequence must not divide by zero
    chunk = position // chunk_len
    late = (chunk >= world_size) * 1
    slot = chunk * (1 - late) + (2 * world_size - 1 - chunk) * late
    return slot * tokens + start // world_size + late * chunk_len + position - chunk * chunk_len


def packed_row(row, row_length: int, rank, world_size: int):
    """Return the row of the unsharded batch that local row `row` of `rank` holds in the row layout.

    `row_length` is the number of tokens of one packed row over all ranks, a multiple of `2 * W`.
    """
    share = max(row_length // world_size, 1)  # packed rows without tokens must not divide by zero
    number = row // share
    return number * row_length + row_position(row - number * share, row_length, rank, world_size)


def gathered_packed_row(row, row_length: int, tokens: int, world_size: int):
    """Return the row of the gathered buffer that holds row `row` of the unsharded batch, in the row layout."""
    start = row // max(row_length, 1) * row_length
    return gathered_row(row - start, start, row_length, tokens, world_size)


def piece_offsets(offset, row_length: int, rank, world_size: int):
    """Return (early, late, used) for a document that begins at row `offset` of the unsharded batch, in the row layout.

    `early` and `late` are the local rows of `rank` where the document begins in the early and in the late chunk of its
    packed row. If the document begins outside a chunk, the number is that chunk's nearest end. `used` is the number of
    local rows that hold rows before `offset`.
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
    """Return the smallest length, at least `length`, that can be distributed over `world_size` ranks."""
    step = 1 if world_size == 1 else 2 * world_size
    return -(-length // step) * step


def is_invalid_batch(
    cu_seqlens,
    rank,
    world_size: int,
    tokens: int | None,
    row_length: int | None = None,
    lengths=None,
    halo: tuple[int, int] = (0, 0),
):
    """Return a boolean array that is true if `cu_seqlens [N + 1]` and `rank [1]` do not describe `tokens` local rows.

    The arrays may be on a device; the host does not read them. `tokens` None allows any number of rows. `row_length` is
    None in the document layout; in the row layout it is the number of tokens of a packed row, and a document must lie
    within one row. `lengths [N]` are the real lengths of documents, None if there is no padding. `halo` is (rows of a
    halo, longest real length that the caller promised); 0 means no limit.
    """
    starts, ends = cu_seqlens[:-1], cu_seqlens[1:]
    padded = ends - starts  # may wrap around to a valid length if an offset is negative, which `fault` records
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
    row_length = max(row_length, 1)  # packed rows without tokens must not divide by zero
    if tokens is not None:
        total = world_size * tokens
        uneven = row_length % (2 * world_size) != 0 or total % row_length != 0 or total > MAX_OFFSET
        padding = cu_seqlens[-1] < min(total - row_length, MAX_OFFSET)  # only the last packed row may have padding
        fault = fault | padding | (uneven and total > 0)
    return fault | (wrong | ((padded > 0) & (starts // row_length != (ends - 1) // row_length))).any()


def _exceeds_halo(padded, real, world_size: int, row_length: int | None, halo: tuple[int, int]):
    """Return a boolean array, true for documents that need more than one chunk as halo, or are longer than promised."""
    rows, longest = halo
    too_long = (real > longest) & (longest > 0)
    if row_length is not None:  # in the row layout the host has compared the chunk length with the halo
        return too_long
    chunk = chunk_length(padded, world_size)
    return too_long | ((chunk < rows) & (real > 2 * chunk))
