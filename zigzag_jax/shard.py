"""Rows of a packed batch in zigzag order: dealing them out to ranks, undoing that, and padding lengths to fit."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

from zigzag_kernels.checks import check_lengths
from zigzag_kernels.layout import gathered_row, padded_length, row_position

from .arguments import Array, as_rank, check_batch


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


def local_cu_seqlens(cu_seqlens: Array, world_size: int) -> jax.Array:
    """Return the offsets of the sequences in the local rows of a rank, `[N + 1]` int32, equal on all ranks.

    Args:
        cu_seqlens: `[N + 1]` int32, offsets in the whole batch.
        world_size: number of ranks.
    """
    check_batch(cu_seqlens, None, world_size)
    return jnp.asarray(cu_seqlens) // world_size


def position_ids(cu_seqlens: Array, rank: int | Array, world_size: int, tokens: int | None = None) -> jax.Array:
    """Return the position of every local row in its sequence, `[T]` int32, for example for RoPE; 0 for padding.

    Args:
        cu_seqlens: `[N + 1]` int32, offsets in the whole batch.
        rank: an int, or an array of one integer, which may be traced.
        world_size: number of ranks.
        tokens: T. Without it the last offset is read, which waits for the device.

    Raises `ValueError` if `tokens` is None and `cu_seqlens` is traced.
    """
    check_batch(cu_seqlens, rank, world_size)
    if tokens is None:
        tokens = _on_host(cu_seqlens, "give the number of local rows as `tokens`")[-1] // world_size
    _, offset, length = sequence_of_rows(cu_seqlens, world_size, tokens)
    return row_position(offset, length, as_rank(rank), world_size) * (length > 0)


def _global_rows(cu_seqlens: Array, rank: int | Array, world_size: int, tokens: int) -> jax.Array:
    """Return the row of the whole batch that each local row holds, `[T]`; padding is dealt out evenly."""
    cu_seqlens, rank = jnp.asarray(cu_seqlens), as_rank(rank)
    sequence, offset, length = sequence_of_rows(cu_seqlens, world_size, tokens)
    position = row_position(offset, length, rank, world_size)
    used = cu_seqlens[-1]
    local_used = used // world_size
    padding = used + rank * (tokens - local_used) + jnp.arange(tokens) - local_used
    return jnp.where(sequence >= 0, cu_seqlens[jnp.maximum(sequence, 0)] + position, padding)


def shard(x: Array, cu_seqlens: Array, rank: int | Array, world_size: int) -> jax.Array:
    """Return the rows of a whole batch that belong to `rank`, in zigzag order; differentiable.

    Args:
        x: `[total, ...]`, the whole batch. Rows behind the last sequence are padding and dealt out evenly.
        cu_seqlens: `[N + 1]` int32, offsets of its sequences; may be traced.
        rank: an int, or an array of one integer, which may be traced.
        world_size: number of ranks; `ValueError` unless it divides `total`.

    Returns:
        `[total / world_size, ...]`.
    """
    check_batch(cu_seqlens, rank, world_size)
    _check_rows(x, world_size)
    return jnp.asarray(x)[_global_rows(cu_seqlens, rank, world_size, x.shape[0] // world_size)]


def unshard(x: Array, cu_seqlens: Array, world_size: int) -> jax.Array:
    """Return the whole batch in its original order: undoes `shard`.

    Args:
        x: `[world_size * T, ...]`, the rows of rank 0, then those of rank 1, and so on.
        cu_seqlens: `[N + 1]` int32, as for `shard`.
        world_size: number of ranks.
    """
    check_batch(cu_seqlens, None, world_size)
    _check_rows(x, world_size)
    cu_seqlens = jnp.asarray(cu_seqlens)
    total, tokens = x.shape[0], x.shape[0] // world_size
    sequence, position, length = sequence_of_rows(cu_seqlens, 1, total)
    start = cu_seqlens[jnp.maximum(sequence, 0)]
    used = cu_seqlens[-1]
    local_used = used // world_size
    behind = jnp.arange(total) - used
    room = jnp.maximum(tokens - local_used, 1)
    padding = behind // room * tokens + local_used + behind % room
    rows = jnp.where(sequence >= 0, gathered_row(position, start, length, tokens, world_size), padding)
    return jnp.asarray(x)[rows]


def pad_to_zigzag(
    x: Array, cu_seqlens: Array, world_size: int, total: int | None = None
) -> tuple[jax.Array, jax.Array]:
    """Append zeros to each sequence so that its length is a multiple of 2W; with one rank lengths stay as they are.

    Args:
        x: `[rows, ...]`, the packed batch.
        cu_seqlens: `[N + 1]` int32, its offsets, which are read on the host: `ValueError` if traced.
        world_size: W, the number of ranks.
        total: number of rows of the result, a multiple of W; zeros behind the last sequence fill it up.

    Returns:
        (padded `x`, its `cu_seqlens`). Attention treats the zeros as tokens at the end of their sequence, so that with
        a causal mask no real token attends to them.
    """
    lengths = _host_lengths(x, cu_seqlens, world_size)
    padded = [padded_length(length, world_size) for length in lengths]
    if total is None:
        total = sum(padded)
    if total < sum(padded) or total % world_size:
        raise ValueError(
            f"total: expected a multiple of world_size = {world_size}, at least {sum(padded)}, got {total}"
        )
    x = jnp.asarray(x)
    rows, new_cu_seqlens = _padded_rows(lengths, padded)
    result = jnp.zeros((total, *x.shape[1:]), x.dtype).at[rows].set(x[: len(rows)], unique_indices=True)
    return result, jnp.asarray(new_cu_seqlens)


def unpad(x: Array, cu_seqlens: Array, world_size: int) -> jax.Array:
    """Return the rows of a padded batch that are no padding: undoes `pad_to_zigzag`.

    Args:
        x: `[rows, ...]`, the padded batch.
        cu_seqlens: `[N + 1]` int32, the offsets before padding, which are read on the host: `ValueError` if traced.
        world_size: number of ranks.
    """
    lengths = _host_lengths(None, cu_seqlens, world_size)
    padded = [padded_length(length, world_size) for length in lengths]
    if x.shape[0] < sum(padded):
        raise ValueError(f"x: expected at least the {sum(padded)} rows of the padded batch, got {x.shape[0]}")
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
    check_batch(cu_seqlens, None, world_size)
    check_lengths(_on_host(cu_seqlens), world_size, total)


def _check_rows(x: Array, world_size: int) -> None:
    if x.shape[0] % world_size:
        raise ValueError(f"x: expected a multiple of world_size = {world_size} rows, got {x.shape[0]}")


def _on_host(cu_seqlens: Array, advice: str = "call this outside of jit") -> list[int]:
    try:
        return np.asarray(cu_seqlens).tolist()
    except jax.errors.TracerArrayConversionError:
        raise ValueError(f"cu_seqlens: expected values that can be read here, got a traced array; {advice}") from None


def _host_lengths(x: Array | None, cu_seqlens: Array, world_size: int) -> list[int]:
    check_batch(cu_seqlens, None, world_size)
    starts = _on_host(cu_seqlens)
    check_lengths(starts, 1, None if x is None else x.shape[0])
    return [end - start for start, end in itertools.pairwise(starts)]


def _padded_rows(lengths: list[int], padded: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Return (row of each original row in the padded batch, padded `cu_seqlens`), int32."""
    starts = np.cumsum([0, *padded], dtype=np.int32)
    shift = np.repeat(starts[:-1] - np.cumsum([0, *lengths], dtype=np.int32)[:-1], lengths)
    return np.arange(sum(lengths), dtype=np.int32) + shift, starts
