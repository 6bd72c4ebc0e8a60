"""Attention for callers outside `shard_map`: whole arrays, sharded over the axes of a mesh."""

import functools
from collections.abc import Callable

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from .api import zigzag_attention
from .arguments import Array, check_array
from .axes import AxisName, axis_names


def make_zigzag_attention(
    mesh: Mesh,
    axis: AxisName = "cp",
    *,
    head_axis: AxisName | None = None,
    batch_axis: AxisName | None = None,
    **options,
) -> Callable[..., jax.Array | tuple[jax.Array, jax.Array]]:
    """Make a function `attention(q, k, v, cu_seqlens=None)` of arrays that are sharded over `mesh`.

    The function wraps `zigzag_attention` in `shard_map` with the right specs, and works under `jit` and `grad`.

    Args:
        mesh: the mesh of devices.
        axis: mesh axis, or axes, over which tokens are sharded in zigzag order: the rows of rank 0, then those of
            rank 1, and so on (see `shard`).
        head_axis: mesh axis over which heads are sharded (tensor parallelism).
        batch_axis: mesh axis over which the first dimension of `[batch, ...]` inputs is sharded (data parallelism).
        options: keyword arguments of `zigzag_attention`, the same for all calls.

    Returns:
        A function that takes one of

        - q, k, v `[W * T, heads, head_dim]` and `cu_seqlens [N + 1]`, or None for one sequence;
        - q, k, v `[batch, W * T, heads, head_dim]` and None for sequences of equal length;
        - q, k, v `[batch, W * T, heads, head_dim]` and `cu_seqlens [batch, N + 1]`, one packed row per entry,

        and returns out in the shape of q; with `return_lse`, (out, lse `[heads, W * T]` or `[batch, heads, W * T]`
        float32). It raises as `zigzag_attention`.

    Raises:
        ValueError: an axis that `mesh` does not have.
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
