"""Attention and the zigzag layout in dense NumPy, from their definitions; all other code must agree with it.

It imports nothing from the packages. The same formulas run in two arithmetics: `EXACT` (float64) is the oracle, and
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


class Options(NamedTuple):
    """Options that decide which keys a row sees, and how scores become probabilities.

    The row at position `p` of its document sees the keys `p - left` to `p + right` of `window_size` (-1: all on that
    side), of the same `attention_chunk` (0: none), and none behind the real length of the document. `sinks [heads]` are
    further logits, which have no values. In the "row" layout packed rows of `row_length` tokens are cut into chunks,
    not documents; 0 is one row that holds the whole batch.
    """

    window_size: tuple[int, int] = (-1, -1)
    attention_chunk: int = 0
    softcap: float = 0.0
    sinks: np.ndarray | None = None
    lengths: tuple[int, ...] | None = None
    layout: str = "document"
    row_length: int = 0


PLAIN = Options()


class RankResult(NamedTuple):
    """The results of one rank; its part of `dk, dv` is in gathered (rank-major) layout, like K/V.

    `max_logits` are the largest scores that rows of this rank see, and `dsinks` sums over its rows of `sink_terms`.
    """

    out: np.ndarray  # [T, heads, head_dim]
    lse: np.ndarray  # [heads, T]
    dq: np.ndarray | None  # [T, heads, head_dim]
    dk: np.ndarray | None  # [world_size * T, kv_heads, head_dim]
    dv: np.ndarray | None
    max_logits: np.ndarray  # [heads]
    dsinks: np.ndarray | None  # [heads]
    sink_terms: np.ndarray | None  # [heads, T]


def attend(q, k, v, mask, scale, arithmetic=EXACT, softcap=0.0, sink=-np.inf):
    """One head: `q [M, D]`, `k, v [N, D]`, `mask [M, N]` (True: seen) -> `out [M, D]`, `lse [M]` (natural log).

    A row that sees no key has `out` 0 and `lse` -inf, whatever the sink is.
    """
    scores = visible_scores(q, k, mask, scale, softcap)
    sink = np.asarray(sink, dtype=scores.dtype)
    maximum = np.maximum(scores.max(axis=1, initial=-np.inf), sink)
    maximum = np.where(np.isneginf(maximum), 0, maximum)
    weights = np.exp(scores - maximum[:, None])
    total = weights.sum(axis=1) + np.where(mask.any(axis=1), np.exp(sink - maximum), 0)
    with np.errstate(divide="ignore"):
        lse = maximum + np.log(total)
    p = weights / np.where(total == 0, 1, total)[:, None]
    return arithmetic.rounded(arithmetic.rounded(p) @ v), lse


def visible_scores(q, k, mask, scale, softcap=0.0):
    """One head: the scores `[M, N]`, after scale and softcap, of the keys that are seen; -inf for the others."""
    return np.where(mask, _capped((q @ k.T) * scale, softcap), -np.inf)


def _capped(scores, softcap):
    return softcap * np.tanh(scores / softcap) if softcap else scores


class HeadResults(NamedTuple):
    """Results of one head, `out [M, D]` and `lse [M]`, and their cotangents."""

    out: np.ndarray
    lse: np.ndarray
    dout: np.ndarray
    dlse: np.ndarray


def attend_gradients(q, k, v, mask, scale, results, arithmetic=EXACT, softcap=0.0):
    """Return `dq, dk, dv` of one head, not yet rounded, for the `HeadResults` of `attend`.

    With `P = exp(S - lse)`: `dP = dout v^T`, `dS = P (dP - rowsum(dout * out) + dlse)`. The derivative of capped scores
    is `1 - (S / softcap)^2`.
    """
    out, lse, dout, dlse = results
    finite_lse = np.where(np.isneginf(lse), 0, lse)
    scores = _capped((q @ k.T) * scale, softcap)
    p = np.exp(np.where(mask, scores, -np.inf) - finite_lse[:, None])
    dp = dout @ v.T
    ds = p * (dp + (dlse - (dout * out).sum(axis=1))[:, None])
    if softcap:
        ds = ds * (1 - (scores / softcap) ** 2)
    ds = arithmetic.rounded(ds)
    return (ds @ k) * scale, (ds.T @ q) * scale, arithmetic.rounded(p).T @ dout


def sink_terms(sink, out, lse, dout, dlse):
    """One head: what each row adds to the gradient of its sink, which is a key whose value is 0."""
    share = np.exp(np.asarray(sink, dtype=lse.dtype) - np.where(np.isneginf(lse), np.inf, lse))
    return share * (dlse - (dout * out).sum(axis=1))


def visible(positions, keys, length, causal, options=PLAIN):
    """Return `[M, N]`: whether rows at `positions [M]` of a document see its `keys [N]`.

    The document has `length` real tokens.
    """
    rows = positions[:, None]
    left, right = options.window_size
    mask = (rows < length) & (keys < length)
    if causal:
        mask &= keys <= rows
    if left >= 0:
        mask &= keys >= rows - left
    if right >= 0:
        mask &= keys <= rows + right
    if options.attention_chunk:
        mask &= keys // options.attention_chunk == rows // options.attention_chunk
    return mask


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


def rows_of_rank(cu_seqlens, rank, world_size, total, options=PLAIN):
    """Global row that each local row of `rank` holds, `[T]`, in the layout of `options`.

    `total` are the global rows of all ranks. In the row layout padding is at the end of the last packed row.
    """
    if options.layout == "row":
        row_length = options.row_length or max(total, 1)
        return zigzag_rows(range(0, total + 1, row_length), rank, world_size)
    return zigzag_rows(cu_seqlens, rank, world_size, (total - int(cu_seqlens[-1])) // world_size)


def rows_of_all(cu_seqlens, world_size, total, options=PLAIN):
    """Global row that each row of the gathered (rank-major) buffer holds, in the layout of `options`: `[total]`."""
    return np.concatenate([rows_of_rank(cu_seqlens, rank, world_size, total, options) for rank in range(world_size)])


def gathered_rows(cu_seqlens, world_size, padding=0):
    """Global row that each row of the gathered (rank-major) buffer holds: `[world_size * T]`."""
    return np.concatenate([zigzag_rows(cu_seqlens, rank, world_size, padding) for rank in range(world_size)])


def rank_attention(
    q,
    k,
    v,
    cu_seqlens,
    rank,
    world_size,
    causal,
    softmax_scale=None,
    *,
    dout=None,
    dlse=None,
    arithmetic=EXACT,
    options=PLAIN,
):
    """Return the results that `rank` must produce, with gradients if `dout` is given.

    `q [total, heads, head_dim]` and `k, v [total, kv_heads, head_dim]` are the whole batch in global order;
    `dout [T, heads, head_dim]` and `dlse [heads, T]` are cotangents of this rank's own rows.
    """
    total, heads, head_dim = q.shape
    kv_heads = k.shape[1]
    scale = head_dim**-0.5 if softmax_scale is None else softmax_scale
    rows = rows_of_rank(cu_seqlens, rank, world_size, total, options)
    q, k, v = (x.astype(arithmetic.accumulate) for x in (q[rows], k, v))
    out = np.zeros_like(q)
    lse = np.full((heads, len(rows)), -np.inf, dtype=q.dtype)
    max_logits = np.full(heads, -np.inf, dtype=q.dtype)
    sinks = np.full(heads, -np.inf) if options.sinks is None else options.sinks
    if dout is not None:
        dout = dout.astype(q.dtype)
        dlse = np.zeros_like(lse) if dlse is None else dlse.astype(q.dtype)
        dq, dk, dv, terms = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v), np.zeros_like(lse)

    for document, (start, end) in enumerate(pairwise(cu_seqlens)):
        mine = np.flatnonzero((start <= rows) & (rows < end))
        keys = slice(start, end)
        length = end - start if options.lengths is None else options.lengths[document]
        mask = visible(rows[mine] - start, np.arange(end - start), length, causal, options)
        for head in range(heads):
            kv_head = head // (heads // kv_heads)
            operands = q[mine, head], k[keys, kv_head], v[keys, kv_head], mask, scale
            out[mine, head], lse[head, mine] = attend(*operands, arithmetic, options.softcap, sinks[head])
            scores = visible_scores(*operands[:2], mask, scale, options.softcap)
            max_logits[head] = max(max_logits[head], scores.max(initial=-np.inf))
            if dout is not None:
                results = HeadResults(out[mine, head], lse[head, mine], dout[mine, head], dlse[head, mine])
                dq_head, dk_head, dv_head = attend_gradients(*operands, results, arithmetic, options.softcap)
                dq[mine, head] = dq_head
                dk[keys, kv_head] += dk_head
                dv[keys, kv_head] += dv_head
                terms[head, mine] = sink_terms(sinks[head], *results)

    if dout is None:
        return RankResult(out, lse, None, None, None, max_logits, None, None)
    gathered = rows_of_all(cu_seqlens, world_size, total, options)
    gradients = (arithmetic.rounded(x) for x in (dq, dk[gathered], dv[gathered]))
    return RankResult(out, lse, *gradients, max_logits, terms.sum(axis=1), terms)


def attention(q, k, v, cu_seqlens, causal, softmax_scale=None, arithmetic=EXACT, options=PLAIN):
    """The whole packed batch `[total, heads, head_dim]` -> `out`, `lse [heads, total]`.

    One rank that holds everything holds it in global order, which makes this a special case of `rank_attention`.
    """
    return rank_attention(q, k, v, cu_seqlens, 0, 1, causal, softmax_scale, arithmetic=arithmetic, options=options)[:2]


def attention_gradients(
    q, k, v, cu_seqlens, causal, softmax_scale, dout, dlse=None, *, arithmetic=EXACT, options=PLAIN
):
    """Gradients `dq, dk, dv` of the whole packed batch for the cotangents `dout` and `dlse [heads, total]`."""
    gradients = {"dout": dout, "dlse": dlse, "arithmetic": arithmetic, "options": options}
    return rank_attention(q, k, v, cu_seqlens, 0, 1, causal, softmax_scale, **gradients)[2:5]
