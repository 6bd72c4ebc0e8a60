"""`Batch`, which holds the lengths and device tables of a training step, and `prepare_batch`, which makes it."""

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from zigzag_kernels.batch_checks import check_documents_in_rows
from zigzag_kernels.callspec import NO_WINDOW
from zigzag_kernels.checks import check_layout, check_method, check_packed_rows, check_world_size
from zigzag_kernels.documents import DocumentPlan, check_plan
from zigzag_kernels.layout import MAX_OFFSET, is_invalid_batch
from zigzag_kernels.modes import Backend, Layout, Method
from zigzag_kernels.segments.columns import SegmentColumn, SequenceColumn

from . import autograd, launch, placement
from .arguments import Array, as_cu_seqlens, as_lengths, as_rank, as_rank_argument, check_array, fingerprint
from .axes import AxisName, axis_names, place_on, vary, varying_axes
from .halos import halo_of_batch
from .host import ShardedBatch
from .parallel import Packing, Tables
from .plans import Parts, offsets_of, one_part
from .surroundings import under_own_promotion


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("cu_seqlens", "rank", "segments", "sequences", "lengths", "whole_cu_seqlens"),
    meta_fields=(
        *("world_size", "method", "compared_by", "layout", "row_length", "rows"),
        *("halo", "max_seqlen", "whole_tokens", "tokens"),
    ),
    drop_fields=("host_rank",),
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
        host_rank: the rank, if the host knows it. It is not part of the pytree, so transformations drop it.
        lengths: `[N]` int32, the real tokens of each sequence; its other rows are padding. None: all rows are real.
        layout: "document" or "row".
        row_length, rows: in the row layout, the tokens of a packed row on all ranks, and the number of packed rows.
        halo: rows of a halo with method "halo", if a window or a length was given; otherwise 0.
        max_seqlen: the promised longest real length of a document; 0 without a promise.
        whole_cu_seqlens: `[N + 1]` int32, offsets of this rank's whole documents in its rows; `cu_seqlens` and
            `lengths` then describe only split documents. None: all documents are split.
        whole_tokens, tokens: for a plan of documents, the rows of each rank for whole documents, and all of its rows;
            otherwise 0.
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

    @property
    def limits_of_halo(self) -> tuple[int, int]:
        """(halo, max_seqlen) if the batch has a halo, otherwise (0, 0)."""
        return (self.halo, self.max_seqlen) if self.halo else (0, 0)

    whole_cu_seqlens: jax.Array | None = None
    whole_tokens: int = 0
    tokens: int = 0

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


