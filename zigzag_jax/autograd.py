"""The kernels as JAX functions of arrays: the device tables of a batch, and attention with its gradient rule."""

import functools

import jax
from jax.ad_checkpoint import checkpoint_name

from zigzag_kernels.modes import Method

from . import launch
from .axes import vary, varying_axes
from .derivatives import without_derivative
from .parallel import Residuals, Tables, Transport
from .surroundings import under_own_promotion


def segment_tables(cu_seqlens: jax.Array, rank: jax.Array, world_size: int, method: str, backend: str) -> Tables:
    """Return the device tables of `cu_seqlens [N + 1]` and `rank [1]`: see `zigzag_kernels.segments.columns`."""
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
    return Tables(segments, sequences)


def attention(
    transport: Transport, q: jax.Array, k: jax.Array, v: jax.Array, tables: Tables, return_lse: bool
) -> tuple[jax.Array, jax.Array | None]:
    """Return (out `[T, heads, head_dim]`, lse `[heads, T]` float32).

    Without `return_lse` lse is None, as its gradient would be an array of zeros. Remat policies know the results as
    "zigzag_out" and "zigzag_lse".
    """
    # The gradient rule sees one rank. A cast before it lets autodiff sum the gradient of an array that ranks share.
    axes = varying_axes(q, k, v, *tables)
    return _attention(transport, bool(return_lse), *(vary(x, axes) for x in (q, k, v)), tables)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention(transport, return_lse, q, k, v, tables):
    return _forward(transport, return_lse, q, k, v, tables)[0]


@under_own_promotion
def _forward(transport, return_lse, q, k, v, tables):
    # K/V of other ranks are no residuals: the collectives are inside of this rule, and the backward pass repeats them.
    # Residuals are the arguments themselves: a marker's results would be kept beside them.
    out, lse = transport.forward(*without_derivative((q, k, v, tables)))
    out, lse = checkpoint_name(out, "zigzag_out"), checkpoint_name(lse, "zigzag_lse")
    return (out, lse if return_lse else None), (Residuals(q, k, v, out, lse), tables)


@under_own_promotion
def _backward(transport, _, saved, cotangents):
    (residuals, tables), cotangents = without_derivative((saved, cotangents))
    return *transport.backward(residuals, *cotangents, tables), None


_attention.defvjp(_forward, _backward)
