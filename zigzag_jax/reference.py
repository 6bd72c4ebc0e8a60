"""Dense attention in plain jax.numpy, differentiable by JAX: the default backend on machines without a GPU.

It needs memory for heads * T * W * T float32 scores. Products and softmax are float32 whatever the inputs are. NaN and
infinities reach only the rows and keys that see them, as in the kernels. Between ranks the collectives of the transport
deliver the same K/V as to the kernels, and autodiff transposes them.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from zigzag_kernels.layout import impossible, row_position
from zigzag_kernels.problem import Problem

from .arguments import check_array
from .axes import vary, varying_axes
from .derivatives import without_derivative
from .parallel import AllGather, Local, Ring, Transport
from .shard import sequence_of_rows
from .surroundings import under_own_promotion

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


@under_own_promotion
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
    weights = jnp.exp(lse - maximum[None])
    total = weights.sum(0)
    unseen = total == 0
    total = jnp.where(unseen, 1.0, total)  # the gradient of log(0) would be NaN
    seen = jnp.where(jnp.isneginf(lse).swapaxes(1, 2)[..., None], 0.0, out.astype(jnp.float32))
    merged = _einsum("nht,nthd->thd", weights / total[None], seen)
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
    tokens, world_size, dtype = len(q), problem.world_size, q.dtype
    sequence, offset, length = sequence_of_rows(cu_seqlens, world_size, tokens)
    q_position = row_position(offset, length, rank, world_size)
    k_position = row_position(offset, length, slots[:, None], world_size)
    k_position = jnp.broadcast_to(k_position, (len(slots), tokens)).reshape(-1)
    k_sequence = jnp.tile(sequence, len(slots))

    visible = (sequence[:, None] == k_sequence[None, :]) & (k_sequence >= 0)[None, :]
    if problem.call.causal:
        visible &= q_position[:, None] >= k_position[None, :]

    # A factor of the results, and of the inputs so that gradients are NaN, too.
    poison = jnp.where(impossible(cu_seqlens, rank, world_size, tokens), jnp.nan, 1.0).astype(jnp.float32)
    arrays = *(x.astype(jnp.float32) * poison for x in (q, k, v)), visible
    axes = varying_axes(*arrays)
    results: Any = _dense(problem.call.softmax_scale, *(vary(x, axes) for x in arrays))
    out, lse = results
    return (out * poison).astype(dtype), lse * poison


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _dense(softmax_scale, q, k, v, visible):
    """Return float32 (out, lse) of rows over the keys that `visible [rows, keys]` lets them see."""
    probabilities, lse = _probabilities(softmax_scale, q, k, visible)
    return _mix_keys(probabilities, visible, v, signed=False).reshape(q.shape), lse.reshape(q.shape[1], len(q))


@under_own_promotion
def _forward(softmax_scale, q, k, v, visible):
    # Residuals are the arguments themselves: a marker's results would be kept beside them.
    results: Any = _dense(softmax_scale, *without_derivative((q, k, v, visible)))
    out, _ = results
    return results, (q, k, v, visible, out)


@under_own_promotion
def _backward(softmax_scale, saved, cotangents):
    (q, k, v, visible, out), (dout, dlse) = without_derivative((saved, cotangents))
    probabilities, _ = _probabilities(softmax_scale, q, k, visible)
    of_row = (dlse - (dout * out).sum(-1).T).reshape(*probabilities.shape[:3], 1)
    dscores = probabilities * (_einsum("tkgd,skd->kgts", _grouped(dout, k), v) + of_row)
    dscores = jnp.where(visible[None, None], dscores, 0.0)
    dq = _mix_keys(dscores, visible, k, signed=True).reshape(q.shape) * softmax_scale
    dk = _mix_rows(dscores, visible, _grouped(q, k), signed=True) * softmax_scale
    return dq, dk, _mix_rows(probabilities, visible, _grouped(dout, k), signed=False), None


_dense.defvjp(_forward, _backward)


def _grouped(x: jax.Array, k: jax.Array) -> jax.Array:
    """Return `x [rows, heads, head_dim]` as `[rows, kv_heads, group, head_dim]`."""
    rows, heads, head_dim = x.shape
    return x.reshape(rows, k.shape[1], heads // k.shape[1], head_dim)


def _probabilities(softmax_scale: float, q: jax.Array, k: jax.Array, visible: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return (probabilities `[kv_heads, group, rows, keys]`, lse `[kv_heads, group, rows]`), 0 for unseen keys."""
    scores = _einsum("tkgd,skd->kgts", _grouped(q, k), k) * softmax_scale
    alone = ~visible.any(1)[None, None]
    visible = visible[None, None]
    scores = jnp.where(visible, scores, -jnp.inf)
    maximum = jnp.where(alone, 0.0, scores.max(-1, initial=-jnp.inf))
    # Divided by their sum, the weights add up to 1 whatever the size of the scores: lse would round large ones.
    weights = jnp.exp(scores - maximum[..., None])
    total = jnp.where(alone, 1.0, weights.sum(-1))
    probabilities = jnp.where(visible, weights / total[..., None], 0.0)
    return probabilities, jnp.where(alone, -jnp.inf, maximum + jnp.log(total))


def _mix_keys(weights: jax.Array, visible: jax.Array, x: jax.Array, *, signed: bool) -> jax.Array:
    """Return the sums `[rows, kv_heads, group, head_dim]` of the keys' `x [keys, kv_heads, head_dim]`."""
    mixed = _einsum("kgts,skd->tkgd", weights, jnp.where(jnp.isfinite(x), x, 0.0))
    return mixed + _foul("ts,skd->tkd", visible, x, signed)[:, :, None]


def _mix_rows(weights: jax.Array, visible: jax.Array, x: jax.Array, *, signed: bool) -> jax.Array:
    """Return the sums `[keys, kv_heads, head_dim]` of the rows' `x [rows, kv_heads, group, head_dim]`."""
    mixed = _einsum("kgts,tkgd->skd", weights, jnp.where(jnp.isfinite(x), x, 0.0))
    return mixed + _foul("ts,tkgd->skd", visible, x, signed)


def _foul(equation: str, visible: jax.Array, x: jax.Array, signed: bool) -> jax.Array:
    """Return what the NaN and infinite elements of `x` add to the visible sums: 0, NaN or an infinity.

    In a dense product they would reach all sums: zero times NaN is NaN. Weights are positive unless `signed`, where any
    such element makes NaN.
    """
    nan = jnp.isnan(x)
    up, down = nan | jnp.isposinf(x), nan | jnp.isneginf(x)
    if signed:
        up = down = up | down
    counts = (jnp.einsum(equation, visible.astype(x.dtype), kind.astype(x.dtype)) for kind in (up, down))
    up, down = (count > 0 for count in counts)
    return jnp.where(up, jnp.inf, 0.0) + jnp.where(down, -jnp.inf, 0.0)
