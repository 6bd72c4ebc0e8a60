"""Attention and the zigzag layout in dense NumPy, from their definitions: what everything else must agree with.

It imports nothing of ours. The same formulas run in two arithmetics: `EXACT` (float64) is the oracle, and
`straightforward(dtype)` rounds where any plain low-precision implementation does, which `closeness.py` needs to say how
large an error is to be expected. Every score matrix is one head of one sequence, so memory stays small.
"""

from itertools import pairwise
from typing import NamedTuple

import ml_dtypes  # noqa: F401  (its import makes "bfloat16" a NumPy dtype)
import numpy as np


class Arithmetic(NamedTuple):
    """`accumulate`: type of scores, statistics and sums. `store`: type to which P, dS and results are rounded."""

    accumulate: np.dtype
    store: np.dtype

    def rounded(self, x):
        """`x` with the values of type `store` and the type `accumulate`."""
        return x.astype(self.store).astype(self.accumulate)


EXACT = Arithmetic(np.dtype("float64"), np.dtype("float64"))


def straightforward(dtype):
    """Products of `dtype` values summed in float32; P, dS and results rounded to `dtype`, statistics in float32."""
    return Arithmetic(np.dtype("float32"), np.dtype(dtype))


class RankResult(NamedTuple):
    """What one rank produces; its part of `dk, dv` is in gathered (rank-major) layout, as K/V are."""

    out: np.ndarray  # [T, heads, head_dim]
    lse: np.ndarray  # [heads, T]
    dq: np.ndarray | None  # [T, heads, head_dim]
    dk: np.ndarray | None  # [world_size * T, kv_heads, head_dim]
    dv: np.ndarray | None


def attend(q, k, v, mask, scale, arithmetic=EXACT):
    """One head: `q [M, D]`, `k, v [N, D]`, `mask [M, N]` (True: seen) -> `out [M, D]`, `lse [M]` (natural log).

    A row that sees no key has `out` 0 and `lse` -inf.
    """
    scores = np.where(mask, (q @ k.T) * scale, -np.inf)
    maximum = scores.max(axis=1, initial=-np.inf)
    maximum = np.where(np.isneginf(maximum), 0, maximum)
    weights = np.exp(scores - maximum[:, None])
    total = weights.sum(axis=1)
    with np.errstate(divide="ignore"):
        lse = maximum + np.log(total)
    p = weights / np.where(total == 0, 1, total)[:, None]
    return arithmetic.rounded(arithmetic.rounded(p) @ v), lse


def attend_gradients(q, k, v, mask, scale, out, lse, dout, dlse, arithmetic=EXACT):
    """One head: `out, lse` of `attend` and their cotangents `dout [M, D]`, `dlse [M]` -> `dq, dk, dv`, not yet rounded.

    With `P = exp(S - lse)`: `dP = dout v^T`, `dS = P (dP - rowsum(dout * out) + dlse)`.
    """
    finite_lse = np.where(np.isneginf(lse), 0, lse)
    p = np.exp(np.where(mask, (q @ k.T) * scale, -np.inf) - finite_lse[:, None])
    dp = dout @ v.T
    ds = arithmetic.rounded(p * (dp + (dlse - (dout * out).sum(axis=1))[:, None]))
    return (ds @ k) * scale, (ds.T @ q) * scale, arithmetic.rounded(p).T @ dout


