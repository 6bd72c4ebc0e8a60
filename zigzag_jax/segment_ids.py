"""Conversion of `segment_ids` and `position_ids`, two common ways to describe packed batches, to `cu_seqlens`."""

import jax
import jax.numpy as jnp

from zigzag_kernels.checks import MAX_ROWS, check_int

from .arguments import Array, as_flag, check_array, check_held
from .axes import gather_rows
from .surroundings import under_own_promotion


@under_own_promotion
def cu_seqlens_from_segment_ids(
    segment_ids: Array, max_sequences: int, positions: Array | None = None, *, return_lengths: bool = False
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Convert the `segment_ids` of a packed row, or of a batch of rows, to `cu_seqlens`.

    A document is a run of tokens with the same id, and id 0 is padding. Padding at the end belongs to no document;
    padding between two documents counts as one more document.

    Args:
        segment_ids: `[total]` integers in any order; may be traced. Or `[batch, tokens]`, whose rows follow one another
            in the packed batch `[batch * tokens]`; a document ends with its row. For one `cu_seqlens` for each row, use
            `jax.vmap`.
        max_sequences: N, the most documents that all of `segment_ids` can have.
        positions: integers in the shape of `segment_ids`. With them a document also begins where the position is 0,
            for packings in which neighbours may have the same id.
        return_lengths: True also returns real lengths. The offsets then extend into the last row even if that row is
            only padding, as the row layout requires, so that N also counts the padding of earlier rows.

    Returns:
        `[max_sequences + 1]` int32 offsets, with the last offset repeated. If there are more documents, the last offset
        is -1, for which `validate` raises an error and attention returns NaN. With `return_lengths`, a tuple of these
        offsets and the real lengths `[max_sequences]` int32 for `prepare_batch`, which are 0 for padding.
    """
    given = {"segment_ids": segment_ids} if positions is None else {"segment_ids": segment_ids, "positions": positions}
    for name, x in given.items():
        _check_ids(name, x, "segment_ids", segment_ids)
    return_lengths = as_flag("return_lengths", return_lengths)
    ids, width = _one_after_another(segment_ids), max(segment_ids.shape[-1], 1)
    rows = jnp.arange(len(ids), dtype=jnp.int32)
    end = jnp.max(jnp.where(ids != 0, rows + 1, 0), initial=0)
    if return_lengths:
        end = jnp.maximum(end, max(len(ids) - width, 0))
    begins = _begins(ids, None if positions is None else _one_after_another(positions), width)
    cu_seqlens = _offsets(begins & (rows < end), end, max_sequences, None)
    if not return_lengths:
        return cu_seqlens
    real = jnp.append(ids != 0, False)[cu_seqlens[:-1]]
    return cu_seqlens, jnp.diff(cu_seqlens) * real * (cu_seqlens[-1] >= 0)


@under_own_promotion
def cu_seqlens_from_position_ids(position_ids: Array, max_sequences: int) -> jax.Array:
    """Convert the `position_ids` of a packed row, or of a batch of rows, to `cu_seqlens`.

    A document begins where the position is 0, and at the beginning of a row; every other position must be one more than
    the position before it. There is no padding: each of several tokens at position 0 in a row is a document.

    Args:
        position_ids: `[total]` integers; may be traced. Or `[batch, tokens]`, whose rows follow one another in the
            packed batch `[batch * tokens]`.
        max_sequences: N, the most documents that all of `position_ids` can have.

    Returns:
        `[max_sequences + 1]` int32 offsets, with the last offset repeated. If there are more documents, or if positions
        skip numbers, as in a rank's zigzag rows, the last offset is -1, for which `validate` raises an error and
        attention returns NaN.
    """
    _check_ids("position_ids", position_ids, "position_ids", position_ids)
    positions, width = _one_after_another(position_ids), max(position_ids.shape[-1], 1)
    rows = jnp.arange(len(positions), dtype=jnp.int32)
    begins = (rows % width == 0) | (positions == 0)
    fault = (~begins & (positions != jnp.roll(positions, 1) + 1)) | (positions < 0)
    return _offsets(begins, jnp.int32(len(positions)), max_sequences, fault.any())


def offsets_of_rows(
    segment_ids: jax.Array, positions: jax.Array | None, max_segments: int, in_order: bool
) -> tuple[jax.Array, jax.Array]:
    """Return (cu_seqlens `[rows * (max_segments + 1) + 1]`, real lengths) of packed rows `[rows, tokens]`, int32.

    There is room for `max_segments` documents in each row and for the padding behind them. The offsets end with -1 if a
    row has more documents, if padding between documents needs more room, or, with `in_order`, if the positions of a
    document do not count its tokens.
    """
    rows, width = segment_ids.shape
    room = rows * (max_segments + 1)
    cu_seqlens, lengths = cu_seqlens_from_segment_ids(segment_ids, room, positions, return_lengths=True)
    ids = segment_ids.reshape(-1)
    begins = _begins(ids, None if positions is None else positions.reshape(-1), max(width, 1))
    fault = ((begins & (ids != 0)).reshape(rows, width).sum(1) > max_segments).any()
    if in_order and positions is not None:
        given = positions.reshape(-1)
        fault |= (~begins & (ids != 0) & (given != jnp.roll(given, 1) + 1)).any()
    fault |= cu_seqlens[-1] < 0
    return cu_seqlens.at[-1].set(jnp.where(fault, -1, cu_seqlens[-1])), jnp.where(fault, 0, lengths)


def _begins(ids: jax.Array, positions: jax.Array | None, width: int) -> jax.Array:
    """Return the tokens `[total]` of packed rows of `width` tokens where a document, or padding, begins."""
    begins = (jnp.arange(len(ids), dtype=jnp.int32) % width == 0) | (ids != jnp.roll(ids, 1))
    return begins if positions is None else begins | ((ids != 0) & (positions == 0))


def _check_ids(name: str, x, model_name: str, model: Array) -> None:
    """Raise `ValueError` unless `x` is integers `[total]` or `[batch, tokens]`, in the shape of `model`."""
    check_array(name, x)
    if x.ndim not in (1, 2) or x.shape != model.shape or not jnp.issubdtype(x.dtype, jnp.integer):
        expected = "[total] or [batch, tokens]" if name == model_name else f"{model.shape} as {model_name}"
        raise ValueError(f"{name}: expected integers {expected}, got shape {x.shape} {x.dtype}")
    check_held(name, x)


def _one_after_another(ids: Array) -> jax.Array:
    """Return the integers of one or several packed rows as `[total]`, with all values on every device."""
    return gather_rows(jnp.asarray(ids), ids.ndim).reshape(-1)


def _offsets(begins: jax.Array, end: jax.Array, max_sequences: int, fault: jax.Array | None) -> jax.Array:
    """Return the offsets of documents that begin at `begins`; the last is `end`, or -1 with a fault."""
    max_sequences = check_int("max_sequences", max_sequences, 1, MAX_ROWS, "a positive int")
    (starts,) = jnp.nonzero(begins, size=max_sequences, fill_value=end)
    wrong = begins.sum() > max_sequences
    if fault is not None:
        wrong |= fault
    return jnp.append(starts, jnp.where(wrong, -1, end)).astype(jnp.int32)
