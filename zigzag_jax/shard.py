"""Dealing a packed batch out to the ranks and putting it together again; all of it off the attention's hot path."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

from zigzag_kernels.checks import check_cu_seqlens, check_lengths, check_rank, check_world_size
from zigzag_kernels.layout import gathered_row, padded_length, row_position

Array = jax.Array | np.ndarray


def check_array(name: str, x) -> None:
    """`ValueError` unless `x` is a JAX or NumPy array, traced ones included."""
    if not isinstance(x, Array):
        raise ValueError(f"{name}: expected an array of JAX or NumPy, got {type(x).__name__}")


def check_batch(cu_seqlens: Array, rank: int | Array | None, world_size: int) -> None:
    """`ValueError` for what can be said of the arguments without their values."""
    check_world_size(world_size)
    check_array("cu_seqlens", cu_seqlens)
    check_cu_seqlens(cu_seqlens.shape, str(cu_seqlens.dtype))
    if rank is not None:
        check_rank(rank, world_size, isinstance(rank, Array | np.generic))


def as_rank(rank: int | Array) -> jax.Array:
    """`[1]` int32: a rank that `check_batch` accepts, as kernels read it."""
    return jnp.asarray(rank, jnp.int32).reshape(1)


def sequence_of_rows(cu_seqlens: Array, world_size: int, tokens: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(sequence, offset behind its first local row, global length) of the rows `[0, tokens)` of any rank, int32.

    Rows behind the last sequence have sequence -1, offset and length 0.
    """
    cu_seqlens = jnp.asarray(cu_seqlens)
    rows = jnp.arange(tokens, dtype=jnp.int32)
    starts = cu_seqlens // world_size
    # Unrolled, because the types of a loop's carry would have to say along which mesh axes `starts` varies.
    sequence = jnp.searchsorted(starts, rows, side="right", method="scan_unrolled").astype(jnp.int32) - 1
    inside = rows < starts[-1]
    sequence = jnp.where(inside, sequence, -1)
    index = jnp.maximum(sequence, 0)
    offset = jnp.where(inside, rows - starts[index], 0)
    following = jnp.minimum(index + 1, len(starts) - 1)
    length = jnp.where(inside, cu_seqlens[following] - cu_seqlens[index], 0)
    return sequence, offset, length


def local_cu_seqlens(cu_seqlens: Array, world_size: int) -> jax.Array:
    """`[N + 1]` int32: where the sequences start in the local rows of any rank."""
    check_batch(cu_seqlens, None, world_size)
    return jnp.asarray(cu_seqlens) // world_size


def position_ids(cu_seqlens: Array, rank: int | Array, world_size: int, tokens: int | None = None) -> jax.Array:
    """`[T]` int32: position in its sequence of every local row of `rank` (for RoPE); 0 for padding.

    `tokens` is T; without it the last value of `cu_seqlens` is read, which waits for the device. `ValueError` if that
    is traced.
    """
    check_batch(cu_seqlens, rank, world_size)
    if tokens is None:
        tokens = _on_host(cu_seqlens, "give the number of local rows as `tokens`")[-1] // world_size
    _, offset, length = sequence_of_rows(cu_seqlens, world_size, tokens)
    return row_position(offset, length, as_rank(rank), world_size) * (length > 0)


def _global_rows(cu_seqlens: Array, rank: int | Array, world_size: int, tokens: int) -> jax.Array:
    """`[T]`: row of the unsharded batch that each local row holds; padding is dealt out evenly behind the sequences."""
    cu_seqlens, rank = jnp.asarray(cu_seqlens), as_rank(rank)
    sequence, offset, length = sequence_of_rows(cu_seqlens, world_size, tokens)
    position = row_position(offset, length, rank, world_size)
    used = cu_seqlens[-1]
    local_used = used // world_size
    padding = used + rank * (tokens - local_used) + jnp.arange(tokens) - local_used
    return jnp.where(sequence >= 0, cu_seqlens[jnp.maximum(sequence, 0)] + position, padding)


