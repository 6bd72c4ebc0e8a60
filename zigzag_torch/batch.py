"""`Batch`, which holds the lengths and device tables of a training step, and `prepare_batch`, which makes it."""

import dataclasses
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.utils import _pytree as pytree

from zigzag_kernels.batch_checks import check_documents_in_rows
from zigzag_kernels.callspec import NO_WINDOW
from zigzag_kernels.checks import check_layout, check_method, check_packed_rows, check_world_size
from zigzag_kernels.documents import DocumentPlan, check_plan
from zigzag_kernels.modes import Backend, Layout, Method
from zigzag_kernels.segments.columns import SegmentColumn, SequenceColumn

from . import launch
from .arguments import as_cu_seqlens, as_lengths, as_rank, as_rank_argument, check_batch, check_device, check_tensor
from .autograd import segment_tables
from .halos import halo_of_batch
from .parallel import Packing, Tables
from .parallel.agreement import Place, place_in, refuse_together
from .parallel.collectives import common_rank
from .plans import Parts, with_identity


@dataclass(frozen=True)
class Batch:
    """The lengths and device tables that all layers of a training step share.

    `prepare_batch` makes a batch, and the attention calls take it in place of `cu_seqlens`.

    Attributes:
        cu_seqlens: `[N + 1]` int32, offsets of the sequences over all ranks.
        rank: `[1]` int32, the rank whose rows the tables describe.
        world_size: number of ranks.
        method: the method that the tables are for.
        segments, sequences: the device tables, or None if the batch was prepared for the backend "reference".
        compared_by: name of the group whose ranks have compared their `cu_seqlens`; None if no ranks have.
        host_rank: the rank, or None if only the device knows it.
        lengths: `[N]` int32, the real tokens of each sequence; its other rows are padding. None: all rows are real.
        layout: "document" or "row".
        row_length, rows: in the row layout, the tokens of a packed row on all ranks, and the number of packed rows.
        whole_cu_seqlens: `[N + 1]` int32, offsets of this rank's whole documents in its rows; `cu_seqlens` and
            `lengths` then describe only split documents. None: all documents are split.
        whole_tokens, tokens: for a plan of documents, the rows of each rank for whole documents, and all of its rows;
            otherwise 0.
        halo: rows of a halo with method "halo", if a window or a length was given; otherwise 0.
        max_seqlen: the promised longest real length of a document; 0 without a promise.
    """

    cu_seqlens: torch.Tensor
    rank: torch.Tensor
    world_size: int
    method: str = Method.ALLGATHER.value
    segments: torch.Tensor | None = None
    sequences: torch.Tensor | None = None
    compared_by: str | None = None
    host_rank: int | None = None
    lengths: torch.Tensor | None = None
    layout: str = Layout.DOCUMENT.value
    row_length: int = 0
    rows: int = 1
    whole_cu_seqlens: torch.Tensor | None = None
    whole_tokens: int = 0
    tokens: int = 0
    halo: int = 0
    max_seqlen: int = 0

    @property
    def whole_documents(self) -> int:
        """The most whole documents that a rank may have: entries of its table."""
        return 0 if self.whole_cu_seqlens is None else self.whole_cu_seqlens.shape[0] - 1

    @property
    def packing(self) -> Packing:
        """The packing of the batch, from which its tables and masks follow."""
        form, whole = (self.layout, self.row_length, self.rows), None
        if self.whole_cu_seqlens is not None:
            whole = Packing(self.whole_cu_seqlens, self.rank.clamp(max=0), None, 1, Layout.DOCUMENT.value, 0, 1)
        return Packing(self.cu_seqlens, self.rank, self.lengths, self.world_size, *form, whole, self.limits_of_halo)

    @property
    def limits_of_halo(self) -> tuple[int, int]:
        """(halo, max_seqlen) if the batch has a halo, otherwise (0, 0)."""
        return (self.halo, self.max_seqlen) if self.halo else (0, 0)

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> "Batch":
        """Return this batch with its tensors on `device`; `non_blocking` as in `torch.Tensor.to`."""
        tensors = ((name, getattr(self, name)) for name in _TENSORS)
        return dataclasses.replace(
            self, **{name: x.to(device, non_blocking=non_blocking) for name, x in tensors if x is not None}
        )


