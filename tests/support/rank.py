"""The arrays that one rank of a case holds, in NumPy, and the results that the oracle expects from them."""

from typing import NamedTuple

import numpy as np

from tests.support import oracle
from tests.support.closeness import assert_close, assert_sums_close


class RankArrays(NamedTuple):
    """The inputs of one rank and the cotangents of its results, T rows, and the K/V that it attends to."""

    q: np.ndarray  # [T, heads, head_dim]
    k: np.ndarray  # [rows, kv_heads, head_dim]
    v: np.ndarray  # [rows, kv_heads, head_dim]
    dout: np.ndarray  # [T, heads, head_dim]
    dlse: np.ndarray  # [heads, T]


def options_of(case, inputs=None):
    """The `oracle.Options` of `case`; `inputs` have its sinks, if it has any."""
    sinks = inputs["sinks"] if case.sinks and inputs is not None else None
    return oracle.Options(
        case.window_size, case.attention_chunk, case.softcap, sinks, case.lengths_real, case.layout, case.row_length
    )


def rank_rows(case, rank):
    """Global row that each local row of `rank` holds, padding included: `[T]`."""
    return oracle.rows_of_rank(case.cu_seqlens, rank, case.world_size, case.total, options_of(case))


def gathered_rows(case):
    """Global row that each row of the gathered buffer holds, the ranks behind one another: `[world_size * T]`."""
    return oracle.rows_of_all(case.cu_seqlens, case.world_size, case.total, options_of(case))


def rank_arrays(case, inputs, rank, key_rows=None):
    """`RankArrays` of the global `inputs`, K/V of the global `key_rows`, by default gathered."""
    rows = rank_rows(case, rank)
    key_rows = gathered_rows(case) if key_rows is None else key_rows
    dlse = np.ascontiguousarray(inputs["dlse"][:, rows])
    return RankArrays(inputs["q"][rows], inputs["k"][key_rows], inputs["v"][key_rows], inputs["dout"][rows], dlse)


def rank_results(case, inputs, rank, arithmetic):
    """{name: array} of the results that `rank` must produce, dK/dV of gathered rows."""
    rows = rank_rows(case, rank)
    return oracle.rank_attention(
        inputs["q"], inputs["k"], inputs["v"], case.cu_seqlens, rank, case.world_size, case.causal, case.softmax_scale,
        dout=inputs["dout"][rows], dlse=inputs["dlse"][:, rows], arithmetic=arithmetic,
        options=options_of(case, inputs),
    )._asdict()  # fmt: skip


def batch_results(case, inputs, arithmetic):
    """{name: array} of the results of the whole batch, in global order."""
    return oracle.rank_attention(
        inputs["q"], inputs["k"], inputs["v"], case.cu_seqlens, 0, 1, case.causal, case.softmax_scale,
        dout=inputs["dout"], dlse=inputs["dlse"], arithmetic=arithmetic, options=options_of(case, inputs),
    )._asdict()  # fmt: skip


def rows_of_results(results, rows):
    """Return the `results` of the whole batch at the global `rows`; results without rows stay as they are."""
    of_rows = {"out", "dq", "dk", "dv"}, {"lse", "sink_terms"}
    rest = {name: x for name, x in results.items() if name not in of_rows[0] | of_rows[1]}
    return (
        {name: results[name][rows] for name in of_rows[0]}
        | {name: results[name][:, rows] for name in of_rows[1]}
        | rest
    )


def assert_results_close(where, results, exact, straightforward):
    """Assert that each of the named `results` is close to the oracle's, by the rules of `closeness`."""
    for name, x in results.items():
        if name == "dsinks":
            terms = exact["sink_terms"], straightforward["sink_terms"]
            assert_sums_close(f"{where}: {name}", x, *terms)
        else:
            assert_close(f"{where}: {name}", x, exact[name], straightforward[name])


def accept_capped_scores(case, inputs, rank, results):
    """Assert that `lse` and the largest logits of a kernel for Hopper are right under a cap, if any.

    The oracle's then take their place in `results`, because `assert_rank_is_right` allows less: `tanh.approx.f32` has a
    relative error of 2^-11. Rows that see one key show it, and sums over keys show less.
    """
    if case.softcap:
        exact = rank_results(case, inputs, rank, oracle.EXACT)
        for name in ("lse", "max_logits"):
            np.testing.assert_allclose(results[name], exact[name], rtol=0, atol=case.softcap * 2**-10.5)
        seen = np.isfinite(exact["lse"])
        error = np.linalg.norm(results["lse"][seen] - exact["lse"][seen]) / np.linalg.norm(exact["lse"][seen])
        assert error < 2**-15, error  # few rows see one key
        results |= {name: exact[name] for name in ("lse", "max_logits")}


def assert_rank_is_right(case, inputs, rank, named):
    """Results of one rank, `named` by where they are from, are as close to the oracle's as a straightforward
    computation."""
    exact, straightforward = (
        rank_results(case, inputs, rank, arithmetic)
        for arithmetic in (oracle.EXACT, oracle.straightforward(case.dtype))
    )
    for origin, results in named.items():
        chosen = {name: results[name] for name in case.results}
        assert_results_close(f"{origin}, rank {rank} of {case.world_size}", chosen, exact, straightforward)
