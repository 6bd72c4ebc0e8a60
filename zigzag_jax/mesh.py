"""Attention for callers outside `shard_map`: whole arrays, sharded over the axes of a mesh."""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from zigzag_kernels.callspec import NO_WINDOW
from zigzag_kernels.checks import check_layout, check_lengths, check_offsets, check_sinks
from zigzag_kernels.documents import DocumentPlan
from zigzag_kernels.halo import reach_of_mask
from zigzag_kernels.modes import Backend, Layout, Method

from .api import zigzag_attention
from .arguments import Array, as_cu_seqlens, as_flag, as_lengths, check_array
from .axes import AxisName, largest_along, largest_on
from .batch import Batch, batch_form, prepare_batch
from .halos import check_documents, halo_of_batch
from .host import ShardedBatch
from .launch import choose_backend
from .plans import Parts, offsets_of, one_part, parts_of_all
from .specs import check_divided, check_mesh, check_spread, reshard, size_on

_OPTIONS = tuple(
    name
    for name, parameter in inspect.signature(zigzag_attention).parameters.items()
    if parameter.kind is parameter.KEYWORD_ONLY and name != "axis_name"
)


class _Axes(NamedTuple):
    """The mesh axes over which dimensions are sharded, under the names of the arguments."""

    axis: AxisName
    head_axis: AxisName | None
    batch_axis: AxisName | None


