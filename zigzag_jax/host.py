"""The data path on the host, in NumPy only: it makes rows, labels and offsets of all ranks from documents.

No function here uses a device, so that worker processes of a data loader can call them.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import PartitionSpec as P

from zigzag_kernels.checks import check_int, check_packed_rows, check_world_size
from zigzag_kernels.documents import (
    DocumentPlan,
    PackedBatch,
    check_labels,
    check_not_shifted,
    deal_documents,
    fingerprint,
)
from zigzag_kernels.layout import MAX_OFFSET, packed_row

INT32 = np.iinfo(np.int32)


_OF_RANKS = "input_ids", "labels", "position_ids", "loss_mask", "rows", "whole_cu_seqlens"
_SHARED = "cu_seqlens", "lengths", "num_targets", "fingerprint"


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=(*_OF_RANKS, *_SHARED),
    meta_fields=("world_size", "layout", "whole_tokens", "tokens"),
)
@dataclass(frozen=True)
class ShardedBatch:
    """A batch of documents, distributed over all ranks for a training step: a pytree of NumPy arrays.

    The rows `[W * T]` of rank 0 come first, then the rows of rank 1, and so on; `specs` returns how arrays are sharded
    over a mesh. A rank has its whole documents and their padding, then its chunks of the split documents and their
    padding, as a plan decides. Batches with the same `tokens`, `whole_tokens`, `max_whole` and `max_split` have the
    same shapes, so that a step compiles once.

    Attributes:
        input_ids: `[W * T]` int32; padding is `pad_token_id`.
        labels: `[W * T]` int32, the next token of the same document; `ignore_index` at its end and for padding.
        position_ids: `[W * T]` int32, the position of every row in its document.
        loss_mask: `[W * T]` bool, True for rows that have a label.
        rows: `[W * T]` int32, the number of the token in the concatenated documents that each row holds; -1 for
            padding.
        whole_cu_seqlens: `[W * (N + 1)]` int32, for each rank the offsets of its whole documents in its rows.
        cu_seqlens: `[M + 1]` int32, offsets of the split documents over all ranks.
        lengths: `[M]` int32, real tokens of each split document.
        num_targets: one int32, the number of labels on all ranks together.
        fingerprint: `[2]` uint32, a hash of all tokens and labels of the batch, and of the plan.
        world_size: W, the number of ranks.
        layout: "document" or "row". In the row layout all documents count as split.
        whole_tokens: rows of each rank for whole documents, the first rows of each rank.
        tokens: T, rows of each rank.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    position_ids: np.ndarray
    loss_mask: np.ndarray
    rows: np.ndarray
    whole_cu_seqlens: np.ndarray
    cu_seqlens: np.ndarray
    lengths: np.ndarray
    num_targets: np.ndarray
    fingerprint: np.ndarray
    world_size: int
    layout: str
    whole_tokens: int
    tokens: int

    def specs(self, axis: str | tuple[str, ...] = "cp") -> "ShardedBatch":
        """Return the `PartitionSpec` of each array over the mesh axes `axis`, as a batch of the same structure."""
        specs: Any = dict.fromkeys(_OF_RANKS, P(axis)) | dict.fromkeys(_SHARED, P())
        if self.world_size == 1:  # the only rank has all whole documents
            specs["whole_cu_seqlens"] = P()
        return dataclasses.replace(self, **specs)


