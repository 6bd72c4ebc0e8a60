"""The same attention in plain jax.numpy, dense and differentiable: the backend of machines without a GPU.

Memory is proportional to heads * T * W * T scores; products and softmax are float32 whatever the inputs are. Between
ranks the same collectives bring the same keys as to the kernels, and autodiff finds those of the backward.
"""

import functools

import jax
import jax.numpy as jnp

from zigzag_kernels.layout import impossible, row_position
from zigzag_kernels.problem import Problem

from .parallel import AllGather, Local, Ring, Way
from .shard import check_array, sequence_of_rows

_einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


def attention(
    way: Way, q: jax.Array, k: jax.Array, v: jax.Array, cu_seqlens: jax.Array, rank: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(out `[T, heads, head_dim]`, lse `[heads, T]` float32) of one rank; arguments as the kernels'."""
    problem = way.problem
    attend = functools.partial(_attend, problem, cu_seqlens=cu_seqlens, rank=rank)
    everyone = jnp.arange(problem.world_size)
    if not isinstance(way, Local):
        k, v = (x.astype(way.reduce_dtype) for x in (k, v))  # of the sums that autodiff makes of the collectives
    if isinstance(way, AllGather):
        parts = []
        for head in way.first_heads:
            queries = slice(head * problem.group, (head + problem.window) * problem.group)
            parts.append(attend(q[:, queries], *way.gather(k, v, head), everyone))
        out, lse = zip(*parts, strict=True)
        return jnp.concatenate(out, axis=1), jnp.concatenate(lse)
    if isinstance(way, Ring):
        parts = []
        for step in range(problem.world_size):
            if step:
                k, v = way.pass_on(k, v)
            parts.append(attend(q.astype(jnp.float32), k, v, (rank - step) % problem.world_size))
        out, lse = zip(*parts, strict=True)
        out, lse = merge_partials(jnp.stack(out), jnp.stack(lse))
        return out.astype(q.dtype), lse
    return attend(q, k, v, everyone)


def merge_partials(out: jax.Array, lse: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Attention to all keys out of the attentions to n parts of them; differentiable.

    `out [n, T, heads, head_dim]` and `lse [n, heads, T]` (natural logarithm; -inf: no key in this part) to
    (out `[T, heads, head_dim]` in its dtype, lse `[heads, T]` float32). `ValueError` for other shapes.
    """
    for name, x in {"out": out, "lse": lse}.items():
        check_array(name, x)
    if out.ndim != 4 or lse.shape != (out.shape[0], out.shape[2], out.shape[1]):
        raise ValueError(
            f"lse: expected [n, heads, T] for out [n, T, heads, head_dim], got shapes {lse.shape} and {out.shape}"
        )
    out, lse = jnp.asarray(out), jnp.asarray(lse, jnp.float32)
    maximum = jax.lax.stop_gradient(lse.max(0, initial=-jnp.inf))
    maximum = jnp.where(jnp.isneginf(maximum), 0.0, maximum)
    weights = jnp.exp(lse - maximum)
    total = weights.sum(0)
    unseen = total == 0
    total = jnp.where(unseen, 1.0, total)  # the gradient of log(0) would be NaN
    merged = _einsum("nht,nthd->thd", weights / total, out.astype(jnp.float32))
    return merged.astype(out.dtype), jnp.where(unseen, -jnp.inf, maximum + jnp.log(total))


def _attend(
    problem: Problem,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    slots: jax.Array,
    *,
    cu_seqlens: jax.Array,
    rank: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """(out, lse) of `q` and the keys of the ranks `slots [n]`: `k, v [n * T, kv_heads, head_dim]`, rank-major."""
    tokens, heads, head_dim = q.shape
    world_size, kv_heads, dtype = problem.world_size, k.shape[1], q.dtype
    sequence, offset, length = sequence_of_rows(cu_seqlens, world_size, tokens)
    q_position = row_position(offset, length, rank, world_size)
    k_position = row_position(offset, length, slots[:, None], world_size)
    k_position = jnp.broadcast_to(k_position, (len(slots), tokens)).reshape(-1)
    k_sequence = jnp.tile(sequence, len(slots))

    # A factor of the results, and of the inputs for the sake of the gradients.
    poison = jnp.where(impossible(cu_seqlens, rank, world_size, tokens), jnp.nan, 1.0)
    q, k, v = (x.astype(jnp.float32) * poison for x in (q, k, v))

    visible = (sequence[:, None] == k_sequence[None, :]) & (k_sequence >= 0)[None, :]
    if problem.call.causal:
        visible &= q_position[:, None] >= k_position[None, :]
    alone = ~visible.any(1)  # padding: any finite score will do, the result is replaced

    grouped = q.reshape(tokens, kv_heads, heads // kv_heads, head_dim)
    scores = _einsum("tkgd,skd->kgts", grouped, k) * problem.call.softmax_scale
    scores = jnp.where(visible | alone[:, None], scores, -jnp.inf)
    maximum = jax.lax.stop_gradient(scores.max(-1, keepdims=True, initial=-jnp.inf))
    weights = jnp.exp(scores - maximum)
    total = weights.sum(-1)
    lse = (maximum[..., 0] + jnp.log(total)).reshape(heads, tokens)
    out = _einsum("kgts,skd->tkgd", weights / total[..., None], v).reshape(q.shape)
    lse = jnp.where(alone, -jnp.inf, lse)
    out = jnp.where(alone[:, None, None], 0.0, out)
    return (out * poison).astype(dtype), lse * poison
