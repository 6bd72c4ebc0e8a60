"""The data path on the host, by NumPy alone: from documents to the rows of all ranks, their labels and offsets.

No function here touches a device, so that workers of a data loader can call them.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from zigzag_kernels.checks import check_int, check_layout, check_packed_rows, check_world_size
from zigzag_kernels.documents import PackedBatch, check_labels, check_not_shifted, fingerprint, pack_documents
from zigzag_kernels.layout import MAX_OFFSET, packed_row, row_position

INT32 = np.iinfo(np.int32)


class ShardedBatch(NamedTuple):
    """A sharded batch is what a training step needs of a batch of documents: NumPy arrays, and so a pytree.

    Rows `[W * T]` are those of rank 0, then of rank 1, and so on: their spec on a mesh is `P("cp")`, that of the other
    arrays `P()`. Batches of equal `tokens` and `max_documents` have equal shapes, so that a step compiles once.

    Attributes:
        input_ids: `[W * T]` int32; padding is `pad_token_id`.
        labels: `[W * T]` int32, the next token of the same document; `ignore_index` at its end and for padding.
        position_ids: `[W * T]` int32, the position of every row in its document.
        loss_mask: `[W * T]` bool, the rows that have a label.
        cu_seqlens: `[N + 1]` int32, offsets over all ranks, as `prepare_batch` takes them.
        lengths: `[N]` int32, real tokens of each document.
        num_targets: one int32, the labels of all ranks together.
        fingerprint: `[2]` uint32, which differ if any token or label of the batch does.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    position_ids: np.ndarray
    loss_mask: np.ndarray
    cu_seqlens: np.ndarray
    lengths: np.ndarray
    num_targets: np.ndarray
    fingerprint: np.ndarray


def shard_documents(
    documents: Sequence,
    world_size: int,
    *,
    labels: Sequence | None = None,
    pad_token_id: int = 0,
    ignore_index: int = -100,
    tokens: int | None = None,
    max_documents: int | None = None,
    layout: str = "document",
) -> ShardedBatch:
    """Return the rows of all ranks of a batch of documents, with labels, positions and what attention needs.

    Args:
        documents: token ids of each document: lists or NumPy arrays `[n]` of integers that int32 holds.
        world_size: W, the number of ranks.
        labels: for each document the label of every token in its own place, such as its ids with `ignore_index` for a
            prompt; they are shifted here. None is the ids themselves.
        pad_token_id: token of padding rows.
        ignore_index: label of rows that have none.
        tokens: T, rows of each rank, padding included; None is as few as this batch needs.
        max_documents: N, entries of the offsets; None is as many as there are documents.
        layout: "document", which splits every document over all ranks, or "row", which splits all as one row.

    Raises `ValueError` for documents that do not fit, with the number of tokens that are too many.
    """
    world_size = check_world_size(world_size)
    expected = "an integer that int32 holds"
    pad_token_id = check_int("pad_token_id", pad_token_id, INT32.min, INT32.max, expected)
    ignore_index = check_int("ignore_index", ignore_index, INT32.min, INT32.max, expected)
    parts = _integers("documents", documents)
    lengths = [len(part) for part in parts]
    packed = pack_documents(lengths, world_size, tokens=tokens, max_documents=max_documents, layout=layout)
    ids = np.concatenate([*parts, np.zeros(0, np.int64)])
    targets = ids
    starts = np.cumsum([0, *lengths])[:-1]
    first = np.zeros(len(ids), bool)  # the first token of a document is nobody's next token
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
    bits = fingerprint(lengths, arrays) % 2**64
    rows, positions, is_last = _places(packed)
    label_rows = np.where(is_last, -1, rows + (rows >= 0))
    local_labels = _taken(targets, label_rows, ignore_index)
    return ShardedBatch(
        input_ids=_taken(ids, rows, pad_token_id),
        labels=local_labels,
        position_ids=positions.astype(np.int32),
        loss_mask=local_labels != ignore_index,
        cu_seqlens=np.array(packed.cu_seqlens, np.int32),
        lengths=np.array(packed.real_lengths, np.int32),
        num_targets=np.array(((targets != ignore_index) & ~first).sum(), np.int32),
        fingerprint=np.array([bits % 2**32, bits >> 32], np.uint32),
    )


