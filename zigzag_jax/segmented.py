"""`segmented_attention`: attention of packed rows that segment ids describe, for whole arrays on a mesh."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P

from zigzag_kernels.checks import check_layout, check_sinks
from zigzag_kernels.modes import Layout, Method

from .api import zigzag_attention
from .arguments import Array, as_flag, check_array
from .axes import AxisName, axis_names, varying_axes
from .segmented_batch import SegmentedBatch, check_rows, prepare_segments
from .specs import Surroundings, check_divided, surroundings_of
from .surroundings import under_own_promotion


@under_own_promotion
def segmented_attention(
    q: Array,
    k: Array,
    v: Array,
    segment_ids: Array | SegmentedBatch | None = None,
    positions: Array | None = None,
    *,
    mesh: Mesh | AbstractMesh | None = None,
    axis: AxisName = "context",
    batch_axis: AxisName | None = None,
    head_axis: AxisName | None = None,
    kv_head_axis: AxisName | None = None,
    layout: str = "row",
    max_segments: int | None = None,
    causal: bool = True,
    window_size: tuple[int | None, int | None] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    sinks: Array | None = None,
    softmax_scale: float | None = None,
    method: str | None = None,
    heads_k_stride: int | None = None,
    return_lse: bool = False,
    backend: str | None = None,
    grad_reduce_dtype: jnp.dtype | str | None = None,
    deterministic: bool = True,
) -> jax.Array | tuple[jax.Array, ...]:
    """Compute attention of packed rows `[B, S, heads, head_dim]` that are sharded over a mesh.

    The arrays are whole arrays, under `jit` or in eager calls, on a mesh with automatic or explicit axes: no
    `shard_map` is needed. Inside a `shard_map` over all axes of its mesh, the arrays are the shards of one device. The
    rows of a device are one packed batch, for which there is one launch.

    Args:
        q: `[B, S, heads, head_dim]`, in zigzag order (`layout`).
        k, v: `[B, S, kv_heads, head_dim]` in the dtype of q. As in MaxText, every device may have all of S: it then
            uses its own part, and the other parts come by `method`.
        segment_ids: `[B, S]` integers in the order of q. A document is a run of tokens with the same id, and id 0 is
            padding. Instead of ids, pass the result of `prepare_segments`, which all layers share. None: `positions`
            say where documents begin, or without positions each row is one document.
        positions: `[B, S]` integers: see `prepare_segments`.
        mesh: the mesh. None means the mesh of `jax.set_mesh` or of the `shard_map` around the call, or without both a
            single device.
        axis: mesh axis, or axes, over which tokens are sharded (context parallelism).
        batch_axis: mesh axis, or axes, over which rows are sharded (data parallelism, FSDP).
        head_axis: mesh axis, or axes, over which heads, and with them `sinks`, are sharded (tensor parallelism).
        kv_head_axis: the first axes of `head_axis`, over which KV heads are sharded; `()` for none. A device uses the
            KV heads that its query heads attend to. None means `head_axis` if that divides kv_heads, or inside
            `shard_map`, and otherwise `()`.
        layout: "row" cuts each row into chunks as a whole, like MaxText's load-balanced reordering. "document" cuts
            each document, so that every device has the same number of its tokens.
        max_segments: the most documents of a row; required for segment ids and positions. A prepared batch has it.
        causal, window_size, attention_chunk, softcap, sinks: as in `zigzag_attention`. `sinks` are `[heads]`.
        softmax_scale, heads_k_stride, backend, grad_reduce_dtype, deterministic: as in `zigzag_attention`.
        method: as in `zigzag_attention`; None: "allgather". "halo" moves only the rows that windows need.
        return_lse: True also returns lse.

    Returns:
        out in the shape of q, or a tuple of out and lse `[B, heads, S]` float32. Padding rows have out 0 and lse -inf.
        Results are NaN for segment ids and positions that `prepare_segments` cannot use.

    Raises:
        ValueError: an invalid argument, which the error names; for example an axis that the mesh does not have, or
            rows, tokens or heads that the devices along an axis do not divide.
        RuntimeError: as `zigzag_attention`.
    """
    axes: dict[str, AxisName | None] = {"axis": axis, "batch_axis": batch_axis, "head_axis": head_axis}
    around = surroundings_of(mesh, axes)
    arrays: dict[str, Any] = {"q": q, "k": k, "v": v}
    _check_arrays(around, axes, arrays)
    layout, method = check_layout(layout).value, Method.ALLGATHER.value if method is None else method
    kv_names, chosen = _choose_kv_heads(around, head_axis, kv_head_axis, q, k)
    _check_types(around, axes, chosen, arrays)
    specs: dict[str, Any] = {"q": P(batch_axis, axis, head_axis)}
    specs |= dict.fromkeys("kv", P(batch_axis, axis, kv_names or None))
    prepared = {"axis": axis, "batch_axis": batch_axis, "layout": layout, "method": method}
    batch = segment_ids
    if not isinstance(segment_ids, SegmentedBatch) and not (segment_ids is None and positions is None):
        reach = {"window_size": window_size, "attention_chunk": attention_chunk}
        batch = _prepare(q, segment_ids, positions, max_segments, mesh=mesh, backend=backend, **prepared, **reach)
    elif positions is not None:
        raise ValueError("positions: expected None with a batch of prepare_segments, which has them already")
    elif segment_ids is None and max_segments is not None:
        raise ValueError(f"segment_ids: expected ids or positions, as max_segments is {max_segments}, got None")
    if isinstance(batch, SegmentedBatch):
        _check_batch(batch, around, q, **prepared)
        arrays["batch"], specs["batch"] = batch, batch.specs
    if sinks is not None:
        check_array("sinks", sinks)
        check_sinks(sinks.shape, str(sinks.dtype), q.shape[2])
        arrays["sinks"], specs["sinks"] = sinks, P(head_axis)
    return_lse = as_flag("return_lse", return_lse)
    attend = functools.partial(
        zigzag_attention,
        axis_name=None if around.mesh is None else axis,
        causal=causal,
        window_size=window_size,
        attention_chunk=attention_chunk,
        softcap=softcap,
        softmax_scale=softmax_scale,
        method=method,
        heads_k_stride=heads_k_stride,
        return_lse=return_lse,
        backend=backend,
        grad_reduce_dtype=grad_reduce_dtype,
        deterministic=deterministic,
        layout=layout,
    )
    out_specs = (specs["q"], P(batch_axis, head_axis, axis)) if return_lse else specs["q"]
    shard = functools.partial(_attend_shard, attend, chosen, None if around.mesh is None else axis)
    return around.call(shard, arrays, specs, out_specs)


class _KVHeads(NamedTuple):
    """The choice of KV heads for a device's query heads, if devices along `axes` have the same KV heads.

    The device with number i along `axes` uses `count` of its KV heads, from number `i * heads // group` on.
    """

    axes: tuple[str, ...]
    heads: int
    group: int
    count: int


def _attend_shard(
    attend: Callable[..., Any],
    chosen: _KVHeads | None,
    axis: AxisName | None,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    batch: SegmentedBatch | None = None,
    sinks: jax.Array | None = None,
):
    """Call `attend` on one device's shards; k and v may also have rows and heads for other devices."""
    rows, tokens = q.shape[:2]
    if axis is not None and k.shape[1] > tokens:
        first = jax.lax.axis_index(axis) * tokens
        k, v = (jax.lax.dynamic_slice_in_dim(x, first, tokens, 1) for x in (k, v))
    if chosen is not None:
        first = jax.lax.axis_index(chosen.axes) * chosen.heads // chosen.group
        k, v = (jax.lax.dynamic_slice_in_dim(x, first, chosen.count, 2) for x in (k, v))
    if batch is None or batch.batch.layout == Layout.ROW:
        return attend(q, k, v, None if batch is None else batch.batch, sinks=sinks)
    results = attend(*(x.reshape(rows * tokens, *x.shape[2:]) for x in (q, k, v)), batch.batch, sinks=sinks)
    out, *lse = results if isinstance(results, tuple) else (results,)
    out = out.reshape(rows, tokens, *out.shape[1:])
    return (out, *(x.reshape(-1, rows, tokens).swapaxes(0, 1) for x in lse)) if lse else out