_TENSORS = ("cu_seqlens", "rank", "segments", "sequences", "lengths", "whole_cu_seqlens")
_CONSTANTS = tuple(field.name for field in dataclasses.fields(Batch) if field.name not in _TENSORS)


def _flatten(batch: Batch) -> tuple[list, list]:
    return [getattr(batch, name) for name in _TENSORS], [getattr(batch, name) for name in _CONSTANTS]


def _unflatten(tensors, constants: list) -> Batch:
    return Batch(**dict(zip(_TENSORS, tensors, strict=True)), **dict(zip(_CONSTANTS, constants, strict=True)))


# With this registration a batch is a pytree of tensors, for `tree_map`, checkpointing and data loaders of trainers.
pytree.register_pytree_node(Batch, _flatten, _unflatten, serialized_type_name="zigzag_torch.Batch")


class Form(NamedTuple):
    """The fields of `Batch` that say how the batch is cut into chunks."""

    layout: str = Layout.DOCUMENT.value
    row_length: int = 0
    rows: int = 1
    whole_tokens: int = 0
    tokens: int = 0

    @property
    def in_words(self) -> str:
        """The form as text, which ranks compare."""
        if self.whole_tokens:
            return f"{self.layout}, {self.tokens} rows, {self.whole_tokens} of them for whole documents"
        return f"{self.layout}, {self.rows} of {self.row_length} tokens" if self.row_length else self.layout


DOCUMENTS = Form()


