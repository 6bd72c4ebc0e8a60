"""Conversion of `segment_ids`, the usual packing of JAX models, to `cu_seqlens`."""

import jax
import jax.numpy as jnp

from zigzag_kernels.checks import MAX_ROWS, check_int

from .arguments import Array, check_array
from .surroundings import under_own_promotion


@under_own_promotion
def cu_seqlens_from_segment_ids(segment_ids: Array, max_sequences: int, positions: Array | None = None) -> jax.Array:
    """Convert the `segment_ids` of a packed row, or of a batch of rows, to `cu_seqlens`.

    A sequence is a run of tokens with the same id, and id 0 is padding. Padding at the end belongs to no sequence;
    padding between two sequences counts as a sequence of its own.

    Args:
        segment_ids: `[total]` integers in any order; may be traced. Or `[batch, tokens]`, whose rows follow one another
            in the packed batch `[batch * tokens]`: each begins a sequence. For one `cu_seqlens` a row use `jax.vmap`.
        max_sequences: N, the most sequences that all of `segment_ids` can have.
        positions: integers in the shape of `segment_ids`. With them a sequence also begins where the position is 0,
            for packings that give neighbours the same id.

    Returns:
        `[max_sequences + 1]` int32, with the last offset repeated. A row with more sequences ends with -1, which
        `validate` refuses, and for which attention returns NaN.
    """
    given = {"segment_ids": segment_ids} if positions is None else {"segment_ids": segment_ids, "positions": positions}
    for name, x in given.items():
        check_array(name, x)
        if x.ndim not in (1, 2) or x.shape != segment_ids.shape or not jnp.issubdtype(x.dtype, jnp.integer):
            expected = "[total] or [batch, tokens]" if name == "segment_ids" else f"{segment_ids.shape} as segment_ids"
            raise ValueError(f"{name}: expected integers {expected}, got shape {x.shape} {x.dtype}")
    max_sequences = check_int("max_sequences", max_sequences, 1, MAX_ROWS, "a positive int")
    ids = jnp.asarray(segment_ids).reshape(-1)
    rows = jnp.arange(len(ids), dtype=jnp.int32)
    end = jnp.max(jnp.where(ids != 0, rows + 1, 0), initial=0)
    begins = (rows % max(segment_ids.shape[-1], 1) == 0) | (ids != jnp.roll(ids, 1))
    if positions is not None:
        begins |= (ids != 0) & (jnp.asarray(positions).reshape(-1) == 0)
    begins &= rows < end
    (starts,) = jnp.nonzero(begins, size=max_sequences, fill_value=end)
    last = jnp.where(begins.sum() > max_sequences, -1, end)
    return jnp.append(starts, last).astype(jnp.int32)
