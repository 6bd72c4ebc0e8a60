"""The rules of `method="halo"`: how far before its chunk a row may see, and how many rows a message has."""

import dataclasses
from collections.abc import Sequence
from enum import IntEnum
from itertools import pairwise
from typing import Any, ClassVar, NamedTuple, Protocol, TypeVar

from .callspec import NO_WINDOW, CallSpec
from .checks import check_attention_chunk, check_int, check_window_size
from .heuristics import halo_moves_less
from .layout import MAX_OFFSET, chunk_length
from .modes import Layout, Method


class HaloSlot(IntEnum):
    """Slots of the buffer of halos, `CallSpec.halo_rows` rows each; kernels read the first four as a K/V buffer."""

    EARLY_HALO = 0  # the halo of the early chunk: last rows of the chunk before it, received from the previous rank
    EARLY_ROWS = 1  # the first rows of the early chunk
    LATE_HALO = 2  # the halo of the late chunk: last rows of the chunk before it, received from the next rank
    LATE_ROWS = 3  # the first rows of the late chunk
    EARLY_SENT = 4  # the last rows of the early chunk, sent to the next rank
    LATE_SENT = 5  # the last rows of the late chunk, sent to the previous rank


KEY_SLOTS = HaloSlot.EARLY_SENT.value