def prepare_batch(
    cu_seqlens: torch.Tensor | DocumentPlan | Parts,
    rank: int | torch.Tensor | None = None,
    world_size: int | None = None,
    *,
    method: str | None = None,
    group=None,
    backend: str | None = None,
    unsharded: torch.Tensor | None = None,
    lengths: torch.Tensor | None = None,
    layout: str = "document",
    row_length: int | None = None,
    rows: int = 1,
    device: torch.device | str | int | None = None,
    window_size: tuple[int, int] = NO_WINDOW,
    attention_chunk: int = 0,
    max_seqlen: int | None = None,
) -> Batch:
    """Build the device tables of a batch once, for all layers and for both passes.

    Args:
        cu_seqlens: `[N + 1]` int32, offsets of the sequences over all ranks. Other integers are converted. A list,
            tuple or NumPy array is checked as in `validate`, and becomes a tensor on the CPU. Instead of offsets, pass
            a plan of `plan_documents`, or the `Parts` of this rank in a plan: each rank then has the rows of the plan,
            whole documents first. The tensors of a plan are on `device`, by default the CPU.
        rank, world_size: rank is an int, or a tensor of one integer on the device of `cu_seqlens`; world_size is an
            int. None means the rank and size in the `group`. Without a group, world_size is 1 by default, and rank is
            required if world_size is larger.
        method: as in the attention calls. None means "halo" if the host knows that halos suffice for `window_size`,
            `attention_chunk` or `max_seqlen`, and otherwise "allgather". The host knows it in the row layout, for a
            plan, and for offsets on the host.
        group: as in the attention calls. Every rank of it makes this call, and the ranks compare their `cu_seqlens` on
            the device. If they differ, attention returns NaN on all ranks, and `validate` gives the reason.
        backend: as in the attention calls.
        unsharded: the whole batch before `shard`, such as token ids, on the device of `cu_seqlens`. Ranks of a group
            compare it like `cu_seqlens`, because ranks with different data would attend to a mixture of both.
        lengths: `[N]` int32, the real tokens of each sequence. Its other rows, at its end, are padding, with out 0, lse
            -inf and zero gradients, and no row attends to them. A negative length, or one above the length of the
            sequence, gives NaN everywhere, or an error if both `lengths` and `cu_seqlens` are lists, tuples or NumPy
            arrays.
        layout: as in the attention calls, which must get the same layout.
        row_length, rows: required in the row layout with several ranks. `row_length` is the number of tokens of one
            packed row over all ranks, a multiple of `2 * world_size`; `rows` is the number of packed rows.
        window_size, attention_chunk: for methods None and "halo", the largest window of all layers that will use the
            batch. It decides how many rows a halo has, for layers with smaller windows too.
        max_seqlen: a promise that no document has more real tokens. With method "halo" it also limits the rows of a
            halo. If a batch breaks the promise, that method gives NaN everywhere, or an error if the host has the
            values.

    Raises the errors of `zigzag_attention`. The host does not wait for the device. A batch that is prepared in
    `torch.inference_mode` can also be used for training.
    """
    if not torch.compiler.is_compiling() and torch.is_inference_mode_enabled():
        with torch.inference_mode(False):
            if isinstance(cu_seqlens, Parts):
                cu_seqlens = pytree.tree_map(_copied, cu_seqlens)
            options = {"method": method, "group": group, "backend": backend, "unsharded": unsharded, "device": device}
            options |= {"lengths": _copied(lengths), "layout": layout, "row_length": row_length, "rows": rows}
            options |= {"window_size": window_size, "attention_chunk": attention_chunk, "max_seqlen": max_seqlen}
            return prepare_batch(_copied(cu_seqlens), _copied(rank), world_size, **options)  # pyright: ignore
    place, parts, plan, documents = place_in(group), None, cu_seqlens, None
    tokens, sizes = 0, None
    try:
        if method is not None:
            check_method(method)
        check_layout(layout)
        if isinstance(cu_seqlens, DocumentPlan | Parts):
            for name, x, default in (("lengths", lengths, None), ("layout", layout, Layout.DOCUMENT)):
                if x is not default and x != default:
                    raise ValueError(f"{name}: expected {default} with a plan, got {x!r}")
            parts = _as_parts(cu_seqlens, rank, world_size, place, device)
            if isinstance(cu_seqlens, DocumentPlan):
                documents = cu_seqlens.split_cu_seqlens, cu_seqlens.split_lengths
            tokens, sizes = parts.tokens, parts.sizes
            cu_seqlens, lengths, parts = _one_part(parts, place.world_size if world_size is None else world_size)
        given = cu_seqlens
        if place.group_name is None:
            world_size = check_world_size(1 if world_size is None else world_size)
            if rank is None and world_size > 1:
                raise ValueError(f"rank: expected the rank to prepare for, as world_size is {world_size}, got None")
            rank = 0 if rank is None else rank
            cu_seqlens, rank, world_size = check_batch(cu_seqlens, rank, world_size, Layout(layout))
        else:
            cu_seqlens = _check_place(cu_seqlens, rank, world_size, place, Layout(layout))
            rank, world_size = place.rank, place.world_size
        form = _form_of(layout, row_length, rows, world_size)._replace(tokens=tokens)
        if parts is not None:
            if place.group_name is None:
                raise ValueError("group: expected that of the ranks of a plan with whole and split documents, got None")
            form = form._replace(whole_tokens=parts.whole_tokens)
        if form.row_length:
            _check_host_rows(given, form, world_size)
        reach = window_size, attention_chunk, max_seqlen
        packed = form.row_length, form.rows
        method, halo, promised = halo_of_batch(method, reach, documents or (given, lengths), packed, world_size, sizes)
        if lengths is not None:
            lengths = as_lengths(lengths, given, cu_seqlens.device)
        backend = launch.choose_backend(backend, cu_seqlens.device)
        if unsharded is not None:
            check_tensor("unsharded", unsharded)
            check_device("unsharded", unsharded, "cu_seqlens", cu_seqlens)
    except (ValueError, RuntimeError) as error:
        refuse_together(place, error)
        raise
    own_rank = as_rank(rank, cu_seqlens.device)
    if place.group_name is not None:
        in_words = f"{form.in_words}, halo {halo}, documents of {promised}" if halo else form.in_words
        plan_too = lengths if lengths is None else with_identity(lengths, plan)
        compared = place.group_name, "prepare_batch", plan_too, in_words, None if parts is None else parts.fault
        own_rank = common_rank(cu_seqlens, unsharded, own_rank, *compared)
    known: dict[str, Any] = {} if parts is None else {"whole_cu_seqlens": parts.whole_cu_seqlens}
    known |= {"compared_by": place.group_name, "host_rank": rank if isinstance(rank, int) else None}
    known |= {"halo": halo, "max_seqlen": promised}
    batch = Batch(cu_seqlens, own_rank, world_size, method, **known, lengths=lengths, **form._asdict())
    if backend == Backend.REFERENCE:
        return batch
    return dataclasses.replace(batch, **tables_of(batch, backend)._asdict())


