"""Checks of arguments that only the published names have: groups, slices of keys, unsupported options."""

from itertools import accumulate

import torch

from zigzag_kernels.checks import (
    MAX_ROWS,
    check_flag,
    check_int,
    check_lengths,
    check_rows,
    check_window_size,
    dtype_name,
)

from ..arguments import check_device, check_int32, check_tensor, readable
from ..reference import Mask

KVSlice = tuple[list[tuple[int, int]], torch.Tensor]


def check_list(name: str, x, length: int) -> None:
    """Raise `ValueError` unless `x` is a list or tuple of `length` entries."""
    if not isinstance(x, list | tuple) or len(x) != length:
        got = f"{len(x)}" if isinstance(x, list | tuple) else f"{type(x).__name__} {x!r}"
        raise ValueError(f"{name}: expected a list with an entry for each of the {length} groups, got {got}")


def local_bounds(name: str, cu_seqlens: torch.Tensor, world_size: int, tokens: int | None = None) -> list[int]:
    """Return the values of local offsets; `ValueError` unless they describe sequences in `tokens` rows of a rank."""
    check_int32(name, cu_seqlens)
    bounds = cu_seqlens.tolist()
    total = None if tokens is None else world_size * tokens
    check_lengths([world_size * bound for bound in bounds], world_size, total, name)
    return bounds


def check_slices(kv_slices: list[KVSlice], groups: int, keys: int) -> None:
    """Raise `ValueError` unless each of the `groups` has ranges of existing keys and the matching offsets."""
    check_list("kv_slices", kv_slices, groups)
    for entry in kv_slices:
        ranges = _check_ranges(entry, keys)
        cu_seqlens = entry[1]
        check_int32("kv_slices", cu_seqlens)
        if cu_seqlens.tolist() != [0, *accumulate(end - start for start, end in ranges)]:
            raise ValueError(
                f"kv_slices: expected the cu_seqlens of {ranges} laid end to end, got {cu_seqlens.tolist()}"
            )


def _check_ranges(entry: KVSlice, keys: int) -> list[tuple[int, int]]:
    """Return the ranges (start, end) of one of `kv_slices`; `ValueError` unless they lie within `keys` keys."""
    if not isinstance(entry, list | tuple) or len(entry) != 2 or not isinstance(entry[0], list | tuple):
        raise ValueError(f"kv_slices: expected pairs of a list of (start, end) and cu_seqlens, got {entry!r}")
    for bounds in entry[0]:
        if not isinstance(bounds, list | tuple) or len(bounds) != 2:
            raise ValueError(f"kv_slices: expected (start, end), got {bounds!r}")
        start = check_int("kv_slices", bounds[0], 0, keys, f"rows from 0 to {keys}")
        check_int("kv_slices", bounds[1], start, keys, f"a range that ends between {start} and the {keys} keys")
    return entry[0]


def check_grouped(
    chunk_q_list: list[torch.Tensor],
    chunk_indices_list: list[torch.Tensor],
    kv_buffer: torch.Tensor,
    nheads: int,
    head_dim: int,
    world_size: int,
) -> None:
    """Raise `ValueError` unless the shapes fit each other, and every local row is in exactly one group.

    The second check needs indices that the host can read without waiting.
    """
    check_tensor("kv_buffer", kv_buffer)
    if kv_buffer.ndim != 4 or kv_buffer.shape[0] != 2:
        raise ValueError(f"kv_buffer: expected [2, W * T, kv_heads, head_dim], got shape {tuple(kv_buffer.shape)}")
    check_rows("kv_buffer", tuple(kv_buffer.shape[1:]), world_size)
    if not isinstance(chunk_q_list, list | tuple) or not chunk_q_list:
        raise ValueError(f"chunk_q_list: expected a list of tensors, got {chunk_q_list!r}")
    nheads, head_dim = check_int("nheads", nheads, 1), check_int("head_dim", head_dim, 1)
    check_list("chunk_indices_list", chunk_indices_list, len(chunk_q_list))
    for q, indices in zip(chunk_q_list, chunk_indices_list, strict=True):
        check_tensor("chunk_q_list", q)
        check_tensor("chunk_indices_list", indices)
        check_device("chunk_q_list", q, "kv_buffer", kv_buffer)
        if indices.dtype != torch.int64 or indices.ndim != 1:
            raise ValueError(
                f"chunk_indices_list: expected [rows] int64, got shape {tuple(indices.shape)} {dtype_name(indices)}"
            )
        if q.shape != (len(indices), nheads, head_dim):
            raise ValueError(
                f"chunk_q_list: expected shape {(len(indices), nheads, head_dim)} as in chunk_indices_list, nheads "
                f"and head_dim, got {tuple(q.shape)}"
            )
    rows = sum(map(len, chunk_indices_list))
    if readable(*chunk_indices_list) and sorted(torch.cat(list(chunk_indices_list)).tolist()) != list(range(rows)):
        raise ValueError(f"chunk_indices_list: expected each of the local rows 0 to {rows - 1} in one group")


def mask_of(causal: bool, dropout_p: float, window_size: tuple[int, int], alibi_slopes: torch.Tensor | None) -> Mask:
    """Return the `Mask` of these options; `NotImplementedError` for options that neither path supports.

    As in FlashAttention, `causal` means the window (-1, 0): all keys to the left, and none to the right.
    """
    if isinstance(dropout_p, bool) or not isinstance(dropout_p, int | float) or dropout_p != 0:
        raise NotImplementedError(f"dropout_p: only 0 is supported, got {dropout_p}")
    if alibi_slopes is not None:
        raise NotImplementedError("alibi_slopes: only None is supported")
    causal = check_flag("causal", causal)
    left, right = check_window_size(window_size)
    return Mask(True, (left, -1)) if causal or right == 0 else Mask(False, (left, right))


def chunks_of(kv_slices: list[KVSlice], world_size: int) -> tuple[int, int]:
    """Return the early and the late chunk of the rank for which `compute_kv_slices_for_groups` made `kv_slices`.

    Rank r sees the first r + 1 chunks of a sequence from its early chunk and the first 2W - r chunks from its late one,
    2W + 1 chunks in all: this gives the length of a chunk, and with it r. A batch without keys is the same for every
    rank.
    """
    check_list("kv_slices", kv_slices, len(kv_slices) if isinstance(kv_slices, list | tuple) else 2)
    lengths: dict[int, list[int]] = {}
    for entry in kv_slices:
        for start, end in _check_ranges(entry, MAX_ROWS):
            if end > start:
                lengths.setdefault(start, []).append(end - start)
    if not lengths:
        return 0, 2 * world_size - 1
    both = sorted(next(iter(lengths.values())))
    chunk, rest = divmod(sum(both), 2 * world_size + 1)
    if len(both) != 2 or rest or both[0] % chunk:
        raise ValueError(
            f"kv_slices: expected keys up to two chunks of each sequence, as compute_kv_slices_for_groups gives, to "
            f"find chunk_idx_0 and chunk_idx_1, got slices of {both} keys"
        )
    return both[0] // chunk - 1, both[1] // chunk - 1


def check_n_chunks(n_chunks: int, world_size: int) -> int:
    """Return `n_chunks`, a number of groups; `ValueError` unless it is from 1 to the 2W chunks of a sequence."""
    return check_int("n_chunks", n_chunks, 1, 2 * world_size, f"1 to 2 * world_size = {2 * world_size}")