class PreparedBatch(Protocol):
    """The fields of a front end's `Batch` that methods and halos depend on; they mean the same in both."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def cu_seqlens(self) -> Any: ...
    @property
    def world_size(self) -> int: ...
    @property
    def method(self) -> str: ...
    @property
    def rows(self) -> int: ...
    @property
    def whole_tokens(self) -> int: ...
    @property
    def halo(self) -> int: ...
    @property
    def max_seqlen(self) -> int: ...


BatchT = TypeVar("BatchT", bound=PreparedBatch)


def check_max_seqlen(max_seqlen: int | None) -> int:
    """Return `max_seqlen`, the promised longest real length of a document, as an int; 0 for None.

    Raises `ValueError` for any other value.
    """
    if max_seqlen is None:
        return 0
    return check_int("max_seqlen", max_seqlen, 1, MAX_OFFSET, "None, or the most real tokens that a document has")


def reach(left: int, chunk: int, max_seqlen: int) -> int | None:
    """Return how many positions before its own a row may see, at least 1, or None for no limit.

    `left` is the left side of the window, -1 for no limit; `chunk` the length of a chunk of attention, 0 for none;
    `max_seqlen` the longest real length of a document, 0 if unknown.
    """
    limits = [left] * (left >= 0) + [chunk - 1] * (chunk > 0) + [max_seqlen - 1] * (max_seqlen > 0)
    return max(min(limits), 1) if limits else None


def check_reach(left: int, chunk: int, max_seqlen: int) -> int:
    """Return `reach`; `ValueError` if there is no limit, because method "halo" needs one."""
    rows = reach(left, chunk, max_seqlen)
    if rows is None:
        raise ValueError(
            "window_size: expected a limit to the left with method 'halo', such as (1023, 0), or an attention_chunk, "
            "or a batch that was prepared with max_seqlen, got none of them"
        )
    return rows


def halo_of_batch(
    method: str,
    window_size: tuple[int | None, int | None],
    attention_chunk: int,
    max_seqlen: int | None,
    world_size: int,
) -> tuple[int, int]:
    """Return (rows of a halo, longest real length of a document) of a prepared batch.

    The first number is 0 unless `method` is "halo" and there are several ranks. The second is the caller's promise, or
    0 without one. Raises `ValueError` for numbers out of range, and for method "halo" if nothing limits how far a row
    sees.
    """
    promised, (left, _) = check_max_seqlen(max_seqlen), check_window_size(window_size)
    chunk = check_attention_chunk(attention_chunk)
    if method != Method.HALO or world_size == 1:
        return 0, promised
    return check_reach(left, chunk, promised), promised


class HostSizes(NamedTuple):
    """Sizes of a batch that the host knows, for the choice of a method."""

    rows: int  # local rows of a rank, without the rows of whole documents
    sequences: int
    packed_rows: int  # number of packed rows in the row layout, otherwise 0
    # Rows of the shortest chunk, of packed rows or of documents with real tokens in more than two chunks. Any shorter
    # document needs at most one chunk as halo, however long the chunk is.
    shortest_chunk: int


def sizes_of_documents(cu_seqlens: Sequence[int], lengths: Sequence[int] | None, world_size: int) -> HostSizes:
    """Return the sizes of a batch in the document layout, from offsets and real lengths on the host."""
    padded = [end - start for start, end in pairwise(cu_seqlens)]
    both = zip(padded, padded if lengths is None else lengths, strict=True)
    chunks = [chunk_length(size, world_size) for size, real in both if real > 2 * chunk_length(size, world_size)]
    return HostSizes(cu_seqlens[-1] // world_size, len(padded), 0, min(chunks, default=MAX_OFFSET))


def sizes_of_rows(row_length: int, packed_rows: int, world_size: int) -> HostSizes:
    """Return the sizes of a batch in the row layout."""
    rows = row_length * packed_rows // world_size
    return HostSizes(rows, 0, packed_rows, chunk_length(row_length, world_size))


def choose_method(rows_seen: int | None, sizes: HostSizes | None, world_size: int) -> Method:
    """Return the method for a call, or a prepared batch, whose caller named none.

    The method is HALO where the host knows that halos of `rows_seen` rows suffice and move less than an all-gather,
    otherwise ALLGATHER. `rows_seen` is the `reach` of a causal call, None for other calls; `sizes` are None if only the
    device knows them.
    """
    if rows_seen is None or sizes is None or world_size == 1 or rows_seen > sizes.shortest_chunk:
        return Method.ALLGATHER
    message = message_rows(rows_seen, sizes.rows, sizes.sequences, sizes.packed_rows)
    return Method.HALO if halo_moves_less(message, sizes.rows, world_size) else Method.ALLGATHER


def message_rows(halo: int, rows: int, sequences: int, packed_rows: int) -> int:
    """Return the rows of one message to a neighbour; `packed_rows` is 0 in the document layout."""
    return halo * packed_rows if packed_rows else min(rows // 2, halo * sequences)


def reach_of_mask(causal: bool, window_size, attention_chunk: int, max_seqlen: int) -> int | None:
    """Return the `reach` of a call with these arguments, or None if rows see keys behind their own position.

    Raises `ValueError` for invalid arguments.
    """
    (left, right), chunk = check_window_size(window_size), check_attention_chunk(attention_chunk)
    return reach(left, chunk, max_seqlen) if causal or right == 0 else None


def with_halo(call: CallSpec, batch: BatchT, rows: int, length: int) -> tuple[CallSpec, BatchT]:
    """Return `call` and `batch` with their halo filled in.

    `rows` is the number of rows of q. `length` is the number of tokens of every document if all have the same length,
    otherwise 0. Raises `ValueError` if rows see keys that are more than the batch's halo away, or if the host knows
    that a chunk is shorter than the halo.
    """
    if not call.causal:
        raise ValueError("causal: expected True, or a window that ends with its row, with method 'halo', got False")
    needed = check_reach(call.window_size[0], call.attention_chunk, batch.max_seqlen)
    halo = batch.halo or needed
    if needed > halo:
        raise ValueError(
            f"window_size: expected at most the {halo} positions before a row that the batch was prepared for, got "
            f"{needed}; give prepare_batch the largest window"
        )
    tokens, packed_rows = rows - batch.whole_tokens, 0
    if call.layout is Layout.ROW:
        packed_rows = batch.rows
        check_halo_in_chunk(halo, batch.world_size * tokens // max(packed_rows, 1), batch.world_size)
    check_halo_in_chunk(halo, length, batch.world_size)
    sent = message_rows(halo, tokens, batch.cu_seqlens.shape[0] - 1, packed_rows)
    call = dataclasses.replace(call, halo=halo, halo_rows=sent)
    return call, batch if batch.halo else dataclasses.replace(batch, halo=halo)


def check_halo_in_chunk(halo: int, length: int, world_size: int) -> None:
    """Raise `ValueError` if chunks of a sequence of `length` tokens have fewer than `halo` rows."""
    chunk = chunk_length(length, world_size)
    if length and halo > chunk:
        raise ValueError(
            f"window_size: expected at most the {chunk} rows of a chunk with method 'halo', got {halo} positions "
            "before a row, the least of window_size, attention_chunk and max_seqlen; method 'allgather' has no such "
            "limit"
        )


def method_of_call(
    batch: BatchT | None,
    mask: tuple[bool, tuple, int],
    shape: tuple[int, int],
    layout: str | None,
    world_size: int,
    heads_k_stride: int | None,
) -> tuple[BatchT | None, str]:
    """Return (`batch`, method) of a call whose caller named no method; `batch` is None without a prepared batch.

    If a prepared batch has halos and the mask reaches farther, the result is that batch with method "allgather" and
    without tables. `mask` is (causal, window_size, attention_chunk). `shape` is (number of sequences or packed rows,
    rows of each on this rank). `layout` is None for sequences of equal length, which have no `cu_seqlens`.
    """
    if batch is not None:
        if batch.method != Method.HALO or world_size == 1:
            return batch, batch.method
        rows_seen = reach_of_mask(*mask, max_seqlen=batch.max_seqlen)
        if rows_seen is not None and rows_seen <= batch.halo:
            return batch, batch.method
        method = Method.ALLGATHER.value
        return dataclasses.replace(batch, method=method, segments=None, sequences=None, halo=0), method
    _, window_size, attention_chunk = mask
    if world_size == 1 or heads_k_stride is not None or (window_size is NO_WINDOW and attention_chunk == 0):
        return None, Method.ALLGATHER.value
    sizes, (number, rows) = None, shape
    if layout is None:
        sizes = HostSizes(number * rows, number, 0, rows // 2)
    elif layout == Layout.ROW:
        sizes = sizes_of_rows(rows * world_size, number, world_size)
    return None, choose_method(reach_of_mask(*mask, max_seqlen=0), sizes, world_size).value
