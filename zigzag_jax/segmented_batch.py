"""`SegmentedBatch`: packed rows that segment ids describe, prepared once for all layers of a training step."""

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P

from zigzag_kernels.batch_checks import check_form
from zigzag_kernels.callspec import NO_WINDOW
from zigzag_kernels.checks import MAX_ROWS, check_int, check_layout, check_method
from zigzag_kernels.halo import halo_of_batch
from zigzag_kernels.layout import gathered_packed_row
from zigzag_kernels.modes import Backend, Layout, Method

from .arguments import Array, check_array, check_held
from .axes import AxisName, axis_names
from .batch import Batch, Form
from .halos import reach_options
from .launch import choose_backend
from .prepare import prepare_batch
from .segment_ids import offsets_of_rows
from .specs import Surroundings, check_divided, check_spread, surroundings_of
from .surroundings import under_own_promotion


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("batch",),
    meta_fields=("row_length", "axis", "batch_axis", "rows"),
)
@dataclass(frozen=True)
class SegmentedBatch:
    """The lengths and device tables of packed rows, for all layers of a training step.

    `prepare_segments` makes a segmented batch, and `segmented_attention` takes it in place of segment ids. It is a
    pytree, and `specs` are its specs for a `shard_map` around a layer.

    Attributes:
        batch: the packed batch of a device's rows; whole arrays hold the batches of all devices.
        row_length: tokens of a row on all devices of `axis`.
        axis: mesh axis, or axes, over which tokens are sharded; None: a single device has all tokens.
        batch_axis: mesh axis, or axes, over which rows are sharded.
        rows: number of rows of a device.
    """

    batch: Batch
    row_length: int
    axis: AxisName | None
    batch_axis: AxisName | None
    rows: int

    @property
    def specs(self) -> "SegmentedBatch":
        """The specs of the arrays on the mesh, for `in_specs` of `shard_map`."""
        rows, ranks = P(self.batch_axis), P((*axis_names(self.batch_axis), *axis_names(self.axis)))
        specs = {"cu_seqlens": rows, "lengths": rows, "rank": ranks, "segments": ranks, "sequences": ranks}
        specs = {name: spec for name, spec in specs.items() if getattr(self.batch, name) is not None}
        return dataclasses.replace(self, batch=dataclasses.replace(self.batch, **specs))  # pyright: ignore


@under_own_promotion
def prepare_segments(
    segment_ids: Array | None,
    positions: Array | None = None,
    *,
    max_segments: int,
    mesh: Mesh | AbstractMesh | None = None,
    axis: AxisName = "context",
    batch_axis: AxisName | None = None,
    layout: str = "row",
    method: str | None = None,
    backend: str | None = None,
    window_size: tuple[int | None, int | None] = NO_WINDOW,
    attention_chunk: int = 0,
    max_seqlen: int | None = None,
) -> SegmentedBatch:
    """Build the device tables of packed rows once, for all layers and for both passes.

    Args:
        segment_ids: `[B, S]` integers, in the order of q; may be traced. A document is a run of tokens with the same
            id, and id 0 is padding. None: `positions` say where documents begin, and there is no padding.
        positions: `[B, S]` integers. With them a document also begins where the position is 0. In the row layout they
            must count the tokens of each document.
        max_segments: the most documents of a row. Padding at the end of a row does not count, but each run of padding
            between documents counts as one document.
        mesh, axis, batch_axis, layout, method, backend: as in `segmented_attention`, which must get the same values.
        window_size, attention_chunk, max_seqlen: for method "halo", the largest window of all layers: see
            `prepare_batch`.

    Returns:
        A `SegmentedBatch`. On the devices that share a row, attention returns NaN in three cases: the row has more than
        `max_segments` documents; positions skip or repeat a number inside a document, as in arrays of another order;
        documents do not fit the document layout.

    Raises:
        ValueError: arrays, axes or options that do not fit each other.
    """
    given = {"segment_ids": segment_ids, "positions": positions}
    given = {name: x for name, x in given.items() if x is not None}
    if not given:
        raise ValueError("segment_ids: expected integers [B, S], or positions, got None")
    first = next(iter(given.values()))
    for name, x in given.items():
        check_array(name, x)
        if x.ndim != 2 or x.shape != first.shape or not _is_integer(x):
            expected = "[B, S]" if x is first else f"{first.shape} as segment_ids"
            raise ValueError(f"{name}: expected integers {expected}, got shape {x.shape} {x.dtype}")
        check_held(name, x)
    max_segments = check_int("max_segments", max_segments, 1, MAX_ROWS, "a positive int")
    layout = check_layout(layout)
    method = Method.ALLGATHER.value if method is None else method
    check_method(method)
    axes = {"axis": axis, "batch_axis": batch_axis}
    around = surroundings_of(mesh, axes)
    for name, x in given.items():
        check_rows(name, x, around, axes)
    axis_name = None if around.mesh is None else axis
    size = around.size(axis)

    reach = reach_options(window_size, attention_chunk, max_seqlen)
    halo, promised = halo_of_batch(method, **reach, world_size=size)

    options = {"layout": layout.value, "method": method, "backend": backend, **reach}
    prepare = _Prepare(max_segments, axis_name, size, tuple(options.items()))
    rows = first.shape[0] // around.parts(batch_axis)
    row_length = first.shape[1] * size // around.parts(axis)
    packed = (row_length, rows) if layout is Layout.ROW else (None, 1)
    form = Form(*check_form(layout, *packed, size))
    # This batch has the structure and the static fields of the result of `prepare`, and specs in place of arrays.
    shared = {"compared_by": axis_name, "lengths": P(), "halo": halo, "max_seqlen": promised, **form._asdict()}
    batch = Batch(P(), P(), size, method, **shared)  # pyright: ignore
    if choose_backend(backend) != Backend.REFERENCE:
        batch = dataclasses.replace(batch, segments=P(), sequences=P())  # pyright: ignore
    segmented = SegmentedBatch(batch, row_length, axis_name, batch_axis, rows)
    arrays = {name: jnp.asarray(x) for name, x in given.items()}
    specs = dict.fromkeys(arrays, P(batch_axis, axis))
    batch = around.call(prepare, arrays, specs, segmented.specs.batch, compiled=True)
    return dataclasses.replace(segmented, batch=batch)


