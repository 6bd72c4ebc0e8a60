"""The backend "reference": dense attention in plain jax.numpy, the default on machines without a GPU.

It needs memory for heads * T * W * T float32 scores. Products and softmax are float32, whatever the dtype of the
inputs. NaN and infinities reach only the rows and keys that see them, as in the kernels. The collectives of the
transport move K/V between ranks as for the kernels, and autodiff transposes the collectives.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from zigzag_kernels.callspec import CallSpec
from zigzag_kernels.layout import is_invalid_batch
from zigzag_kernels.problem import Problem

from .arguments import check_array
from .axes import gather_rows, largest_along, spread_like, vary, varying_axes
from .derivatives import without_derivative
from .parallel import AllGather, Halo, Inputs, Local, Packing, Ring, Transport, TwoPart
from .shard import place_of_rows
from .surroundings import under_own_promotion

_einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


class Rows(NamedTuple):
    """The document of each row, -1 for padding, and its position in the document."""

    document: jax.Array
    position: jax.Array


def attention(transport: Transport, inputs: Inputs, packing: Packing) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Return (out `[T, heads, head_dim]`, lse `[heads, T]` float32, largest logits `[heads]` or None) of one rank."""
    if isinstance(transport, TwoPart):
        return _attend_parts(transport, inputs, packing)
    problem, (q, k, v, sinks) = transport.problem, inputs
    dtype = q.dtype
    attend = functools.partial(_attend, problem, packing)
    everyone = jnp.arange(problem.world_size)
    if not isinstance(transport, Local):
        # Autodiff sums dK/dV over the ranks in the dtype in which the collectives carry K/V.
        k, v = (x.astype(problem.call.grad_reduce_dtype) for x in (k, v))
    parts = []
    if isinstance(transport, Halo):  # the reference gathers all K/V; its mask still limits what rows see
        transport = AllGather(problem, transport.axis_name)
    if isinstance(transport, AllGather):
        for head in transport.first_heads:
            queries = slice(head * problem.group, (head + problem.window) * problem.group)
            parts.append(attend(q[:, queries], *transport.gather(k, v, head), everyone))
        out, lse, maxima = zip(*parts, strict=True)
        out, lse = jnp.concatenate(out, axis=1), jnp.concatenate(lse)
        largest = jnp.concatenate([largest_along(1, x) for x in maxima])
    elif isinstance(transport, Ring):
        queries = q.astype(jnp.float32)  # one cast for all steps, so that autodiff sums dQ of all steps in float32
        for step in range(problem.world_size):
            if step:
                k, v = transport.pass_on(k, v)
            parts.append(attend(queries, k, v, (packing.rank - step) % problem.world_size))
        out, lse, maxima = zip(*parts, strict=True)
        out, lse = merge_partials(jnp.stack(out), jnp.stack(lse))
        largest = largest_along(1, jnp.concatenate(maxima, 1))
    else:
        out, lse, maxima = attend(q, k, v, everyone)
        largest = largest_along(1, maxima)
    if sinks is not None:
        out, lse = _add_sinks(out, lse, sinks)
    if not problem.call.return_max_logits:
        return out.astype(dtype), lse, None
    return out.astype(dtype), lse, jnp.where(jnp.isnan(lse).any(1), jnp.nan, largest)  # not infinite, as in the kernels


def _attend_parts(transport: TwoPart, inputs: Inputs, packing: Packing):
    """Return `attention` of a batch of two parts: rows of whole documents, then of split documents."""
    assert packing.whole is not None
    first, (q, k, v, sinks) = transport.whole.rows, inputs
    parts = [attention(Local(transport.whole), Inputs(q[:first], k[:first], v[:first], sinks), packing.whole)]
    if transport.split is not None:
        parts.append(attention(transport.split, Inputs(q[first:], k[first:], v[first:], sinks), packing))
    outs, lses, largest = zip(*parts, strict=True)
    most = None if largest[0] is None else largest_along(0, jnp.stack(largest))
    return jnp.concatenate(outs), jnp.concatenate(lses, 1), most


