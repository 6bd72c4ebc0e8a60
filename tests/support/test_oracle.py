"""The oracle against what does not depend on it: finite differences, hand-made layouts, and the sum over ranks."""

from dataclasses import replace

import numpy as np
import pytest

from tests.support import oracle
from tests.support.cases import Case, make_inputs, select

TINY = Case(name="tiny", world_size=2, lengths=(8, 0, 4), heads=4, kv_heads=2, head_dim=3, padding=1)


@pytest.mark.parametrize("causal", [True, False])
def test_gradients_agree_with_finite_differences(causal):
    inputs = {name: x.astype(np.float64) for name, x in make_inputs(TINY).items()}
    q, k, v, dout = (inputs[name] for name in ("q", "k", "v", "dout"))
    sequences = slice(0, TINY.cu_seqlens[-1])  # the padding has lse = -inf, which no finite difference survives
    dlse = inputs["dlse"][:, sequences]

    def loss(q, k, v):
        out, lse = oracle.attention(q, k, v, TINY.cu_seqlens, causal, 0.7)
        return (out * dout).sum() + (lse[:, sequences] * dlse).sum()

    gradients = oracle.attention_gradients(q, k, v, TINY.cu_seqlens, causal, 0.7, dout, inputs["dlse"])
    step = 1e-5
    for argument, gradient in enumerate(gradients):
        numeric = np.zeros_like(gradient)
        for index in np.ndindex(gradient.shape):
            up, down = [q.copy(), k.copy(), v.copy()], [q.copy(), k.copy(), v.copy()]
            up[argument][index] += step
            down[argument][index] -= step
            numeric[index] = (loss(*up) - loss(*down)) / (2 * step)
        np.testing.assert_allclose(gradient, numeric, rtol=0, atol=1e-8)


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


@pytest.mark.parametrize("case", [*select("interpret"), replace(TINY, causal=False)], ids=str)
def test_ranks_add_up_to_the_whole(case):
    inputs = make_inputs(case)
    operands = inputs["q"], inputs["k"], inputs["v"], case.cu_seqlens
    out, lse = oracle.attention(*operands, case.causal)
    dq, dk, dv = oracle.attention_gradients(*operands, case.causal, None, inputs["dout"], inputs["dlse"])
    gathered = oracle.gathered_rows(case.cu_seqlens, case.world_size, case.padding)
    assert sorted(gathered) == list(range(case.total))
    dk_sum, dv_sum = np.zeros_like(dk), np.zeros_like(dv)
    for rank in range(case.world_size):
        rows = oracle.zigzag_rows(case.cu_seqlens, rank, case.world_size, case.padding)
        assert len(rows) == case.tokens
        cotangents = inputs["dout"][rows], inputs["dlse"][:, rows]
        part = oracle.rank_attention(*operands, rank, case.world_size, case.causal, None, *cotangents)
        np.testing.assert_allclose(part.out, out[rows], rtol=1e-12)
        np.testing.assert_allclose(part.lse, lse[:, rows], rtol=1e-12)
        np.testing.assert_allclose(part.dq, dq[rows], rtol=1e-12, atol=1e-13)
        dk_sum += part.dk
        dv_sum += part.dv
    np.testing.assert_allclose(dk_sum, dk[gathered], rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(dv_sum, dv[gathered], rtol=1e-12, atol=1e-13)
