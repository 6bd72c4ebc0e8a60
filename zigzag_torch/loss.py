"""The loss of rows that are distributed over ranks: the mean over the targets of all ranks, with its gradients."""

import torch
import torch.distributed as dist
import torch.nn.functional as F

from zigzag_kernels.checks import MAX_TOTAL, check_int, dtype_name

from .arguments import check_device, check_tensor, readable
from .parallel.agreement import place_in, resolve


def token_mean_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    num_targets: torch.Tensor | int,
    group=None,
    *,
    ignore_index: int = -100,
    gradients: str | None = None,
) -> torch.Tensor:
    """Return the mean cross entropy, float32, of all targets of all ranks: the same value on every rank.

    Args:
        logits: `[T, vocabulary]`, the rows of this rank.
        labels: `[T]` integers, already shifted to the next token, as in `ShardedBatch`; `ignore_index` for no label.
            Other numbers outside of the vocabulary give NaN on all ranks, or `ValueError` if the values are on the CPU.
        num_targets: the number of targets of the whole batch, as in `ShardedBatch`. Ranks add up their numbers of
            labels, and compare `num_targets` and `gradients`. If the sum is another number, or ranks differ, the loss
            is NaN on all ranks, or the call raises `ValueError` if the values are on the CPU.
        group: the ranks whose targets `num_targets` counts: a process group or a 1-D DeviceMesh.
        ignore_index: label that does not count.
        gradients: with several ranks, how the ranks' gradients of the parameters will be combined: "sum", or "mean" as
            in DistributedDataParallel and FSDP.

    The loss of a batch without targets is 0. Raises `ValueError` for arguments that do not fit each other.
    """
    check_tensor("logits", logits)
    check_tensor("labels", labels)
    if logits.ndim < 2 or labels.shape != logits.shape[:-1] or not _is_integer(labels):
        raise ValueError(
            f"labels: expected integers {tuple(logits.shape[:-1])} as in logits, got shape {tuple(labels.shape)} "
            f"{dtype_name(labels)}"
        )
    check_device("labels", labels, "logits", logits)
    place = place_in(group)
    if gradients not in (("sum", "mean") if place.world_size > 1 else (None, "sum", "mean")):
        raise ValueError(
            f"gradients: expected 'sum' or 'mean', as ranks combine those of parameters, got {gradients!r}"
        )
    if not isinstance(num_targets, torch.Tensor):
        num_targets = torch.full((), check_int("num_targets", num_targets, 0, MAX_TOTAL), device=logits.device)
    elif num_targets.numel() != 1:
        raise ValueError(f"num_targets: expected one integer, got shape {tuple(num_targets.shape)}")
    wanted = num_targets.reshape(()).to(logits.device, torch.float64)
    labels, vocabulary = labels.flatten().long(), logits.shape[-1]
    counted = labels != ignore_index
    # Cross entropy of such labels would end this process on a GPU; on a CPU it would raise on this rank alone.
    unknown = counted & ((labels < 0) | (labels >= vocabulary))
    losses = F.cross_entropy(
        logits.flatten(0, -2).float(),
        labels.masked_fill(unknown, ignore_index),
        ignore_index=ignore_index,
        reduction="sum",
    )
    total = torch.zeros(3 + 2 * place.world_size, dtype=torch.float64, device=logits.device)
    total[0], total[1], total[2] = losses.detach(), counted.sum(), unknown.sum()
    _, _, _, *said = total.split((1, 1, 1, place.world_size, place.world_size))
    said[0][place.rank], said[1][place.rank] = wanted, float(gradients == "mean")  # a place of its own for each rank
    if place.group_name is not None and place.world_size > 1:
        dist.all_reduce(total, group=resolve(place.group_name))
    known = wanted.clamp(min=1)
    if readable(total):
        if total[2] > 0:
            raise ValueError(
                f"labels: expected 0 to {vocabulary - 1}, or ignore_index = {ignore_index}, got {int(total[2])} others "
                "on all ranks together"
            )
        _refuse_differences(int(total[1]), *(x.tolist() for x in said))
    same = (total[2] == 0) & (said[0] == total[1]).all() & (said[1] == said[1][0]).all()
    mean = torch.where(same, total[0] / known, float("nan")).float()
    own = losses * ((place.world_size if gradients == "mean" else 1) / known).float()
    return mean + (own - own.detach())


def _is_integer(x: torch.Tensor) -> bool:
    return not (x.is_floating_point() or x.is_complex() or x.dtype == torch.bool)


def _refuse_differences(labels: int, num_targets: list[float], averages: list[float]) -> None:
    """Raise the same `ValueError` on every rank if a rank's `num_targets` is not `labels`, or `averages` differ."""
    for rank, number in enumerate(num_targets):
        if number != labels:
            where = f" on rank {rank}" if len(num_targets) > 1 else ""
            raise ValueError(
                f"num_targets: expected the {labels} labels that ranks have together, got {int(number)}{where}"
            )
    if len(set(averages)) > 1:
        said = ["mean" if average else "sum" for average in averages]
        raise ValueError(f"gradients: expected the same on every rank, got {', '.join(said)}")
