"""`Batch`, the lengths and device tables that all layers of a training step share, and how it is made and checked."""

import dataclasses
from dataclasses import dataclass

import torch
from torch.utils import _pytree as pytree

from zigzag_kernels.checks import check_method, check_world_size
from zigzag_kernels.modes import Backend, Method
from zigzag_kernels.segments.columns import SegmentColumn, SequenceColumn

from . import launch
from .arguments import as_cu_seqlens, as_rank, as_rank_argument, check_batch, check_device, check_tensor
from .autograd import segment_tables
from .parallel import Tables
from .parallel.agreement import Place, place_in, refuse_together
from .parallel.collectives import common_rank


@dataclass(frozen=True)
class Batch:
    """A batch holds the lengths and device tables that all layers of a training step share.

    `prepare_batch` makes it, and attention takes it in place of `cu_seqlens`.

    Attributes:
        cu_seqlens: `[N + 1]` int32, offsets of the sequences in the whole batch.
        rank: `[1]` int32.
        world_size: number of ranks.
        method: the way of moving K/V that the tables are for.
        segments, sequences: the device tables, or None if it was prepared for the backend "reference".
        compared_by: name of the group whose ranks have compared their `cu_seqlens`; None: nobody has.
        host_rank: the rank, if the host knows it; None: only the device does.
    """

    cu_seqlens: torch.Tensor
    rank: torch.Tensor
    world_size: int
    method: str = Method.ALLGATHER.value
    segments: torch.Tensor | None = None
    sequences: torch.Tensor | None = None
    compared_by: str | None = None
    host_rank: int | None = None

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> "Batch":
        """Return this batch with its tensors on `device`, as `torch.Tensor.to` moves them."""
        tensors = ((name, getattr(self, name)) for name in _TENSORS)
        return dataclasses.replace(
            self, **{name: x.to(device, non_blocking=non_blocking) for name, x in tensors if x is not None}
        )


_TENSORS = ("cu_seqlens", "rank", "segments", "sequences")
_CONSTANTS = tuple(field.name for field in dataclasses.fields(Batch) if field.name not in _TENSORS)


def _flatten(batch: Batch) -> tuple[list, list]:
    return [getattr(batch, name) for name in _TENSORS], [getattr(batch, name) for name in _CONSTANTS]


def _unflatten(tensors, constants: list) -> Batch:
    return Batch(**dict(zip(_TENSORS, tensors, strict=True)), **dict(zip(_CONSTANTS, constants, strict=True)))


# What takes a pytree of tensors (`tree_map`, checkpointing, data loaders of trainers) then takes a batch.
pytree.register_pytree_node(Batch, _flatten, _unflatten, serialized_type_name="zigzag_torch.Batch")


def prepare_batch(
    cu_seqlens: torch.Tensor,
    rank: int | torch.Tensor | None = None,
    world_size: int | None = None,
    *,
    method: str = "allgather",
    group=None,
    backend: str | None = None,
    unsharded: torch.Tensor | None = None,
) -> Batch:
    """Build the device tables of a batch once, for all layers and for both passes.

    Args:
        cu_seqlens: `[N + 1]` int32, offsets of the sequences in the whole batch. Other integers are converted; a list,
            tuple or NumPy array is checked, as `validate` does, and is then on the CPU.
        rank, world_size: an int or one integer on the device of `cu_seqlens`, and an int. None means the rank and size
            of the `group`; without a group world_size is 1, and rank, which other sizes need, is 0.
        method: as in the attention calls.
        group: as in the attention calls. Every rank of it makes this call, and the ranks compare their `cu_seqlens` on
            the device: if they differ, attention returns NaN on all ranks, and `validate` gives the reason.
        backend: as in the attention calls.
        unsharded: the whole batch before `shard`, such as token ids, on the device of `cu_seqlens`. With a group, ranks
            compare it as they compare `cu_seqlens`, since ranks that read other data would attend to a mixture of it.

    Raises the errors of `zigzag_attention`. The host does not wait for the device. A batch that is prepared in
    `torch.inference_mode` can be trained on all the same.
    """
    if not torch.compiler.is_compiling() and torch.is_inference_mode_enabled():
        with torch.inference_mode(False):
            copies = [x.clone() if isinstance(x, torch.Tensor) else x for x in (cu_seqlens, rank)]
            options = {"method": method, "group": group, "backend": backend, "unsharded": unsharded}
            return prepare_batch(*copies, world_size, **options)  # pyright: ignore
    place = place_in(group)
    try:
        check_method(method)
        if place.group_name is None:
            world_size = check_world_size(1 if world_size is None else world_size)
            if rank is None and world_size > 1:
                raise ValueError(f"rank: expected the rank to prepare for, as world_size is {world_size}, got None")
            cu_seqlens, rank, world_size = check_batch(cu_seqlens, 0 if rank is None else rank, world_size)
        else:
            cu_seqlens = _check_place(cu_seqlens, rank, world_size, place)
            rank, world_size = place.rank, place.world_size
        backend = launch.choose_backend(backend, cu_seqlens.device)
        if unsharded is not None:
            check_tensor("unsharded", unsharded)
            check_device("unsharded", unsharded, "cu_seqlens", cu_seqlens)
    except (ValueError, RuntimeError) as error:
        refuse_together(place, error)
        raise
    own_rank = as_rank(rank, cu_seqlens.device)
    if place.group_name is not None:
        own_rank = common_rank(cu_seqlens, unsharded, own_rank, place.group_name, "prepare_batch")
    host_rank = rank if isinstance(rank, int) else None
    batch = Batch(cu_seqlens, own_rank, world_size, method, compared_by=place.group_name, host_rank=host_rank)
    if backend == Backend.REFERENCE:
        return batch
    return dataclasses.replace(batch, **tables_of(batch, backend)._asdict())