def _copied(x):
    return x.clone() if isinstance(x, torch.Tensor) else x


def _as_parts(given: DocumentPlan | Parts, rank, world_size: int | None, place: Place, device) -> Parts:
    """Return the `Parts` of `rank`, an int; `ValueError` for a plan for another number of ranks."""
    if isinstance(given, Parts):
        return given.checked()
    check_plan(given, place.world_size if world_size is None else world_size)
    return Parts.of_plan(given, place.rank if rank is None else rank, device)


def _one_part(parts: Parts, world_size: int) -> tuple[torch.Tensor, torch.Tensor | None, Parts | None]:
    """Return (cu_seqlens, real lengths, `parts`), or None in place of `parts` if the offsets describe all rows."""
    if world_size == 1:
        return *parts.joined(), None
    return parts.split_cu_seqlens, parts.split_lengths, parts if parts.whole_tokens else None


def _check_place(
    cu_seqlens: torch.Tensor,
    rank: int | torch.Tensor | None,
    world_size: int | None,
    place: Place,
    layout: Layout,
) -> torch.Tensor:
    """Return the checked `cu_seqlens`; `ValueError` if `rank` or `world_size` contradicts the group."""
    own_rank = place.rank if rank is None else rank
    cu_seqlens, own_rank, _ = check_batch(cu_seqlens, own_rank, place.world_size, layout)
    if isinstance(own_rank, torch.Tensor) or own_rank != place.rank:
        raise ValueError(f"rank: expected None or that in the group, {place.rank}, got {rank}")
    if world_size is not None and check_world_size(world_size) != place.world_size:
        raise ValueError(f"world_size: expected None or the size of the group, {place.world_size}, got {world_size}")
    return cu_seqlens


def _form_of(layout: str, row_length: int | None, rows: int, world_size: int) -> Form:
    """Return the `Form` of a batch with these arguments; `ValueError` unless they fit each other."""
    if layout == Layout.ROW and world_size > 1:
        return Form(Layout.ROW.value, *check_packed_rows(row_length, rows, world_size))
    if layout == Layout.ROW:
        check_packed_rows(0 if row_length is None else row_length, rows, world_size)
    for name, given, without in (("row_length", row_length, None), ("rows", rows, 1)):
        if layout == Layout.DOCUMENT and given != without:
            raise ValueError(f"{name}: expected {without} with layout 'document', got {given!r}")
    return Form(Layout(layout).value)


def _check_host_rows(cu_seqlens, form: Form, world_size: int) -> None:
    """Raise `ValueError` if offsets are on the host and a document does not lie within one packed row."""
    if not isinstance(cu_seqlens, torch.Tensor):
        offsets = as_cu_seqlens(cu_seqlens, 1, torch.device("cpu")).tolist()
        check_documents_in_rows(offsets, world_size, form.row_length, form.rows * form.row_length)


