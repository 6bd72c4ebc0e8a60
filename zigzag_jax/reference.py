"""Dense attention in plain jax.numpy, differentiable by JAX: the default backend on machines without a GPU.

It needs memory for heads * T * W * T float32 scores. Products and softmax are float32 whatever the inputs are. Between
ranks the collectives of the transport deliver the same K/V as to the kernels, and autodiff transposes them.
"""

import functools

import jax
import jax.numpy as jnp

from zigzag_kernels.layout import impossible, row_position
from zigzag_kernels.problem import Problem

from .arguments import check_array
from .parallel import AllGather, Local, Ring, Transport
from .shard import sequence_of_rows

_einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


def attention(
    transport: Transport, q: jax.Array, k: jax.Array, v: jax.Array, cu_seqlens: jax.Array, rank: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Return (out `[T, heads, head_dim]`, lse `[heads, T]` float32) of one rank."""
    problem = transport.problem
    attend = functools.partial(_attend, problem, cu_seqlens=cu_seqlens, rank=rank)
    everyone = jnp.arange(problem.world_size)
    if not isinstance(transport, Local):
        # Autodiff sums dK/dV over the ranks in the dtype in which the collectives carry K/V.
        k, v = (x.astype(problem.call.grad_reduce_dtype) for x in (k, v))
    if isinstance(transport, AllGather):
        parts = []
        for head in transport.first_heads:
            queries = slice(head * problem.group, (head + problem.window) * problem.group)
            parts.append(attend(q[:, queries], *transport.gather(k, v, head), everyone))
        out, lse = zip(*parts, strict=True)
        return jnp.concatenate(out, axis=1), jnp.concatenate(lse)
    if isinstance(transport, Ring):
        parts = []
        queries = q.astype(jnp.float32)  # once, so that autodiff sums dQ of all steps in float32
        for step in range(problem.world_size):
            if step:
                k, v = transport.pass_on(k, v)
            parts.append(attend(queries, k, v, (rank - step) % problem.world_size))
        out, lse = zip(*parts, strict=True)
        out, lse = merge_partials(jnp.stack(out), jnp.stack(lse))
        return out.astype(q.dtype), lse
    return attend(q, k, v, everyone)


def merge_partials(out: jax.Array, lse: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Combine attention to n disjoint parts of the keys into attention to all of them; differentiable.

    Args:
        out: `[n, T, heads, head_dim]`, the result for each part.
        lse: `[n, heads, T]`, natural logarithm; -inf where a row attends to no key of the part.

    Returns:
        (out `[T, heads, head_dim]` in the dtype of `out`, lse `[heads, T]` float32).

    Raises `ValueError` for other shapes.
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
    """Return (out, lse) of `q` for the keys of the ranks `slots [n]`.

    k and v are `[n * T, kv_heads, head_dim]`, rank-major.
    """
    tokens, heads, head_dim = q.shape
    world_size, kv_heads, dtype = problem.world_size, k.shape[1], q.dtype
    sequence, offset, length = sequence_of_rows(cu_seqlens, world_size, tokens)
    q_position = row_position(offset, length, rank, world_size)
    k_position = row_position(offset, length, slots[:, None], world_size)
    k_position = jnp.broadcast_to(k_position, (len(slots), tokens)).reshape(-1)
    k_sequence = jnp.tile(sequence, len(slots))

    # A factor of the results, and of the inputs so that gradients are NaN, too.
    poison = jnp.where(impossible(cu_seqlens, rank, world_size, tokens), jnp.nan, 1.0)
    q, k, v = (x.astype(jnp.float32) * poison for x in (q, k, v))

    visible = (sequence[:, None] == k_sequence[None, :]) & (k_sequence >= 0)[None, :]
    if problem.call.causal:
        visible &= q_position[:, None] >= k_position[None, :]
    alone = ~visible.any(1)  # padding: any finite score serves, as the result is replaced

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
