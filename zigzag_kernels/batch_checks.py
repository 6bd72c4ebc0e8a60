"""Checks, on the host, that the documents of a batch can be distributed over the ranks in a layout."""

from collections.abc import Mapping, Sequence, Set
from itertools import pairwise

from .checks import (
    MAX_TOTAL,
    check_default_rows,
    check_int,
    check_layout,
    check_lengths,
    check_packed_rows,
    check_real_lengths,
    python_value,
)
from .layout import MAX_OFFSET, chunk_length, padded_length
from .modes import Layout


def check_document_lengths(name: str, lengths: Sequence[int]) -> tuple[int, ...]:
    """Return the lengths of documents as ints; `ValueError` unless int32 offsets hold all of them."""
    if isinstance(lengths, Mapping | Set):
        raise ValueError(f"{name}: expected the tokens of each document in turn, got {type(lengths).__name__}")
    try:
        values = [python_value(length) for length in lengths]
    except TypeError:
        raise ValueError(f"{name}: expected the tokens of each document, got {lengths!r}") from None
    for i, length in enumerate(values):
        if isinstance(length, bool) or not isinstance(length, int) or not 0 <= length <= MAX_OFFSET:
            raise ValueError(f"{name}: expected numbers of tokens, got {length!r} (document {i})")
    if sum(values) > MAX_OFFSET:
        raise ValueError(f"{name}: expected at most {MAX_OFFSET} tokens in a batch, got {sum(values)}")
    return tuple(values)


def check_row_length(
    layout: str, row_length: int | None, world_size: int, total: int | None, name: str = "total"
) -> int | None:
    """Return the tokens of one packed row, or None in the document layout.

    A `row_length` of None means one row of all `total` tokens; a `total` of None means that the number of tokens is
    unknown. Errors about the total name the argument `name`. Raises `ValueError` unless packed rows of this length can
    be distributed over the ranks.
    """
    if check_layout(layout) is Layout.DOCUMENT:
        if row_length is not None:
            raise ValueError(f"row_length: expected None with layout 'document', got {row_length!r}")
        return None
    if row_length is None:
        if total is None:
            raise ValueError("row_length: expected the tokens of a packed row over all ranks, got None")
        culprit, row_length = name, total
    else:
        culprit, expected = "row_length", f"the tokens of a packed row over all ranks, 1 to {MAX_OFFSET}"
        row_length = check_int(culprit, row_length, 1, MAX_OFFSET, expected)
    if world_size > 1 and row_length % (2 * world_size):
        raise ValueError(
            f"{culprit}: expected packed rows of a multiple of 2 * world_size = {2 * world_size} tokens, got "
            f"{row_length}; pad_to_zigzag makes one so"
        )
    if total is not None and total % max(row_length, 1):
        raise ValueError(f"row_length: expected a divisor of the {total} tokens that all rows have, got {row_length}")
    if world_size > 1 and total is not None and total > MAX_OFFSET:
        raise ValueError(f"{name}: expected at most {MAX_OFFSET} tokens in the row layout, got {total}")
    return row_length


def check_form(layout: str, row_length: int | None, rows: int, world_size: int) -> tuple[str, int, int]:
    """Return (layout, row_length, rows) of a batch; a `row_length` of 0 says that no packed rows are cut into chunks.

    Raises `ValueError` unless `prepare_batch` can take these arguments together.
    """
    if check_layout(layout) is Layout.ROW:
        given = 0 if row_length is None and world_size == 1 else row_length
        tokens, rows = check_packed_rows(given, rows, world_size)
        return (Layout.ROW.value, tokens, rows) if world_size > 1 else (Layout.ROW.value, 0, 1)
    for name, given, without in (("row_length", row_length, None), ("rows", rows, 1)):
        if given != without:
            raise ValueError(f"{name}: expected {without} with layout 'document', got {given!r}")
    return Layout.DOCUMENT.value, 0, 1


