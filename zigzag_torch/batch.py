"""`Batch`, which holds the lengths and device tables of a training step."""

import dataclasses
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.utils import _pytree as pytree

from zigzag_kernels.batch_checks import check_documents_in_rows
from zigzag_kernels.checks import check_world_size
from zigzag_kernels.modes import Layout, Method
from zigzag_kernels.segments.columns import SegmentColumn, SequenceColumn

from .arguments import (
    as_cu_seqlens,
    as_rank,
    as_rank_argument,
    is_padded,
)
from .autograd import segment_tables
from .parallel import Packing, Tables


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
        padded: whether the offsets come from `pad_to_zigzag` and count padding. Attention then needs a
            causal mask, or `lengths`.
        unsharded_rows: rows of the whole batch, if `prepare_batch` got it as `unsharded`; otherwise 0.
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
    padded: bool = False
    unsharded_rows: int = 0

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


def check_host_rows(cu_seqlens, form: Form, world_size: int) -> None:
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
            check_host_rows(cu_seqlens, form, world_size)
        total = world_size * q.shape[0] if q.ndim and not isinstance(cu_seqlens, torch.Tensor) else None
        step = world_size if form.layout == Layout.DOCUMENT else 1
        padded = is_padded(cu_seqlens)
        cu_seqlens = as_cu_seqlens(cu_seqlens, step, q.device, total)
        rank = as_rank_argument(rank, world_size, cu_seqlens.device)
        host_rank = rank if isinstance(rank, int) else None
        own_rank = as_rank(rank, cu_seqlens.device)
        known = {"host_rank": host_rank, "padded": padded}
        return Batch(cu_seqlens, own_rank, world_size, method, **known, **form._asdict())
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