def shard_documents(
    documents: Sequence,
    world_size: int,
    *,
    labels: Sequence | None = None,
    pad_token_id: int = 0,
    ignore_index: int = -100,
    tokens: int | None = None,
    max_documents: int | None = None,
    max_whole: int | None = None,
    max_split: int | None = None,
    layout: str = "document",
    split_above: int | None = None,
    split_tokens: int | None = None,
    window_size: tuple[int | None, int | None] = (-1, -1),
    attention_chunk: int = 0,
    causal: bool = True,
) -> ShardedBatch:
    """Return the rows, labels, positions and offsets of all ranks, for a batch of documents.

    Args:
        documents: token ids of each document: lists or NumPy arrays `[n]` of integers that int32 holds.
        world_size: W, the number of ranks.
        labels: for each document, the label of every token in the token's own place, such as its id, or `ignore_index`
            for tokens of a prompt. This function shifts the labels. None: the token ids.
        pad_token_id: token of padding rows.
        ignore_index: label of rows that have none.
        tokens: T, the rows of each rank, with padding. None: as few as this batch needs.
        max_documents: the most documents that a batch may have. None: the number of documents of this batch.
        max_whole: N, the most whole documents that a rank may have. None: twice a rank's share of `max_documents`. Do
            not choose a much larger number: kernels choose their tiles by the mean length, rows divided by N.
        max_split: M, the most split documents. None: `max_documents`.
        layout: "document", in which `plan_documents` decides which documents are split, or "row", in which all
            documents are one packed row that is split.
        split_above: split the documents longer than this, and others only if the batch does not fit otherwise; 0 splits
            all. None: split as few tokens as make the work of all ranks about equal.
        split_tokens: rows of each rank for split documents, with padding. A fixed number gives all steps the same
            shapes. None: the fewest eighths of `tokens` for which a plan exists, or as few as this batch needs if
            `tokens` is None.
        window_size, attention_chunk, causal: the mask for which work is predicted, as in `zigzag_attention`.

    Raises `ValueError` for documents that do not fit; the error says how many tokens are too many.
    """
    world_size = check_world_size(world_size)
    expected = "an integer that int32 holds"
    pad_token_id = check_int("pad_token_id", pad_token_id, INT32.min, INT32.max, expected)
    ignore_index = check_int("ignore_index", ignore_index, INT32.min, INT32.max, expected)
    parts = _integers("documents", documents)
    lengths = [len(part) for part in parts]
    sizes = {"tokens": tokens, "max_documents": max_documents, "max_whole": max_whole, "max_split": max_split}
    mask = {"window_size": window_size, "attention_chunk": attention_chunk, "causal": causal}
    packed = deal_documents(
        lengths, world_size, layout=layout, split_above=split_above, split_tokens=split_tokens, **sizes, **mask
    )
    ids = np.concatenate([*parts, np.zeros(0, np.int64)])
    targets = ids
    starts = np.cumsum([0, *lengths])[:-1]
    first = np.zeros(len(ids), bool)  # first tokens of documents, which no row has to predict
    first[starts[np.array(lengths, np.int64) > 0]] = True
    if labels is not None:
        own = _integers("labels", labels)
        check_labels(lengths, [len(part) for part in own])
        targets = np.concatenate([*own, np.zeros(0, np.int64)])
        known = targets != ignore_index
        following = ~first[1:] & known[:-1]
        shifted = bool(following.any()) and np.array_equal(targets[:-1][following], ids[1:][following])
        check_not_shifted(np.array_equal(targets[known], ids[known]), shifted)
    arrays = [x.astype("<i8").tobytes() for x in ((ids,) if targets is ids else (ids, targets))]
    bits = fingerprint(lengths, [*arrays, packed.key]) % 2**64
    if isinstance(packed, DocumentPlan):
        whole = [packed.whole_cu_seqlens(rank) for rank in range(world_size)]
        offsets, split_lengths, whole_tokens = packed.split_cu_seqlens, packed.split_lengths, packed.whole_tokens
        rows, positions, is_last = _places_in_plan(packed)
    else:
        whole, whole_tokens, offsets, split_lengths = [[0]] * world_size, 0, packed.cu_seqlens, packed.real_lengths
        rows, positions, is_last = _places_in_row(packed)
    label_rows = np.where(is_last, -1, rows + (rows >= 0))
    local_labels = _taken(targets, label_rows, ignore_index)
    return ShardedBatch(
        input_ids=_taken(ids, rows, pad_token_id),
        labels=local_labels,
        position_ids=positions.astype(np.int32),
        loss_mask=local_labels != ignore_index,
        rows=rows.astype(np.int32),
        whole_cu_seqlens=np.array(whole, np.int32).ravel(),
        cu_seqlens=np.array(offsets, np.int32),
        lengths=np.array(split_lengths, np.int32),
        num_targets=np.array(((targets != ignore_index) & ~first).sum(), np.int32),
        fingerprint=np.array([bits % 2**32, bits >> 32], np.uint32),
        world_size=world_size,
        layout=str(layout),
        whole_tokens=whole_tokens,
        tokens=packed.tokens,
    )


