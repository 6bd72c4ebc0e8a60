"""Conversion of `segment_ids` and `position_ids`, two common ways to describe packed batches, to `cu_seqlens`."""

import torch

from zigzag_kernels.checks import MAX_ROWS, check_flag, check_int, dtype_name

from .arguments import check_device, check_tensor


def cu_seqlens_from_segment_ids(
    segment_ids: torch.Tensor,
    max_sequences: int | None = None,
    positions: torch.Tensor | None = None,
    *,
    return_lengths: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Convert the `segment_ids` of a packed row, or of a batch of rows, to `cu_seqlens [max_sequences + 1]` int32.

    A document is a run of tokens with the same id, and id 0 is padding. Padding at the end belongs to no document;
    padding between two documents counts as one more document. `segment_ids` are `[total]` integers in any order, or
    `[batch, tokens]`, whose rows follow one another in the packed batch `[batch * tokens]`; a document ends with its
    row.

    `max_sequences` is N, the most documents that all of `segment_ids` can have; without it the host counts the
    documents, and waits for the device. With `positions`, integers in the shape of `segment_ids`, a document also
    begins where the position is 0, for packings in which neighbours may have the same id. If there are fewer than N
    documents, the last offset is repeated. If there are more, the last offset is -1, for which `validate` raises an
    error and attention returns NaN.

    With `return_lengths` there is a second result, the real lengths `[N]` int32 for `prepare_batch`, which are 0 for
    padding. The offsets then extend into the last row even if that row is only padding, as the row layout requires, so
    that N also counts the padding of earlier rows. Raises `ValueError` for other shapes or dtypes.
    """
    given = {"segment_ids": segment_ids} if positions is None else {"segment_ids": segment_ids, "positions": positions}
    for name, x in given.items():
        _check_ids(name, x, "segment_ids", segment_ids)
    return_lengths = check_flag("return_lengths", return_lengths)
    ids, width = segment_ids.reshape(-1), max(segment_ids.shape[-1], 1)
    rows = torch.arange(len(ids), device=ids.device)
    end = torch.cat((rows.new_zeros(1), torch.where(ids != 0, rows + 1, 0))).amax()
    if return_lengths:
        end = end.clamp(min=max(len(ids) - width, 0))
    begins = (rows % width == 0) | (ids != ids.roll(1))
    if positions is not None:
        begins = begins | ((ids != 0) & (positions.reshape(-1) == 0))
    cu_seqlens = _offsets(begins & (rows < end), end, max_sequences, None)
    if not return_lengths:
        return cu_seqlens
    real = torch.cat((ids != 0, ids.new_zeros(1, dtype=torch.bool)))[cu_seqlens[:-1].long()]
    return cu_seqlens, cu_seqlens.diff() * real * (cu_seqlens[-1] >= 0)


def cu_seqlens_from_position_ids(position_ids: torch.Tensor, max_sequences: int | None = None) -> torch.Tensor:
    """Convert the `position_ids` of a packed row, or of a batch of rows, to `cu_seqlens [max_sequences + 1]` int32.

    A document begins where the position is 0, and at the beginning of a row; every other position must be one more than
    the position before it. There is no padding: each of several tokens at position 0 in a row is a document.

    `position_ids` are `[total]` integers, or `[batch, tokens]`, whose rows follow one another in the packed batch.
    `max_sequences` is as in `cu_seqlens_from_segment_ids`. If there are more documents, or if positions skip numbers,
    as in a rank's zigzag rows, the last offset is -1, for which `validate` raises an error and attention returns NaN.
    """
    _check_ids("position_ids", position_ids, "position_ids", position_ids)
    positions, width = position_ids.reshape(-1), max(position_ids.shape[-1], 1)
    rows = torch.arange(len(positions), device=positions.device)
    first = rows % width == 0
    begins = first | (positions == 0)
    fault = ~begins & (positions != positions.roll(1) + 1) | (positions < 0)
    return _offsets(begins, rows.new_tensor(len(positions)), max_sequences, fault.any())


def _check_ids(name: str, x, model_name: str, model: torch.Tensor) -> None:
    """Raise `ValueError` unless `x` has integers `[total]` or `[batch, tokens]`, and shape and device of `model`."""
    check_tensor(name, x)
    integers = not (x.is_floating_point() or x.is_complex() or x.dtype == torch.bool)
    if x.ndim not in (1, 2) or x.shape != model.shape or not integers:
        expected = "[total] or [batch, tokens]" if name == model_name else f"{tuple(model.shape)} as {model_name}"
        raise ValueError(f"{name}: expected integers {expected}, got shape {tuple(x.shape)} {dtype_name(x)}")
    check_device(name, x, model_name, model)


def _offsets(
    begins: torch.Tensor, end: torch.Tensor, max_sequences: int | None, fault: torch.Tensor | None
) -> torch.Tensor:
    """Return the offsets of documents that begin at `begins`; the last is `end`, or -1 with a fault."""
    if max_sequences is None:
        max_sequences = int(begins.sum())
    else:
        max_sequences = check_int("max_sequences", max_sequences, 1, MAX_ROWS, "a positive int")
    numbers = torch.arange(1, max_sequences + 1, device=begins.device)
    counts = begins.long().cumsum(0)
    count = begins.sum()
    starts = torch.where(numbers <= count, torch.searchsorted(counts, numbers), end)
    wrong = count > max_sequences
    if fault is not None:
        wrong = wrong | fault
    return torch.cat((starts, torch.where(wrong, -1, end).reshape(1))).int()
