"""Checks and conversions of single arguments that are tensors; `zigzag_kernels.checks` has the rules."""

import weakref

import torch

from zigzag_kernels.checks import (
    DTYPE_BYTES,
    check_cu_seqlens,
    check_lengths,
    check_offsets,
    check_rank,
    check_real_lengths,
    check_real_lengths_array,
    check_sinks,
    check_world_size,
    dtype_name,
)
from zigzag_kernels.layout import MAX_OFFSET
from zigzag_kernels.modes import Layout

from . import launch

_PLAIN = {torch.Tensor, torch.nn.Parameter}
_AUTOCAST_DTYPES = {getattr(torch, name) for name in DTYPE_BYTES}
_padded: "weakref.WeakValueDictionary[int, torch.Tensor]" = weakref.WeakValueDictionary()
_EXACT = {torch.int8, torch.int16, torch.int32, torch.uint8}  # types whose values int32 holds


def check_tensor(name: str, x) -> None:
    """Raise `ValueError` unless `x` is a dense tensor of this process."""
    if not isinstance(x, torch.Tensor):
        raise ValueError(f"{name}: expected a torch.Tensor, got {type(x).__name__}")
    if type(x).__name__ == "DTensor":
        raise ValueError(f"{name}: expected the rows of this rank, got a DTensor: call .to_local()")
    if x.is_nested:
        raise ValueError(
            f"{name}: expected packed rows, got a nested tensor: of a jagged one pass x.values(), and x.offsets() as "
            "cu_seqlens"
        )
    if x.layout is not torch.strided:
        raise ValueError(f"{name}: expected a dense tensor, got layout {x.layout}: call .to_dense()")


def check_device(name: str, x: torch.Tensor, other_name: str, other: torch.Tensor) -> None:
    """Raise `ValueError` unless `x` is on the device of `other`."""
    if x.device != other.device:
        raise ValueError(f"{name}: expected the device of {other_name}, {other.device}, got {x.device}")


def check_int32(name: str, cu_seqlens) -> None:
    """Raise `ValueError` unless `cu_seqlens` is a tensor of int32 offsets; its values are not read."""
    check_tensor(name, cu_seqlens)
    check_cu_seqlens(tuple(cu_seqlens.shape), dtype_name(cu_seqlens), name)
    if cu_seqlens.dtype != torch.int32:
        raise ValueError(f"{name}: expected dtype int32, got {dtype_name(cu_seqlens)}")


def as_cu_seqlens(
    cu_seqlens, world_size: int, device: torch.device | None = None, total: int | None = None
) -> torch.Tensor:
    """Return offsets as a tensor `[N + 1]` int32; the values of a tensor are not read.

    A list, tuple or NumPy array is checked like in `validate`, with the `total` rows that there are, and copied to
    `device`. In a tensor, integers that int32 cannot hold become -1, for which attention returns NaN. Raises
    `ValueError` for anything else.
    """
    if not isinstance(cu_seqlens, torch.Tensor):
        offsets = _host_offsets(cu_seqlens)
        check_lengths(offsets, world_size, total)
        return torch.tensor(offsets, dtype=torch.int32, device=device)
    check_tensor("cu_seqlens", cu_seqlens)
    if cu_seqlens.dtype == torch.int32 and cu_seqlens.ndim == 1 and cu_seqlens.shape[0]:  # the usual case, fast
        return cu_seqlens
    check_cu_seqlens(tuple(cu_seqlens.shape), dtype_name(cu_seqlens))
    return _as_int32(cu_seqlens)


def _host_offsets(cu_seqlens) -> list[int]:
    if type(cu_seqlens).__module__ == "numpy":
        check_cu_seqlens(tuple(cu_seqlens.shape), dtype_name(cu_seqlens))
        cu_seqlens = cu_seqlens.tolist()
    if not isinstance(cu_seqlens, list | tuple):
        raise ValueError(f"cu_seqlens: expected a torch.Tensor or a list of ints, got {type(cu_seqlens).__name__}")
    return check_offsets(cu_seqlens)


def _as_int32(x: torch.Tensor) -> torch.Tensor:
    """Return the integers `x` as int32, with -1 in place of integers that int32 cannot hold."""
    if x.dtype == torch.int32:
        return x
    if x.dtype in _EXACT:
        return x.int()
    x = x.long()
    return torch.where((x < -1) | (x > MAX_OFFSET), -1, x).int()


