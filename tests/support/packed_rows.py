"""Packed rows `[B, S]` that segment ids describe, dealt out in the row layout, and their results by the oracle."""

from typing import NamedTuple

import numpy as np

from tests.support import oracle
from tests.support.closeness import assert_close

RESULTS = "out", "lse", "dq", "dk", "dv"


class PackedRows(NamedTuple):
    """Whole arrays in the order of the tokens: q `[B, S, heads, head_dim]`, lse and its cotangent `[B, heads, S]`."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    dout: np.ndarray
    dlse: np.ndarray
    segment_ids: np.ndarray  # [B, S]
    positions: np.ndarray  # [B, S]


def make_rows(documents, length, *, heads=4, kv_heads=2, head_dim=16, seed=0):
    """Rows of `length` tokens; `documents` has for each row (id, tokens) of its documents, and 0 is padding."""
    rng = np.random.default_rng(seed)
    shape = len(documents), length
    q, dout = rng.standard_normal((2, *shape, heads, head_dim), np.float32)
    k, v = rng.standard_normal((2, *shape, kv_heads, head_dim), np.float32)
    dlse = rng.standard_normal((shape[0], heads, length), np.float32)
    segment_ids, positions = np.zeros((2, *shape), np.int32)
    for row, lengths in enumerate(documents):
        start = 0
        for number, tokens in lengths:
            segment_ids[row, start : start + tokens] = number
            positions[row, start : start + tokens] = np.arange(tokens) if number else 0
            start += tokens
    return PackedRows(q, k, v, dout, dlse, segment_ids, positions)


def row_order(length, world_size):
    """Return `[length]`: the token of a packed row at each place, when tokens are in the order of the ranks."""
    return np.concatenate([oracle.rank_positions(length, rank, world_size) for rank in range(world_size)])


def dealt_out(rows, world_size):
    """Return `rows` with the tokens of each row in the order of the ranks."""
    order = row_order(rows.q.shape[1], world_size)
    return PackedRows(*(x[..., order] if name == "dlse" else x[:, order] for name, x in rows._asdict().items()))


def results_of(rows, documents, arithmetic, *, causal=True, softmax_scale=None, options=oracle.PLAIN):
    """{name: array} of RESULTS of `make_rows(documents, ...)`, in the order of the tokens, and the terms of dsinks."""
    batch, length, heads, _ = rows.q.shape
    starts, lengths = [0], []
    for of_row in documents:
        for number, tokens in [*of_row, (0, length - sum(tokens for _, tokens in of_row))]:
            starts.append(starts[-1] + tokens)
            lengths.append(tokens if number else 0)
    flat = {name: x.reshape(-1, *x.shape[2:]) for name, x in rows._asdict().items() if name in ("q", "k", "v", "dout")}
    found = oracle.rank_attention(
        flat["q"], flat["k"], flat["v"], starts, 0, 1, causal, softmax_scale, dout=flat["dout"],
        dlse=rows.dlse.swapaxes(0, 1).reshape(heads, -1), arithmetic=arithmetic,
        options=options._replace(lengths=tuple(lengths)),
    )._asdict()  # fmt: skip
    rows_of = {name: found[name].reshape(*rows.k.shape[:2], -1, rows.k.shape[3]) for name in RESULTS if name != "lse"}
    lse = found["lse"].reshape(heads, batch, length).swapaxes(0, 1)
    return rows_of | {"lse": lse, "sink_terms": found["sink_terms"]}


def assert_rows_are_right(results, documents, rows, world_size, **options):
    """RESULTS of all ranks behind one another equal the oracle's for the rows of `make_rows`."""
    order = row_order(rows.q.shape[1], world_size)
    wanted = [
        results_of(rows, documents, arithmetic, **options)
        for arithmetic in (oracle.EXACT, oracle.straightforward(rows.q.dtype))
    ]
    for name, x in zip(RESULTS, results, strict=True):
        of_name = [w[name][..., order] if name == "lse" else w[name][:, order] for w in wanted]
        # As `closeness` takes them: [rows, heads, head_dim] and, for lse, [heads, rows].
        kept = 1 if name == "lse" else 2
        assert_close(name, *(np.asarray(y).reshape(-1, *y.shape[-kept:]) for y in (x, *of_name)))