class PackedRows(NamedTuple):
    """Documents packed into rows of equal length for a training step: a pytree of NumPy arrays.

    The tokens of each row are in the order of the ranks (`reorder_rows`).

    Attributes:
        input_ids: `[B, S]` int32; padding is `pad_token_id`.
        labels: `[B, S]` int32, the next token of the same document; `ignore_index` at its end and for padding.
        position_ids: `[B, S]` int32, the position of every token in its document.
        segment_ids: `[B, S]` int32, the number of the document in its row, from 1; 0 is padding.
        num_targets: one int32, the number of labels in all rows together.
        fingerprint: `[2]` uint32, a hash of all tokens and labels of the batch.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    position_ids: np.ndarray
    segment_ids: np.ndarray
    num_targets: np.ndarray
    fingerprint: np.ndarray

    def specs(self, axis: str | tuple[str, ...], batch_axis: str | tuple[str, ...] | None = None) -> "PackedRows":
        """Return the specs of the arrays on a mesh, with tokens sharded over `axis` and rows over `batch_axis`."""
        rows: Any = P(batch_axis, axis)
        shared: Any = P()
        return PackedRows(rows, rows, rows, rows, shared, shared)


def pack_rows(
    documents: Sequence,
    rows: int,
    row_length: int,
    world_size: int = 1,
    *,
    labels: Sequence | None = None,
    pad_token_id: int = 0,
    ignore_index: int = -100,
) -> PackedRows:
    """Pack whole documents into `rows` rows of `row_length` tokens, with each row's tokens in the order of its ranks.

    Each document, longest first, goes into the row with the most room left, which fills rows evenly. Within a row,
    documents keep the order of the argument.

    Args:
        documents, labels, pad_token_id, ignore_index: as in `shard_documents`.
        rows: B, the number of rows.
        row_length: S, tokens of a row, a multiple of `2 * world_size`.
        world_size: W, the number of ranks that share each row: the devices of the context axis.

    Raises `ValueError` for documents that do not fit.
    """
    world_size = check_world_size(world_size)
    row_length, rows = check_packed_rows(row_length, rows, world_size)
    lengths = [len(part) for part in _integers("documents", documents)]
    if labels is not None:
        check_labels(lengths, [len(part) for part in _integers("labels", labels)])
    held, room = [[] for _ in range(rows)], [row_length] * rows
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        row = room.index(max(room))
        if lengths[i] > room[row]:
            raise ValueError(
                f"documents: expected {sum(lengths)} tokens that fit into {rows} rows of {row_length}, got "
                f"{lengths[i]} where the emptiest row has room for {room[row]} (document {i})"
            )
        held[row].append(i)
        room[row] -= lengths[i]
    common: dict[str, Any] = {"pad_token_id": pad_token_id, "ignore_index": ignore_index, "layout": "row"}
    common["tokens"] = row_length // world_size
    parts, segment_ids = [], np.zeros((rows, row_length), np.int32)
    for row, numbers in enumerate(map(sorted, held)):
        own = None if labels is None else [labels[i] for i in numbers]
        parts.append(shard_documents([documents[i] for i in numbers], world_size, labels=own, **common))
        ids = np.repeat(np.arange(1, len(numbers) + 1), [lengths[i] for i in numbers])
        segment_ids[row, : len(ids)] = ids
    bits = fingerprint(lengths, [part.fingerprint.tobytes() for part in parts]) % 2**64
    return PackedRows(
        input_ids=np.stack([part.input_ids for part in parts]),
        labels=np.stack([part.labels for part in parts]),
        position_ids=np.stack([part.position_ids for part in parts]),
        segment_ids=reorder_rows(segment_ids, world_size),
        num_targets=np.array(sum(int(part.num_targets) for part in parts), np.int32),
        fingerprint=np.array([bits % 2**32, bits >> 32], np.uint32),
    )


def unshard_rows(x: np.ndarray, batch: ShardedBatch) -> np.ndarray:
    """Return the rows `x [W * T, ...]` of all ranks in the order of the documents of `batch`, without padding.

    The rows of rank 0 come first in `x`, then the rows of rank 1, and so on. Raises `ValueError` for another number of
    rows.
    """
    if not isinstance(batch, ShardedBatch):
        raise ValueError(f"batch: expected a ShardedBatch, got {type(batch).__name__}")
    x, rows = np.asarray(x), np.asarray(batch.rows)
    if not x.ndim or len(x) != len(rows):
        raise ValueError(f"x: expected [W * T, ...] with the {len(rows)} rows of the batch, got shape {x.shape}")
    held = np.flatnonzero(rows >= 0)
    order = np.empty(len(held), np.int64)
    order[rows[held]] = held
    return x[order]


def reorder_rows(x: np.ndarray, world_size: int, *, to_contiguous: bool = False) -> np.ndarray:
    """Return packed rows `x [B, S, ...]` with the tokens of each row in the order of the row layout.

    The tokens of rank 0 come first, then the tokens of rank 1, and so on, so that `P("data", "context")` gives each
    device its own tokens. MaxText's load-balanced reordering is the same. `to_contiguous` undoes the reordering.

    Raises `ValueError` unless S is a multiple of `2 * world_size`; one rank takes any S.
    """
    world_size, x = check_world_size(world_size), np.asarray(x)
    if x.ndim < 2:
        raise ValueError(f"x: expected rows [B, S, ...], got shape {x.shape}")
    length, _ = check_packed_rows(x.shape[1], 1, world_size)
    ranks, local = np.arange(world_size)[:, None], np.arange(length // world_size)[None, :]
    order = packed_row(local, length, ranks, world_size).reshape(-1)
    return x[:, np.argsort(order) if to_contiguous else order]


def _places_in_plan(plan: DocumentPlan) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (token, position, is last token of its document) for the rows `[W * T]` of all ranks.

    The token is its number in the concatenated batch, or -1 for padding; the position is the position in the document.
    """
    shape = plan.world_size, plan.tokens
    rows, positions, is_last = np.full(shape, -1, np.int64), np.zeros(shape, np.int64), np.zeros(shape, bool)
    starts = np.cumsum([0, *plan.lengths])
    for rank in range(plan.world_size):
        for row, document, position, tokens in plan.pieces(rank):
            places = slice(row, row + tokens)
            positions[rank, places] = np.arange(position, position + tokens)
            rows[rank, places] = starts[document] + positions[rank, places]
            is_last[rank, row + tokens - 1] = position + tokens == plan.lengths[document]
    return rows.ravel(), positions.ravel(), is_last.ravel()