def as_batch(
    cu_seqlens: torch.Tensor | Batch,
    rank: int | torch.Tensor,
    world_size: int,
    method: str,
    q: torch.Tensor,
    form: Form = DOCUMENTS,
) -> Batch:
    """Return the prepared batch, or make a batch of this `form`, without tables, from offsets.

    Raises `ValueError` for a batch that was prepared for another rank, `world_size`, `method` or layout. If only the
    device knows the two ranks, and they differ, attention returns NaN. Offsets on the host are copied to the device of
    `q`, the rows of one rank; `ValueError` if they count more rows than all ranks have.
    """
    world_size = check_world_size(world_size)
    if not isinstance(cu_seqlens, Batch):
        if form.row_length:
            _check_host_rows(cu_seqlens, form, world_size)
        total = world_size * q.shape[0] if q.ndim and not isinstance(cu_seqlens, torch.Tensor) else None
        step = world_size if form.layout == Layout.DOCUMENT else 1
        cu_seqlens = as_cu_seqlens(cu_seqlens, step, q.device, total)
        rank = as_rank_argument(rank, world_size, cu_seqlens.device)
        host_rank = rank if isinstance(rank, int) else None
        own_rank = as_rank(rank, cu_seqlens.device)
        return Batch(cu_seqlens, own_rank, world_size, method, host_rank=host_rank, **form._asdict())
    batch = cu_seqlens
    if batch.layout != form.layout:
        raise ValueError(f"layout: expected that of the prepared batch, {batch.layout!r}, got {str(form.layout)!r}")
    if batch.world_size != world_size:
        raise ValueError(f"world_size: expected that of the prepared batch, {batch.world_size}, got {world_size}")
    if batch.method != method and world_size > 1:
        raise ValueError(f"method: expected that of the prepared batch, {batch.method!r}, got {method!r}")
    rank = as_rank_argument(rank, world_size, batch.cu_seqlens.device)
    if isinstance(rank, int) and batch.host_rank is not None:
        if rank != batch.host_rank:
            raise ValueError(f"rank: expected that of the prepared batch, {batch.host_rank}, got {rank}")
        return batch
    return batch if rank is batch.rank else _for_rank(batch, as_rank(rank, batch.cu_seqlens.device))


def _for_rank(batch: Batch, rank: torch.Tensor) -> Batch:
    """Return `batch`, made invalid on the device if it was prepared for another rank, so that attention returns NaN."""
    same = batch.rank == rank
    batch = dataclasses.replace(batch, rank=torch.where(same, batch.rank, -1))
    if batch.segments is None or batch.sequences is None:
        return batch
    of_no_rank = [torch.zeros_like(table) for table in (batch.segments, batch.sequences)]
    # `fill_` does not synchronise. An assignment would copy -1 to the device, and the host would wait for the copy.
    for table, columns in zip(
        of_no_rank, ((SegmentColumn.KV_LEN, SegmentColumn.KEYS), (SequenceColumn.KEYS,)), strict=True
    ):
        for column in columns:
            table.select(-1, column).select(-1, -1).fill_(-1)
    segments, sequences = batch.segments, batch.sequences
    return dataclasses.replace(
        batch,
        segments=torch.where(same, segments, of_no_rank[0]),
        sequences=torch.where(same, sequences, of_no_rank[1]),
    )


def tables_of(batch: Batch, backend: str) -> Tables:
    """Return the device tables of `batch` for the kernels of `backend`; build them if the batch has none."""
    if batch.segments is not None and batch.sequences is not None:
        return Tables(batch.segments, batch.sequences)
    layout, cu_seqlens = Method(batch.method).kv_layout.value, batch.cu_seqlens.contiguous()
    inputs = cu_seqlens, batch.rank, batch.world_size, layout, backend
    has_parts = batch.whole_cu_seqlens is not None
    if batch.lengths is not None or batch.layout == Layout.ROW or batch.halo or has_parts:
        inputs = *inputs, batch.lengths, batch.layout, batch.row_length, batch.rows
    if has_parts or batch.halo:
        whole = None if batch.whole_cu_seqlens is None else batch.whole_cu_seqlens.contiguous()
        inputs = *inputs, whole, batch.whole_tokens, batch.tokens * has_parts, *batch.limits_of_halo
    return Tables(*segment_tables(*inputs))
