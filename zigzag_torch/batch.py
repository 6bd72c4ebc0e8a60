"""`Batch`, the lengths and device tables that all layers of a training step share, and how it is made and checked."""

import dataclasses
from dataclasses import dataclass

import torch
from torch.utils import _pytree as pytree

from zigzag_kernels.checks import check_method, check_rank
from zigzag_kernels.modes import Backend, Method

from . import launch
from .arguments import as_rank, check_batch
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
    """

    cu_seqlens: torch.Tensor
    rank: torch.Tensor
    world_size: int
    method: str = Method.ALLGATHER.value
    segments: torch.Tensor | None = None
    sequences: torch.Tensor | None = None
    compared_by: str | None = None

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
) -> Batch:
    """Build the device tables of a batch once, for all layers and for both passes.

    Args:
        cu_seqlens: `[N + 1]` int32, offsets of the sequences in the whole batch.
        rank, world_size: an int or one integer on the device of `cu_seqlens`, and an int. None means 0 and 1, or the
            rank and size of the `group`.
        method: as in the attention calls.
        group: as in the attention calls. Every rank of it makes this call, and the ranks compare their `cu_seqlens` on
            the device: if they differ, attention returns NaN on all ranks, and `validate` gives the reason.
        backend: as in the attention calls.

    Raises the errors of `zigzag_attention`. The host does not wait for the device. A batch that is prepared in
    `torch.inference_mode` can be trained on all the same.
    """
    if not torch.compiler.is_compiling() and torch.is_inference_mode_enabled():
        with torch.inference_mode(False):
            copies = [x.clone() if isinstance(x, torch.Tensor) else x for x in (cu_seqlens, rank)]
            return prepare_batch(*copies, world_size, method=method, group=group, backend=backend)  # pyright: ignore
    place = place_in(group)
    try:
        check_method(method)
        if place.group_name is None:
            rank, world_size = 0 if rank is None else rank, 1 if world_size is None else world_size
            check_batch(cu_seqlens, rank, world_size)
        else:
            _check_place(cu_seqlens, rank, world_size, place)
            rank, world_size = place.rank, place.world_size
        backend = launch.choose_backend(backend, cu_seqlens.device)
    except (ValueError, RuntimeError) as error:
        refuse_together(place, error)
        raise
    own_rank = as_rank(rank, cu_seqlens.device)
    if place.group_name is not None:
        own_rank = common_rank(cu_seqlens, own_rank, place.group_name)
    batch = Batch(cu_seqlens, own_rank, world_size, method, compared_by=place.group_name)
    if backend == Backend.REFERENCE:
        return batch
    return dataclasses.replace(batch, **tables_of(batch, backend)._asdict())


def _check_place(
    cu_seqlens: torch.Tensor, rank: int | torch.Tensor | None, world_size: int | None, place: Place
) -> None:
    """Raise `ValueError` if `rank` or `world_size` is not that of the group, or cannot be one."""
    check_batch(cu_seqlens, rank, place.world_size)
    if rank is not None and (isinstance(rank, torch.Tensor) or rank != place.rank):
        raise ValueError(f"rank: expected None or that in the group, {place.rank}, got {rank}")
    if world_size not in (None, place.world_size):
        raise ValueError(f"world_size: expected None or the size of the group, {place.world_size}, got {world_size}")


def as_batch(cu_seqlens: torch.Tensor | Batch, rank: int | torch.Tensor, world_size: int, method: str) -> Batch:
    """Return `cu_seqlens` as a batch, still without tables if it is a tensor.

    Raises `ValueError` for a batch that was prepared for another `world_size` or `method`.
    """
    if not isinstance(cu_seqlens, Batch):
        check_batch(cu_seqlens, rank, world_size)
        return Batch(cu_seqlens, as_rank(rank, cu_seqlens.device), world_size, method)
    batch = cu_seqlens
    if batch.world_size != world_size:
        raise ValueError(f"world_size: expected that of the prepared batch, {batch.world_size}, got {world_size}")
    if batch.method != method and world_size > 1:
        raise ValueError(f"method: expected that of the prepared batch, {batch.method!r}, got {method!r}")
    check_rank(rank, world_size, isinstance(rank, torch.Tensor))
    return batch


def tables_of(batch: Batch, backend: str) -> Tables:
    """Return the device tables of `batch` for the kernels of `backend`, made if it was prepared without."""
    if batch.segments is not None and batch.sequences is not None:
        return Tables(batch.segments, batch.sequences)
    layout, cu_seqlens = Method(batch.method).kv_layout.value, batch.cu_seqlens.contiguous()
    return Tables(*segment_tables(cu_seqlens, batch.rank, batch.world_size, layout, backend))