def make_zigzag_attention(
    mesh: Mesh,
    axis: AxisName = "cp",
    *,
    head_axis: AxisName | None = None,
    batch_axis: AxisName | None = None,
    **options,
) -> Callable[..., jax.Array | tuple[jax.Array, ...]]:
    """Make a function `attention(q, k, v, cu_seqlens=None, *, sinks=None)` of arrays that are sharded over `mesh`.

    The function wraps `zigzag_attention` in `shard_map` with the right specs, and works under `jit` and `grad`.

    Args:
        mesh: the mesh of devices.
        axis: mesh axis, or axes, over which tokens are sharded in zigzag order: the rows of all ranks in the
            order of the ranks (see `shard`).
        head_axis: mesh axis over which heads, and with them `sinks`, are sharded (tensor parallelism).
        batch_axis: mesh axis over which the first dimension of `[batch, ...]` inputs is sharded (data parallelism).
        options: keyword arguments of `zigzag_attention`, the same for all calls. A call may pass `sinks` of its own.

    Returns:
        A function that takes one of

        - q, k, v `[W * T, heads, head_dim]` and `cu_seqlens [N + 1]`, or None for one sequence, or the `Batch` that
          `attention.prepare_batch(cu_seqlens, lengths=None, row_length=None, rows=1, unsharded=None, max_seqlen=None)`
          makes once for all layers, of offsets, of a plan of `plan_documents`, or of a `host.ShardedBatch`;
        - q, k, v `[batch, W * T, heads, head_dim]` and None for sequences of equal length;
        - q, k, v `[batch, W * T, heads, head_dim]` and `cu_seqlens [batch, N + 1]`, one packed row per entry,

        and returns out in the shape of q. If lse or max_logits are requested, it returns a tuple of out and the
        requested results: lse `[heads, W * T]` or `[batch, heads, W * T]` float32, and max_logits `[heads]` float32
        over all rows of the batch. It raises the errors of `zigzag_attention`. Gradients of `sinks [heads]` are summed
        over all devices.

        The function raises an error for an array that is sharded over a mesh axis which no argument names, if it knows
        the sharding: in eager calls, and with explicit axes of `mesh`. Under `jit` with other meshes, XLA gathers such
        arrays.

    Raises:
        ValueError: an axis that `mesh` does not have, or has twice.
        TypeError: an option that `zigzag_attention` does not take.
    """
    axes = _Axes(axis, head_axis, batch_axis)
    check_mesh(mesh, axes._asdict())
    for name in options:
        if name not in _OPTIONS:
            raise TypeError(f"{name}: expected one of the options {', '.join(_OPTIONS)}")
    layout = check_layout(options.get("layout", Layout.DOCUMENT))
    asked = {"out": True} | {
        name: as_flag(f"return_{name}", options.get(f"return_{name}", False)) for name in ("lse", "max_logits")
    }
    fixed_sinks = options.pop("sinks", None)
    attend = functools.partial(zigzag_attention, axis_name=axis, **options)

    def attention(q: Array, k: Array, v: Array, cu_seqlens: Array | Batch | None = None, *, sinks: Array | None = None):
        _check_arrays(mesh, axes, q=q, k=k, v=v)
        lead = (batch_axis,) * (q.ndim - 3)
        rows = P(*lead, axis, head_axis)
        arrays: dict[str, Any] = {"q": q, "k": k, "v": v}
        specs: dict[str, Any] = dict.fromkeys(arrays, rows)
        if cu_seqlens is not None:
            arrays["cu_seqlens"], specs["cu_seqlens"] = _spread_lengths(
                cu_seqlens, mesh, axes, q.shape[: q.ndim - 2], layout
            )
            if options.get("method") == Method.HALO:
                row_length = q.shape[-3] if layout == Layout.ROW else None
                _check_documents(cu_seqlens, size_on(mesh, axis), row_length, options)
        sinks = fixed_sinks if sinks is None else sinks
        if sinks is not None:
            check_array("sinks", sinks)
            check_sinks(sinks.shape, str(sinks.dtype), q.shape[-2])
            arrays["sinks"], specs["sinks"] = sinks, P(head_axis)
        if AxisType.Explicit in mesh.axis_types:
            arrays = reshard(arrays, specs, mesh)
        names = tuple(arrays)

        def body(*shards):
            return _attend_shard(attend, batch_axis, asked["max_logits"], **dict(zip(names, shards, strict=True)))

        of_results = {"out": rows, "lse": P(*lead, head_axis, axis), "max_logits": P(head_axis)}
        out_specs = tuple(spec for name, spec in of_results.items() if asked[name])
        out_specs = out_specs if len(out_specs) > 1 else rows
        return jax.shard_map(body, mesh=mesh, in_specs=tuple(specs.values()), out_specs=out_specs)(*arrays.values())

    def prepare(
        cu_seqlens: Array | DocumentPlan | ShardedBatch | Parts,
        lengths: Array | None = None,
        row_length: int | None = None,
        rows: int = 1,
        unsharded: Array | None = None,
        max_seqlen: int | None = None,
    ) -> Batch:
        """Prepare a batch for all layers: `attention` takes it in place of `cu_seqlens [N + 1]`."""
        chosen = {name: options[name] for name in ("backend", "layout") if name in options}
        size, parts, tokens = size_on(mesh, axis), None, 0
        if isinstance(cu_seqlens, ShardedBatch):
            unsharded = cu_seqlens.fingerprint if unsharded is None else unsharded
            cu_seqlens, row_length = offsets_of(cu_seqlens, size, layout)
        if isinstance(cu_seqlens, DocumentPlan | Parts):
            if lengths is not None:
                raise ValueError("lengths: expected None with a plan, got an array")
            of_all = parts_of_all(cu_seqlens, size, layout)
            cu_seqlens, lengths, parts = one_part(of_all, size)
            tokens = of_all.tokens
        form = batch_form(layout, row_length, rows, size)
        if parts is not None:
            form = form._replace(whole_tokens=parts.whole_tokens, tokens=tokens)
        window_size, attention_chunk = options.get("window_size", NO_WINDOW), options.get("attention_chunk", 0)
        reach, packed = (window_size, attention_chunk, max_seqlen), (form.row_length, form.rows)
        given = cu_seqlens, lengths
        method, halo, promised = halo_of_batch(options.get("method"), reach, given, packed, size)
        chosen |= {"method": method, "row_length": row_length, "rows": rows}
        chosen |= {"window_size": window_size, "attention_chunk": attention_chunk, "max_seqlen": max_seqlen}
        arrays: dict[str, Any] = {"cu_seqlens": as_cu_seqlens(cu_seqlens, _cut(size, layout))}
        if lengths is not None:
            arrays["lengths"] = as_lengths(lengths, cu_seqlens)
        if unsharded is not None:
            check_array("unsharded", unsharded)
            arrays["unsharded"] = jnp.asarray(unsharded)
        in_specs = dict.fromkeys(arrays, P())
        if parts is not None:
            arrays["whole_cu_seqlens"], in_specs["whole_cu_seqlens"] = jnp.asarray(parts.whole_cu_seqlens), P(axis)
        if AxisType.Explicit in mesh.axis_types:
            arrays = reshard(arrays, in_specs, mesh)

        names = tuple(arrays)

        def body(*shards):
            shard = dict(zip(names, shards, strict=True))
            if parts is not None:
                whole, split, real = (shard.pop(name) for name in ("whole_cu_seqlens", "cu_seqlens", "lengths"))
                shard["cu_seqlens"] = Parts(whole, split, real, parts.whole_tokens, parts.tokens)
            return prepare_batch(axis_name=axis, **shard, **chosen)

        tables = None if choose_backend(options.get("backend")) == Backend.REFERENCE else P(axis)
        shared = {name: in_specs.get(name) for name in ("lengths", "whole_cu_seqlens")} | form._asdict()
        shared |= {"halo": halo, "max_seqlen": promised}
        specs = Batch(P(), P(axis), size, method, tables, tables, axis, **shared)  # pyright: ignore
        mapped = jax.shard_map(body, mesh=mesh, in_specs=tuple(in_specs.values()), out_specs=specs)
        return dataclasses.replace(mapped(*arrays.values()), tokens=tokens)

    attention.prepare_batch = prepare
    return attention


