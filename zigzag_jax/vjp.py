"""The kernels as JAX functions of arrays: the device tables of a batch, and attention with its gradient rule."""

import functools

import jax
from jax.ad_checkpoint import checkpoint_name

from zigzag_kernels.modes import Method

from . import launch
from .parallel import Way


def segment_tables(
    cu_seqlens: jax.Array, rank: jax.Array, world_size: int, method: str, backend: str
) -> tuple[jax.Array, jax.Array]:
    """(segments, sequences) of `cu_seqlens [N + 1]` and `rank [1]`, int32: see `zigzag_kernels.segments.columns`."""
    from zigzag_kernels import plan

    segments, sequences = plan.segment_tables(
        launch.run,
        cu_seqlens,
        rank,
        sequences=cu_seqlens.shape[0] - 1,
        world_size=world_size,
        target=launch.target(backend),
        kv_layout=Method(method).kv_layout,
    )
    return segments, sequences


def attention(
    way: Way,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: jax.Array,
    sequences: jax.Array,
    return_lse: bool,
) -> tuple[jax.Array, jax.Array | None]:
    """(out `[T, heads, head_dim]`, lse `[heads, T]` float32 or, unless asked for, None: its gradient would be zeros).

    Remat policies know them as "zigzag_out" and "zigzag_lse".
    """
    # A custom rule sees one rank. Cast before it, autodiff sums over the ranks the gradient of what they share.
    axes = launch.varying_axes(q, k, v, segments, sequences)
    return _attention(way, bool(return_lse), *(launch.vary(x, axes) for x in (q, k, v)), segments, sequences)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention(way, return_lse, q, k, v, segments, sequences):
    return _forward(way, return_lse, q, k, v, segments, sequences)[0]


def _forward(way, return_lse, q, k, v, segments, sequences):
    # K/V of other ranks are no residuals: the collectives are inside of this rule, and the backward repeats them.
    out, lse = way.forward(q, k, v, segments)
    out, lse = checkpoint_name(out, "zigzag_out"), checkpoint_name(lse, "zigzag_lse")
    return (out, lse if return_lse else None), (q, k, v, out, lse, segments, sequences)


def _backward(way, _, residuals, cotangents):
    q, k, v, out, lse, segments, sequences = residuals
    dq, dk, dv = way.backward(q, k, v, out, lse, *cotangents, segments, sequences)
    return dq, dk, dv, None, None


_attention.defvjp(_forward, _backward)