def _add_sinks(out: jax.Array, lse: jax.Array, sinks: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return (out, lse) after adding the logits `sinks [heads]`, without values, to each row that sees a key."""
    sinks = vary(sinks, varying_axes(lse))  # its transpose sums the gradient over the ranks
    of_sinks = jnp.where(jnp.isneginf(lse), -jnp.inf, sinks[:, None])
    return merge_partials(jnp.stack((out, jnp.zeros_like(out))), jnp.stack((lse, of_sinks)))


@under_own_promotion
def merge_partials(out: jax.Array, lse: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Merge attention to n disjoint parts of the keys into attention to all keys; differentiable.

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
    out = gather_rows(jnp.asarray(out))
    lse = spread_like(jnp.asarray(lse, jnp.float32), out, (None, 2, 1))
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
    problem: Problem, packing: Packing, q: jax.Array, k: jax.Array, v: jax.Array, slots: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return float32 (out, lse, largest score of each row) of `q` for the keys of the ranks `slots [n]`.

    k and v are `[n * T, kv_heads, head_dim]`, rank after rank.
    """
    rows, keys = (_places(packing, ranks, len(q)) for ranks in (packing.rank, slots[:, None]))
    visible = _visible(problem.call, rows, keys)

    # A factor, 1 or NaN, of the results, and of the inputs so that the gradients become NaN too.
    batch = packing.cu_seqlens, packing.rank, packing.world_size, len(q)
    fault = is_invalid_batch(*batch, packing.in_rows, packing.lengths, packing.halo)
    poison = jnp.where(fault, jnp.nan, 1.0).astype(jnp.float32)
    arrays = *(x.astype(jnp.float32) * poison for x in (q, k, v)), visible
    axes = varying_axes(*arrays)
    results: Any = _dense(problem.call, *(vary(x, axes) for x in arrays))
    out, lse, maxima = results
    return out * poison, lse * poison, jax.lax.stop_gradient(maxima) * poison


def _places(packing: Packing, ranks: jax.Array, tokens: int) -> Rows:
    """Return the `Rows` of the `ranks`, `[1]` or `[n, 1]`, one rank after the other."""
    cu_seqlens, world_size = packing.cu_seqlens, packing.world_size
    places = place_of_rows(cu_seqlens, ranks, world_size, tokens, packing.in_rows, packing.lengths)
    return Rows(*(x.reshape(-1) for x in places))


def _visible(call: CallSpec, rows: Rows, keys: Rows) -> jax.Array:
    """Return `[rows, keys]`: whether a row sees a key, which depends on their documents and positions."""
    row, key = rows.position[:, None], keys.position[None, :]
    visible = (rows.document[:, None] == keys.document[None, :]) & (keys.document >= 0)[None, :]
    left, right = call.window_size
    if call.causal:
        visible &= row >= key
    if left >= 0:
        visible &= key >= row - left
    if right >= 0:
        visible &= key <= row + right
    if call.attention_chunk:
        visible &= row // call.attention_chunk == key // call.attention_chunk
    return visible


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _dense(call, q, k, v, visible):
    """Return float32 (out, lse, largest scores); a row sees a key where `visible [rows, keys]` is true."""
    probabilities, statistics, _ = _probabilities(call, q, k, visible)
    lse, maxima = (x.reshape(q.shape[1], len(q)) for x in statistics)
    maxima = jnp.where(jnp.isnan(lse), lse, maxima)  # the maximum may have dropped NaN
    return _mix_keys(probabilities, visible, v, signed=False).reshape(q.shape), lse, maxima


@under_own_promotion
def _forward(call, q, k, v, visible):
    # The residuals are the arguments themselves, because results of `without_derivative` would be kept in addition.
    results: Any = _dense(call, *without_derivative((q, k, v, visible)))
    return results, (q, k, v, visible, results[0])


@under_own_promotion
def _backward(call, saved, cotangents):
    (q, k, v, visible, out), (dout, dlse, _) = without_derivative((saved, cotangents))
    probabilities, _, slopes = _probabilities(call, q, k, visible)
    of_row = (dlse - (dout * out).sum(-1).T).reshape(*probabilities.shape[:3], 1)
    dscores = probabilities * (_einsum("tkgd,skd->kgts", _grouped(dout, k), v) + of_row)
    if slopes is not None:
        dscores *= slopes
    dscores = jnp.where(visible[None, None], dscores, 0.0)
    dq = _mix_keys(dscores, visible, k, signed=True).reshape(q.shape) * call.softmax_scale
    dk = _mix_rows(dscores, visible, _grouped(q, k), signed=True) * call.softmax_scale
    return dq, dk, _mix_rows(probabilities, visible, _grouped(dout, k), signed=False), None


_dense.defvjp(_forward, _backward)


def _grouped(x: jax.Array, k: jax.Array) -> jax.Array:
    """Return `x [rows, heads, head_dim]` as `[rows, kv_heads, group, head_dim]`."""
    rows, heads, head_dim = x.shape
    return x.reshape(rows, k.shape[1], heads // k.shape[1], head_dim)


def _probabilities(
    call: CallSpec, q: jax.Array, k: jax.Array, visible: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array], jax.Array | None]:
    """Return (probabilities `[kv_heads, group, rows, keys]`, (lse, largest scores), slopes), 0 for unseen keys.

    lse and largest scores are `[kv_heads, group, rows]`. slopes are the derivatives of capped scores, or None.
    """
    scores, slopes = _einsum("tkgd,skd->kgts", _grouped(q, k), k) * call.softmax_scale, None
    if call.softcap:
        bounded = jnp.tanh(scores / call.softcap)
        scores, slopes = call.softcap * bounded, 1.0 - bounded * bounded
    alone = ~visible.any(1)[None, None]
    visible = visible[None, None]
    scores = jnp.where(visible, scores, -jnp.inf)
    largest = scores.max(-1, initial=-jnp.inf)
    maximum = jnp.where(alone, 0.0, largest)
    # The weights are divided by their sum, so that they add up to 1. With exp(score - lse) they might not, because lse
    # is rounded if scores are large.
    weights = jnp.exp(scores - maximum[..., None])
    total = jnp.where(alone, 1.0, weights.sum(-1))
    probabilities = jnp.where(visible, weights / total[..., None], 0.0)
    return probabilities, (jnp.where(alone, -jnp.inf, maximum + jnp.log(total)), largest), slopes


def _mix_keys(weights: jax.Array, visible: jax.Array, x: jax.Array, *, signed: bool) -> jax.Array:
    """Return the sums `[rows, kv_heads, group, head_dim]` of the keys' `x [keys, kv_heads, head_dim]`."""
    mixed = _einsum("kgts,skd->tkgd", weights, jnp.where(jnp.isfinite(x), x, 0.0))
    return mixed + _nonfinite_sums("ts,skd->tkd", visible, x, signed)[:, :, None]


def _mix_rows(weights: jax.Array, visible: jax.Array, x: jax.Array, *, signed: bool) -> jax.Array:
    """Return the sums `[keys, kv_heads, head_dim]` of the rows' `x [rows, kv_heads, group, head_dim]`."""
    mixed = _einsum("kgts,tkgd->skd", weights, jnp.where(jnp.isfinite(x), x, 0.0))
    return mixed + _nonfinite_sums("ts,tkgd->skd", visible, x, signed)


def _nonfinite_sums(equation: str, visible: jax.Array, x: jax.Array, signed: bool) -> jax.Array:
    """Return the NaN and infinities that elements of `x` add to visible sums; 0 if all are finite.

    A dense product would add them to all sums, because zero times NaN is NaN. If weights are `signed`, infinities
    become NaN too.
    """
    nan = jnp.isnan(x)
    up, down = nan | jnp.isposinf(x), nan | jnp.isneginf(x)
    if signed:
        up = down = up | down
    counts = (jnp.einsum(equation, visible.astype(x.dtype), kind.astype(x.dtype)) for kind in (up, down))
    up, down = (count > 0 for count in counts)
    return jnp.where(up, jnp.inf, 0.0) + jnp.where(down, -jnp.inf, 0.0)
