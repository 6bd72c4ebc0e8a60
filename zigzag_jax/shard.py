"""Rows of a packed batch in zigzag order: dealing them out to ranks, undoing that, and padding lengths to fit."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

from zigzag_kernels.checks import (
    MAX_ROWS,
    check_cu_seqlens,
    check_fill,
    check_int,
    check_lengths,
    check_offsets,
    check_rank,
    check_rows,
    check_unsaid_rows,
    check_world_size,
)
from zigzag_kernels.layout import MAX_OFFSET, gathered_row, impossible, padded_length, row_position

from .arguments import Array, as_rank, check_array, check_batch, mark_padded, readable
from .surroundings import under_own_promotion


def sequence_of_rows(cu_seqlens: Array, world_size: int, tokens: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return (sequence, offset from its first local row, global length) of each of `tokens` local rows, int32.

    The three are the same on every rank. Rows behind the last sequence have sequence -1, offset 0 and length 0.
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
def local_cu_seqlens(cu_seqlens: Array, world_size: int) -> jax.Array:
    """Return the offsets of the sequences in the local rows of a rank, `[N + 1]` int32, equal on all ranks.

    Args:
        cu_seqlens: `[N + 1]` int32, offsets in the whole batch.
        world_size: number of ranks.

    Raises `ValueError` for offsets that `validate` refuses; if they are traced or on a GPU, all of the result is -1.
    """
    cu_seqlens, _, world_size = check_batch(cu_seqlens, 0, world_size)
    return _poisoned(cu_seqlens // world_size, _fault(cu_seqlens, 0, world_size))


@under_own_promotion
def position_ids(cu_seqlens: Array, rank: int | Array, world_size: int, tokens: int | None = None) -> jax.Array:
    """Return the position of every local row in its sequence, `[T]` int32, for example for RoPE; 0 for padding.

    Args:
        cu_seqlens: `[N + 1]` int32, offsets in the whole batch.
        rank: an int, or an array of one integer, which may be traced.
        world_size: number of ranks.
        tokens: T. Without it the last offset is read, which waits for the device.

    Raises `ValueError` if `tokens` is None and `cu_seqlens` is traced, for offsets that `validate` refuses, for a rank
    that is none, and for fewer `tokens` than the sequences have. If the values are traced or on a GPU, all positions
    are -1 instead.
    """
    if tokens is None:
        offsets = _on_host(cu_seqlens, "give the number of local rows as `tokens`")
        world_size = check_world_size(world_size)
        check_lengths(offsets, world_size)
        tokens = check_unsaid_rows(offsets[-1] // world_size)
    cu_seqlens, rank, world_size = check_batch(cu_seqlens, rank, world_size)
    tokens = check_int("tokens", tokens, 0, MAX_ROWS, f"a number of rows up to {MAX_ROWS}")
    fault = _fault(cu_seqlens, rank, world_size, tokens)
    _, offset, length = sequence_of_rows(cu_seqlens, world_size, tokens)
    return _poisoned(row_position(offset, length, as_rank(rank), world_size) * (length > 0), fault)


def _fault(cu_seqlens: jax.Array, rank: int | Array, world_size: int, tokens: int | None = None) -> jax.Array | None:
    """Return whether the values cannot describe a batch of `tokens` local rows, as an array that nobody has read.

    Values that the host has at hand are checked instead: `ValueError`, or None.
    """
    number = isinstance(rank, int)
    if not readable(cu_seqlens) or not (number or readable(rank)):
        return impossible(cu_seqlens, as_rank(rank), world_size, tokens)
    check_rank(rank if number else int(np.asarray(rank).item()), world_size, False)
    offsets = np.asarray(cu_seqlens).tolist()
    check_lengths(offsets, world_size)
    if tokens is not None and offsets[-1] > tokens * world_size:
        raise ValueError(
            f"tokens: expected at least the {offsets[-1] // world_size} local rows of cu_seqlens, got {tokens}"
        )
    return None


def _poisoned(x: jax.Array, fault: jax.Array | None) -> jax.Array:
    """Return `x`, but NaN in every place, or -1, or the largest of unsigned numbers, if there is a `fault`."""
    if fault is None:
        return x
    if jnp.issubdtype(x.dtype, jnp.inexact):
        return jnp.where(fault, jnp.asarray(jnp.nan, x.dtype), x)
    if x.dtype == jnp.bool_:
        return fault | x
    value = -1 if jnp.issubdtype(x.dtype, jnp.signedinteger) else jnp.iinfo(x.dtype).max
    return jnp.where(fault, jnp.asarray(value, x.dtype), x)


def _rows_of(x: Array, cu_seqlens: jax.Array, world_size: int) -> int:
    """Return how many rows of `x` each rank has; `ValueError` unless the rows are those of `cu_seqlens`."""
    check_array("x", x)
    end = int(np.asarray(cu_seqlens)[-1]) if readable(cu_seqlens) else None
    return check_rows("x", x.shape, world_size, end)


def _take(x: Array, rows: jax.Array, fault: jax.Array | None) -> jax.Array:
    """Return `x[rows]`, poisoned if there is a `fault`, with which `rows` may not exist."""
    return _poisoned(jnp.asarray(x)[rows], fault)


def _global_rows(cu_seqlens: Array, rank: int | Array, world_size: int, tokens: int) -> jax.Array:
    """Return the row of the whole batch that each local row holds, `[T]`; padding is dealt out evenly."""
    rank = as_rank(rank)
    sequence, offset, length = sequence_of_rows(cu_seqlens, world_size, tokens)
    position = row_position(offset, length, rank, world_size)
    used = cu_seqlens[-1]
    local_used = used // world_size
    padding = used + rank * (tokens - local_used) + jnp.arange(tokens) - local_used
    return jnp.where(sequence >= 0, cu_seqlens[jnp.maximum(sequence, 0)] + position, padding)


@under_own_promotion
def shard(x: Array, cu_seqlens: Array, rank: int | Array, world_size: int) -> jax.Array:
    """Return the rows of a whole batch that belong to `rank`, in zigzag order; differentiable.

    Args:
        x: `[total, ...]`, the whole batch. Rows behind the last sequence are padding and dealt out evenly.
        cu_seqlens: `[N + 1]` int32, offsets of its sequences; may be traced.
        rank: an int, or an array of one integer, which may be traced.
        world_size: number of ranks; `ValueError` unless it divides `total`.

    Returns:
        `[total / world_size, ...]`.

    Raises `ValueError` for offsets that `validate` refuses and for a rank that is none. If those values are traced or
    on a GPU, all of the result is NaN instead, -1 if `x` has integers, or the largest number if it has unsigned ones.
    """
    cu_seqlens, rank, world_size = check_batch(cu_seqlens, rank, world_size)
    tokens = _rows_of(x, cu_seqlens, world_size)
    fault = _fault(cu_seqlens, rank, world_size, tokens)
    return _take(x, _global_rows(cu_seqlens, rank, world_size, tokens), fault)


@under_own_promotion
def unshard(x: Array, cu_seqlens: Array, world_size: int) -> jax.Array:
    """Return the whole batch in its original order: undoes `shard`.

    Args:
        x: `[world_size * T, ...]`, the rows of rank 0, then those of rank 1, and so on.
        cu_seqlens: `[N + 1]` int32, as for `shard`.
        world_size: number of ranks.

    It treats offsets that `validate` refuses as `shard` does.
    """
    cu_seqlens, _, world_size = check_batch(cu_seqlens, 0, world_size)
    tokens = _rows_of(x, cu_seqlens, world_size)
    fault, total = _fault(cu_seqlens, 0, world_size, tokens), x.shape[0]
    sequence, position, length = sequence_of_rows(cu_seqlens, 1, total)
    start = cu_seqlens[jnp.maximum(sequence, 0)]
    used = cu_seqlens[-1]
    local_used = used // world_size
    behind = jnp.arange(total) - used
    room = jnp.maximum(tokens - local_used, 1)
    padding = behind // room * tokens + local_used + behind % room
    rows = jnp.where(sequence >= 0, gathered_row(position, start, length, tokens, world_size), padding)
    return _take(x, rows, fault)


@under_own_promotion
def pad_to_zigzag(
    x: Array, cu_seqlens: Array, world_size: int, total: int | None = None, *, value: float = 0
) -> tuple[jax.Array, jax.Array]:
    """Append `value` to each sequence so that its length is a multiple of 2W; with one rank lengths stay as they are.

    Args:
        x: `[rows, ...]`, the packed batch.
        cu_seqlens: `[N + 1]` int32, its offsets, which are read on the host: `ValueError` if traced.
        world_size: W, the number of ranks.
        total: number of rows of the result, a multiple of W; rows of `value` behind the last sequence fill it up.
        value: 0 for tokens; labels want the index that the loss ignores, such as -100.

    Returns:
        (padded `x`, its `cu_seqlens`). Attention treats the padding as tokens at the end of their sequence, so that
        with a causal mask no real token attends to them. Without one, every real token would: attention refuses
        `causal=False` with the `cu_seqlens` of this function, unless they are traced.
    """
    check_array("x", x)
    lengths = _host_lengths(x, cu_seqlens, world_size)
    padded = [padded_length(length, world_size) for length in lengths]
    if total is None:
        total = sum(padded)
    expected = f"a multiple of world_size = {world_size}, at least {sum(padded)}"
    if check_int("total", total, sum(padded), MAX_OFFSET, expected) % world_size:
        raise ValueError(f"total: expected {expected}, got {total}")
    x = jnp.asarray(x)
    fill = jnp.asarray(check_fill("value", value, str(x.dtype), _limits(x.dtype)), x.dtype)
    rows, new_cu_seqlens = _padded_rows(lengths, padded)
    result = jnp.full((total, *x.shape[1:]), fill).at[rows].set(x[: len(rows)], unique_indices=True)
    new_cu_seqlens = jnp.asarray(new_cu_seqlens)
    if padded != lengths:
        mark_padded(new_cu_seqlens)
    return result, new_cu_seqlens


def _limits(dtype: np.dtype) -> tuple[float, float]:
    if dtype == jnp.bool_:
        return 0, 1
    limits = jnp.finfo(dtype) if jnp.issubdtype(dtype, jnp.inexact) else jnp.iinfo(dtype)
    whole = jnp.issubdtype(dtype, jnp.integer)
    return (int(limits.min), int(limits.max)) if whole else (float(limits.min), float(limits.max))


@under_own_promotion
def unpad(x: Array, cu_seqlens: Array, world_size: int) -> jax.Array:
    """Return the rows of a padded batch that are no padding: undoes `pad_to_zigzag`.

    Args:
        x: `[rows, ...]`, the padded batch.
        cu_seqlens: `[N + 1]` int32, the offsets before padding, which are read on the host: `ValueError` if traced.
        world_size: number of ranks.
    """
    lengths = _host_lengths(None, cu_seqlens, world_size)
    padded = [padded_length(length, world_size) for length in lengths]
    check_array("x", x)
    if not x.ndim or x.shape[0] < sum(padded):
        raise ValueError(
            f"x: expected at least the {sum(padded)} rows of the padded batch, got {x.shape[0] if x.ndim else 'none'}"
        )
    return jnp.asarray(x)[_padded_rows(lengths, padded)[0]]


def validate(cu_seqlens: Array, world_size: int, total: int | None = None) -> None:
    """Raise `ValueError` unless the sequences can be dealt out to `world_size` ranks.

    Attention cannot look at values on a device and returns NaN for invalid lengths; this names the fault. It reads
    `cu_seqlens` on the host, which waits for the device, so call it once.

    Args:
        cu_seqlens: `[N + 1]` int32, offsets in the whole batch; `ValueError` if traced.
        world_size: number of ranks.
        total: rows of the whole batch, if the sequences are to be checked against them.
    """
    world_size = check_world_size(world_size)
    check_lengths(_on_host(cu_seqlens), world_size, total)


def _on_host(cu_seqlens: Array, advice: str = "call this outside of jit") -> list[int]:
    if isinstance(cu_seqlens, list | tuple):
        return check_offsets(cu_seqlens)
    check_array("cu_seqlens", cu_seqlens)
    check_cu_seqlens(cu_seqlens.shape, str(cu_seqlens.dtype))
    try:
        return check_offsets(np.asarray(cu_seqlens).tolist())
    except jax.errors.TracerArrayConversionError:
        raise ValueError(f"cu_seqlens: expected values that can be read here, got a traced array; {advice}") from None


def _host_lengths(x: Array | None, cu_seqlens: Array, world_size: int) -> list[int]:
    check_world_size(world_size)
    starts = _on_host(cu_seqlens)
    check_lengths(starts, 1)
    if x is not None:
        check_rows("x", x.shape, 1, starts[-1])
    return [end - start for start, end in itertools.pairwise(starts)]


def _padded_rows(lengths: list[int], padded: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Return (row of each original row in the padded batch, padded `cu_seqlens`), int32."""
    starts = np.cumsum([0, *padded], dtype=np.int32)
    shift = np.repeat(starts[:-1] - np.cumsum([0, *lengths], dtype=np.int32)[:-1], lengths)
    return np.arange(sum(lengths), dtype=np.int32) + shift, starts
