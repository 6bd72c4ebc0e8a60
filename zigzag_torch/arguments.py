"""Checks of single arguments that are tensors; `zigzag_kernels.checks` has the rules themselves."""

import torch

from zigzag_kernels.checks import DTYPE_BYTES, check_cu_seqlens, check_rank, check_world_size

_AUTOCAST_DTYPES = {getattr(torch, name) for name in DTYPE_BYTES}


def check_tensor(name: str, x) -> None:
    """Raise `ValueError` unless `x` is a tensor."""
    if not isinstance(x, torch.Tensor):
        raise ValueError(f"{name}: expected a torch.Tensor, got {type(x).__name__}")


def check_device(name: str, x: torch.Tensor, other_name: str, other: torch.Tensor) -> None:
    """Raise `ValueError` unless `x` is on the device of `other`."""
    if x.device != other.device:
        raise ValueError(f"{name}: expected the device of {other_name}, {other.device}, got {x.device}")


def check_batch(cu_seqlens: torch.Tensor, rank: int | torch.Tensor | None, world_size: int) -> None:
    """Raise `ValueError` for shapes, types and host values that no batch has; values on a device are not read."""
    check_world_size(world_size)
    check_tensor("cu_seqlens", cu_seqlens)
    check_cu_seqlens(tuple(cu_seqlens.shape), str(cu_seqlens.dtype).removeprefix("torch."))
    if rank is not None:
        check_rank(rank, world_size, isinstance(rank, torch.Tensor))
    if isinstance(rank, torch.Tensor):
        check_device("rank", rank, "cu_seqlens", cu_seqlens)


def as_rank(rank: int | torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a rank that `check_batch` accepts as the kernels read it: `[1]` int32."""
    if isinstance(rank, torch.Tensor):
        return rank.to(torch.int32).reshape(1)
    return torch.full((1,), rank, dtype=torch.int32, device=device)


def cast_for_autocast(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return `tensors` in the dtype of `torch.autocast` if that is on for their device, as PyTorch's attention does.

    Whatever mixture of the supported dtypes they come in, such as float32 from a rotary embedding beside bfloat16.
    """
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x.to(dtype) if x.dtype in _AUTOCAST_DTYPES else x for x in tensors)
