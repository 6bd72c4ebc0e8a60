"""The published fused forward function: two runs of rows of every sequence attend to keys in position order."""

from itertools import pairwise
from typing import NamedTuple

import torch

from zigzag_kernels.callspec import make_call_spec
from zigzag_kernels.checks import MAX_ROWS, check_int, check_lengths
from zigzag_kernels.modes import KVLayout
from zigzag_kernels.problem import ArraySpec, make_problem
from zigzag_kernels.segments.columns import SegmentColumn, SequenceColumn

from .. import launch
from ..arguments import cast_for_autocast, check_device, check_int32, check_tensor
from ..autograd import attention
from ..parallel import Tables, transport_of
from ..reference import Mask
from . import grouped
from .verify import choose_path, fused_backend


def fused_zigzag_llama3_flash_attn_forward_v2(  # noqa: PLR0917  (a published name)
    q0: torch.Tensor,
    q1: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q0: torch.Tensor,
    cu_seqlens_q1: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    chunk_idx_0: int,
    chunk_idx_1: int,
    total_chunks: int,
    softmax_scale: float | None = None,
    causal: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute attention of two groups of rows in one launch; differentiable, also through lse.

    Args:
        q0, q1: `[rows, heads, head_dim]`, the rows of groups 0 and 1. In group g, the rows of a sequence with `length`
            keys begin at position `chunk_idx_g * length // total_chunks`, and end at or before position `length`.
        k, v: `[keys, kv_heads, head_dim]`, every sequence in position order.
        cu_seqlens_q0, cu_seqlens_q1, cu_seqlens_k: `[N + 1]` int32, the offsets of the sequences in q0, in q1 and in k.
        chunk_idx_0, chunk_idx_1: the chunk that each group begins with, from 0 to `total_chunks - 1`.
        total_chunks: the number of equal chunks of a sequence.
        softmax_scale: positive; `1 / sqrt(head_dim)` if None.
        causal: True lets a row see the keys up to its own position, False all keys of its sequence.

    Returns:
        out0, out1 in the shapes of q0 and q1; lse0, lse1 `[heads, rows]` float32, in natural logarithm. Rows behind the
        last sequence have out 0 and lse -inf. Invalid lengths, or rows that extend beyond their sequence, give NaN
        everywhere; the unfused path raises.

    Raises: as `zigzag_attention_gathered`.
    """
    for name, x in {"q0": q0, "q1": q1, "k": k, "v": v}.items():
        check_tensor(name, x)
        check_device(name, x, "q0", q0)
    q0, q1, k, v = cast_for_autocast(q0, q1, k, v)
    if q1.ndim != q0.ndim or q1.shape[1:] != q0.shape[1:] or q1.dtype != q0.dtype:
        raise ValueError(f"q1: expected heads, head_dim and dtype of q0, {tuple(q0.shape)}, got {tuple(q1.shape)}")
    offsets = {"cu_seqlens_q0": cu_seqlens_q0, "cu_seqlens_q1": cu_seqlens_q1, "cu_seqlens_k": cu_seqlens_k}
    for name, cu_seqlens in offsets.items():
        check_int32(name, cu_seqlens)
    for name, cu_seqlens in offsets.items():
        check_device(name, cu_seqlens, "q0", q0)
        if cu_seqlens.shape != cu_seqlens_k.shape:
            raise ValueError(
                f"{name}: expected the shape of cu_seqlens_k, {tuple(cu_seqlens_k.shape)}, "
                f"got {tuple(cu_seqlens.shape)}"
            )
    total_chunks = check_int("total_chunks", total_chunks, 1, MAX_ROWS, f"a number of chunks from 1 to {MAX_ROWS}")
    last = total_chunks - 1
    chunks = {"chunk_idx_0": chunk_idx_0, "chunk_idx_1": chunk_idx_1}
    chunks = [check_int(name, x, 0, last, f"0 to total_chunks - 1 = {last}") for name, x in chunks.items()]
    backend = launch.choose_backend(fused_backend(q0.device), q0.device)
    _, dtype, strides = launch.describe(q0)
    problem = make_problem(
        ArraySpec((len(q0) + len(q1), *q0.shape[1:]), dtype, strides),
        launch.describe(k),
        launch.describe(v),
        make_call_spec(head_dim=q0.shape[-1], backend=backend, causal=causal, softmax_scale=softmax_scale),
        sequences=len(cu_seqlens_k),
        world_size=1,
        target=launch.target(backend, q0.device),
        kv_layout=KVLayout.CONTIGUOUS,
        kv_rows=k.shape[0] if k.ndim else 0,
    )
    pair = _Pair(
        (cu_seqlens_q0, cu_seqlens_q1),
        (len(q0), len(q1)),
        cu_seqlens_k,
        len(k),
        (chunks[0], chunks[1]),
        total_chunks,
    )

    def fused_path(q0, q1, k, v):
        if backend == "reference":
            return unfused_path(q0, q1, k, v)
        q, k, v = torch.cat([q0, q1]), launch.last_dim_contiguous(k), launch.last_dim_contiguous(v)
        transport = transport_of(q, k, v, problem.call, problem.sequences, 1, KVLayout.CONTIGUOUS, None)
        out, lse = attention(transport, q, k, v, _tables(pair))
        return _split(out, lse, pair)

    def unfused_path(q0, q1, k, v):
        calls = _calls(pair, causal)
        grouping = grouped.Grouping(
            calls, sum(pair.rows), cu_seqlens_k, 1, Mask(causal), problem.call.softmax_scale, False
        )
        groups = [q[: len(call.rows)] for q, call in zip((q0, q1), calls, strict=True)]
        out, lse = grouped.GroupedAttention.apply(grouping, None, k.shape[1], k, v, *groups)
        return _split(out, lse, pair)

    inputs, results = {"q0": q0, "q1": q1, "k": k, "v": v}, ("out0", "out1", "lse0", "lse1")
    out0, out1, lse0, lse1 = choose_path(fused_path, unfused_path, inputs, results)
    return out0, out1, lse0, lse1


class _Pair(NamedTuple):
    """The lengths of two groups of rows, and of the keys of their sequences."""

    cu_seqlens_q: tuple[torch.Tensor, torch.Tensor]
    rows: tuple[int, int]
    cu_seqlens_k: torch.Tensor
    keys: int
    chunks: tuple[int, int]
    total_chunks: int


def _split(out: torch.Tensor, lse: torch.Tensor, pair: _Pair) -> tuple[torch.Tensor, ...]:
    """Return (out0, out1, lse0, lse1) from results that have the rows of group 0, then of group 1."""
    return *out.split(pair.rows), *lse.split(pair.rows, 1)


def _calls(pair: _Pair, causal: bool) -> list[grouped.Call]:
    """Return an attention call for each group, with keys up to the last row; `ValueError` for invalid lengths."""
    bounds = pair.cu_seqlens_k.tolist()
    check_lengths(bounds, 1, pair.keys)
    indices, slices, first = [], [], 0
    for cu_seqlens, rows, chunk in zip(pair.cu_seqlens_q, pair.rows, pair.chunks, strict=True):
        q_bounds = cu_seqlens.tolist()
        check_lengths(q_bounds, 1, rows)
        ranges = []
        for (start, end), (q_start, q_end) in zip(pairwise(bounds), pairwise(q_bounds), strict=True):
            last = start + chunk * (end - start) // pair.total_chunks + q_end - q_start
            if last > end:
                raise ValueError(
                    f"cu_seqlens_q: expected rows up to the end of their sequence of {end - start} keys, "
                    f"got {q_end - q_start} of chunk {chunk} of {pair.total_chunks}"
                )
            ranges.append((start, last))
        slices.append((ranges, grouped.offsets(ranges, pair.cu_seqlens_k)))
        indices.append(torch.arange(first, first + q_bounds[-1], device=cu_seqlens.device))
        first += rows
    return grouped.make_calls(list(pair.cu_seqlens_q), indices, slices, list(pairwise(bounds)), causal)


def _tables(pair: _Pair) -> Tables:
    """Return the tables that the kernels read (`zigzag_kernels.segments.columns`), heaviest entry first.

    Rows behind the last sequence of a group are one more sequence, without keys. If lengths are invalid, the last
    entry, for the padding, begins behind the end of the arrays, so that kernels make all results NaN.
    """
    cu_seqlens_k, tokens = pair.cu_seqlens_k, sum(pair.rows)
    nothing = torch.zeros_like(cu_seqlens_k[:1])
    length = torch.cat([cu_seqlens_k.diff(), nothing])  # [N + 1], like all columns below
    valid = (length >= 0).all() & (cu_seqlens_k[0] == 0) & (cu_seqlens_k[-1] <= pair.keys)
    groups, first = [], 0
    for cu_seqlens, rows, chunk in zip(pair.cu_seqlens_q, pair.rows, pair.chunks, strict=True):
        bounds = torch.cat([cu_seqlens, nothing + rows])
        q_len, position = bounds.diff(), (chunk * length.long() // pair.total_chunks).int()
        valid &= (cu_seqlens[0] == 0) & (q_len >= 0).all() & (position + q_len <= length)[:-1].all()
        groups.append((bounds[:-1] + first, q_len, position, length))
        first += rows

    zero = torch.zeros_like(length)
    document = length, zero, length, length, zero  # the early part has all keys, and there is no late part
    segments = [torch.stack([zero, *group, cu_seqlens_k, zero, length, group[2], *document], 1) for group in groups]
    weight = torch.cat([torch.minimum(position + q_len, length) for _, q_len, position, _ in groups])
    halves = (column for group in reversed(groups) for column in (*group, group[2]))
    sequences = torch.stack([zero, cu_seqlens_k, zero, length, *document, *halves], 1)
    used_rows, used_keys = nothing + tokens, cu_seqlens_k[-1:]
    return Tables(
        _ordered(
            torch.cat(segments), weight, SegmentColumn.Q_LEN, used_rows, torch.where(valid, used_rows, tokens + 1)
        ),
        _ordered(sequences, length, SequenceColumn.KEYS, used_keys, torch.where(valid, used_keys, pair.keys + 1)),
    )


def _ordered(entries: torch.Tensor, weight: torch.Tensor, size: int, before: torch.Tensor, row: torch.Tensor):
    """Return `entries` in descending order of weight, with the padding behind them.

    Column 0 of each entry becomes the sum of column `size` of all earlier entries.
    """
    entries = entries[weight.argsort(descending=True, stable=True)]
    entries[:, 0] = entries[:, size].cumsum(0) - entries[:, size]
    padding = torch.cat([before, row, torch.zeros_like(entries[0, 2:])])
    return torch.cat([entries, padding[None]])
