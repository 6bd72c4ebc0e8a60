"""The data path: it makes the rows, labels and tables of one rank from documents, and restores documents from rows."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.utils._pytree as pytree

from zigzag_kernels.checks import check_int, check_layout, check_rank, check_world_size, dtype_name
from zigzag_kernels.documents import DocumentPlan, check_labels, check_not_shifted, deal_documents, fingerprint
from zigzag_kernels.halo import sizes_of_documents

from .arguments import check_tensor
from .batch import Batch
from .parallel.agreement import agree, place_in, resolve
from .parallel.collectives import all_gather
from .plans import Parts, order_of_tokens
from .prepare import prepare_batch
from .validate import validate

INT64 = torch.iinfo(torch.int64)
_OF_TOKENS = "attention_mask", "position_ids"  # entries of an example that say whether it is one whole document


@dataclass(frozen=True)
class ShardedBatch:
    """The part of a batch of documents that one rank needs for a training step.

    `shard_documents` and `ZigzagCollator` make it, from a plan of documents. Its rows are the whole documents of this
    rank and their padding, then this rank's chunks of the split documents and their padding. Batches with the same
    `tokens`, `whole_tokens`, `max_whole` and `max_split` have the same shapes.

    Attributes:
        input_ids: `[T]` int64, the tokens of this rank; padding is `pad_token_id`.
        labels: `[T]` int64, the next token of the same document; `ignore_index` at the document's end and for padding.
        position_ids: `[T]` int32, the position of every row in its document.
        loss_mask: `[T]` bool, True for rows that have a label.
        rows: `[T]` int64, the number of the token in the concatenated documents that each row holds; -1 for padding.
        whole_cu_seqlens: `[N + 1]` int32, offsets of this rank's whole documents in its rows.
        cu_seqlens: `[M + 1]` int32, offsets of the split documents over all ranks, for `prepare_batch`.
        lengths: `[M]` int32, real tokens of each split document.
        num_targets: one int64, the number of labels on all ranks together.
        fingerprint: `[1]` int64, a hash of all tokens and labels of the whole batch, and of the plan.
        rank, world_size: the rank that has these rows, and the number of ranks.
        layout: "document" or "row". In the row layout all documents count as split.
        whole_tokens: rows for whole documents, the first rows of each rank.
        shortest_chunk: rows of the shortest chunk that needs a full halo, from which `prepare` chooses a method; 0 in
            the row layout.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor
    loss_mask: torch.Tensor
    rows: torch.Tensor
    whole_cu_seqlens: torch.Tensor
    cu_seqlens: torch.Tensor
    lengths: torch.Tensor
    num_targets: torch.Tensor
    fingerprint: torch.Tensor
    rank: int
    world_size: int
    layout: str
    whole_tokens: int
    shortest_chunk: int = 0

    @property
    def row_length(self) -> int | None:
        """Tokens of the packed row over all ranks, in the row layout with several ranks; otherwise None."""
        return self.world_size * len(self.input_ids) if self.layout == "row" and self.world_size > 1 else None

    @property
    def parts(self) -> Parts:
        """The offsets of whole and split documents, for `prepare_batch`; only in the layout "document"."""
        offsets = self.whole_cu_seqlens, self.cu_seqlens, self.lengths
        return Parts(*offsets, self.whole_tokens, len(self.input_ids), self.shortest_chunk)

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> "ShardedBatch":
        """Return this batch with its tensors on `device`; `non_blocking` as in `torch.Tensor.to`."""
        return self._map(lambda x: x.to(device, non_blocking=non_blocking))

    def pin_memory(self, device: torch.device | str | None = None) -> "ShardedBatch":
        """Return this batch in pinned memory, for `device` if it is given; data loaders call this function."""
        return self._map(lambda x: x.pin_memory() if device is None else x.pin_memory(device))

    def prepare(self, group=None, *, method: str | None = None, backend: str | None = None, **reach) -> Batch:
        """Return the `Batch` that attention takes, for all layers and both passes.

        The ranks of a `group` compare lengths and `fingerprint`; attention is NaN if they have rows of different
        batches, and `validate` raises an error. `method` and `backend` are arguments of `prepare_batch`, and so are the
        arguments `reach`: `window_size`, `attention_chunk` and `max_seqlen`. Raises `ValueError` if the rows belong to
        another rank of the group.
        """
        return prepare_batch(
            self.cu_seqlens if self.layout == "row" else self.parts,
            self.rank,
            self.world_size,
            method=method,
            group=group,
            backend=backend,
            unsharded=None if group is None else self.fingerprint,
            layout=self.layout,
            row_length=self.row_length,
            **reach,
        )

    def model_kwargs(
        self,
        group=None,
        *,
        method: str | None = None,
        backend: str | None = None,
        gradients: str | None = None,
        **reach,
    ) -> dict:
        """Return the keyword arguments of a transformers model, after a call of `zigzag_torch.hf.use_mesh` for it.

        Rows are `[1, T]`, and `zigzag_batch` is the result of `prepare` with `group`, `method`, `backend` and `reach`.
        The empty `attention_mask` makes any other attention implementation raise an error. With `gradients` the
        arguments include the labels as `shift_labels`, and the model's `loss` is the share of this rank: the mean loss
        of all targets is the sum of all shares ("sum"), or their mean ("mean"), as in `token_mean_loss`. Without
        `gradients`, pass the logits to `token_mean_loss`, as is necessary for models whose loss shifts labels itself.
        Raises `ValueError` for any other `gradients`.
        """
        if gradients not in (None, "sum", "mean"):
            raise ValueError(f"gradients: expected None, 'sum' or 'mean', got {gradients!r}")
        result = {
            "input_ids": self.input_ids[None],
            "position_ids": self.position_ids[None],
            "attention_mask": self.loss_mask.new_empty((0, 0, 0, 0)),
            "zigzag_batch": self.prepare(group, method=method, backend=backend, **reach),
            "use_cache": False,
        }
        if gradients is not None:
            # A model that shifts labels itself reads `labels`; these are empty, so it raises an error.
            result |= {"labels": self.labels.new_empty((1, 0)), "shift_labels": self.labels[None]}
            shares = self.world_size if gradients == "mean" else 1
            result["num_items_in_batch"] = self.num_targets.clamp(min=1) / shares
        return result

    def validate(self, group=None, *, halo: int = 0, max_seqlen: int | None = None) -> None:
        """Raise `ValueError` for invalid values, or if the ranks of `group` hold rows of different batches.

        `halo` and `max_seqlen` are as in `zigzag_torch.validate`. The host waits for the device.
        """
        common = {"group": group, "unsharded": self.fingerprint, "halo": halo, "max_seqlen": max_seqlen}
        if self.layout == "document":
            return validate(self.parts, self.world_size, **common)
        total, form = self.world_size * len(self.input_ids), {"layout": "row", "row_length": self.row_length or None}
        return validate(self.cu_seqlens, self.world_size, total, lengths=self.lengths, **form, **common)

    def _map(self, function) -> "ShardedBatch":
        return dataclasses.replace(self, **{name: function(getattr(self, name)) for name in _TENSORS})