def as_lengths(lengths, cu_seqlens, device: torch.device) -> torch.Tensor:
    """Return the real `lengths` of the sequences of `cu_seqlens` as a tensor `[N]` int32.

    Both arguments are as the caller passed them. The values of tensors are not read; a list, tuple or NumPy array is
    copied to `device`. Raises `ValueError` for anything else, and if both are on the host and a length does not fit its
    sequence.
    """
    sequences = len(cu_seqlens) - 1
    if isinstance(lengths, torch.Tensor):
        check_tensor("lengths", lengths)
        check_real_lengths_array(tuple(lengths.shape), dtype_name(lengths), sequences)
        if lengths.device != device:
            raise ValueError(f"lengths: expected the device of cu_seqlens, {device}, got {lengths.device}")
        return _as_int32(lengths)
    if type(lengths).__module__ == "numpy":
        check_real_lengths_array(tuple(lengths.shape), dtype_name(lengths), sequences)
        lengths = lengths.tolist()
    if not isinstance(lengths, list | tuple):
        raise ValueError(f"lengths: expected a torch.Tensor or a list of ints, got {type(lengths).__name__}")
    values = check_offsets(lengths, "lengths") if lengths else []
    check_real_lengths_array((len(values),), "int64", sequences)
    if not isinstance(cu_seqlens, torch.Tensor):
        check_real_lengths(values, _host_offsets(cu_seqlens))
    return torch.tensor(values, dtype=torch.int32, device=device)


def as_sinks(sinks, q: torch.Tensor) -> torch.Tensor:
    """Return `sinks [heads]` as contiguous float32, which the kernels read; `ValueError` for anything else."""
    check_tensor("sinks", sinks)
    check_sinks(tuple(sinks.shape), dtype_name(sinks), q.shape[1])
    check_device("sinks", sinks, "q", q)
    return sinks.float().contiguous()


def as_rank_argument(rank: int | torch.Tensor, world_size: int, device: torch.device) -> int | torch.Tensor:
    """Return `rank`, an int, or a tensor of one integer on `device` whose value is not read.

    Raises `ValueError` for anything else, and for an int that is not from 0 to `world_size - 1`.
    """
    if isinstance(rank, torch.Tensor):
        check_tensor("rank", rank)
        if rank.device != device:
            raise ValueError(f"rank: expected the device of cu_seqlens, {device}, got {rank.device}")
        return check_rank(rank, world_size, True)
    return check_rank(rank, world_size, False)


def check_batch(
    cu_seqlens, rank, world_size: int, layout: Layout = Layout.DOCUMENT
) -> tuple[torch.Tensor, int | torch.Tensor, int]:
    """Return the checked (cu_seqlens tensor, rank as an int or a tensor, world_size).

    Values of tensors are not read. In the row layout documents may have any lengths. Raises `ValueError` for invalid
    arguments.
    """
    world_size = check_world_size(world_size)
    cu_seqlens = as_cu_seqlens(cu_seqlens, world_size if layout is Layout.DOCUMENT else 1)
    return cu_seqlens, as_rank_argument(rank, world_size, cu_seqlens.device), world_size


def as_rank(rank: int | torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a checked rank as a tensor `[1]` int32, which the kernels read; -1 if int32 cannot hold it."""
    if isinstance(rank, torch.Tensor):
        return _as_int32(rank).reshape(1)
    return torch.full((1,), rank, dtype=torch.int32, device=device)


def cast_for_autocast(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return `tensors` cast to the dtype of `torch.autocast`, if autocast is enabled for their device.

    The tensors may have different supported dtypes, such as float32 from a rotary embedding beside bfloat16.
    """
    device = tensors[0].device.type
    if device == "meta" or not torch.is_autocast_enabled(device):  # PyTorch has no autocast of meta tensors
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x.to(dtype) if x.dtype in _AUTOCAST_DTYPES else x for x in tensors)


def readable(*tensors: torch.Tensor) -> bool:
    """Return whether the host can read `tensors` without waiting: they are on the CPU, and no tracer is active."""
    if torch.compiler.is_compiling() or any(x.device.type != "cpu" or type(x) not in _PLAIN for x in tensors):
        return False
    fast = launch.fast_launch
    if fast is None:
        return False
    nothing_traces = not (fast.transforms_run() or fast.dispatch_modes() or fast.traced_graph() is not None)
    return nothing_traces and not any(map(fast.belongs_to_transform, tensors))


def mark_padded(cu_seqlens: torch.Tensor) -> None:
    """Record that some of the tokens that `cu_seqlens` counts are padding, for `is_padded`."""
    _padded[id(cu_seqlens)] = cu_seqlens


def is_padded(cu_seqlens) -> bool:
    """Return whether `cu_seqlens` is an array that `mark_padded` got; copies and traced arrays are not known."""
    return not torch.compiler.is_compiling() and _padded.get(id(cu_seqlens)) is cu_seqlens