def check_rows(name: str, x: Array, around: Surroundings, axes: dict[str, AxisName | None]) -> None:
    """Raise `ValueError` unless the devices of `axis` and `batch_axis` divide tokens and rows of `x [B, S, ...]`."""
    if around.mesh is not None:
        check_spread(name, x, axes)
    for argument, dimension, what in (("batch_axis", 0, "rows"), ("axis", 1, "tokens")):
        check_divided(name, x, dimension, what, (argument, axes[argument], around.parts(axes[argument])))
    size, step = around.size(axes["axis"]), 2 * around.parts(axes["axis"])
    if size > 1 and x.shape[1] % step:
        raise ValueError(
            f"{name}: expected tokens that can be cut into {2 * size} chunks, 2 for each device of axis "
            f"{axes['axis']!r}: a multiple of {step}, got {x.shape[1]} in shape {x.shape}"
        )


@dataclass(frozen=True)
class _Prepare:
    """Prepares the batch of one device from its `segment_ids` and `positions [rows, T]`; equal objects do the same.

    `options` are keyword arguments of `prepare_batch`.
    """

    max_segments: int
    axis_name: AxisName | None
    world_size: int
    options: tuple[tuple[str, Any], ...]

    def __call__(self, segment_ids: jax.Array | None = None, positions: jax.Array | None = None) -> Batch:
        world_size, options = self.world_size, dict(self.options)
        given = [x for x in (segment_ids, positions) if x is not None]
        whole = [_whole_rows(x, self.axis_name, world_size) for x in given]
        rows, width = whole[0].shape[0], world_size * whole[0].shape[2]
        in_rows = options["layout"] == Layout.ROW
        fault = jnp.bool_(False)
        if in_rows or world_size == 1:
            order = gathered_packed_row(jnp.arange(width), width, width // world_size, world_size)
            in_order = [x.reshape(rows, width)[:, order] for x in whole]
        else:
            # In the document layout, every device has a part of each document, and all parts have the same length.
            in_order = [x[:, 0] for x in whole]
            if segment_ids is not None:
                fault = (whole[0] != whole[0][:, :1]).any()
        ids = jnp.ones_like(in_order[0]) if segment_ids is None else in_order[0]
        places = None if positions is None else in_order[-1]
        cu_seqlens, lengths = offsets_of_rows(ids, places, self.max_segments, in_order=in_rows or world_size == 1)
        cu_seqlens = cu_seqlens.at[-1].set(jnp.where(fault, -1, cu_seqlens[-1]))
        if not in_rows:
            cu_seqlens, lengths = jnp.where(cu_seqlens < 0, -1, cu_seqlens * world_size), lengths * world_size
        of_rows = {"row_length": width, "rows": rows} if in_rows else {}
        return prepare_batch(cu_seqlens, axis_name=self.axis_name, lengths=lengths, **of_rows, **options)


def _whole_rows(x: jax.Array, axis_name: AxisName | None, world_size: int) -> jax.Array:
    """Return the integers `[rows, T]` of all devices as `[rows, world_size, T]`, the same on every device."""
    if axis_name is None:
        return x[:, None]
    parts = jnp.zeros((x.shape[0], world_size, x.shape[1]), x.dtype)
    # This is a sum, because the result of an all-gather has the type of an array that varies along the axis.
    parts = jax.lax.dynamic_update_slice_in_dim(parts, x[:, None], jax.lax.axis_index(axis_name), 1)
    return jax.lax.psum(parts, axis_name)


def _is_integer(x: Array) -> bool:
    return jnp.issubdtype(x.dtype, jnp.integer)
