"""Functions that pad a packed batch so that it can be distributed over ranks, and that remove the padding."""

import itertools

import torch

from zigzag_kernels.batch_checks import check_padded_total
from zigzag_kernels.checks import (
    check_fill,
    check_layout,
    check_lengths,
    check_rows,
    check_world_size,
    dtype_name,
)
from zigzag_kernels.layout import padded_length
from zigzag_kernels.modes import Layout

from .arguments import as_cu_seqlens, check_tensor, mark_padded


def pad_to_zigzag(
    x: torch.Tensor,
    cu_seqlens: torch.Tensor,
    world_size: int,
    total: int | None = None,
    *,
    value: float = 0,
    layout: str = "document",
    row_length: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad a batch with `value` so that it can be distributed over ranks; return (padded `x`, its `cu_seqlens`).

    `x [total, ...]` has the documents of `cu_seqlens [N + 1]`, and W is `world_size`.
    In the document layout every document is padded to a multiple of 2W tokens, and `total`, a multiple of W, also pads
    the end to a fixed number of rows. In the row layout documents keep their lengths, and only the end is padded: to
    `total`, to whole rows of `row_length` tokens, or to a multiple of 2W. A single rank needs no padding. The host
    reads the lengths. `value` is 0 for tokens; for labels, pass the index that the loss ignores, such as -100.

    In the document layout, padding tokens are keys at the end of their document. With a causal mask no real token sees
    them; without it, every real token would. For `causal=False`, give `prepare_batch` the real `lengths`. Without them,
    attention raises an error for the `cu_seqlens` of this function, and for a batch that was prepared from them; a copy
    of the offsets alone, such as one on another device, looks like offsets without padding. In the row layout, padding
    belongs to no document, so that every mask is correct.
    """
    check_tensor("x", x)
    layout = check_layout(layout)
    lengths = _host_lengths(x, cu_seqlens, world_size)
    padded = lengths if layout is Layout.ROW else [padded_length(length, world_size) for length in lengths]
    total = check_padded_total(sum(padded), total, layout, row_length, world_size)
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


def unpad(x: torch.Tensor, cu_seqlens: torch.Tensor, world_size: int, *, layout: str = "document") -> torch.Tensor:
    """Undo `pad_to_zigzag`: return the rows of the original batch, whose offsets are `cu_seqlens`.

    `x` has the rows of the padded batch; it was padded with the same `world_size` and `layout`. Raises
    `ValueError` if `x` has fewer rows.
    """
    layout = check_layout(layout)
    lengths = _host_lengths(None, cu_seqlens, world_size)
    padded = lengths if layout is Layout.ROW else [padded_length(length, world_size) for length in lengths]
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
    """Return (the row of the padded batch that has each original row, the padded `cu_seqlens`)."""
    starts = torch.tensor([0, *padded], device=device).cumsum(0)
    rows = [torch.arange(length, device=device) + start for start, length in zip(starts, lengths, strict=False)]
    empty = torch.arange(0, device=device)
    return torch.cat([empty, *rows]), starts.int()