def rank_positions(length, rank, world_size):
    """Positions of one sequence that `rank` holds: of `2 * world_size` chunks, chunk `rank`, then its mirror image."""
    if world_size > 1 and length % (2 * world_size):
        raise ValueError(f"length {length} is not a multiple of {2 * world_size}")
    positions = []
    for chunk in (rank, 2 * world_size - 1 - rank):
        # One rank holds both halves, so any length will do there.
        positions += range(chunk * length // (2 * world_size), (chunk + 1) * length // (2 * world_size))
    return np.array(positions, dtype=np.int64)


def zigzag_rows(cu_seqlens, rank, world_size, padding=0):
    """Global row that each local row of `rank` holds: `[T]`.

    The global batch ends with `world_size * padding` rows behind the last sequence; each rank holds `padding` of them
    behind its own last sequence.
    """
    rows = []
    for start, end in pairwise(cu_seqlens):
        rows += [start + position for position in rank_positions(end - start, rank, world_size)]
    first_padding = cu_seqlens[-1] + rank * padding
    rows += range(first_padding, first_padding + padding)
    return np.array(rows, dtype=np.int64)


def gathered_rows(cu_seqlens, world_size, padding=0):
    """Global row that each row of the gathered (rank-major) buffer holds: `[world_size * T]`."""
    return np.concatenate([zigzag_rows(cu_seqlens, rank, world_size, padding) for rank in range(world_size)])


def rank_attention(
    q, k, v, cu_seqlens, rank, world_size, causal, softmax_scale=None, dout=None, dlse=None, arithmetic=EXACT
):
    """What `rank` must produce; gradients if `dout` is given.

    `q [total, heads, head_dim]` and `k, v [total, kv_heads, head_dim]` are the whole batch in global order;
    `dout [T, heads, head_dim]` and `dlse [heads, T]` are cotangents of this rank's own rows.
    """
    total, heads, head_dim = q.shape
    kv_heads = k.shape[1]
    scale = head_dim**-0.5 if softmax_scale is None else softmax_scale
    padding = (total - int(cu_seqlens[-1])) // world_size
    rows = zigzag_rows(cu_seqlens, rank, world_size, padding)
    q, k, v = (x.astype(arithmetic.accumulate) for x in (q[rows], k, v))
    out = np.zeros_like(q)
    lse = np.full((heads, len(rows)), -np.inf, dtype=q.dtype)
    if dout is not None:
        dout = dout.astype(q.dtype)
        dlse = np.zeros_like(lse) if dlse is None else dlse.astype(q.dtype)
        dq, dk, dv = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)

    local_start = 0
    for start, end in pairwise(cu_seqlens):
        positions = rank_positions(end - start, rank, world_size)
        mine = slice(local_start, local_start + len(positions))
        keys = slice(start, end)
        local_start += len(positions)
        key_positions = np.arange(end - start)
        mask = np.ones((len(positions), end - start), dtype=bool)
        if causal:
            mask = key_positions[None, :] <= positions[:, None]
        for head in range(heads):
            kv_head = head // (heads // kv_heads)
            operands = q[mine, head], k[keys, kv_head], v[keys, kv_head], mask, scale
            out[mine, head], lse[head, mine] = attend(*operands, arithmetic)
            if dout is not None:
                results = out[mine, head], lse[head, mine], dout[mine, head], dlse[head, mine]
                dq_head, dk_head, dv_head = attend_gradients(*operands, *results, arithmetic)
                dq[mine, head] = dq_head
                dk[keys, kv_head] += dk_head
                dv[keys, kv_head] += dv_head

    if dout is None:
        return RankResult(out, lse, None, None, None)
    gathered = gathered_rows(cu_seqlens, world_size, padding)
    return RankResult(out, lse, *(arithmetic.rounded(x) for x in (dq, dk[gathered], dv[gathered])))


def attention(q, k, v, cu_seqlens, causal, softmax_scale=None, arithmetic=EXACT):
    """The whole packed batch `[total, heads, head_dim]` -> `out`, `lse [heads, total]`.

    One rank that holds everything holds it in global order, which makes this a special case of `rank_attention`.
    """
    return rank_attention(q, k, v, cu_seqlens, 0, 1, causal, softmax_scale, arithmetic=arithmetic)[:2]


def attention_gradients(q, k, v, cu_seqlens, causal, softmax_scale, dout, dlse=None, arithmetic=EXACT):
    """Gradients `dq, dk, dv` of the whole packed batch for the cotangents `dout` and `dlse [heads, total]`."""
    return rank_attention(q, k, v, cu_seqlens, 0, 1, causal, softmax_scale, dout, dlse, arithmetic)[2:]
