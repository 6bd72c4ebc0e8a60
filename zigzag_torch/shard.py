"""Dealing a packed batch out to the ranks, and putting it together again; never on the hot path of attention."""

import itertools

import torch

from zigzag_kernels.checks import (
    MAX_ROWS,
    check_fill,
    check_int,
    check_lengths,
    check_rank,
    check_rows,
    check_unsaid_rows,
    check_world_size,
    dtype_name,
)
from zigzag_kernels.layout import MAX_OFFSET, gathered_row, impossible, padded_length, row_position

from .arguments import as_cu_seqlens, as_rank, check_batch, check_device, check_tensor, mark_padded, readable
from .parallel.agreement import compare, place_in, refuse, resolve
from .parallel.collectives import fingerprint


def sequence_of_rows(
    cu_seqlens: torch.Tensor, world_size: int, tokens: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (sequence, offset behind its first local row, global length) of the local rows of any rank, int64.

    Rows behind the last sequence have sequence -1, offset and length 0.
    """
    rows = torch.arange(tokens, device=cu_seqlens.device)
    starts = torch.div(cu_seqlens, world_size, rounding_mode="floor").long()
    sequence = torch.searchsorted(starts, rows, right=True) - 1
    inside = rows < starts[-1]
    sequence = torch.where(inside, sequence, -1)
    index = sequence.clamp(min=0)
    offset = torch.where(inside, rows - starts[index], 0)
    length = torch.where(inside, cu_seqlens.long()[(index + 1).clamp(max=len(starts) - 1)] - cu_seqlens[index], 0)
    return sequence, offset, length


def local_cu_seqlens(cu_seqlens: torch.Tensor, world_size: int) -> torch.Tensor:
    """Return `[N + 1]` int32: the offsets of the sequences in the local rows of any rank.

    Raises `ValueError` for offsets that `validate` refuses; if they are on a GPU, all of the result is -1 instead.
    """
    cu_seqlens, _, world_size = check_batch(cu_seqlens, 0, world_size)
    fault = _fault(cu_seqlens, 0, world_size)
    return _poisoned(torch.div(cu_seqlens, world_size, rounding_mode="floor"), fault)


def position_ids(
    cu_seqlens: torch.Tensor, rank: int | torch.Tensor, world_size: int, tokens: int | None = None
) -> torch.Tensor:
    """Return `[T]` int32: the position in its sequence of every local row of `rank` (for RoPE); 0 for padding.

    `tokens` is T; without it `cu_seqlens` is read, which waits for the device. Raises `ValueError` for offsets that
    `validate` refuses, for a rank that is none, and for fewer `tokens` than the sequences have; if the values are on a
    GPU, all positions are -1 instead.
    """
    cu_seqlens, rank, world_size = check_batch(cu_seqlens, rank, world_size)
    if tokens is None:
        offsets = cu_seqlens.tolist()
        check_lengths(offsets, world_size)
        tokens = check_unsaid_rows(offsets[-1] // world_size)
    tokens = check_int("tokens", tokens, 0, MAX_ROWS, f"a number of rows up to {MAX_ROWS}")
    fault = _fault(cu_seqlens, rank, world_size, tokens)
    _, offset, length = sequence_of_rows(cu_seqlens, world_size, tokens)
    position = row_position(offset, length, as_rank(rank, cu_seqlens.device), world_size)
    return _poisoned((position * (length > 0)).int(), fault)


def _fault(
    cu_seqlens: torch.Tensor, rank: int | torch.Tensor, world_size: int, tokens: int | None = None
) -> torch.Tensor | None:
    """Return whether the values cannot describe a batch of `tokens` local rows, as a tensor that nobody has read.

    Values that the host has at hand are checked instead: `ValueError`, or None.
    """
    number = isinstance(rank, int)
    if not readable(cu_seqlens) or not (number or readable(rank)):
        return impossible(cu_seqlens, as_rank(rank, cu_seqlens.device), world_size, tokens)
    check_rank(rank if number else int(rank), world_size, False)
    offsets = cu_seqlens.tolist()
    check_lengths(offsets, world_size)
    if tokens is not None and offsets[-1] > tokens * world_size:
        raise ValueError(
            f"tokens: expected at least the {offsets[-1] // world_size} local rows of cu_seqlens, got {tokens}"
        )
    return None


def _poisoned(x: torch.Tensor, fault: torch.Tensor | None) -> torch.Tensor:
    """Return `x`, but NaN in every place, or -1, or the largest of unsigned numbers, if there is a `fault`."""
    if fault is None:
        return x
    if x.is_floating_point() or x.is_complex():
        return x.masked_fill(fault, float("nan"))
    unsigned = x.dtype == torch.bool or torch.iinfo(x.dtype).min == 0
    return x.masked_fill(fault, -1 if not unsigned else True if x.dtype == torch.bool else torch.iinfo(x.dtype).max)


def _rows_of(x: torch.Tensor, cu_seqlens: torch.Tensor, world_size: int) -> int:
    """Return how many rows of `x` each rank has; `ValueError` unless the rows are those of `cu_seqlens`."""
    check_tensor("x", x)
    if cu_seqlens.device.type != "cpu":
        check_device("cu_seqlens", cu_seqlens, "x", x)
    end = int(cu_seqlens[-1]) if readable(cu_seqlens) else None
    return check_rows("x", tuple(x.shape), world_size, end)


def _take(x: torch.Tensor, rows: torch.Tensor, fault: torch.Tensor | None) -> torch.Tensor:
    """Return `x[rows]`, poisoned if there is a `fault`, with which `rows` may not exist."""
    return x[rows] if fault is None else _poisoned(x[rows.masked_fill(fault, 0)], fault)


def _global_rows(cu_seqlens: torch.Tensor, rank: int | torch.Tensor, world_size: int, tokens: int) -> torch.Tensor:
    """Return `[T]`: the row of the unsharded batch that each local row holds; ranks share padding evenly."""
    rank = as_rank(rank, cu_seqlens.device)
    sequence, offset, length = sequence_of_rows(cu_seqlens, world_size, tokens)
    position = row_position(offset, length, rank, world_size)
    used = cu_seqlens[-1].long()
    local_used = used // world_size
    rows = torch.arange(tokens, device=cu_seqlens.device)
    padding = used + rank * (tokens - local_used) + rows - local_used
    return torch.where(sequence >= 0, cu_seqlens[sequence.clamp(min=0)] + position, padding)


def shard(x: torch.Tensor, cu_seqlens: torch.Tensor, rank: int | torch.Tensor, world_size: int) -> torch.Tensor:
    """Return the zigzag rows `[total / W, ...]` of `rank` from the unsharded batch `x [total, ...]`; differentiable.

    Rows of `x` behind the last sequence are padding, which ranks share evenly. Raises `ValueError` if `total` is not a
    multiple of W, for offsets that `validate` refuses, and for a rank that is none; if those values are on a GPU, all
    of the result is NaN instead, -1 if `x` has integers, or the largest number if it has unsigned ones.
    """
    cu_seqlens, rank, world_size = check_batch(cu_seqlens, rank, world_size)
    tokens = _rows_of(x, cu_seqlens, world_size)
    fault = _fault(cu_seqlens, rank, world_size, tokens)
    return _take(x, _global_rows(cu_seqlens, rank, world_size, tokens), fault)


def unshard(x: torch.Tensor, cu_seqlens: torch.Tensor, world_size: int) -> torch.Tensor:
    """Undo `shard`: return the batch `[total, ...]` from the rank-major rows `x [W * T, ...]` of all ranks.

    It treats offsets that `validate` refuses as `shard` does.
    """
    cu_seqlens, _, world_size = check_batch(cu_seqlens, 0, world_size)
    fault = _fault(cu_seqlens, 0, world_size, _rows_of(x, cu_seqlens, world_size))
    return _take(x, position_order(cu_seqlens, world_size, x.shape[0]), fault)


def position_order(cu_seqlens: torch.Tensor, world_size: int, total: int) -> torch.Tensor:
    """Return `[total]`: the row of the gathered, rank-major buffer that holds each row of the unsharded batch.

    Raises `ValueError` if `total` is not a multiple of `world_size`.
    """
    if total % world_size:
        raise ValueError(f"x: expected a multiple of world_size = {world_size} rows, got {total}")
    tokens = total // world_size
    sequence, position, length = sequence_of_rows(cu_seqlens, 1, total)
    start = cu_seqlens[sequence.clamp(min=0)].long()
    used = cu_seqlens[-1].long()
    local_used = used // world_size
    behind = torch.arange(total, device=cu_seqlens.device) - used
    room = (tokens - local_used).clamp(min=1)
    padding = behind // room * tokens + local_used + behind % room
    return torch.where(sequence >= 0, gathered_row(position, start, length, tokens, world_size), padding)


def pad_to_zigzag(
    x: torch.Tensor, cu_seqlens: torch.Tensor, world_size: int, total: int | None = None, *, value: float = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad sequences with `value` to multiples of 2W; return (the padded `x`, its `cu_seqlens`).

    `total` pads the end too, to a fixed number of rows (a multiple of W). The host reads the lengths. With one rank
    lengths stay as they are. `value` is 0 for tokens; labels want the index that the loss ignores, such as -100.

    Padded positions are keys like any other behind their sequence: under a causal mask no real token sees them.
    Without one, every real token would: attention refuses `causal=False` with the `cu_seqlens` of this function.
    """
    check_tensor("x", x)
    lengths = _host_lengths(x, cu_seqlens, world_size)
    padded = [padded_length(length, world_size) for length in lengths]
    if total is None:
        total = sum(padded)
    expected = f"a multiple of world_size = {world_size}, at least {sum(padded)}"
    if check_int("total", total, sum(padded), MAX_OFFSET, expected) % world_size:
        raise ValueError(f"total: expected {expected}, got {total}")
    result = x.new_full((total, *x.shape[1:]), check_fill("value", value, dtype_name(x), _limits(x.dtype)))
    rows, new_cu_seqlens = _padded_rows(lengths, padded, x.device)
    if padded != lengths:
        mark_padded(new_cu_seqlens)
    return result.index_copy(0, rows, x[: len(rows)]), new_cu_seqlens


def _limits(dtype: torch.dtype) -> tuple[float, float]:
    if dtype == torch.bool:
        return 0, 1
    limits = torch.finfo(dtype) if dtype.is_floating_point or dtype.is_complex else torch.iinfo(dtype)
    return limits.min, limits.max


def unpad(x: torch.Tensor, cu_seqlens: torch.Tensor, world_size: int) -> torch.Tensor:
    """Undo `pad_to_zigzag`: return the rows of the original batch; `cu_seqlens` is that of the original batch."""
    lengths = _host_lengths(None, cu_seqlens, world_size)
    padded = [padded_length(length, world_size) for length in lengths]
    check_tensor("x", x)
    if not x.ndim or x.shape[0] < sum(padded):
        raise ValueError(
            f"x: expected at least the {sum(padded)} rows of the padded batch, got {x.shape[0] if x.ndim else 'none'}"
        )
    return x[_padded_rows(lengths, padded, x.device)[0]]


def _host_lengths(x: torch.Tensor | None, cu_seqlens: torch.Tensor, world_size: int) -> list[int]:
    check_world_size(world_size)
    starts = as_cu_seqlens(cu_seqlens, 1).tolist()
    check_lengths(starts, 1)
    if x is not None:
        check_rows("x", tuple(x.shape), 1, starts[-1])
    return [end - start for start, end in itertools.pairwise(starts)]


def _padded_rows(lengths: list[int], padded: list[int], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (the row in the padded batch of every original row, the padded `cu_seqlens`)."""
    starts = torch.tensor([0, *padded], device=device).cumsum(0)
    rows = [torch.arange(length, device=device) + start for start, length in zip(starts, lengths, strict=False)]
    empty = torch.arange(0, device=device)
    return torch.cat([empty, *rows]), starts.int()


def validate(
    cu_seqlens: torch.Tensor,
    world_size: int,
    total: int | None = None,
    *,
    group=None,
    unsharded: torch.Tensor | None = None,
) -> None:
    """Raise `ValueError` unless `cu_seqlens` can be dealt out to `world_size` ranks; the host reads it: call it once.

    `total` is the number of rows of the unsharded batch. Attention itself produces NaN for invalid lengths, because
    checking them would synchronise with the GPU. With a `group` (as `zigzag_attention` takes it) every rank of it makes
    this call; if the ranks differ in anything, or one of them finds a fault, all raise the same error. `unsharded` is
    the whole batch before `shard`, which ranks of a group compare as well.
    """
    if group is None:
        _check_values(cu_seqlens, world_size, total)
        if unsharded is not None:
            check_tensor("unsharded", unsharded)
        return
    place = place_in(group)
    assert place.group_name is not None
    group = resolve(place.group_name)
    try:
        if world_size != place.world_size:
            raise ValueError(f"world_size: expected the size of the group, {place.world_size}, got {world_size}")
        values = _check_values(cu_seqlens, world_size, total)
        if unsharded is not None:
            check_tensor("unsharded", unsharded)
    except ValueError as error:
        refuse(group, error)
    report = {"call": "validate", "total": total, "sequences": len(values) - 1}
    if unsharded is not None:
        report["unsharded"] = f"fingerprint {int(fingerprint(unsharded)):#x}"
    compare(group, report | {f"cu_seqlens[{index}]": value for index, value in enumerate(values)})


def _check_values(cu_seqlens: torch.Tensor, world_size: int, total: int | None) -> list[int]:
    """Return the values of `cu_seqlens`; `ValueError` if they cannot be dealt out."""
    world_size = check_world_size(world_size)
    values = as_cu_seqlens(cu_seqlens, world_size).tolist()
    check_lengths(values, world_size, total)
    return values
