"""Conversion of `segment_ids`, the usual packing of JAX models, to `cu_seqlens`."""

import jax
import jax.numpy as jnp

from .arguments import Array, check_array


def cu_seqlens_from_segment_ids(segment_ids: Array, max_sequences: int, positions: Array | None = None) -> jax.Array:
    """Convert the `segment_ids` of a packed row to `cu_seqlens`.

    A sequence is a run of tokens with the same id, and id 0 is padding. Padding at the end belongs to no sequence;
    padding between two sequences counts as a sequence of its own.

    Args:
        segment_ids: `[total]` integers in any order; may be traced. For `[batch, total]` use `jax.vmap`.
        max_sequences: N, the most sequences that a row can have.
        positions: `[total]` integers. With them a sequence also begins where the position is 0, for packings that give
            neighbours the same id.

    Returns:
        `[max_sequences + 1]` int32, with the last offset repeated. A row with more sequences ends with -1, which
        `validate` refuses, and for which attention returns NaN.
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
