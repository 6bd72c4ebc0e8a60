"""Functions that distribute a packed batch over ranks and restore it; they are not on the hot path of attention."""

import torch

from zigzag_kernels.batch_checks import (
    check_host_offsets,
    check_row_length,
    default_rows,
    is_batch_of_rows,
)
from zigzag_kernels.checks import (
    MAX_ROWS,
    check_int,
    check_layout,
    check_rank,
    check_rows,
    check_world_size,
)
from zigzag_kernels.documents import DocumentPlan, check_plan
from zigzag_kernels.layout import (
    gathered_packed_row,
    gathered_row,
    is_invalid_batch,
    packed_row,
    piece_offsets,
    row_position,
)
from zigzag_kernels.modes import Layout

from .arguments import as_rank, check_batch, check_device, check_tensor, readable
from .plans import positions_of_plan, shard_by_plan, unshard_by_plan


def sequence_of_rows(
    cu_seqlens: torch.Tensor, world_size: int, tokens: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (sequence, offset from its first local row, length over all ranks) of each local row, int64.

    The result is the same for all ranks. Rows behind the last sequence have sequence -1, and offset and length 0.
    """
    rows = torch.arange(tokens, device=cu_seqlens.device)
    starts = torch.div(cu_seqlens, world_size, rounding_mode="floor").long()
    sequence = torch.searchsorted(starts, rows, right=True) - 1
    inside = rows < starts[-1]
    sequence = torch.where(inside, sequence, -1)
    index = sequence.clamp(min=0)
    offset = torch.where(inside, rows - starts[index], 0)
    length = torch.where(inside, cu_seqlens.long()[(index + 1).clamp(max=len(starts) - 1)] - cu_seqlens[index], 0)
    return sequence, offset, length


def documents_at(cu_seqlens: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (document, position in it) of `rows` of the unsharded batch, int64; -1 and 0 behind the last document."""
    document = torch.searchsorted(cu_seqlens.long(), rows, right=True) - 1
    inside = (rows < cu_seqlens[-1]) & (document >= 0)
    document = torch.where(inside, document, -1)
    return document, torch.where(inside, rows - cu_seqlens[document.clamp(min=0)], 0)


def place_of_rows(
    cu_seqlens: torch.Tensor,
    rank: torch.Tensor,
    world_size: int,
    tokens: int,
    row_length: int | None = None,
    lengths: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (document, position in it) of the local rows of `rank`, int64; document -1 is padding.

    A `rank [1]` gives results `[T]`, and ranks `[n, 1]` give `[n, T]`. `row_length` is the number of tokens of a packed
    row in the row layout, None in the document layout. `lengths [N]` are real lengths; the rest of a document is
    padding.
    """
    if row_length is None or world_size == 1:
        document, offset, length = sequence_of_rows(cu_seqlens, world_size, tokens)
        document, position = torch.broadcast_tensors(document, row_position(offset, length, rank, world_size))
    else:
        rows = torch.arange(tokens, device=cu_seqlens.device)
        document, position = documents_at(cu_seqlens, packed_row(rows, row_length, rank, world_size))
    if lengths is not None and len(lengths):
        real = lengths[document.clamp(0, len(lengths) - 1)]  # with invalid offsets there may be no such document
        document = torch.where(position < real, document, -1)
    return document, position


def local_cu_seqlens(
    cu_seqlens: torch.Tensor,
    world_size: int,
    *,
    layout: str = "document",
    row_length: int | None = None,
    rank: int | torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the offsets, int32, of the pieces of documents in the local rows of a rank.

    `cu_seqlens [N + 1]` are the offsets over all ranks, and `world_size` is the number of ranks. In the document layout
    every document has one piece on each rank, its two chunks end to end; the result is `[N + 1]` and the same for all
    ranks. In the row layout the result is `[2 * N + 1]`, and `rank` is required: each document has two pieces, its
    parts in the rank's early and late chunk, in the order of the local rows. Most of these pieces are empty. Rows
    behind the last offset are padding. For a single rank the result is always that of the document layout.

    Raises `ValueError` for offsets that `validate` rejects, for an invalid rank, and in the row layout without
    `row_length`. If the values are on a GPU, all elements of the result are -1 instead.
    """
    layout = check_layout(layout)
    if rank is None and layout is Layout.ROW and check_world_size(world_size) > 1:
        raise ValueError("rank: expected the rank whose pieces to count, as layout is 'row', got None")
    cu_seqlens, rank, world_size = check_batch(cu_seqlens, 0 if rank is None else rank, world_size, layout)
    row_length = check_row_length(layout, row_length, world_size, None)
    fault = _fault(cu_seqlens, rank, world_size, row_length=row_length)
    if row_length is None or world_size == 1:
        return _poisoned(torch.div(cu_seqlens, world_size, rounding_mode="floor"), fault)
    early, late, used = piece_offsets(cu_seqlens, row_length, as_rank(rank, cu_seqlens.device), world_size)
    starts = torch.cat((early[:-1], late[:-1])).minimum(used[-1]).sort()[0]
    return _poisoned(torch.cat((starts, used[-1:])).int(), fault)


def position_ids(
    cu_seqlens: torch.Tensor | DocumentPlan,
    rank: int | torch.Tensor,
    world_size: int,
    tokens: int | None = None,
    *,
    layout: str = "document",
    row_length: int | None = None,
) -> torch.Tensor:
    """Return `[T]` int32: the position in its document of every local row of `rank` (for RoPE); 0 for padding.

    `world_size` is the number of ranks. `tokens` is T. Without `tokens`, the host reads `cu_seqlens`, which waits for
    the device, and T has no padding behind the last document, except the padding of the last packed row. In the row
    layout a `row_length` of None means one row of all tokens. In place of `cu_seqlens`, pass a plan of
    `plan_documents`, for a result on the CPU; `shard`, `unshard` and `validate` also accept a plan.

    Raises `ValueError` for offsets that `validate` rejects, for an invalid rank, and for fewer `tokens` than the
    documents have. If the values are on a GPU, all positions are -1 instead.
    """
    if isinstance(cu_seqlens, DocumentPlan):
        plan = check_plan(cu_seqlens, world_size, layout=layout, row_length=row_length)
        return positions_of_plan(plan, rank, tokens)
    cu_seqlens, rank, world_size = check_batch(cu_seqlens, rank, world_size, check_layout(layout))
    if tokens is None:
        offsets = cu_seqlens.tolist()
        tokens = default_rows(offsets, world_size, layout, row_length)
    tokens = check_int("tokens", tokens, 0, MAX_ROWS, f"a number of rows up to {MAX_ROWS}")
    row_length = check_row_length(layout, row_length, world_size, world_size * tokens, "tokens")
    fault = _fault(cu_seqlens, rank, world_size, tokens, row_length)
    document, position = place_of_rows(cu_seqlens, as_rank(rank, cu_seqlens.device), world_size, tokens, row_length)
    return _poisoned((position * (document >= 0)).int(), fault)


def _fault(
    cu_seqlens: torch.Tensor,
    rank: int | torch.Tensor,
    world_size: int,
    tokens: int | None = None,
    row_length: int | None = None,
) -> torch.Tensor | None:
    """Return a boolean tensor, true if the values do not describe a batch of `tokens` local rows.

    If the host can read the values without waiting, it checks them instead: the function raises `ValueError`, or
    returns None.
    """
    number = isinstance(rank, int)
    if not readable(cu_seqlens) or not (number or readable(rank)):
        return is_invalid_batch(cu_seqlens, as_rank(rank, cu_seqlens.device), world_size, tokens, row_length)
    check_rank(rank if number else int(rank), world_size, False)
    check_host_offsets(cu_seqlens.tolist(), world_size, tokens, row_length)
    return None


def _poisoned(x: torch.Tensor, fault: torch.Tensor | None) -> torch.Tensor:
    """Return `x`, or if there is a `fault` an array of NaN, of -1, or of the largest unsigned number."""
    if fault is None:
        return x
    if x.is_floating_point() or x.is_complex():
        return x.masked_fill(fault, float("nan"))
    unsigned = x.dtype == torch.bool or torch.iinfo(x.dtype).min == 0
    return x.masked_fill(fault, -1 if not unsigned else True if x.dtype == torch.bool else torch.iinfo(x.dtype).max)


def _rows_of(x: torch.Tensor, cu_seqlens: torch.Tensor, world_size: int) -> int:
    """Return how many rows of `x` each rank has; `ValueError` unless they are the rows of `cu_seqlens`."""
    check_tensor("x", x)
    if cu_seqlens.device.type != "cpu":
        check_device("cu_seqlens", cu_seqlens, "x", x)
    end = int(cu_seqlens[-1]) if readable(cu_seqlens) else None
    return check_rows("x", tuple(x.shape), world_size, end)


def _one_after_another(
    x: torch.Tensor, layout: Layout, row_length: int | None, world_size: int, parts: int
) -> tuple[torch.Tensor, tuple[int, ...]]:
    """Return (`x` as `[total, ...]`, its leading shape), which is () unless `x` is `[batch, rows, ...]`."""
    check_tensor("x", x)
    if layout is Layout.DOCUMENT or row_length is None:
        return x, ()
    row_length = check_row_length(layout, row_length, world_size, None)
    if row_length is None or not is_batch_of_rows("x", tuple(x.shape), row_length, parts):
        return x, ()
    return x.flatten(0, 1), tuple(x.shape[:2])


def _take(x: torch.Tensor, rows: torch.Tensor, fault: torch.Tensor | None) -> torch.Tensor:
    """Return `x[rows]`, poisoned if there is a `fault`; with a fault `rows` may be out of range."""
    return x[rows] if fault is None else _poisoned(x[rows.masked_fill(fault, 0)], fault)


def _global_rows(
    cu_seqlens: torch.Tensor, rank: int | torch.Tensor, world_size: int, tokens: int, row_length: int | None
) -> torch.Tensor:
    """Return `[T]`: the row of the unsharded batch that each local row holds.

    In the document layout, ranks share the padding behind the last document evenly.
    """
    rank = as_rank(rank, cu_seqlens.device)
    rows = torch.arange(tokens, device=cu_seqlens.device)
    if row_length is not None and world_size > 1:
        return packed_row(rows, row_length, rank, world_size)
    sequence, offset, length = sequence_of_rows(cu_seqlens, world_size, tokens)
    position = row_position(offset, length, rank, world_size)
    used = cu_seqlens[-1].long()
    local_used = used // world_size
    padding = used + rank * (tokens - local_used) + rows - local_used
    return torch.where(sequence >= 0, cu_seqlens[sequence.clamp(min=0)] + position, padding)


def shard(
    x: torch.Tensor,
    cu_seqlens: torch.Tensor | DocumentPlan,
    rank: int | torch.Tensor,
    world_size: int,
    *,
    layout: str = "document",
    row_length: int | None = None,
) -> torch.Tensor:
    """Return the zigzag rows `[total / W, ...]` of `rank` from the unsharded batch `x [total, ...]`; differentiable.

    W is `world_size`. Rows of `x` behind the last document are padding, which ranks share evenly in the document
    layout. In the row layout each packed row of `row_length` tokens is cut into chunks; a `row_length` of None means
    one row of all tokens, and only the last row may have padding. `x` may then also be `[B, row_length, ...]`, whose
    rows follow one another in `cu_seqlens`; the result is `[B, row_length / W, ...]`.

    Raises `ValueError` if `total` is not a multiple of W, for offsets that `validate` rejects, and for an invalid rank.
    If these values are on a GPU, all elements of the result are NaN instead, or -1 for integers, or the largest number
    for unsigned integers.

    With a plan of documents, `x` has the tokens of all documents, and padding rows of the result are 0.
    """
    if isinstance(cu_seqlens, DocumentPlan):
        return shard_by_plan(x, check_plan(cu_seqlens, world_size, layout=layout, row_length=row_length), rank)
    layout = check_layout(layout)
    cu_seqlens, rank, world_size = check_batch(cu_seqlens, rank, world_size, layout)
    x, batch = _one_after_another(x, layout, row_length, world_size, 1)
    tokens = _rows_of(x, cu_seqlens, world_size)
    row_length = check_row_length(layout, row_length, world_size, x.shape[0], "x")
    fault = _fault(cu_seqlens, rank, world_size, tokens, row_length)
    result = _take(x, _global_rows(cu_seqlens, rank, world_size, tokens, row_length), fault)
    return result.unflatten(0, (batch[0], batch[1] // world_size)) if batch else result


def unshard(
    x: torch.Tensor,
    cu_seqlens: torch.Tensor | DocumentPlan,
    world_size: int,
    *,
    layout: str = "document",
    row_length: int | None = None,
) -> torch.Tensor:
    """Undo `shard`: return the batch `[total, ...]` from the rows `x [W * T, ...]` of all ranks, in rank order.

    `cu_seqlens` and `world_size`, W, are as in `shard`. In the row layout `x` may also be
    `[W * B, row_length / W, ...]`, rank after rank; the result is then `[B, row_length, ...]`. With a plan of documents
    the result has the tokens of all documents and no padding. Invalid values are treated as in `shard`.
    """
    if isinstance(cu_seqlens, DocumentPlan):
        return unshard_by_plan(x, check_plan(cu_seqlens, world_size, layout=layout, row_length=row_length))
    layout = check_layout(layout)
    cu_seqlens, _, world_size = check_batch(cu_seqlens, 0, world_size, layout)
    x, batch = _one_after_another(x, layout, row_length, world_size, world_size)
    tokens = _rows_of(x, cu_seqlens, world_size)
    row_length = check_row_length(layout, row_length, world_size, x.shape[0], "x")
    fault = _fault(cu_seqlens, 0, world_size, tokens, row_length)
    result = _take(x, position_order(cu_seqlens, world_size, x.shape[0], row_length), fault)
    return result.unflatten(0, (batch[0] // world_size, batch[1] * world_size)) if batch else result


def position_order(
    cu_seqlens: torch.Tensor, world_size: int, total: int, row_length: int | None = None
) -> torch.Tensor:
    """Return `[total]`: the row of the gathered, rank-major buffer that holds each row of the unsharded batch.

    `row_length` is None in the document layout. Raises `ValueError` if `total` is not a multiple of `world_size`.
    """
    if total % world_size:
        raise ValueError(f"x: expected a multiple of world_size = {world_size} rows, got {total}")
    tokens = total // world_size
    if row_length is not None and world_size > 1:
        rows = torch.arange(total, device=cu_seqlens.device)
        return gathered_packed_row(rows, row_length, tokens, world_size)
    sequence, position, length = sequence_of_rows(cu_seqlens, 1, total)
    start = cu_seqlens[sequence.clamp(min=0)].long()
    used = cu_seqlens[-1].long()
    local_used = used // world_size
    behind = torch.arange(total, device=cu_seqlens.device) - used
    room = (tokens - local_used).clamp(min=1)
    padding = behind // room * tokens + local_used + behind % room
    return torch.where(sequence >= 0, gathered_row(position, start, length, tokens, world_size), padding)