def _places_in_row(packed: PackedBatch) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the results of `_places_in_plan` for documents that are cut into chunks as one packed row."""
    world_size, lengths = packed.world_size, np.array([*packed.lengths, 0], np.int64)  # the last one is padding
    ranks, local = np.arange(world_size)[:, None], np.arange(packed.tokens)[None, :]
    offsets = np.array(packed.cu_seqlens[: len(lengths)], np.int64)
    row = packed_row(local, world_size * packed.tokens, ranks, world_size) if world_size > 1 else local
    document = np.searchsorted(offsets, row, side="right") - 1
    position = row - offsets[document]
    real = position < lengths[document]
    first = np.cumsum(lengths) - lengths
    rows = np.where(real, first[document] + position, -1)
    return rows.ravel(), (position * real).ravel(), (position == lengths[document] - 1).ravel()


def _integers(name: str, documents) -> list[np.ndarray]:
    """Return each document as an array `[n]` int64; `ValueError` unless it has integers that int32 can hold."""
    if isinstance(documents, str | bytes | Mapping) or not hasattr(documents, "__len__"):
        raise ValueError(f"{name}: expected a list of documents, got {type(documents).__name__}")
    result = []
    for i, document in enumerate(documents):
        try:
            ids = np.asarray(document)
        except (TypeError, ValueError):
            raise ValueError(f"{name}: expected integers [n], got {type(document).__name__} (document {i})") from None
        if ids.ndim != 1 or (len(ids) and ids.dtype.kind not in "iu"):
            raise ValueError(f"{name}: expected integers [n], got shape {ids.shape} {ids.dtype} (document {i})")
        if len(ids) and not (ids.min() >= INT32.min and ids.max() <= MAX_OFFSET):
            raise ValueError(
                f"{name}: expected integers that int32 holds, got {ids.min()} to {ids.max()} (document {i})"
            )
        result.append(ids.astype(np.int64))
    return result


def _taken(values: np.ndarray, rows: np.ndarray, fill: int) -> np.ndarray:
    """Return `values[rows]` as int32, with `fill` where a row is -1."""
    return np.append(values, fill)[rows].astype(np.int32)
