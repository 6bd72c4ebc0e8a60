"""Functions that distribute the rows of a packed batch over ranks in zigzag order, restore them, and check both."""

import jax
import jax.numpy as jnp
import numpy as np

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

from .arguments import Array, as_rank, check_array, check_batch, on_host, readable
from .axes import gather_rows
from .plans import positions_of_plan, shard_by_plan, unshard_by_plan
from .surroundings import under_own_promotion


def sequence_of_rows(cu_seqlens: Array, world_size: int, tokens: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return (sequence, offset from its first local row, length over all ranks) of each local row, int32.

    The result is the same for all ranks. Rows behind the last sequence have sequence -1, and offset and length 0.
    """
    cu_seqlens = jnp.asarray(cu_seqlens)
    rows = jnp.arange(tokens, dtype=jnp.int32)
    starts = cu_seqlens // world_size
    # Unrolled: the type of a loop's carry would have to name the mesh axes along which `starts` varies.
    sequence = jnp.searchsorted(starts, rows, side="right", method="scan_unrolled").astype(jnp.int32) - 1
    inside = rows < starts[-1]
    sequence = jnp.where(inside, sequence, -1)
    index = jnp.maximum(sequence, 0)
    offset = jnp.where(inside, rows - starts[index], 0)
    following = jnp.minimum(index + 1, len(starts) - 1)
    length = jnp.where(inside, cu_seqlens[following] - cu_seqlens[index], 0)
    return sequence, offset, length


@under_own_promotion
def documents_at(cu_seqlens: Array, rows: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return (document, position in it) of `rows` of the whole batch, int32; -1 and 0 behind the last document."""
    cu_seqlens = jnp.asarray(cu_seqlens)
    # Unrolled: the type of a loop's carry would have to name the mesh axes along which the arrays vary.
    document = jnp.searchsorted(cu_seqlens, rows, side="right", method="scan_unrolled").astype(jnp.int32) - 1
    inside = (rows < cu_seqlens[-1]) & (document >= 0)
    document = jnp.where(inside, document, -1)
    return document, jnp.where(inside, rows - cu_seqlens[jnp.maximum(document, 0)], 0)


def place_of_rows(
    cu_seqlens: Array,
    rank: jax.Array,
    world_size: int,
    tokens: int,
    row_length: int | None = None,
    lengths: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Return (document, position in it) of the local rows of `rank`, int32; document -1 is padding.

    A `rank [1]` gives results `[T]`, and ranks `[n, 1]` give `[n, T]`. `row_length` is the number of tokens of a packed
    row in the row layout, None in the document layout. `lengths [N]` are real lengths; the rest of a document is
    padding.
    """
    if row_length is None or world_size == 1:
        document, offset, length = sequence_of_rows(cu_seqlens, world_size, tokens)
        document, position = jnp.broadcast_arrays(document, row_position(offset, length, rank, world_size))
    else:
        rows = packed_row(jnp.arange(tokens, dtype=jnp.int32), row_length, rank, world_size)
        document, position = documents_at(cu_seqlens, rows)
    if lengths is not None and len(lengths):
        document = jnp.where(position < lengths[jnp.maximum(document, 0)], document, -1)
    return document, position


@under_own_promotion
def local_cu_seqlens(
    cu_seqlens: Array,
    world_size: int,
    *,
    layout: str = "document",
    row_length: int | None = None,
    rank: int | Array | None = None,
) -> jax.Array:
    """Return the offsets, int32, of the pieces of documents in the local rows of a rank.

    In the document layout every document has one piece on each rank, its two chunks end to end; the result is `[N + 1]`
    and the same for all ranks. In the row layout the result is `[2 * N + 1]`, and `rank` is required: each document has
    two pieces, its parts in the rank's early and late chunk, in the order of the local rows. Most of these pieces are
    empty. Rows behind the last offset are padding. For a single rank the result is always that of the document layout.

    Args:
        cu_seqlens: `[N + 1]` int32, offsets in the whole batch.
        world_size: number of ranks.
        layout: "document" or "row".
        row_length: tokens of a packed row over all ranks, in the row layout.
        rank: an int, or an array of one integer, which may be traced.

    Raises `ValueError` for offsets that `validate` rejects, for an invalid rank, and in the row layout without
    `row_length`. If the values are traced or on a GPU, all elements of the result are -1 instead.
    """
    layout = check_layout(layout)
    if rank is None and layout is Layout.ROW and check_world_size(world_size) > 1:
        raise ValueError("rank: expected the rank whose pieces to count, as layout is 'row', got None")
    cu_seqlens, rank, world_size = check_batch(cu_seqlens, 0 if rank is None else rank, world_size, layout)
    row_length = check_row_length(layout, row_length, world_size, None)
    fault = _fault(cu_seqlens, rank, world_size, row_length=row_length)
    if row_length is None or world_size == 1:
        return _poisoned(cu_seqlens // world_size, fault)
    early, late, used = piece_offsets(cu_seqlens, row_length, as_rank(rank), world_size)
    starts = jnp.sort(jnp.minimum(jnp.concatenate((early[:-1], late[:-1])), used[-1]))
    return _poisoned(jnp.append(starts, used[-1]), fault)


@under_own_promotion
def position_ids(
    cu_seqlens: Array | DocumentPlan,
    rank: int | Array,
    world_size: int,
    tokens: int | None = None,
    *,
    layout: str = "document",
    row_length: int | None = None,
) -> jax.Array:
    """Return the position of every local row in its document, `[T]` int32, for example for RoPE; 0 for padding.

    Args:
        cu_seqlens: `[N + 1]` int32, offsets in the whole batch. Or a plan of `plan_documents`, which `shard`, `unshard`
            and `validate` also accept.
        rank: an int, or an array of one integer, which may be traced.
        world_size: number of ranks.
        tokens: T. None: the host reads the last offset, which waits for the device, and T has no padding behind the
            last document, except the padding of the last packed row.
        layout: "document" or "row".
        row_length: tokens of a packed row over all ranks, in the row layout; None means one row of all tokens.

    Raises `ValueError` if `tokens` is None and `cu_seqlens` is traced, for offsets that `validate` rejects, for an
    invalid rank, and for fewer `tokens` than the documents have. If the values are traced or on a GPU, all positions
    are -1 instead.
    """
    if isinstance(cu_seqlens, DocumentPlan):
        plan = check_plan(cu_seqlens, world_size, layout=layout, row_length=row_length)
        return positions_of_plan(plan, rank, tokens)
    layout = check_layout(layout)
    if tokens is None:
        offsets = on_host(cu_seqlens, "give the number of local rows as `tokens`")
        tokens = default_rows(offsets, check_world_size(world_size), layout, row_length)
    cu_seqlens, rank, world_size = check_batch(cu_seqlens, rank, world_size, layout)
    tokens = check_int("tokens", tokens, 0, MAX_ROWS, f"a number of rows up to {MAX_ROWS}")
    row_length = check_row_length(layout, row_length, world_size, world_size * tokens, "tokens")
    fault = _fault(cu_seqlens, rank, world_size, tokens, row_length)
    document, position = place_of_rows(cu_seqlens, as_rank(rank), world_size, tokens, row_length)
    return _poisoned(position * (document >= 0), fault)


def _fault(
    cu_seqlens: jax.Array,
    rank: int | Array,
    world_size: int,
    tokens: int | None = None,
    row_length: int | None = None,
) -> jax.Array | None:
    """Return a boolean array, true if the values do not describe a batch of `tokens` local rows.

    If the host can read the values without waiting, it checks them instead: the function raises `ValueError`, or
    returns None.
    """
    number = isinstance(rank, int)
    if not readable(cu_seqlens) or not (number or readable(rank)):
        return is_invalid_batch(cu_seqlens, as_rank(rank), world_size, tokens, row_length)
    check_rank(rank if number else int(np.asarray(rank).item()), world_size, False)
    check_host_offsets(np.asarray(cu_seqlens).tolist(), world_size, tokens, row_length)
    return None


def _poisoned(x: jax.Array, fault: jax.Array | None) -> jax.Array:
    """Return `x`, or if there is a `fault` an array of NaN, of -1, or of the largest unsigned number."""
    if fault is None:
        return x
    if jnp.issubdtype(x.dtype, jnp.inexact):
        return jnp.where(fault, jnp.asarray(jnp.nan, x.dtype), x)
    if x.dtype == jnp.bool_:
        return fault | x
    value = -1 if jnp.issubdtype(x.dtype, jnp.signedinteger) else jnp.iinfo(x.dtype).max
    return jnp.where(fault, jnp.asarray(value, x.dtype), x)


def _rows_of(x: Array, cu_seqlens: jax.Array, world_size: int) -> int:
    """Return how many rows of `x` each rank has; `ValueError` unless they are the rows of `cu_seqlens`."""
    check_array("x", x)
    end = int(np.asarray(cu_seqlens)[-1]) if readable(cu_seqlens) else None
    return check_rows("x", x.shape, world_size, end)


def _one_after_another(
    x: Array, layout: Layout, row_length: int | None, world_size: int, parts: int
) -> tuple[jax.Array, tuple[int, ...]]:
    """Return (`x` as `[total, ...]`, its leading shape), which is () unless `x` is `[batch, rows, ...]`.

    With explicit mesh axes, every device has all rows of the result.
    """
    check_array("x", x)
    x = jnp.asarray(x)
    if layout is Layout.ROW and row_length is not None:
        row_length = check_row_length(layout, row_length, world_size, None)
        if row_length is not None and is_batch_of_rows("x", x.shape, row_length, parts):
            return gather_rows(x, 2).reshape(x.shape[0] * x.shape[1], *x.shape[2:]), x.shape[:2]
    return gather_rows(x), ()


def _take(x: jax.Array, rows: jax.Array, fault: jax.Array | None) -> jax.Array:
    """Return `x[rows]`, poisoned if there is a `fault`; with a fault `rows` may be out of range."""
    return _poisoned(x[rows], fault)


def _global_rows(
    cu_seqlens: Array, rank: int | Array, world_size: int, tokens: int, row_length: int | None
) -> jax.Array:
    """Return the row of the whole batch that each local row holds, `[T]`.

    In the document layout, ranks share the padding behind the last document evenly.
    """
    rank = as_rank(rank)
    rows = jnp.arange(tokens, dtype=jnp.int32)
    if row_length is not None and world_size > 1:
        return packed_row(rows, row_length, rank, world_size)
    sequence, offset, length = sequence_of_rows(cu_seqlens, world_size, tokens)
    position = row_position(offset, length, rank, world_size)
    used = cu_seqlens[-1]
    local_used = used // world_size
    padding = used + rank * (tokens - local_used) + rows - local_used
    return jnp.where(sequence >= 0, cu_seqlens[jnp.maximum(sequence, 0)] + position, padding)


@under_own_promotion
def shard(
    x: Array,
    cu_seqlens: Array | DocumentPlan,
    rank: int | Array,
    world_size: int,
    *,
    layout: str = "document",
    row_length: int | None = None,
) -> jax.Array:
    """Return the rows of a whole batch that belong to `rank`, in zigzag order; differentiable.

    Args:
        x: `[total, ...]`, the whole batch. Rows behind the last document are padding, which ranks share evenly in the
            document layout. In the row layout also `[B, row_length, ...]`, whose rows follow one another in
            `cu_seqlens`.
        cu_seqlens: `[N + 1]` int32, offsets of its documents; may be traced. With a plan of documents `x` has the
            tokens of all documents, and padding rows of the result are 0.
        rank: an int, or an array of one integer, which may be traced.
        world_size: number of ranks; `ValueError` unless it divides `total`.
        layout: "document", or "row", in which packed rows are cut into chunks and only the last row may have padding.
        row_length: tokens of a packed row over all ranks, in the row layout; None means one row of all tokens.

    Returns:
        `[total / world_size, ...]`, or `[B, row_length / world_size, ...]`.

    Raises `ValueError` for offsets that `validate` rejects and for an invalid rank. If these values are traced or on a
    GPU, all elements of the result are NaN instead, or -1 for integers, or the largest number for unsigned integers.
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
    return result.reshape(batch[0], batch[1] // world_size, *result.shape[1:]) if batch else result


@under_own_promotion
def unshard(
    x: Array,
    cu_seqlens: Array | DocumentPlan,
    world_size: int,
    *,
    layout: str = "document",
    row_length: int | None = None,
) -> jax.Array:
    """Undo `shard`: return the whole batch in its original order.

    Args:
        x: `[world_size * T, ...]`, the rows of all ranks in the order of the ranks. In the row layout also
            `[world_size * B, row_length / world_size, ...]`, with the result `[B, row_length, ...]`.
        cu_seqlens: as for `shard`. With a plan the result has the tokens of all documents, and no padding.
        world_size: number of ranks.
        layout, row_length: as for `shard`.

    Invalid offsets are treated as in `shard`.
    """
    if isinstance(cu_seqlens, DocumentPlan):
        return unshard_by_plan(x, check_plan(cu_seqlens, world_size, layout=layout, row_length=row_length))
    layout = check_layout(layout)
    cu_seqlens, _, world_size = check_batch(cu_seqlens, 0, world_size, layout)
    x, batch = _one_after_another(x, layout, row_length, world_size, world_size)
    tokens = _rows_of(x, cu_seqlens, world_size)
    row_length = check_row_length(layout, row_length, world_size, x.shape[0], "x")
    fault = _fault(cu_seqlens, 0, world_size, tokens, row_length)
    result = _take(x, _position_order(cu_seqlens, world_size, tokens, row_length), fault)
    return result.reshape(batch[0] // world_size, batch[1] * world_size, *result.shape[1:]) if batch else result


def _position_order(cu_seqlens: jax.Array, world_size: int, tokens: int, row_length: int | None) -> jax.Array:
    """Return `[W * tokens]`: the row of the gathered buffer that holds each row of the whole batch."""
    total = world_size * tokens
    rows = jnp.arange(total, dtype=jnp.int32)
    if row_length is not None and world_size > 1:
        return gathered_packed_row(rows, row_length, tokens, world_size)
    sequence, position, length = sequence_of_rows(cu_seqlens, 1, total)
    start = cu_seqlens[jnp.maximum(sequence, 0)]
    used = cu_seqlens[-1]
    local_used = used // world_size
    behind = rows - used
    room = jnp.maximum(tokens - local_used, 1)
    padding = behind // room * tokens + local_used + behind % room
    return jnp.where(sequence >= 0, gathered_row(position, start, length, tokens, world_size), padding)