@under_own_promotion
def prepare_batch(
    cu_seqlens: Array | DocumentPlan | ShardedBatch | Parts,
    rank: int | Array | None = None,
    world_size: int | None = None,
    *,
    axis_name: AxisName | None = None,
    method: str | None = None,
    backend: str | None = None,
    unsharded: Array | None = None,
    lengths: Array | None = None,
    layout: str = "document",
    row_length: int | None = None,
    rows: int = 1,
    window_size: tuple[int | None, int | None] = NO_WINDOW,
    attention_chunk: int = 0,
    max_seqlen: int | None = None,
) -> Batch:
    """Build the device tables of a batch once, for all layers and for both passes.

    Args:
        cu_seqlens: `[N + 1]` int32, offsets of the sequences over all ranks; may be traced. Other integers are
            converted; a list, tuple or NumPy array is checked as in `validate`. Instead of offsets, pass a plan of
            `plan_documents`, or a `host.ShardedBatch`, inside `shard_map` with its `specs`: each rank then has the rows
            of the plan, whole documents first.
        rank: an int, or an array of one integer, which may be traced. None means the rank on the mesh axis, or 0 on a
            single device.
        world_size: number of ranks. None means the size of the mesh axis, or 1.
        axis_name: mesh axis, or axes, of the attention calls inside `shard_map`; `rank` and `world_size` are then None.
            The ranks compare their `cu_seqlens`: if they differ, attention returns NaN on all ranks.
        method: as in the attention calls. None means "halo" if the host knows that halos suffice for `window_size`,
            `attention_chunk` or `max_seqlen`, and otherwise "allgather". The host knows it in the row layout, and for
            offsets on the host.
        backend: as in the attention calls.
        unsharded: the whole batch before `shard`, such as token ids; its spec is `P()`. With `axis_name`, ranks compare
            it like `cu_seqlens`, because processes with different data would attend to a mixture of both.
        lengths: `[N]` int32, the real tokens of each sequence; may be traced. The other rows, at the end of a sequence,
            are padding, with out 0, lse -inf and zero gradients, and no row attends to them. A negative length, or one
            above the length of the sequence, gives NaN everywhere, or an error if both `lengths` and `cu_seqlens` are
            lists, tuples or NumPy arrays.
        layout: as in the attention calls, which must get the same layout.
        row_length, rows: required in the row layout with several ranks. `row_length` is the number of tokens of one
            packed row over all ranks, a multiple of `2 * world_size`; `rows` is the number of packed rows.
        window_size, attention_chunk: for methods None and "halo", the largest window of all layers that will use the
            batch. It decides how many rows a halo has, for layers with smaller windows too.
        max_seqlen: a promise that no document has more real tokens. With method "halo" it also limits the rows of a
            halo. If a batch breaks the promise, that method gives NaN everywhere, or an error if the host has the
            values.

    Raises the errors of `zigzag_attention_gathered`.
    """
    if method is not None:
        check_method(method)
    check_layout(layout)
    if axis_name is not None:
        for name, x in {"rank": rank, "world_size": world_size}.items():
            if x is not None:
                raise ValueError(f"{name}: expected None with axis_name, which gives it, got {x}")
        rank, world_size = place_on(axis_name)
    world_size = check_world_size(1 if world_size is None else world_size)
    if rank is None and world_size > 1:
        raise ValueError(f"rank: expected the rank to prepare for, as world_size is {world_size}, got None")
    rank = 0 if rank is None else rank
    by_default, backend = backend is None, launch.choose_backend(backend)
    parts, tokens = None, 0
    if isinstance(cu_seqlens, ShardedBatch):
        unsharded = cu_seqlens.fingerprint if unsharded is None else unsharded
        cu_seqlens, row_length = offsets_of(cu_seqlens, world_size, layout)
    form = batch_form(layout, row_length, rows, world_size)
    if isinstance(cu_seqlens, DocumentPlan | Parts):
        for name, x, default in (("lengths", lengths, None), ("layout", layout, Layout.DOCUMENT)):
            if x is not default and x != default:
                raise ValueError(f"{name}: expected {default} with a plan, got {x!r}")
        if isinstance(cu_seqlens, DocumentPlan):
            cu_seqlens = Parts.of_plan(check_plan(cu_seqlens, world_size), rank)
        tokens = cu_seqlens.tokens
        cu_seqlens, lengths, parts = one_part(cu_seqlens, world_size)
    if parts is not None:
        if axis_name is None:
            raise ValueError("axis_name: expected that of the ranks of a plan with whole and split documents, got None")
        form = form._replace(whole_tokens=parts.whole_tokens)
    form = form._replace(tokens=tokens)
    reach, packed = (window_size, attention_chunk, max_seqlen), (form.row_length, form.rows)
    method, halo, promised = halo_of_batch(method, reach, (cu_seqlens, lengths), packed, world_size)
    batch = as_batch(cu_seqlens, rank, world_size, method, form)
    if parts is not None:
        batch = dataclasses.replace(batch, whole_cu_seqlens=as_cu_seqlens(parts.whole_cu_seqlens, 1))
    if lengths is not None:
        batch = dataclasses.replace(batch, lengths=as_lengths(lengths, cu_seqlens))
    batch = dataclasses.replace(batch, halo=halo, max_seqlen=promised)
    check_varying(batch, axis_name)
    if unsharded is not None:
        check_array("unsharded", unsharded)
        check_same_on_every_rank(axis_name, unsharded=jnp.asarray(unsharded))
    if axis_name is not None:
        batch = compare(batch, axis_name, unsharded)
    batch = marked(batch, backend, by_default)
    if backend == Backend.REFERENCE:
        return batch
    return dataclasses.replace(batch, **tables_of(batch, backend)._asdict())


def batch_form(layout: str, row_length: int | None, rows: int, world_size: int) -> Form:
    """Return the `Form` of a batch with these arguments; `ValueError` unless they fit each other."""
    if layout == Layout.ROW and world_size > 1:
        return Form(Layout.ROW.value, *check_packed_rows(row_length, rows, world_size))
    if layout == Layout.ROW:
        check_packed_rows(0 if row_length is None else row_length, rows, world_size)
    for name, given, without in (("row_length", row_length, None), ("rows", rows, 1)):
        if layout == Layout.DOCUMENT and given != without:
            raise ValueError(f"{name}: expected {without} with layout 'document', got {given!r}")
    return Form(Layout(layout).value)


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
        if form.row_length and not isinstance(given, jax.Array):
            offsets = np.asarray(given).tolist()
            check_documents_in_rows(offsets, world_size, form.row_length, form.rows * form.row_length)
        return Batch(cu_seqlens, as_rank(rank), world_size, method, host_rank=host_rank, **form._asdict())
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
