"""`Batch`, which holds the lengths and device tables of a training step."""

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from zigzag_kernels.batch_checks import check_documents_in_rows
from zigzag_kernels.checks import check_world_size
from zigzag_kernels.layout import MAX_OFFSET, is_invalid_batch
from zigzag_kernels.modes import Layout, Method
from zigzag_kernels.segments.columns import SegmentColumn, SequenceColumn

from . import autograd, placement
from .arguments import Array, as_cu_seqlens, as_rank, as_rank_argument, fingerprint, is_padded
from .axes import AxisName, axis_names, vary, varying_axes
from .parallel import Packing, Tables


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("cu_seqlens", "rank", "segments", "sequences", "lengths", "whole_cu_seqlens"),
    meta_fields=(
        *("world_size", "method", "compared_by", "layout", "row_length", "rows"),
        *("halo", "max_seqlen", "whole_tokens", "tokens"),
    ),
    drop_fields=("host_rank", "padded", "unsharded_rows"),
)
@dataclass(frozen=True)
class Batch:
    """The lengths and device tables that all layers of a training step share.

    `prepare_batch` makes a batch, and the attention calls take it in place of `cu_seqlens`. A batch is a pytree. Its
    specs for `shard_map` are `Batch(P(), P(axis), world_size, method, P(axis), P(axis), axis)`; a function of
    `make_zigzag_attention` prepares a batch outside `shard_map`.

    Attributes:
        cu_seqlens: `[N + 1]` int32, offsets of the sequences over all ranks.
        rank: `[1]` int32, the rank whose rows the tables describe.
        world_size: number of ranks.
        method: the method that the tables are for.
        segments, sequences: the device tables, each an array or a tuple of arrays, or None if the batch was prepared
            for the backend "reference".
        compared_by: mesh axis, or axes, whose ranks have compared their `cu_seqlens`; None if no ranks have.
        host_rank: the rank, if the host knows it.
        lengths: `[N]` int32, the real tokens of each sequence; its other rows are padding. None: all rows are real.
        layout: "document" or "row".
        row_length, rows: in the row layout, the tokens of a packed row on all ranks, and the number of packed rows.
        halo: rows of a halo with method "halo", if a window or a length was given; otherwise 0.
        max_seqlen: the promised longest real length of a document; 0 without a promise.
        whole_cu_seqlens: `[N + 1]` int32, offsets of this rank's whole documents in its rows; `cu_seqlens` and
            `lengths` then describe only split documents. None: all documents are split.
        whole_tokens, tokens: for a plan of documents, the rows of each rank for whole documents, and all of its rows;
            otherwise 0.
        padded: whether the offsets come from `pad_to_zigzag` and count padding. Attention then needs a
            causal mask, or `lengths`.
        unsharded_rows: rows of the whole batch, if `prepare_batch` got it as `unsharded`; otherwise 0.

    `host_rank`, `padded` and `unsharded_rows` are facts for checks. They are not part of the pytree, so transformations
    drop them.
    """

    cu_seqlens: jax.Array
    rank: jax.Array
    world_size: int
    method: str = Method.ALLGATHER.value
    segments: jax.Array | tuple | None = None
    sequences: jax.Array | tuple | None = None
    compared_by: AxisName | None = None
    host_rank: int | None = None
    lengths: jax.Array | None = None
    layout: str = Layout.DOCUMENT.value
    row_length: int = 0
    rows: int = 1
    halo: int = 0
    max_seqlen: int = 0
    whole_cu_seqlens: jax.Array | None = None
    whole_tokens: int = 0
    tokens: int = 0
    padded: bool = False
    unsharded_rows: int = 0

    @property
    def limits_of_halo(self) -> tuple[int, int]:
        """(halo, max_seqlen) if the batch has a halo, otherwise (0, 0)."""
        return (self.halo, self.max_seqlen) if self.halo else (0, 0)

    @property
    def whole_documents(self) -> int:
        """The most whole documents that a rank may have: entries of its table."""
        return 0 if self.whole_cu_seqlens is None else self.whole_cu_seqlens.shape[0] - 1

    @property
    def packing(self) -> Packing:
        """The packing of the batch, from which its tables and masks follow."""
        form = self.layout, self.row_length, self.rows
        parts: tuple[Any, ...] = ()
        if self.whole_cu_seqlens is not None:
            rank = jnp.minimum(self.rank, 0)
            whole = Packing(self.whole_cu_seqlens, rank, None, 1, Layout.DOCUMENT.value, 0, 1)
            parts = whole, self.whole_tokens, self.tokens
        return Packing(self.cu_seqlens, self.rank, self.lengths, self.world_size, *form, self.limits_of_halo, *parts)


