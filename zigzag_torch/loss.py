"""The loss of rows that are dealt out: the mean over the targets of all ranks, with its gradients."""

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
        labels: `[T]` integers, as `ShardedBatch` has them: already the next token, and `ignore_index` for none.
        num_targets: of the whole batch, as `ShardedBatch` has it. Ranks count their labels together: for another number
            the loss is NaN, or `ValueError` where the values are on the CPU.
        group: all ranks whose targets `num_targets` counts, a process group or a 1-D DeviceMesh.
        ignore_index: label that does not count.
        gradients: with several ranks, how their gradients of the parameters are combined afterwards: "sum", or "mean"
            as DistributedDataParallel and FSDP do over these ranks.

    The loss of a batch without targets is 0.
    """
    check_tensor("logits", logits)
    check_tensor("labels", labels)
    if logits.ndim < 2 or labels.shape != logits.shape[:-1] or labels.is_floating_point():
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
    losses = F.cross_entropy(
        logits.flatten(0, -2).float(), labels.flatten().long(), ignore_index=ignore_index, reduction="sum"
    )
    total = torch.stack((losses.detach().double(), (labels != ignore_index).sum().double()))
    if place.group_name is not None and place.world_size > 1:
        dist.all_reduce(total, group=resolve(place.group_name))
    known = wanted.clamp(min=1)
    if readable(total) and total[1] != wanted:
        raise ValueError(
            f"num_targets: expected the {int(total[1])} labels that ranks have together, got {int(wanted)}"
        )
    mean = torch.where(total[1] == wanted, total[0] / known, float("nan")).float()
    own = losses * ((place.world_size if gradients == "mean" else 1) / known).float()
    return mean + (own - own.detach())