_CONSTANTS = "rank", "world_size", "layout", "whole_tokens", "shortest_chunk"
_TENSORS = tuple(field.name for field in dataclasses.fields(ShardedBatch) if field.name not in _CONSTANTS)


def _flatten(batch: ShardedBatch) -> tuple[list, list]:
    return [getattr(batch, name) for name in _TENSORS], [getattr(batch, name) for name in _CONSTANTS]


def _unflatten(tensors, constants: list) -> ShardedBatch:
    return ShardedBatch(*tensors, *constants)


pytree.register_pytree_node(ShardedBatch, _flatten, _unflatten, serialized_type_name="zigzag_torch.ShardedBatch")


def shard_documents(
    documents: Sequence,
    rank: int,
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
    """Return the rows, labels, positions and offsets of `rank`, for a batch of documents, on the CPU.

    Args:
        documents: token ids of each document: lists, NumPy arrays or tensors `[n]` of integers. Every rank must pass
            the same documents.
        rank, world_size: this rank, and the number of ranks.
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
    world_size, layout = check_world_size(world_size), check_layout(layout)
    rank = check_rank(rank, world_size, False)
    pad_token_id = check_int("pad_token_id", pad_token_id, INT64.min, INT64.max, "an integer")
    ignore_index = check_int("ignore_index", ignore_index, INT64.min, INT64.max, "an integer")
    parts = _integers("documents", documents)
    lengths = [len(part) for part in parts]
    sizes = {"tokens": tokens, "max_documents": max_documents, "max_whole": max_whole, "max_split": max_split}
    mask = {"window_size": window_size, "attention_chunk": attention_chunk, "causal": causal}
    packed = deal_documents(
        lengths, world_size, layout=layout, split_above=split_above, split_tokens=split_tokens, **sizes, **mask
    )
    ids = _joined(parts)
    targets = ids
    if labels is not None:
        own = _integers("labels", labels)
        check_labels(lengths, [len(part) for part in own])
        targets = _joined(own)
    first = torch.zeros(len(ids), dtype=torch.bool)  # first tokens of documents, which no row has to predict
    starts = torch.tensor([0, *lengths]).cumsum(0)[:-1]
    first[starts[torch.tensor(lengths, dtype=torch.int64) > 0]] = True
    if labels is not None:
        known = targets != ignore_index
        following = ~first[1:] & known[:-1]
        shifted = bool(following.any()) and torch.equal(targets[:-1][following], ids[1:][following])
        check_not_shifted(torch.equal(targets[known], ids[known]), shifted)
    rows, label_rows = _int64(packed.rows(rank)), _int64(packed.label_rows(rank))
    local_labels = _taken(targets, label_rows, ignore_index)
    is_plan = isinstance(packed, DocumentPlan)
    whole = packed.whole_cu_seqlens(rank) if is_plan else [0]
    split = (packed.split_cu_seqlens, packed.split_lengths) if is_plan else (packed.cu_seqlens, packed.real_lengths)
    whole_cu_seqlens, cu_seqlens, real_lengths = (torch.tensor(x, dtype=torch.int32) for x in (whole, *split))
    arrays = [x.numpy().tobytes() for x in ((ids,) if targets is ids else (ids, targets))]
    return ShardedBatch(
        input_ids=_taken(ids, rows, pad_token_id),
        labels=local_labels,
        position_ids=torch.tensor(packed.positions(rank), dtype=torch.int32),
        loss_mask=local_labels != ignore_index,
        rows=rows,
        whole_cu_seqlens=whole_cu_seqlens,
        cu_seqlens=cu_seqlens,
        lengths=real_lengths,
        num_targets=((targets != ignore_index) & ~first).sum(),
        fingerprint=torch.tensor([fingerprint(lengths, [*arrays, packed.key])]),
        rank=rank,
        world_size=world_size,
        layout=layout.value,
        whole_tokens=packed.whole_tokens if is_plan else 0,
        shortest_chunk=sizes_of_documents(*split, world_size).shortest_chunk if is_plan else 0,
    )


def _integers(name: str, documents) -> list[torch.Tensor]:
    """Return each document as a tensor `[n]` int64 on the CPU; `ValueError` for anything else than integers."""
    if isinstance(documents, str | bytes | Mapping) or not hasattr(documents, "__len__"):
        raise ValueError(f"{name}: expected a list of documents, got {type(documents).__name__}")
    result = []
    for i, document in enumerate(documents):
        try:
            ids = document if isinstance(document, torch.Tensor) else torch.tensor(document)
        except (TypeError, ValueError, RuntimeError, OverflowError):
            raise ValueError(f"{name}: expected integers [n], got {type(document).__name__} (document {i})") from None
        integers = not (ids.is_floating_point() or ids.is_complex() or ids.dtype in (torch.bool, torch.uint64))
        if ids.ndim != 1 or (len(ids) and not integers):
            raise ValueError(
                f"{name}: expected integers [n], got shape {tuple(ids.shape)} {dtype_name(ids)} (document {i})"
            )
        result.append(ids.detach().cpu().long())
    return result


def _joined(parts: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64)


def _int64(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64)


def _taken(values: torch.Tensor, rows: torch.Tensor, fill: int) -> torch.Tensor:
    """Return `values[rows]`, with `fill` where a row is -1."""
    return torch.cat((values, values.new_tensor([fill])))[rows]


class ZigzagCollator:
    """A collator for a `DataLoader`, which makes the `ShardedBatch` of this rank from a list of documents.

    Every rank of the group must load the same documents, so the sampler must not depend on the rank within the group.
    An instance holds only numbers, so that it can be sent to worker processes; it uses no collective and no device.
    """

    def __init__(
        self,
        group=None,
        *,
        tokens: int,
        max_documents: int,
        rank: int | None = None,
        world_size: int | None = None,
        pad_token_id: int = 0,
        ignore_index: int = -100,
        layout: str = "document",
        **options,
    ):
        """Make a collator for a rank of `group`, a process group or a 1-D DeviceMesh, or for `rank` of `world_size`.

        All other arguments, and the `options`, are as in `shard_documents`. With `split_tokens` all batches have the
        same shapes, so that a step compiles once. Without it there are at most nine different shapes, one for each
        share of split documents. Raises the errors of `shard_documents` for invalid arguments.
        """
        place = place_in(group)
        if group is not None and not (rank is None and world_size is None):
            raise ValueError(f"rank: expected None with a group, as well as world_size, got {rank} and {world_size}")
        self.world_size = place.world_size if world_size is None else check_world_size(world_size)
        if rank is None and group is None and self.world_size > 1:
            raise ValueError(f"rank: expected the rank to make batches for, as world_size is {world_size}, got None")
        self.rank = place.rank if rank is None else check_rank(rank, self.world_size, False)
        self.options = options | {"pad_token_id": pad_token_id, "ignore_index": ignore_index, "layout": layout}
        self.options |= {
            "tokens": check_int("tokens", tokens, 1),
            "max_documents": check_int("max_documents", max_documents, 1),
        }
        shard_documents([], self.rank, self.world_size, **self.options)  # raises here for options, not in a worker

    def __call__(self, examples: Sequence) -> ShardedBatch:
        """Return the batch of `examples`: token ids, or mappings with "input_ids" and perhaps "labels".

        An example is one document without padding: other entries are not used, but an "attention_mask" with a 0, and
        "position_ids" or "seq_lengths" of several documents raise `ValueError`.
        """
        if not any(isinstance(example, Mapping) for example in examples):
            return shard_documents(examples, self.rank, self.world_size, **self.options)
        documents, labels = [], []
        for i, example in enumerate(examples):
            if not isinstance(example, Mapping) or "input_ids" not in example:
                raise ValueError(
                    f"examples: expected a mapping with 'input_ids', got {type(example).__name__} at [{i}]"
                )
            _check_whole(example, i)
            documents.append(example["input_ids"])
            labels += [example["labels"]] if "labels" in example else []
        if labels and len(labels) != len(documents):
            raise ValueError(f"examples: expected 'labels' in all {len(documents)} or in none, got {len(labels)}")
        return shard_documents(documents, self.rank, self.world_size, labels=labels or None, **self.options)


def _check_whole(example: Mapping, i: int) -> None:
    """Raise `ValueError` if entries of an example say that it is padded, or that it has several documents."""
    mask, positions = (None if (x := example.get(name)) is None else torch.as_tensor(x) for name in _OF_TOKENS)
    if mask is not None and not bool(mask.all()):
        raise ValueError(
            f"attention_mask: expected documents without padding, got {int((mask == 0).sum())} zeros in examples[{i}]"
        )
    lengths = example.get("seq_lengths")  # of packed examples
    if isinstance(lengths, Sequence | torch.Tensor) and len(lengths) > 1:
        raise ValueError(f"seq_lengths: expected one document in each example, got several in examples[{i}]")
    if positions is not None and not torch.equal(positions, torch.arange(len(positions), device=positions.device)):
        raise ValueError(
            "position_ids: expected one document in each example, with positions from 0, got "
            f"{positions.tolist()[:16]} in examples[{i}]"
        )


def unshard_group(x: torch.Tensor, batch: ShardedBatch, group=None) -> torch.Tensor:
    """Gather `x [T, ...]` from all ranks of `group`, and return its rows in the order of the documents.

    The result `[tokens of all documents, ...]` has no padding. Every rank of the group makes this call, and its host
    waits for `batch.rows` of all ranks. The result is differentiable: a row of x gets the sum of the gradients of its
    copies on all ranks. Raises `ValueError` for rows that do not belong to `batch`.
    """
    check_tensor("x", x)
    if not isinstance(batch, ShardedBatch):
        raise ValueError(f"batch: expected a ShardedBatch, got {type(batch).__name__}")
    place = place_in(group)
    if place.world_size != batch.world_size:
        raise ValueError(f"group: expected the {batch.world_size} ranks of the batch, got {place.world_size}")
    tokens = len(batch.input_ids)
    if not x.ndim or x.shape[0] != tokens:
        raise ValueError(f"x: expected [T, ...] with the {tokens} rows of the batch, got shape {tuple(x.shape)}")
    gathered, rows = x, batch.rows.to(x.device)
    if place.group_name is not None and place.world_size > 1:
        facts = ("call", "unshard_group"), ("x", (tuple(x.shape), dtype_name(x)))
        agree(resolve(place.group_name), facts)
        gathered, rows = (all_gather(x, place.world_size, place.group_name) for x in (gathered, rows))
    return gathered[order_of_tokens(rows)]