def check_documents_in_rows(
    cu_seqlens: list[int], world_size: int, row_length: int, total: int | None = None, name: str = "cu_seqlens"
) -> None:
    """Raise `ValueError` unless every document lies within one packed row of `row_length` tokens.

    `cu_seqlens` are the offsets of the documents, on the host. `total` is the number of tokens of all rows. Only the
    last row may have padding, behind the last document.
    """
    check_lengths(cu_seqlens, 1, total, name)
    if world_size == 1:
        return
    for i, (start, end) in enumerate(pairwise(cu_seqlens)):
        if start < end and start // row_length != (end - 1) // row_length:
            raise ValueError(
                f"{name}: expected documents within a row of {row_length} tokens, got {start} to {end} (document {i})"
            )
    if total is not None and cu_seqlens[-1] < total - row_length:
        raise ValueError(
            f"{name}: expected to end in the last row of {row_length} tokens, at {total - row_length} or behind, got "
            f"{cu_seqlens[-1]}; padding of other rows is a document of real length 0"
        )


def check_host_offsets(cu_seqlens: list[int], world_size: int, tokens: int | None, row_length: int | None) -> None:
    """Raise `ValueError` unless `cu_seqlens`, on the host, describe a batch of `tokens` local rows.

    `tokens` None allows any number of rows. `row_length` is None in the document layout.
    """
    check_lengths(cu_seqlens, world_size if row_length is None else 1)
    if tokens is not None and cu_seqlens[-1] > tokens * world_size:
        least = -(-cu_seqlens[-1] // world_size)
        raise ValueError(f"tokens: expected at least the {least} local rows of cu_seqlens, got {tokens}")
    if row_length is not None:
        check_documents_in_rows(cu_seqlens, world_size, row_length, None if tokens is None else tokens * world_size)


def check_padding_unseen(padded: bool, causal: bool, has_lengths: bool) -> None:
    """Raise `ValueError` for a call in which real tokens attend to the padding of `pad_to_zigzag`.

    `padded` says that the offsets are known to count padding. A causal mask hides it, and so do real lengths.
    """
    if padded and not (causal or has_lengths):
        raise ValueError(
            "causal: expected True with the cu_seqlens of pad_to_zigzag, got False: every token would attend to the "
            "padding of its sequence; give prepare_batch the real lengths"
        )


def check_sharded(rows: int, unsharded_rows: int, world_size: int) -> None:
    """Raise `ValueError` if q has as many `rows` as the whole batch has, and several ranks share the batch.

    `unsharded_rows` is 0 if the host does not know how many rows the whole batch has.
    """
    if world_size > 1 and unsharded_rows and rows == unsharded_rows:
        raise ValueError(
            f"q: expected the rows of one of {world_size} ranks, got the {rows} rows that `unsharded`, the whole "
            "batch, has; shard returns the rows of a rank"
        )


def check_halo(
    cu_seqlens: list[int], lengths: Sequence[int] | None, world_size: int, row_length: int | None, halo: tuple[int, int]
) -> None:
    """Raise `ValueError` if a chunk is shorter than a halo, or a document is longer than promised.

    `cu_seqlens` and the real `lengths` are on the host. `halo` is (rows of a halo, longest real length that the caller
    promised); 0 means no limit.
    """
    rows, longest = halo
    padded = [end - start for start, end in pairwise(cu_seqlens)]
    for i, (size, real) in enumerate(zip(padded, padded if lengths is None else lengths, strict=True)):
        chunk = chunk_length(size if row_length is None else row_length, world_size)
        if longest and real > longest:
            raise ValueError(f"max_seqlen: expected at least the {real} tokens of document {i}, got {longest}")
        if world_size > 1 and chunk < rows and (real > 2 * chunk or row_length):  # packed rows may have no tokens
            what = "a packed row" if row_length else "the document"
            raise ValueError(
                f"cu_seqlens: expected chunks of at least the {rows} rows of a halo, got {chunk} tokens in a chunk of "
                f"{what} (document {i} has {real}); method 'allgather' has no such limit"
            )


def default_rows(cu_seqlens: list[int], world_size: int, layout: str, row_length: int | None) -> int:
    """Return the number of local rows that `cu_seqlens` describe, which is the default of `tokens`.

    In the row layout only the last packed row may have padding. Raises `ValueError` for documents that cannot be
    distributed over the ranks, and for more rows than `check_default_rows` accepts.
    """
    check_lengths(cu_seqlens, world_size if check_layout(layout) is Layout.DOCUMENT else 1)
    end = cu_seqlens[-1]
    packed = check_row_length(layout, row_length, world_size, end if row_length is None else None, "tokens")
    if packed:
        end = -(-end // packed) * packed
    return check_default_rows(end // world_size)


def check_whole_batch(
    cu_seqlens: list[int], world_size: int, total: int | None, layout: str, row_length: int | None
) -> None:
    """Raise `ValueError` unless documents with these offsets can be distributed over the ranks in this layout.

    `cu_seqlens` are on the host. `total` is the number of rows of the packed batch, None if unknown.
    """
    if total is not None:
        total = check_int("total", total, 0, MAX_TOTAL, "a number of rows")
    row_length = check_row_length(layout, row_length, world_size, total)
    if row_length is None:
        check_lengths(cu_seqlens, world_size, total)
    else:
        check_documents_in_rows(cu_seqlens, world_size, row_length, total)


def check_padded_total(used: int, total: int | None, layout: str, row_length: int | None, world_size: int) -> int:
    """Return the rows that a batch has with its padding, for documents that take `used` rows.

    A `total` of None selects the fewest rows that can be distributed over the ranks. Raises `ValueError` for a `total`
    that cannot be distributed, or that is smaller than the documents.
    """
    step = padded_length(1, world_size)
    if check_layout(layout) is Layout.DOCUMENT or row_length is not None:
        step = check_row_length(layout, row_length, world_size, None) or world_size
    if total is None:
        total = used if layout == Layout.DOCUMENT else -(-used // step) * step
    unit = "world_size" if step == world_size else "2 * world_size" if row_length is None else "row_length"
    expected = f"a multiple of {unit} = {step}, at least {used}"
    most = MAX_OFFSET
    if row_length is not None:  # only the last packed row may have padding
        most = used // step * step + step
        expected += f" and at most {most}"
    if check_int("total", total, used, most, expected) % step:
        raise ValueError(f"total: expected {expected}, got {total}")
    return python_value(total)


def is_batch_of_rows(name: str, shape: tuple[int, ...], row_length: int, parts: int) -> bool:
    """Return whether an array has one row for each packed row, `[parts * B, row_length / parts, ...]`.

    The other form of the same tokens is `[total, ...]`. `parts` is 1 for whole packed rows, and the number of ranks for
    rows that are distributed. Raises `ValueError` for a shape that may be either form.
    """
    share = row_length // parts
    if len(shape) < 2 or shape[1] != share or shape[0] % parts:
        return False
    if shape[0] and shape[0] % row_length == 0:
        raise ValueError(
            f"{name}: expected [total, ...], or [rows, {share}, ...] for packed rows of {row_length} tokens, got shape "
            f"{shape}, which may be either: reshape it so that its second dimension tells"
        )
    return True


def check_parts(
    whole_cu_seqlens: list[int],
    split_cu_seqlens: list[int],
    split_lengths: list[int],
    world_size: int,
    whole_tokens: int,
    tokens: int,
) -> None:
    """Raise `ValueError` unless whole and split documents fit into the two parts of a rank's rows.

    All offsets and lengths are on the host. A rank has `tokens` rows; its whole documents have the first `whole_tokens`
    of them.
    """
    check_lengths(whole_cu_seqlens, 1, whole_tokens, "whole_cu_seqlens")
    check_lengths(split_cu_seqlens, world_size, world_size * (tokens - whole_tokens), "split_cu_seqlens")
    check_real_lengths(split_lengths, split_cu_seqlens)
