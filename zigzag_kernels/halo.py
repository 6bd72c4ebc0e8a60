"""The rules of `method="halo"`: how many rows before a chunk its rows see, and how many rows a message has."""

import dataclasses
from enum import IntEnum

from .callspec import CallSpec
from .checks import check_attention_chunk, check_int, check_window_size
from .layout import MAX_OFFSET, chunk_length
from .modes import Layout, Method


class HaloSlot(IntEnum):
    """Slots of the buffer of halos, all of `CallSpec.halo_rows` rows; kernels read the first four as a K/V buffer."""

    EARLY_HALO = 0  # the last rows of the chunk before the early one, from the rank before this one
    EARLY_ROWS = 1  # the first rows of the early chunk
    LATE_HALO = 2  # the last rows of the chunk before the late one, from the next rank
    LATE_ROWS = 3
    EARLY_SENT = 4  # the last rows of the early chunk, for the next rank
    LATE_SENT = 5  # the last rows of the late chunk, for the rank before this one


KEY_SLOTS = HaloSlot.EARLY_SENT.value


def check_max_seqlen(max_seqlen: int | None) -> int:
    """Return the promised longest real length of a document as an int, 0 for None; `ValueError` for anything else."""
    if max_seqlen is None:
        return 0
    return check_int("max_seqlen", max_seqlen, 1, MAX_OFFSET, "None, or the most real tokens that a document has")


def reach(left: int, chunk: int, max_seqlen: int) -> int | None:
    """Return how many positions before its own a row may see, at least 1, or None if nothing limits them.

    `left` of a window is -1 for no limit, `chunk` of attention 0, and `max_seqlen`, the most real tokens of a document,
    0 if unknown.
    """
    limits = [left] * (left >= 0) + [chunk - 1] * (chunk > 0) + [max_seqlen - 1] * (max_seqlen > 0)
    return max(min(limits), 1) if limits else None


def check_reach(left: int, chunk: int, max_seqlen: int) -> int:
    """Return `reach`; `ValueError` if nothing limits what a row sees, as method "halo" needs it."""
    rows = reach(left, chunk, max_seqlen)
    if rows is None:
        raise ValueError(
            "window_size: expected a limit to the left with method 'halo', such as (1023, 0), or an attention_chunk, "
            f"or a batch that was prepared with max_seqlen, got {(left, -1)}"
        )
    return rows


def halo_of_batch(
    method: str,
    window_size: tuple[int | None, int | None],
    attention_chunk: int,
    max_seqlen: int | None,
    world_size: int,
) -> tuple[int, int]:
    """Return (rows before a chunk that its rows may see, most real tokens of a document) of a prepared batch.

    The caller promised the second number. The first is 0 unless `method` moves halos. Raises `ValueError` for numbers
    out of range, and if nothing limits the rows that such a method needs.
    """
    promised, (left, _) = check_max_seqlen(max_seqlen), check_window_size(window_size)
    chunk = check_attention_chunk(attention_chunk)
    if method != Method.HALO or world_size == 1:
        return 0, promised
    return check_reach(left, chunk, promised), promised


def with_halo(
    call: CallSpec, halo: int, max_seqlen: int, *, tokens: int, sequences: int, packed_rows: int, world_size: int
) -> CallSpec:
    """Return `call` with `halo` and with the number of rows of its messages.

    `halo` is the number of rows before a chunk in the tables of a prepared batch, 0 if there is none yet. `tokens` is
    the number of rows of a rank, `packed_rows` the number of packed rows in the row layout. Raises `ValueError` if rows
    see keys farther away than `halo`; in the row layout, where the host knows the length of chunks, also if a chunk has
    fewer rows.
    """
    if not call.causal:
        raise ValueError("causal: expected True, or a window that ends with its row, with method 'halo', got False")
    needed = check_reach(call.window_size[0], call.attention_chunk, max_seqlen)
    halo = halo or needed
    if needed > halo:
        raise ValueError(
            f"window_size: expected at most the {halo} positions before a row that the batch was prepared for, got "
            f"{needed}; give prepare_batch the largest window"
        )
    if call.layout is Layout.ROW:
        check_halo_in_chunk(halo, world_size * tokens // max(packed_rows, 1), world_size)
        return dataclasses.replace(call, halo=halo, halo_rows=halo * packed_rows)
    return dataclasses.replace(call, halo=halo, halo_rows=min(tokens // 2, halo * sequences))


def check_halo_in_chunk(halo: int, length: int, world_size: int) -> None:
    """Raise `ValueError` if chunks of a sequence of `length` tokens have fewer than `halo` rows."""
    chunk = chunk_length(length, world_size)
    if length and halo > chunk:
        raise ValueError(
            f"window_size: expected at most the {chunk} rows of a chunk with method 'halo', got {halo} positions "
            "before a row; method 'allgather' has no such limit"
        )
