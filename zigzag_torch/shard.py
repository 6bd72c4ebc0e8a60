"""Dealing a packed batch out to the ranks, and putting it together again; never on the hot path of attention."""

import itertools

import torch

from zigzag_kernels.checks import check_lengths
from zigzag_kernels.layout import gathered_row, padded_length, row_position

from .arguments import as_rank, check_batch
from .parallel.agreement import compare, place_in, refuse, resolve


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
    """Return `[N + 1]` int32: the offsets of the sequences in the local rows of any rank."""
    check_batch(cu_seqlens, None, world_size)
    return torch.div(cu_seqlens, world_size, rounding_mode="floor")


def position_ids(
    cu_seqlens: torch.Tensor, rank: int | torch.Tensor, world_size: int, tokens: int | None = None
) -> torch.Tensor:
    """Return `[T]` int32: the position in its sequence of every local row of `rank` (for RoPE); 0 for padding.

    `tokens` is T; without it the last value of `cu_seqlens` is read, which waits for the device.
    """
    check_batch(cu_seqlens, rank, world_size)
    if tokens is None:
        tokens = int(cu_seqlens[-1]) // world_size
    _, offset, length = sequence_of_rows(cu_seqlens, world_size, tokens)
    rank = as_rank(rank, cu_seqlens.device)
    return (row_position(offset, length, rank, world_size) * (length > 0)).int()


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
    multiple of W.
    """
    check_batch(cu_seqlens, rank, world_size)
    if x.shape[0] % world_size:
        raise ValueError(f"x: expected a multiple of world_size = {world_size} rows, got {x.shape[0]}")
    return x[_global_rows(cu_seqlens, rank, world_size, x.shape[0] // world_size)]


def unshard(x: torch.Tensor, cu_seqlens: torch.Tensor, world_size: int) -> torch.Tensor:
    """Undo `shard`: return the batch `[total, ...]` from the rank-major rows `x [W * T, ...]` of all ranks."""
    check_batch(cu_seqlens, None, world_size)
    return x[position_order(cu_seqlens, world_size, x.shape[0])]


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
    x: torch.Tensor, cu_seqlens: torch.Tensor, world_size: int, total: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad sequences with zeros to multiples of 2W; return (the padded `x`, its `cu_seqlens`).

    `total` pads the end too, to a fixed number of rows (a multiple of W). The host reads the lengths. With one rank
    lengths stay as they are. Padded positions are keys like any other behind their sequence: under a causal mask no
    real token sees them.
    """
    lengths = _host_lengths(x, cu_seqlens, world_size)
    padded = [padded_length(length, world_size) for length in lengths]
    if total is None:
        total = sum(padded)
    if total < sum(padded) or total % world_size:
        raise ValueError(
            f"total: expected a multiple of world_size = {world_size}, at least {sum(padded)}, got {total}"
        )
    result = x.new_zeros((total, *x.shape[1:]))
    rows, new_cu_seqlens = _padded_rows(lengths, padded, x.device)
    return result.index_copy(0, rows, x[: len(rows)]), new_cu_seqlens


def unpad(x: torch.Tensor, cu_seqlens: torch.Tensor, world_size: int) -> torch.Tensor:
    """Undo `pad_to_zigzag`: return the rows of the original batch; `cu_seqlens` is that of the original batch."""
    lengths = _host_lengths(None, cu_seqlens, world_size)
    padded = [padded_length(length, world_size) for length in lengths]
    if x.shape[0] < sum(padded):
        raise ValueError(f"x: expected at least the {sum(padded)} rows of the padded batch, got {x.shape[0]}")
    return x[_padded_rows(lengths, padded, x.device)[0]]


def _host_lengths(x: torch.Tensor | None, cu_seqlens: torch.Tensor, world_size: int) -> list[int]:
    check_batch(cu_seqlens, None, world_size)
    starts = cu_seqlens.tolist()
    check_lengths(starts, 1, None if x is None else x.shape[0])
    return [end - start for start, end in itertools.pairwise(starts)]


def _padded_rows(lengths: list[int], padded: list[int], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (the row in the padded batch of every original row, the padded `cu_seqlens`)."""
    starts = torch.tensor([0, *padded], device=device).cumsum(0)
    rows = [torch.arange(length, device=device) + start for start, length in zip(starts, lengths, strict=False)]
    empty = torch.arange(0, device=device)
    return torch.cat([empty, *rows]), starts.int()


def validate(cu_seqlens: torch.Tensor, world_size: int, total: int | None = None, *, group=None) -> None:
    """Raise `ValueError` unless `cu_seqlens` can be dealt out to `world_size` ranks; the host reads it: call it once.

    `total` is the number of rows of the unsharded batch. Attention itself produces NaN for invalid lengths, because
    checking them would synchronise with the GPU. With a `group` (as `zigzag_attention` takes it) every rank of it makes
    this call; if the ranks differ in anything, or one of them finds a fault, all raise the same error.
    """
    if group is None:
        check_batch(cu_seqlens, None, world_size)
        check_lengths(cu_seqlens.tolist(), world_size, total)
        return
    place = place_in(group)
    assert place.group_name is not None
    group = resolve(place.group_name)
    try:
        if world_size != place.world_size:
            raise ValueError(f"world_size: expected the size of the group, {place.world_size}, got {world_size}")
        check_batch(cu_seqlens, None, world_size)
        values = cu_seqlens.tolist()
        check_lengths(values, world_size, total)
    except ValueError as error:
        refuse(group, error)
    report = {"call": "validate", "total": total, "sequences": len(values) - 1}
    compare(group, report | {f"cu_seqlens[{index}]": value for index, value in enumerate(values)})