def _check_arrays(around: Surroundings, axes: dict[str, AxisName | None], arrays: dict[str, Array]) -> None:
    """Raise `ValueError` for q, k and v that do not fit each other or the mesh.

    Heads of k and v are checked elsewhere.
    """
    for name, x in arrays.items():
        check_array(name, x)
        if x.ndim != 4:
            raise ValueError(f"{name}: expected [B, S, heads, head_dim], got shape {x.shape}")
    q, k = arrays["q"], arrays["k"]
    expected = [q.shape[:2]]
    if around.inside:  # k and v may have the keys of all devices
        expected.append((q.shape[0], q.shape[1] * around.size(axes["axis"])))
    for name, x in arrays.items():
        if x.shape[:2] not in (expected if x is k else [k.shape[:2]] if x is not q else [q.shape[:2]]):
            raise ValueError(f"{name}: expected [B, S] = {list(expected[-1])} as in q, got shape {x.shape}")
        check_rows(name, x, around, axes)
    check_divided("q", q, 2, "heads", ("head_axis", axes["head_axis"], around.parts(axes["head_axis"])))


def _choose_kv_heads(
    around: Surroundings, head_axis: AxisName | None, kv_head_axis: AxisName | None, q: Array, k: Array
) -> tuple[tuple[str, ...], _KVHeads | None]:
    """Return (axes over which KV heads are sharded, the choice among a device's KV heads, or None for all)."""
    names, size, kv_heads = axis_names(head_axis), around.parts(head_axis), k.shape[2]
    if kv_head_axis is None:
        kv_names = names if kv_heads % size == 0 else ()
    else:
        kv_names = axis_names(kv_head_axis)
        if names[: len(kv_names)] != kv_names:
            raise ValueError(f"kv_head_axis: expected the first axes of head_axis {head_axis!r}, got {kv_head_axis!r}")
        over = "kv_head_axis", kv_head_axis, around.parts(kv_names)
        check_divided("k", k, 2, "heads", over)
    others = names[len(kv_names) :]
    if around.size(others) == 1:
        return kv_names, None
    heads, held = q.shape[2] // size, kv_heads // around.parts(kv_names)
    group, rest = divmod(heads * around.size(others), held)
    if rest or not group or (heads % group and group % heads):
        raise ValueError(
            f"k: expected KV heads of which each device along head_axis {head_axis!r} needs whole groups of query "
            f"heads, got {held} KV heads for {heads} query heads on each of the {around.size(others)} devices along "
            f"{others}"
        )
    return kv_names, _KVHeads(others, heads, group, max(heads // group, 1))


def _check_types(
    around: Surroundings, axes: dict[str, AxisName | None], chosen: _KVHeads | None, arrays: dict[str, Any]
) -> None:
    """Raise `ValueError` if, by types of `shard_map`, k or v is the same along an axis on which q differs."""
    if not around.inside:
        return
    known = {*axis_names(axes["axis"]), *(chosen.axes if chosen else ())}
    for name in "kv":
        same = set(varying_axes(arrays["q"])) - set(varying_axes(arrays[name])) - known
        if same:
            raise ValueError(
                f"{name}: expected the heads and rows of this device, got the same along the mesh axes {sorted(same)}, "
                "along which q differs; if devices have other query heads of the same KV heads, say so by head_axis "
                "and kv_head_axis=()"
            )


def _prepare(
    q: Array, segment_ids: Array | None, positions: Array | None, max_segments: int | None, **options
) -> SegmentedBatch:
    """Return `prepare_segments` of ids and positions that have the shape of q's rows."""
    for name, x in {"segment_ids": segment_ids, "positions": positions}.items():
        if x is None:
            continue
        check_array(name, x)
        if x.shape != q.shape[:2]:
            raise ValueError(f"{name}: expected integers [B, S] = {list(q.shape[:2])} as in q, got shape {x.shape}")
    if max_segments is None:
        raise ValueError("max_segments: expected the most documents of a row, which segment ids need, got None")
    return prepare_segments(segment_ids, positions, max_segments=max_segments, **options)


def _check_batch(batch: SegmentedBatch, around: Surroundings, q: Array, **wanted) -> None:
    """Raise `ValueError` for a batch that was prepared for other rows or options than this call."""
    of_batch = {"axis": batch.axis, "batch_axis": batch.batch_axis, "layout": batch.batch.layout}
    of_batch |= {"method": batch.batch.method}
    if around.mesh is None:
        wanted["axis"] = None
    for name, prepared in of_batch.items():
        if wanted[name] != prepared:
            raise ValueError(f"{name}: expected that of the prepared batch, {prepared!r}, got {wanted[name]!r}")
    length = q.shape[1] * around.size(batch.axis) // around.parts(batch.axis)
    if length != batch.row_length:
        raise ValueError(f"q: expected rows of {batch.row_length} tokens, as the prepared batch has, got {length}")
    if (rows := q.shape[0] // around.parts(batch.batch_axis)) != batch.rows:
        raise ValueError(f"q: expected the {batch.rows} rows of a device in the prepared batch, got {rows}")
