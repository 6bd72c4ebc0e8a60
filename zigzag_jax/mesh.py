"""Attention of whole arrays that lie spread over a mesh: `shard_map` around `zigzag_attention`, with the specs."""

import functools
from collections.abc import Callable

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from .api import zigzag_attention
from .parallel import AxisName, axis_names
from .shard import Array, check_array


def make_zigzag_attention(
    mesh: Mesh,
    axis: AxisName = "cp",
    *,
    head_axis: AxisName | None = None,
    batch_axis: AxisName | None = None,
    **options,
) -> Callable[..., jax.Array | tuple[jax.Array, jax.Array]]:
    """`attention(q, k, v, cu_seqlens=None)` of arrays that are sharded over `mesh`, or become so; for jit and grad.

    Args:
        axis: over which the tokens are spread, in zigzag order: the rows of rank 0, then those of rank 1 (see `shard`).
        head_axis: over which the heads of q and of k and v are spread (tensor parallelism).
        batch_axis: over which the first dimension of `[batch, ...]` inputs is spread (data parallelism).
        options: those of `zigzag_attention`, for all calls.

    The returned function takes

    - q, k, v `[W * T, heads, head_dim]` and `cu_seqlens [N + 1]`, or None for one sequence,
    - `[batch, W * T, heads, head_dim]` and None, for sequences of equal length, or `cu_seqlens [batch, N + 1]`, where
      each of the batch is packed,

    and gives out in the shape of q; with `return_lse`, (out, lse `[heads, W * T]` or `[batch, heads, W * T]` float32).
    It raises as `zigzag_attention`, and `ValueError` for an axis that the mesh does not have.
    """
    for name in (name for axes in (axis, head_axis, batch_axis) for name in axis_names(axes)):
        if name not in mesh.axis_names:
            raise ValueError(f"mesh: expected an axis {name!r}, got the axes {mesh.axis_names}")
    attend = functools.partial(zigzag_attention, axis_name=axis, **options)

    def attention(q: Array, k: Array, v: Array, cu_seqlens: Array | None = None):
        for name, x in {"q": q, "k": k, "v": v}.items():
            check_array(name, x)
        if batch_axis is not None and q.ndim != 4:
            raise ValueError(f"q: expected [batch, tokens, heads, head_dim] to spread over batch_axis, got {q.shape}")
        lead = (batch_axis,) * (q.ndim - 3)
        rows, lse = P(*lead, axis, head_axis), P(*lead, head_axis, axis)
        arrays, specs, body = [q, k, v], [rows] * 3, attend
        if cu_seqlens is not None:
            check_array("cu_seqlens", cu_seqlens)
            arrays, specs = [*arrays, cu_seqlens], [*specs, P(*lead)]
            body = jax.vmap(attend) if lead else attend
        if AxisType.Explicit in mesh.axis_types:
            arrays = [jax.reshard(x, NamedSharding(mesh, spec)) for x, spec in zip(arrays, specs, strict=True)]
        out_specs = (rows, lse) if options.get("return_lse") else rows
        return jax.shard_map(body, mesh=mesh, in_specs=tuple(specs), out_specs=out_specs)(*arrays)

    return attention
