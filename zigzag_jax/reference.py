"""The same attention in plain jax.numpy, dense and differentiable: the backend of machines without a GPU.

Memory is proportional to heads * T * W * T scores; products and softmax are float32 whatever the inputs are.
"""

import functools

import jax
import jax.numpy as jnp

from zigzag_kernels.layout import impossible, row_position

from .shard import sequence_of_rows

_einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    cu_seqlens: jax.Array,
    rank: jax.Array,
    world_size: int,
    causal: bool,
    softmax_scale: float,
) -> tuple[jax.Array, jax.Array]:
    """(out `[T, heads, head_dim]`, lse `[heads, T]` float32) of one rank; arguments as the kernels'."""
    tokens, heads, head_dim = q.shape
    kv_heads, dtype = k.shape[1], q.dtype
    sequence, offset, length = sequence_of_rows(cu_seqlens, world_size, tokens)
    q_position = row_position(offset, length, rank, world_size)
    slots = jnp.arange(world_size)[:, None]
    k_position = jnp.broadcast_to(row_position(offset, length, slots, world_size), (world_size, tokens)).reshape(-1)
    k_sequence = jnp.tile(sequence, world_size)

    # A factor of the results, and of the inputs for the sake of the gradients.
    poison = jnp.where(impossible(cu_seqlens, rank, world_size, tokens), jnp.nan, 1.0)
    q, k, v = (x.astype(jnp.float32) * poison for x in (q, k, v))

    visible = (sequence[:, None] == k_sequence[None, :]) & (k_sequence >= 0)[None, :]
    if causal:
        visible &= q_position[:, None] >= k_position[None, :]
    alone = ~visible.any(1)  # padding: any finite score will do, the result is replaced

    grouped = q.reshape(tokens, kv_heads, heads // kv_heads, head_dim)
    scores = _einsum("tkgd,skd->kgts", grouped, k) * softmax_scale
    scores = jnp.where(visible | alone[:, None], scores, -jnp.inf)
    maximum = jax.lax.stop_gradient(scores.max(-1, keepdims=True, initial=-jnp.inf))
    weights = jnp.exp(scores - maximum)
    total = weights.sum(-1)
    lse = (maximum[..., 0] + jnp.log(total)).reshape(heads, tokens)
    out = _einsum("kgts,skd->tkgd", weights / total[..., None], v).reshape(q.shape)
    lse = jnp.where(alone, -jnp.inf, lse)
    out = jnp.where(alone[:, None, None], 0.0, out)
    return (out * poison).astype(dtype), lse * poison
