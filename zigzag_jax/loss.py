"""The mean loss of all targets of a batch, whose rows are spread over devices."""

import jax
import jax.numpy as jnp
import numpy as np

from zigzag_kernels.checks import check_int
from zigzag_kernels.layout import MAX_OFFSET

from .arguments import Array, check_array
from .axes import AxisName, axis_names, varying_axes
from .surroundings import under_own_promotion


@under_own_promotion
def token_mean_loss(
    logits: Array,
    labels: Array,
    num_targets: Array | int,
    *,
    axis_name: AxisName | None = None,
    ignore_index: int = -100,
) -> jax.Array:
    """Return the mean cross entropy, float32, of all targets of all ranks; differentiable.

    Args:
        logits: `[rows, vocabulary]`, the rows of all ranks, or inside `shard_map` of this rank.
        labels: `[rows]` integers, already shifted to the next token, as in `host.ShardedBatch`; `ignore_index` for no
            label. Other numbers outside of the vocabulary give NaN.
        num_targets: the number of targets of the whole batch, as in `host.ShardedBatch`. If there is another number of
            labels, the loss is NaN.
        axis_name: inside `shard_map` with `check_vma=True`, the mesh axes over which rows are sharded.
        ignore_index: label that does not count.

    The loss of a batch without targets is 0.
    """
    check_array("logits", logits)
    check_array("labels", labels)
    logits, labels = jnp.asarray(logits), jnp.asarray(labels)
    if logits.ndim < 2 or labels.shape != logits.shape[:-1] or not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(
            f"labels: expected integers {logits.shape[:-1]} as in logits, got shape {labels.shape} {labels.dtype}"
        )
    if isinstance(num_targets, jax.Array | np.ndarray | np.generic):
        if np.size(num_targets) != 1 or not jnp.issubdtype(num_targets.dtype, jnp.integer):
            raise ValueError(f"num_targets: expected one integer, got shape {num_targets.shape} {num_targets.dtype}")
    else:
        num_targets = check_int("num_targets", num_targets, 0, MAX_OFFSET)
    for axis in axis_names(axis_name):
        if axis not in varying_axes(labels):
            raise ValueError(
                f"labels: expected those of each rank, got labels that are the same along the mesh axis {axis!r} by "
                "their type: spread them with P(axis) in in_specs, and leave check_vma=True"
            )
    counted = labels != ignore_index
    known = (labels >= 0) & (labels < logits.shape[-1])  # JAX would count negative numbers from the end
    scores = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    chosen = jnp.take_along_axis(scores, jnp.where(counted & known, labels, 0)[..., None], axis=-1)[..., 0]
    chosen = jnp.where(known, chosen, jnp.nan)
    total, count = -jnp.where(counted, chosen, 0).sum(), counted.sum(dtype=jnp.int32)
    if axis_names(axis_name):
        total, count = jax.lax.psum((total, count), axis_name)
    wanted = jnp.asarray(num_targets).reshape(())
    return jnp.where(count == wanted, total / jnp.maximum(count, 1), jnp.nan)