def _attend_shard(attend: Callable[..., Any], batch_axis: AxisName | None, return_max_logits: bool, **shard):
    """Call `attend` on one device's `shard` of the arguments, given by name, and return its results."""
    q, k, v, cu_seqlens = (shard.get(name) for name in ("q", "k", "v", "cu_seqlens"))
    attend = functools.partial(attend, sinks=shard.get("sinks"))
    packed_apart = shard["q"].ndim == 4 and cu_seqlens is not None and not isinstance(cu_seqlens, Batch)
    results = (jax.vmap(attend) if packed_apart else attend)(*(x for x in (q, k, v, cu_seqlens) if x is not None))
    if not return_max_logits:
        return results
    *others, largest = results
    if packed_apart:
        largest = largest_along(0, largest)
    return *others, largest if batch_axis is None else largest_on(batch_axis, largest)


def _cut(world_size: int, layout: Layout) -> int:
    """Return the number of ranks over which each sequence is cut by itself: 1 in the row layout."""
    return 1 if layout == Layout.ROW else world_size


def _check_documents(cu_seqlens: Array | Batch, world_size: int, row_length: int | None, options: dict) -> None:
    """Raise `ValueError` if the host knows that a chunk is shorter than the halo.

    The check is here, because inside `shard_map` all offsets are traced.
    """
    rows = reach_of_mask(
        options.get("causal", True), options.get("window_size", NO_WINDOW), options.get("attention_chunk", 0), 0
    )
    if world_size == 1 or rows is None or isinstance(cu_seqlens, jax.Array | Batch):
        return
    for offsets in cu_seqlens if np.ndim(cu_seqlens) == 2 else [cu_seqlens]:
        check_documents(offsets, world_size, row_length, rows)


def _batch_specs(batch: Batch, axis: AxisName) -> Batch:
    """Return the specs of a batch of all ranks."""
    of_ranks = "segments", "sequences", "whole_cu_seqlens"
    tables = {name: None if getattr(batch, name) is None else P(axis) for name in of_ranks}
    lengths = None if batch.lengths is None else P()
    return dataclasses.replace(batch, cu_seqlens=P(), rank=P(axis), lengths=lengths, **tables)  # pyright: ignore


def _check_arrays(mesh: Mesh, axes: _Axes, **arrays) -> None:
    """Raise `ValueError` for arrays that the axes do not divide, or that are sharded over other axes."""
    for name, x in arrays.items():
        check_array(name, x)
    for name, x in arrays.items():
        if axes.batch_axis is not None and x.ndim != 4:
            raise ValueError(
                f"{name}: expected [batch, tokens, heads, head_dim] to spread over batch_axis, got {x.shape}"
            )
        if x.ndim not in (3, 4):
            raise ValueError(f"{name}: expected [tokens, heads, head_dim] or [batch, ...], got shape {x.shape}")
        spread = {"head_axis": (-2, "heads"), "axis": (-3, "tokens"), "batch_axis": (-4, "batch")}
        for argument, (dimension, what) in spread.items():
            given = getattr(axes, argument)
            check_divided(name, x, dimension, what, (argument, given, size_on(mesh, given)))
        check_spread(name, x, axes._asdict())


def _spread_lengths(
    cu_seqlens: Array | Batch, mesh: Mesh, axes: _Axes, shape: tuple[int, ...], layout: Layout
) -> tuple[Any, Any]:
    """Return (cu_seqlens as an array or a batch, its spec); `shape` is (batch, tokens) of q, or (tokens,).

    Raises `ValueError` for offsets on the host that do not describe these tokens.
    """
    *batch, tokens = shape
    if isinstance(cu_seqlens, Batch):
        rows_of_all = layout == Layout.ROW and axes.batch_axis is None
        if (batch and not rows_of_all) or cu_seqlens.compared_by != axes.axis:
            raise ValueError(
                "cu_seqlens: expected, for packed q [tokens, heads, head_dim], a batch of attention.prepare_batch, "
                f"got one prepared for axis_name {cu_seqlens.compared_by!r}"
            )
        return cu_seqlens, _batch_specs(cu_seqlens, axes.axis)
    step = _cut(size_on(mesh, axes.axis), layout)
    if not batch:
        return as_cu_seqlens(cu_seqlens, step, tokens), P()
    check_array("cu_seqlens", cu_seqlens)
    if cu_seqlens.ndim != 2 or cu_seqlens.shape[0] != batch[0]:
        raise ValueError(f"cu_seqlens: expected [batch, N + 1] with batch {batch[0]} as in q, got {cu_seqlens.shape}")
    if isinstance(cu_seqlens, np.ndarray):
        for offsets in cu_seqlens:
            check_lengths(check_offsets(offsets.tolist()), step, tokens)
    return cu_seqlens, P(axes.batch_axis)
