"""`Batch`, the lengths and device tables that all layers of a training step share, and how it is made and checked."""

import dataclasses
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp

from zigzag_kernels.checks import check_method
from zigzag_kernels.modes import Backend, Method

from . import autograd, launch
from .arguments import Array, as_rank, check_batch
from .axes import AxisName, axis_names, place_on, varying_axes
from .parallel import Tables


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Batch:
    """A batch holds the lengths and device tables that all layers of a training step share.

    `prepare_batch` makes it, and attention takes it in place of `cu_seqlens`. A batch is a pytree. Its specs for
    `shard_map` are `Batch(P(), P(axis), world_size, method, P(axis), P(axis), axis)`.

    Attributes:
        cu_seqlens: `[N + 1]` int32, offsets of the sequences in the whole batch.
        rank: `[1]` int32.
        world_size: number of ranks.
        method: the way of moving K/V that the tables are for.
        segments, sequences: the device tables, or None if it was prepared for the backend "reference".
        compared_by: mesh axis, or axes, whose ranks have compared their `cu_seqlens`; None: nobody has.
    """

    cu_seqlens: jax.Array
    rank: jax.Array
    world_size: int = field(metadata={"static": True})
    method: str = field(default=Method.ALLGATHER.value, metadata={"static": True})
    segments: jax.Array | None = None
    sequences: jax.Array | None = None
    compared_by: AxisName | None = field(default=None, metadata={"static": True})


def prepare_batch(
    cu_seqlens: Array,
    rank: int | Array = 0,
    world_size: int = 1,
    *,
    axis_name: AxisName | None = None,
    method: str = "allgather",
    backend: str | None = None,
) -> Batch:
    """Build the device tables of a batch once, for all layers and for both passes.

    Args:
        cu_seqlens: `[N + 1]` int32, offsets of the sequences in the whole batch; may be traced.
        rank: an int, or an array of one integer, which may be traced.
        world_size: number of ranks.
        axis_name: mesh axis, or axes, of the attention calls inside `shard_map`; it replaces `rank` and `world_size`.
            The ranks compare their `cu_seqlens`: if they differ, attention returns NaN on all ranks.
        method: as in the attention calls.
        backend: as in the attention calls.

    Raises the errors of `zigzag_attention_gathered`.
    """
    check_method(method)
    if axis_name is not None:
        rank, world_size = place_on(axis_name)
    backend = launch.choose_backend(backend)
    batch = as_batch(cu_seqlens, rank, world_size, method)
    check_varying(batch, axis_name)
    if axis_name is not None:
        compared = _compare(batch.cu_seqlens, axis_name)
        batch = dataclasses.replace(batch, cu_seqlens=compared, compared_by=axis_name)
    if backend == Backend.REFERENCE:
        return batch
    return dataclasses.replace(batch, **tables_of(batch, backend)._asdict())


def as_batch(cu_seqlens: Array | Batch, rank: int | Array, world_size: int, method: str) -> Batch:
    """Return `cu_seqlens` as a batch, still without tables if it is an array.

    Raises `ValueError` for a batch that was prepared for another `world_size` or `method`.
    """
    if not isinstance(cu_seqlens, Batch):
        check_batch(cu_seqlens, rank, world_size)
        return Batch(jnp.asarray(cu_seqlens), as_rank(rank), world_size, method)
    for name, wanted in {"world_size": world_size, "method": method}.items():
        prepared = getattr(cu_seqlens, name)
        if prepared != wanted:
            raise ValueError(f"{name}: expected that of the prepared batch, {prepared!r}, got {wanted!r}")
    check_batch(cu_seqlens.cu_seqlens, rank, world_size)
    return cu_seqlens


def tables_of(batch: Batch, backend: str) -> Tables:
    """Return the device tables of `batch` for the kernels of `backend`, made if it was prepared without."""
    if batch.segments is not None and batch.sequences is not None:
        return Tables(batch.segments, batch.sequences)
    return autograd.segment_tables(batch.cu_seqlens, batch.rank, batch.world_size, batch.method, backend)


def check_varying(batch: Batch, axis_name: AxisName | None, *arrays: jax.Array) -> None:
    """Raise `ValueError` if, by the types of `shard_map`, lengths differ between ranks or rank numbers do not."""
    for axis in axis_names(axis_name):
        if axis in varying_axes(batch.cu_seqlens):
            raise ValueError(
                f"cu_seqlens: expected the same on every rank of the mesh axis {axis!r}, got an array that varies "
                "along it; give the global one with P() in in_specs"
            )
        if axis in varying_axes(*arrays) and axis not in varying_axes(batch.rank):
            raise ValueError(
                f"rank: expected a batch prepared for the mesh axis {axis!r}, got the same rank everywhere along it; "
                "prepare_batch takes the axis_name"
            )


def _compare(cu_seqlens: jax.Array, axis_name: AxisName) -> jax.Array:
    """Return `cu_seqlens` if all ranks have the same, else -1 everywhere, for which attention returns NaN."""
    # The types of shard_map promise it within one process. Between processes, or without check_vma, nothing does.
    same = jax.lax.pmax(cu_seqlens, axis_name) == jax.lax.pmin(cu_seqlens, axis_name)
    return jnp.where(same.all(), cu_seqlens, -1)
