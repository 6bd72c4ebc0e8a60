"""The oracle against what does not depend on it: finite differences, hand-made layouts, and the sum over ranks."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from tests.support import oracle
from tests.support.cases import Case, make_inputs, select
from tests.support.rank import batch_results, gathered_rows, rank_results, rank_rows

TINY = Case(name="tiny", world_size=2, lengths=(8, 0, 4), heads=4, kv_heads=2, head_dim=3, padding=1)


SINKS = np.array([0.3, -2.0, -np.inf, 5.0])
OPTIONS = {
    "plain": oracle.PLAIN,
    "window": oracle.Options(window_size=(2, 1), attention_chunk=5),
    "softcap": oracle.Options(softcap=0.8),
    "sinks": oracle.Options(sinks=SINKS),
    "all": oracle.Options((3, -1), 5, 1.5, SINKS, (7, 0, 2)),
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("causal", [True, False])
def test_gradients_agree_with_finite_differences(causal, options):
    inputs = {name: x.astype(np.float64) for name, x in make_inputs(TINY).items()}
    q, k, v, dout = (inputs[name] for name in ("q", "k", "v", "dout"))
    sinks = np.full(TINY.heads, -np.inf) if options.sinks is None else options.sinks
    real = np.ones(TINY.total, dtype=bool)  # padding has lse = -inf, which no finite difference survives
    for start, end, length in zip(TINY.cu_seqlens, TINY.cu_seqlens[1:], options.lengths or TINY.lengths, strict=False):
        real[start + length : end] = False
    real[TINY.cu_seqlens[-1] :] = False

    def loss(q, k, v, sinks):
        out, lse = oracle.attention(q, k, v, TINY.cu_seqlens, causal, 0.7, options=options._replace(sinks=sinks))
        return (out * dout).sum() + (lse * inputs["dlse"])[:, real].sum()

    result = oracle.rank_attention(
        q, k, v, TINY.cu_seqlens, 0, 1, causal, 0.7, dout=dout, dlse=inputs["dlse"], options=options
    )
    arguments, step = (q, k, v, sinks), 1e-5
    for number, gradient in enumerate((result.dq, result.dk, result.dv, result.dsinks)):
        numeric = np.zeros_like(gradient)
        for index in np.ndindex(gradient.shape):
            up, down = ([x.copy() for x in arguments] for _ in range(2))
            up[number][index] += step
            down[number][index] -= step
            numeric[index] = (loss(*up) - loss(*down)) / (2 * step)
        np.testing.assert_allclose(gradient, numeric, rtol=0, atol=1e-8)


def test_rows_see_a_range_of_keys():
    def of_row(row, causal, **options):
        return np.flatnonzero(oracle.visible(np.array([row]), np.arange(10), 9, causal, oracle.Options(**options))[0])

    assert of_row(5, True).tolist() == [0, 1, 2, 3, 4, 5]
    assert of_row(5, False).tolist() == list(range(9))
    assert of_row(5, False, window_size=(2, 1)).tolist() == [3, 4, 5, 6]
    assert of_row(5, True, window_size=(2, 1)).tolist() == [3, 4, 5]
    assert of_row(5, False, window_size=(-1, 0)).tolist() == [0, 1, 2, 3, 4, 5]
    assert of_row(7, False, window_size=(0, -1)).tolist() == [7, 8]
    assert of_row(5, True, attention_chunk=4).tolist() == [4, 5]
    assert of_row(5, False, attention_chunk=4, window_size=(0, 9)).tolist() == [5, 6, 7]
    assert of_row(9, False).tolist() == []


def test_a_sink_is_a_key_without_a_value():
    inputs = make_inputs(TINY)
    scores = np.log([2.0, 6.0])[:, None]
    q, k, v = np.ones((1, 1, 1)), scores[:, None], np.array([3.0, 5.0]).reshape(2, 1, 1)
    options = oracle.Options(sinks=np.log([4.0]))
    q = np.concatenate([np.zeros_like(q), q])
    result = oracle.rank_attention(q, k, v, [0, 2], 0, 1, True, 1.0, options=options)
    np.testing.assert_allclose(result.out[:, 0, 0], [3 / 5, (2 * 3 + 6 * 5) / 12])
    np.testing.assert_allclose(result.lse[0], np.log([5.0, 12.0]))
    np.testing.assert_allclose(result.max_logits, [np.log(6.0)])
    nothing = oracle.Options(sinks=np.full(TINY.heads, -np.inf))
    operands = inputs["q"], inputs["k"], inputs["v"], TINY.cu_seqlens, True
    for x, y in zip(oracle.attention(*operands), oracle.attention(*operands, options=nothing), strict=True):
        np.testing.assert_array_equal(x, y)


def test_capped_scores():
    q, k = np.array([[2.0]]), np.array([[3.0], [-1.0]])
    scores = oracle.visible_scores(q, k, np.array([[True, False]]), 0.5, softcap=4.0)
    np.testing.assert_allclose(scores, [[4 * np.tanh(3 / 4), -np.inf]])


def test_rows_of_ranks_in_the_row_layout():
    one, two = oracle.Options(layout="row"), oracle.Options(layout="row", row_length=8)
    assert oracle.rows_of_rank([0, 3, 5], 0, 2, 8, one).tolist() == [0, 1, 6, 7]
    assert oracle.rows_of_all([0, 3, 5], 2, 8, one).tolist() == [0, 1, 6, 7, 2, 3, 4, 5]
    assert oracle.rows_of_rank([0, 3, 5, 8, 12], 1, 2, 16, two).tolist() == [2, 3, 4, 5, 10, 11, 12, 13]
    assert oracle.rows_of_rank([0, 3], 0, 1, 4, one).tolist() == [0, 1, 2, 3]


def test_attention_of_one_key_and_of_equal_keys():
    v = np.arange(6.0).reshape(3, 1, 2)
    q, k = np.ones_like(v), np.ones_like(v)
    out, lse = oracle.attention(q, k, v, [0, 1, 3], causal=True)
    np.testing.assert_allclose(out[:, 0], [[0, 1], [2, 3], [3, 4]])
    np.testing.assert_allclose(lse[0], 2**0.5 + np.log([1, 1, 2]))


def test_padding_sees_nothing_and_gives_nothing():
    inputs = make_inputs(TINY)
    out, lse = oracle.attention(inputs["q"], inputs["k"], inputs["v"], TINY.cu_seqlens, causal=False)
    padding = slice(TINY.cu_seqlens[-1], None)
    assert (out[padding] == 0).all()
    assert np.isneginf(lse[:, padding]).all()
    for gradient in oracle.attention_gradients(**inputs, cu_seqlens=TINY.cu_seqlens, causal=False, softmax_scale=None):
        assert np.isfinite(gradient).all()
        assert (gradient[padding] == 0).all()


def test_zigzag_rows_of_two_ranks():
    cu_seqlens = [0, 8, 8, 12]
    assert oracle.zigzag_rows(cu_seqlens, 0, 2, padding=1).tolist() == [0, 1, 6, 7, 8, 11, 12]
    assert oracle.zigzag_rows(cu_seqlens, 1, 2, padding=1).tolist() == [2, 3, 4, 5, 9, 10, 13]
    assert oracle.gathered_rows([0, 4], 2).tolist() == [0, 3, 1, 2]
    assert oracle.zigzag_rows([0, 5, 8], 0, 1).tolist() == list(range(8))
    with pytest.raises(ValueError, match="length 6 is not a multiple of 4"):
        oracle.zigzag_rows([0, 6], 0, 2)


@pytest.mark.parametrize("case", [*select("interpret", "ranges"), replace(TINY, causal=False)], ids=str)
def test_ranks_add_up_to_the_whole(case):
    inputs = make_inputs(case)
    whole = SimpleNamespace(**batch_results(case, inputs, oracle.EXACT))
    gathered = gathered_rows(case)
    assert sorted(gathered) == list(range(case.total))
    sums = dict.fromkeys(("dk", "dv", "dsinks"), 0)
    for rank in range(case.world_size):
        rows = rank_rows(case, rank)
        assert len(rows) == case.tokens
        part = rank_results(case, inputs, rank, oracle.EXACT)
        np.testing.assert_allclose(part["out"], whole.out[rows], rtol=1e-12)
        np.testing.assert_allclose(part["lse"], whole.lse[:, rows], rtol=1e-12)
        np.testing.assert_allclose(part["dq"], whole.dq[rows], rtol=1e-12, atol=1e-13)
        sums = {name: x + part[name] for name, x in sums.items()}
        assert (part["max_logits"] <= whole.max_logits).all()
    np.testing.assert_allclose(sums["dk"], whole.dk[gathered], rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(sums["dv"], whole.dv[gathered], rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(sums["dsinks"], whole.dsinks, rtol=1e-12, atol=1e-13)