def unshard_rows(x: np.ndarray, batch: ShardedBatch, world_size: int, *, layout: str = "document") -> np.ndarray:
    """Return `x [W * T, ...]`, rows of all ranks, in the order of the documents, one after another, without padding.

    `world_size` and `layout` are those that the batch was made with.
    """
    world_size, layout = check_world_size(world_size), check_layout(layout)
    rows, x = len(batch.input_ids), np.asarray(x)
    if rows % world_size:
        raise ValueError(f"world_size: expected a divisor of the {rows} rows of the batch, got {world_size}")
    if not x.ndim or len(x) != rows:
        raise ValueError(f"x: expected [W * T, ...] with the {rows} rows of the batch, got shape {x.shape}")
    lengths = tuple(batch.lengths.tolist())
    packed = PackedBatch(lengths, world_size, rows // world_size, len(lengths), layout)
    if packed.cu_seqlens != batch.cu_seqlens.tolist():
        raise ValueError(
            f"layout: expected that of the batch, and its world_size, got {layout.value!r} and {world_size}"
        )
    held, _, _ = _places(packed)
    order = np.empty(sum(lengths), np.int64)
    order[held[held >= 0]] = np.flatnonzero(held >= 0)
    return x[order]


def reorder_rows(x: np.ndarray, world_size: int, *, to_contiguous: bool = False) -> np.ndarray:
    """Return packed rows `x [B, S, ...]` with the tokens of each in the order of the ranks, as the row layout has them.

    Rank 0's tokens come first, then those of rank 1, and so on, so that `P("data", "context")` gives each device its
    own. MaxText's load-balanced reordering is the same. `to_contiguous` undoes it.

    Raises `ValueError` unless S is a multiple of `2 * world_size`; one rank takes any S.
    """
    world_size, x = check_world_size(world_size), np.asarray(x)
    if x.ndim < 2:
        raise ValueError(f"x: expected rows [B, S, ...], got shape {x.shape}")
    length, _ = check_packed_rows(x.shape[1], 1, world_size)
    ranks, local = np.arange(world_size)[:, None], np.arange(length // world_size)[None, :]
    order = packed_row(local, length, ranks, world_size).reshape(-1)
    return x[:, np.argsort(order) if to_contiguous else order]


def _places(packed: PackedBatch) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return of the rows of all ranks `[W * T]`: token of the concatenated batch, -1 for padding; position; is last.

    The position is that in the document, and the last token of a document is nobody's predecessor.
    """
    world_size, lengths = packed.world_size, np.array([*packed.lengths, 0], np.int64)  # the last one is padding
    ranks, local = np.arange(world_size)[:, None], np.arange(packed.tokens)[None, :]
    offsets = np.array(packed.cu_seqlens[: len(lengths)], np.int64)
    if packed.row_length is None or world_size == 1:
        starts = offsets // world_size
        document = np.searchsorted(starts, local, side="right") - 1
        padded = np.diff(offsets, append=offsets[-1])[document]
        position = row_position(local - starts[document], padded, ranks, world_size)
    else:
        row = packed_row(local, packed.row_length, ranks, world_size)
        document = np.searchsorted(offsets, row, side="right") - 1
        position = row - offsets[document]
    real = position < lengths[document]
    first = np.cumsum(lengths) - lengths
    rows = np.where(real, first[document] + position, -1)
    return rows.ravel(), (position * real).ravel(), (position == lengths[document] - 1).ravel()


def _integers(name: str, documents) -> list[np.ndarray]:
    """Return each document as an array `[n]` int64; `ValueError` for anything else than integers that int32 holds."""
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
    """Return `values[rows]` as int32, and `fill` where a row is -1."""
    return np.append(values, fill)[rows].astype(np.int32)