class Form(NamedTuple):
    """The fields of `Batch` that say how the batch is cut into chunks."""

    layout: str = Layout.DOCUMENT.value
    row_length: int = 0
    rows: int = 1
    whole_tokens: int = 0
    tokens: int = 0


DOCUMENTS = Form()


def check_host_rows(cu_seqlens: Array, form: Form, world_size: int) -> None:
    """Raise `ValueError` if valid offsets are on the host and a document does not lie within one packed row."""
    if form.row_length and not isinstance(cu_seqlens, jax.Array):
        offsets = np.asarray(cu_seqlens).tolist()
        check_documents_in_rows(offsets, world_size, form.row_length, form.rows * form.row_length)


def as_batch(
    cu_seqlens: Array | Batch,
    rank: int | Array,
    world_size: int,
    method: str,
    form: Form = DOCUMENTS,
    tokens: int | None = None,
) -> Batch:
    """Return the prepared batch, or make a batch of this `form`, without tables, from offsets.

    Raises `ValueError` for a batch that was prepared for another rank, `world_size`, `method` or layout. If only the
    device knows the two ranks, and they differ, attention returns NaN. `tokens` are the rows of one rank, if they are
    known; `ValueError` for offsets on the host that count more rows than all ranks have.
    """
    world_size = check_world_size(world_size)
    rank = as_rank_argument(rank, world_size)
    host_rank = rank if isinstance(rank, int) else None
    if not isinstance(cu_seqlens, Batch):
        total, step = None if tokens is None else world_size * tokens, 1 if form.layout == Layout.ROW else world_size
        given, cu_seqlens = cu_seqlens, as_cu_seqlens(cu_seqlens, step, total)
        known = {"host_rank": host_rank, "padded": is_padded(given)}
        check_host_rows(given, form, world_size)
        return Batch(cu_seqlens, as_rank(rank), world_size, method, **known, **form._asdict())
    batch = cu_seqlens
    if batch.whole_tokens and rank is not batch.rank:
        raise ValueError("cu_seqlens: expected a batch of whole and split documents prepared with this axis_name")
    for name, wanted in {"world_size": world_size, "method": method, "layout": str(form.layout)}.items():
        prepared = getattr(batch, name)
        if prepared != wanted:
            raise ValueError(f"{name}: expected that of the prepared batch, {prepared!r}, got {wanted!r}")
    if host_rank is not None and batch.host_rank is not None:
        if host_rank != batch.host_rank:
            raise ValueError(f"rank: expected that of the prepared batch, {batch.host_rank}, got {host_rank}")
        return batch
    return batch if rank is batch.rank else _for_rank(batch, as_rank(rank))


def _for_rank(batch: Batch, rank: jax.Array) -> Batch:
    """Return `batch`, made invalid on the device if it was prepared for another rank, so that attention returns NaN."""
    same = batch.rank == rank
    batch = dataclasses.replace(batch, rank=jnp.where(same, batch.rank, -1))
    if batch.segments is None or batch.sequences is None:
        return batch

    def of_rank(columns):
        return lambda table: jnp.where(same, table, jnp.zeros_like(table).at[..., -1, columns].set(-1))

    segments = of_rank(jnp.array([SegmentColumn.KV_LEN, SegmentColumn.KEYS]))
    return dataclasses.replace(
        batch,
        segments=jax.tree.map(segments, batch.segments),
        sequences=jax.tree.map(of_rank(SequenceColumn.KEYS), batch.sequences),
    )


def marked(batch: Batch, backend: str, by_default: bool) -> Batch:
    """Return `batch` with the `placement.mark` of a call; `by_default` says that the caller named no `backend`."""
    mark = functools.partial(placement.mark, backend=backend, by_default=by_default)
    return dataclasses.replace(batch, rank=mark(batch.rank), segments=jax.tree.map(mark, batch.segments))


def tables_of(batch: Batch, backend: str) -> Tables:
    """Return the device tables of `batch` for the kernels of `backend`; build them if the batch has none."""
    if batch.segments is not None and batch.sequences is not None:
        return Tables(batch.segments, batch.sequences)
    return autograd.segment_tables(batch.packing, batch.method, backend)


