"""A mixin for the Trainer of transformers, with which the ranks of a group share each batch of documents."""

import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.utils.data import BatchSampler, DataLoader, Dataset, DistributedSampler

from ..data import ZigzagCollator
from ..parallel.agreement import place_in, resolve
from .registry import use_mesh

if TYPE_CHECKING:
    from transformers import Trainer as _Trainer
else:
    _Trainer = object

_BATCH = "zigzag_sharded"
_STRATEGIES = "random", "sequential"  # orders of the documents in training


class ZigzagTrainerMixin(_Trainer):
    """A mixin that lets a Trainer use the ranks of a group for each batch: `class T(ZigzagTrainerMixin, Trainer)`.

    The ranks of a group share the same documents of `train_dataset`; each group gets other documents. The items of a
    dataset are mappings with "input_ids" and optionally "labels", where each label is in the place of its own token.
    `per_device_train_batch_size` counts the documents of a batch, which the ranks of a group hold together.

    The loss is the mean over the targets of all ranks and all accumulated batches, and `evaluate` returns the mean over
    the targets of all batches. The gradients are correct with DistributedDataParallel and FSDP2, which by default
    average gradients over all processes.
    """

    def __init__(
        self,
        *args,
        group=None,
        tokens: int,
        method: str = "allgather",
        heads_k_stride: int | None = None,
        backend: str | None = None,
        pad_token_id: int = 0,
        **kwargs,
    ):
        """Make a Trainer for a `group`, a process group or 1-D DeviceMesh, with `tokens` rows on each rank.

        `tokens` includes padding, whose token is `pad_token_id`. `method`, `heads_k_stride` and `backend` are as in
        `zigzag_attention`; all other arguments are for the Trainer. Raises `NotImplementedError` for the arguments
        `data_collator`, `compute_metrics` and `compute_loss_func`, for label smoothing, for a `train_sampling_strategy`
        other than "random" and "sequential", and for context, sequence or tensor parallelism of accelerate's
        `ParallelismConfig`.
        """
        for name in ("data_collator", "compute_metrics", "compute_loss_func"):
            if kwargs.get(name) is not None:
                raise NotImplementedError(f"{name}: expected None, got {type(kwargs[name]).__name__}")
        place = place_in(group)
        self._zigzag_group, self._zigzag_size = group, place.world_size
        self._zigzag_method = {"method": method, "backend": backend}
        super().__init__(*args, **kwargs)
        if self.label_smoother is not None:
            raise NotImplementedError(f"label_smoothing_factor: expected 0, got {self.args.label_smoothing_factor}")
        if (strategy := self.args.train_sampling_strategy) not in _STRATEGIES:
            raise NotImplementedError(f"train_sampling_strategy: expected one of {_STRATEGIES}, got {strategy!r}")
        if self.args.n_gpu > 1:
            raise NotImplementedError(f"n_gpu: expected one process for each GPU, got {self.args.n_gpu} GPUs")
        if self.args.world_size > 1 and not self.args.average_tokens_across_devices:
            raise ValueError("average_tokens_across_devices: expected True, got False")
        if self.args.world_size % place.world_size:
            raise ValueError(
                f"group: expected a part of the {self.args.world_size} processes, got {place.world_size} ranks"
            )
        for name, size in (
            ("cp_size", super().get_cp_size()),
            ("sp_size", self.get_sp_size()),
            ("tp_size", self.get_tp_size()),
        ):
            if size > 1:
                raise NotImplementedError(
                    f"{name}: expected 1, got {size}: `group` alone says which ranks share a batch"
                )
        if not self.model_accepts_loss_kwargs:
            raise NotImplementedError(f"{type(self.model).__name__}: expected a forward that takes num_items_in_batch")
        model: Any = self.model
        use_mesh(model, group, method=method, heads_k_stride=heads_k_stride, backend=backend)
        self._zigzag_replicas, self._zigzag_replica = _replicas(place.group_name, self.args.world_size)
        self._zigzag_documents = {"tokens": tokens, "pad_token_id": pad_token_id}
        self._zigzag_evaluated = self._nothing_evaluated()

    def get_cp_size(self) -> int:
        """Return the number of ranks that share a batch; the Trainer divides the number of processes by it."""
        return self._zigzag_size

    def get_train_dataloader(self) -> DataLoader:
        """Return the loader of this group's documents.

        Their order is random, and another one in every epoch, unless the `train_sampling_strategy` is "sequential".
        """
        if self.train_dataset is None:
            raise ValueError("train_dataset: expected one for training, got None")
        return self._documents(self.train_dataset, self._train_batch_size, training=True)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """Return the loader of this group's documents of `eval_dataset`, in their order.

        If the number of groups does not divide the documents, the first documents are repeated, and count twice.
        """
        dataset: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        dataset = self.eval_dataset[dataset] if isinstance(dataset, str) else dataset  # pyright: ignore
        if dataset is None:
            raise ValueError("eval_dataset: expected one for evaluation, got None")
        return self._documents(dataset, self.args.eval_batch_size, training=False)

    def get_test_dataloader(self, test_dataset: Dataset) -> DataLoader:
        """Return the loader of this group's documents of `test_dataset`, in their order."""
        return self.get_eval_dataloader(test_dataset)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Return the loss of `model` for `inputs`, like `Trainer.prediction_step` with `prediction_loss_only`.

        Without `prediction_loss_only` it raises `NotImplementedError`, because the rows of logits are in zigzag order.
        `ignore_keys` only concern logits.
        """
        if not prediction_loss_only:
            raise NotImplementedError("prediction_loss_only: expected True, got False: take unshard_group for logits")
        loss: Any = super().prediction_step(model, inputs, True, ignore_keys)[0]
        targets = self._count_targets([inputs], self.args.device)
        self._zigzag_evaluated += torch.stack((loss.double() * targets, targets.double()))
        return loss, None, None

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ):
        """Evaluate the model on all batches of `dataloader`, like `Trainer.evaluation_loop`.

        `description`, `prediction_loss_only`, `ignore_keys` and `metric_key_prefix` are arguments of that function.
        The loss is the mean over the targets of all batches. The Trainer's own is the mean over batches, whatever the
        number of their targets.
        """
        total = self._zigzag_evaluated = self._nothing_evaluated()
        arguments = dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
        output: Any = super().evaluation_loop(*arguments)
        if self.args.world_size > 1:
            dist.all_reduce(total)
        output.metrics[f"{metric_key_prefix}_loss"] = (total[0] / total[1].clamp(min=1)).item()
        return output

    def _documents(self, dataset, batch_size: int, *, training: bool) -> DataLoader:
        if not hasattr(dataset, "__len__"):
            raise NotImplementedError(f"dataset: expected one with a length, got {type(dataset).__name__}")
        args = self.args
        seed = args.seed if args.data_seed is None else args.data_seed
        shuffle = training and args.train_sampling_strategy == "random"
        sampler = DistributedSampler(dataset, self._zigzag_replicas, self._zigzag_replica, shuffle, seed)
        collate = _Collator(self._zigzag_group, max_documents=batch_size, **self._zigzag_documents)
        return _Loader(
            dataset,
            batch_sampler=_Batches(sampler, batch_size, training and bool(args.dataloader_drop_last)),
            collate_fn=collate,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory and args.device.type == "cuda",
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
        )

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> torch.Tensor | None:
        return self._count_targets(batch_samples, device).clamp(min=1) if batch_samples else None

    def _nothing_evaluated(self) -> torch.Tensor:
        """Return the sum of the losses of all targets and their number, both 0."""
        return torch.zeros(2, dtype=torch.float64, device=self.args.device)

    def _count_targets(self, batch_samples: list, device: torch.device) -> torch.Tensor:
        """Return the number of targets of these batches in all groups."""
        targets = torch.stack([batch[_BATCH].num_targets for batch in batch_samples]).sum().to(device)
        if self.args.world_size > 1:  # every rank of a group has counted all targets of the group
            dist.all_reduce(targets)
            targets = targets // self._zigzag_size
        return targets

    def _prepare_context_parallel_inputs(self, model, inputs):
        batch: Any = inputs[_BATCH]
        batch = batch.to(self.args.device)
        kwargs = batch.model_kwargs(self._zigzag_group, **self._zigzag_method, gradients="sum")
        del kwargs["num_items_in_batch"]  # the Trainer passes its own number, for all accumulated batches
        return contextlib.nullcontext, kwargs


def _replicas(group_name: str | None, world_size: int) -> tuple[int, int]:
    """Return (number of groups, number of this group); groups are ordered by their first rank."""
    if world_size == 1:
        return 1, 0
    own = [dist.get_rank()] if group_name is None else dist.get_process_group_ranks(resolve(group_name))
    firsts: list[Any] = [None] * world_size
    dist.all_gather_object(firsts, min(own))
    order = sorted(set(firsts))
    return len(order), order.index(min(own))


class _Collator:
    """A collator that returns a mapping of tensors, which the Trainer expects, with the `ShardedBatch` in it."""

    def __init__(self, group, **options):
        self.collate = ZigzagCollator(group, **options)

    def __call__(self, examples: Sequence) -> dict:
        batch = self.collate(examples)
        return {"input_ids": batch.input_ids[None], "labels": batch.labels[None], _BATCH: batch}


class _Batches(BatchSampler):
    """A batch sampler that passes the epoch on to its sampler, because accelerate sets the epoch on batch samplers."""

    def set_epoch(self, epoch: int) -> None:
        assert isinstance(self.sampler, DistributedSampler)
        self.sampler.set_epoch(epoch)


class _Loader(DataLoader):
    """A loader that passes the epoch, which the Trainer sets on it, on to its batch sampler."""

    def set_epoch(self, epoch: int) -> None:
        assert isinstance(self.batch_sampler, _Batches)
        self.batch_sampler.set_epoch(epoch)