def _check_place(
    cu_seqlens: torch.Tensor, rank: int | torch.Tensor | None, world_size: int | None, place: Place
) -> torch.Tensor:
    """Return the checked `cu_seqlens`; `ValueError` if `rank` or `world_size` is not that of the group."""
    own_rank = place.rank if rank is None else rank
    cu_seqlens, own_rank, _ = check_batch(cu_seqlens, own_rank, place.world_size)
    if isinstance(own_rank, torch.Tensor) or own_rank != place.rank:
        raise ValueError(f"rank: expected None or that in the group, {place.rank}, got {rank}")
    if world_size is not None and check_world_size(world_size) != place.world_size:
        raise ValueError(f"world_size: expected None or the size of the group, {place.world_size}, got {world_size}")
    return cu_seqlens


def as_batch(
    cu_seqlens: torch.Tensor | Batch, rank: int | torch.Tensor, world_size: int, method: str, device: torch.device
) -> Batch:
    """Return `cu_seqlens` as a batch for `rank`, still without tables if it is none yet.

    Raises `ValueError` for a batch that was prepared for another rank, `world_size` or `method`. If only the device
    knows the ranks, and they differ, attention to the batch is NaN. Offsets of the host are copied to `device`.
    """
    world_size = check_world_size(world_size)
    if not isinstance(cu_seqlens, Batch):
        cu_seqlens = as_cu_seqlens(cu_seqlens, world_size, device)
        rank = as_rank_argument(rank, world_size, cu_seqlens.device)
        host_rank = rank if isinstance(rank, int) else None
        return Batch(cu_seqlens, as_rank(rank, cu_seqlens.device), world_size, method, host_rank=host_rank)
    batch = cu_seqlens
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
    """Return `batch`, but one of no rank, to which attention is NaN, if it was prepared for another than `rank`."""
    same = batch.rank == rank
    batch = dataclasses.replace(batch, rank=torch.where(same, batch.rank, -1))
    if batch.segments is None or batch.sequences is None:
        return batch
    of_no_rank = [torch.zeros_like(table) for table in (batch.segments, batch.sequences)]
    of_no_rank[0][..., -1, [SegmentColumn.KV_LEN, SegmentColumn.KEYS]] = -1
    of_no_rank[1][..., -1, SequenceColumn.KEYS] = -1
    segments, sequences = batch.segments, batch.sequences
    return dataclasses.replace(
        batch,
        segments=torch.where(same, segments, of_no_rank[0]),
        sequences=torch.where(same, sequences, of_no_rank[1]),
    )


def tables_of(batch: Batch, backend: str) -> Tables:
    """Return the device tables of `batch` for the kernels of `backend`, made if it was prepared without."""
    if batch.segments is not None and batch.sequences is not None:
        return Tables(batch.segments, batch.sequences)
    layout, cu_seqlens = Method(batch.method).kv_layout.value, batch.cu_seqlens.contiguous()
    return Tables(*segment_tables(cu_seqlens, batch.rank, batch.world_size, layout, backend))
