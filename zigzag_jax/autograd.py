"""The kernels as JAX functions of arrays: the device tables of a batch, and attention with its gradient rule."""

import functools
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

from zigzag_kernels.modes import Method

from . import launch
from .axes import largest_along, vary, varying_axes
from .derivatives import without_derivative
from .parallel import Inputs, Packing, Residuals, Tables, Transport, halo_tables
from .surroundings import under_own_promotion


def segment_tables(packing: Packing, method: str, backend: str) -> Tables:
    """Return the device tables of a batch: see `zigzag_kernels.segments.columns` and `Tables`.

    In a batch of two parts without rows for split documents, there are only the tables of the whole documents.
    """
    from zigzag_kernels import plan

    target, whole, of_whole = launch.target(backend), packing.whole, None
    if whole is not None:
        sizes: Any = {"sequences": whole.cu_seqlens.shape[0] - 1, "world_size": 1, "target": target}
        of_whole = plan.segment_tables(launch.run, whole.cu_seqlens, whole.rank, end_row=packing.first_row, **sizes)
        if packing.first_row == packing.end_row:
            return Tables(*of_whole)
    split = plan.segment_tables(
        launch.run,
        packing.cu_seqlens,
        packing.rank,
        packing.lengths,
        sequences=packing.cu_seqlens.shape[0] - 1,
        world_size=packing.world_size,
        target=target,
        kv_layout=Method(method).kv_layout,
        layout=packing.layout,
        row_length=packing.row_length,
        rows=packing.rows,
        halo=packing.halo[0],
        longest=packing.halo[1],
        first_row=packing.first_row,
        end_row=packing.end_row,
    )
    if method == Method.HALO and packing.world_size > 1:
        split = halo_tables(*split)
    return Tables(*(split if of_whole is None else zip(of_whole, split, strict=True)))


def attention(
    transport: Transport, inputs: Inputs, tables: Tables, return_lse: bool
) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
    """Return (out `[T, heads, head_dim]`, lse `[heads, T]` float32, largest logits `[heads]` float32).

    Without `return_lse` lse is None, because otherwise autodiff would make an array of zeros as its gradient. Largest
    logits are None unless the call requests them, and have no gradient. For remat policies, the names of the results
    are "zigzag_out", "zigzag_lse" and "zigzag_max_logits".
    """
    # The gradient rule below is for one rank. The casts before it make autodiff sum, over the ranks, the gradient of an
    # array that ranks share.
    axes = varying_axes(*jax.tree.leaves((inputs, tables)))
    inputs = Inputs(*(None if x is None else vary(x, axes) for x in inputs))  # pyright: ignore
    return _attention(transport, bool(return_lse), inputs, tables)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention(transport, return_lse, inputs, tables):
    return _forward(transport, return_lse, inputs, tables)[0]


@under_own_promotion
def _forward(transport, return_lse, inputs, tables):
    # K/V of other ranks are not residuals: the collectives are inside this rule, and the backward pass repeats them.
    # The residuals are the arguments themselves, because results of `without_derivative` would be kept in addition.
    out, lse = transport.forward(*without_derivative((inputs, tables)))
    largest = None
    if transport.problem.call.return_max_logits:
        lse, of_rows = lse
        largest = checkpoint_name(largest_along(1, of_rows), "zigzag_max_logits")
    out, lse = checkpoint_name(out, "zigzag_out"), checkpoint_name(lse, "zigzag_lse")
    return (out, lse if return_lse else None, largest), (Residuals(inputs, out, lse), tables)


@under_own_promotion
def _backward(transport, _, saved, cotangents):
    (residuals, tables), (dout, dlse, _) = without_derivative((saved, cotangents))
    return transport.backward(residuals, dout, dlse, tables), None


_attention.defvjp(_forward, _backward)