def check_varying(batch: Batch, axis_name: AxisName | None, *arrays: jax.Array) -> None:
    """Raise `ValueError` if, by types of `shard_map`, lengths differ between ranks, or rank numbers are equal."""
    check_same_on_every_rank(axis_name, cu_seqlens=batch.cu_seqlens, lengths=batch.lengths)
    for axis in axis_names(axis_name):
        if axis in varying_axes(*arrays) and axis not in varying_axes(batch.rank):
            raise ValueError(
                f"rank: expected a batch prepared for the mesh axis {axis!r}, got the same rank everywhere along it; "
                "prepare_batch takes the axis_name"
            )


def check_same_on_every_rank(axis_name: AxisName | None, **arrays: jax.Array | None) -> None:
    """Raise `ValueError` for an array that, by the types of `shard_map`, differs between the ranks of `axis_name`."""
    for axis in axis_names(axis_name):
        for name, x in arrays.items():
            if x is not None and axis in varying_axes(x):
                raise ValueError(
                    f"{name}: expected the same on every rank of the mesh axis {axis!r}, got an array that varies "
                    "along it; give the global one with P() in in_specs"
                )


def check_rows_vary(axis_name: AxisName | None, rank: int | jax.Array, **arrays: jax.Array) -> None:
    """Raise `ValueError` if, by the types of `shard_map`, every rank of `axis_name` has the same rows of an array."""
    if isinstance(rank, int):
        return
    for axis in axis_names(axis_name):
        if axis not in varying_axes(rank) or jax.lax.axis_size(axis) == 1:
            continue  # arrays have no such types, or the axis has only one device
        for name, x in arrays.items():
            if axis not in varying_axes(x):
                raise ValueError(
                    f"{name}: expected the rows of each rank, got an array that is the same along the mesh axis "
                    f"{axis!r}; give its rows with P({axis!r}) in in_specs"
                )


def compare(batch: Batch, axis_name: AxisName, unsharded: Array | None = None) -> Batch:
    """Return `batch`, with all offsets -1 if ranks have different batches, so that attention returns NaN.

    Ranks compare their offsets, real lengths, packed rows, halos and `unsharded` batches.
    """
    # The types of shard_map guarantee equal arrays within one process, but not between processes or without check_vma.
    own = batch.cu_seqlens
    if batch.layout == Layout.ROW and batch.world_size > 1:
        # The shape is the same as in the document layout, in which the first offset is always 0.
        own = own.at[0].add(jnp.int32(batch.row_length))
    if batch.lengths is not None:
        own = jnp.concatenate((own, batch.lengths))
    if batch.halo:
        own = jnp.concatenate((own, jnp.array(batch.limits_of_halo, own.dtype)))
    if unsharded is not None:
        own = jnp.concatenate((own, fingerprint(jnp.asarray(unsharded))))
    extremes, whole = jnp.stack((own, ~own)), batch.whole_cu_seqlens  # the largest of ~x is ~ of the smallest x
    if whole is not None:
        fault = is_invalid_batch(whole, jnp.zeros(1, jnp.int32), 1, batch.whole_tokens)
        # Two equal values make the comparison below fail.
        extremes = jnp.where(fault, MAX_OFFSET, vary(extremes, varying_axes(fault)))
    largest, of_inverse = jax.lax.pmax(extremes, axis_name)
    agreed = (largest == ~of_inverse).all()
    if whole is not None:
        batch = dataclasses.replace(batch, whole_cu_seqlens=jnp.where(agreed, whole, -1))
    return dataclasses.replace(batch, cu_seqlens=jnp.where(agreed, batch.cu_seqlens, -1), compared_by=axis_name)


def compare_if_untyped(batch: Batch, axis_name: AxisName | None, rank: int | jax.Array) -> Batch:
    """Compare `batch` unless it must be the same on all ranks, by the types of `shard_map` in a single process."""
    if axis_name is None or isinstance(rank, int) or batch.compared_by == axis_name or batch.world_size == 1:
        return batch
    typed = set(axis_names(axis_name)) <= set(varying_axes(rank))
    if typed and jax.process_count() == 1:
        return batch
    return dataclasses.replace(compare(batch, axis_name), segments=None, sequences=None)