def shard(x: Array, cu_seqlens: Array, rank: int | Array, world_size: int) -> jax.Array:
    """The zigzag rows `[total / W, ...]` of `rank` out of the unsharded batch `x [total, ...]`; differentiable.

    Rows of `x` behind the last sequence are padding and dealt out evenly. `ValueError` if `total` is not a multiple
    of W.
    """
    check_batch(cu_seqlens, rank, world_size)
    _check_rows(x, world_size)
    return jnp.asarray(x)[_global_rows(cu_seqlens, rank, world_size, x.shape[0] // world_size)]


def unshard(x: Array, cu_seqlens: Array, world_size: int) -> jax.Array:
    """The unsharded batch `[total, ...]` out of the rank-major rows `x [W * T, ...]` of all ranks: undoes `shard`."""
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
    """(`x` with zeros behind each sequence so that all lengths are multiples of 2W, its `cu_seqlens`).

    `total` pads the end too, to a fixed number of rows (a multiple of W). Lengths are read on the host: `ValueError` if
    `cu_seqlens` is traced. With one rank lengths stay as they are. Padded positions are keys like any other behind
    their sequence: under a causal mask no real token sees them.
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
    """The rows of the original batch out of a padded one; `cu_seqlens` is the original: undoes `pad_to_zigzag`."""
    lengths = _host_lengths(None, cu_seqlens, world_size)
    padded = [padded_length(length, world_size) for length in lengths]
    if x.shape[0] < sum(padded):
        raise ValueError(f"x: expected at least the {sum(padded)} rows of the padded batch, got {x.shape[0]}")
    return jnp.asarray(x)[_padded_rows(lengths, padded)[0]]


def validate(cu_seqlens: Array, world_size: int, total: int | None = None) -> None:
    """`ValueError` unless `cu_seqlens` can be dealt out to `world_size` ranks; reads it on the host, so call it once.

    `total` is the number of rows of the unsharded batch. The attention itself cannot look at traced values: it answers
    impossible lengths with NaN.
    """
    check_batch(cu_seqlens, None, world_size)
    check_lengths(_on_host(cu_seqlens), world_size, total)


def cu_seqlens_from_segment_ids(segment_ids: Array, max_sequences: int, positions: Array | None = None) -> jax.Array:
    """`cu_seqlens [max_sequences + 1]` int32 of a batch packed by `segment_ids [total]`, in order; may be traced.

    The tokens of a sequence are neighbours with the same id, and 0 is padding. A sequence begins where the id changes,
    whatever the ids are; with `positions [total]` also where the position is 0, for packings that give neighbours the
    same id. Padding behind the last sequence belongs to none, padding between two is a sequence of its own, and counts.
    The last value is repeated up to `max_sequences`; where there are more, it is -1, which `validate` refuses and
    attention answers with NaN. For `[batch, total]` use `jax.vmap`.
    """
    given = {"segment_ids": segment_ids} if positions is None else {"segment_ids": segment_ids, "positions": positions}
    for name, x in given.items():
        check_array(name, x)
        if x.ndim != 1 or x.shape != segment_ids.shape or not jnp.issubdtype(x.dtype, jnp.integer):
            raise ValueError(f"{name}: expected integers [total], got shape {x.shape} {x.dtype}")
    if isinstance(max_sequences, bool) or not isinstance(max_sequences, int) or max_sequences < 1:
        raise ValueError(f"max_sequences: expected a positive int, got {max_sequences!r}")
    ids = jnp.asarray(segment_ids)
    rows = jnp.arange(len(ids), dtype=jnp.int32)
    end = jnp.max(jnp.where(ids != 0, rows + 1, 0), initial=0)
    begins = (rows == 0) | (ids != jnp.roll(ids, 1))
    if positions is not None:
        begins |= (ids != 0) & (jnp.asarray(positions) == 0)
    begins &= rows < end
    (starts,) = jnp.nonzero(begins, size=max_sequences, fill_value=end)
    last = jnp.where(begins.sum() > max_sequences, -1, end)
    return jnp.append(starts, last).astype(jnp.int32)


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
    """(row in the padded batch of every original row, padded `cu_seqlens`), int32."""
    starts = np.cumsum([0, *padded], dtype=np.int32)
    shift = np.repeat(starts[:-1] - np.cumsum([0, *lengths], dtype=np.int32)[:-1], lengths)
    return np.arange(sum(lengths), dtype=np.int32) + shift, starts
