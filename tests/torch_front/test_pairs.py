"""Two groups of rows against keys in position order: dense attention from the definition, and what cannot be."""

import numpy as np
import pytest
import torch

from tests.support import oracle, pieces
from tests.support.closeness import assert_close
from tests.support.pieces import tensor
from zigzag_torch import ZigzagConfig, fused_zigzag_llama3_flash_attn_forward_v2

NAMES = "out0", "out1", "lse0", "lse1", "dq0", "dq1", "dk", "dv"


class Pair:
    """Inputs of one call: `rows[g][i]` rows of sequence i in group g, `lengths` keys."""

    def __init__(
        self, lengths, rows, chunks, total_chunks, *, causal=True, dtype="float32", padding=(0, 0, 0), heads=(4, 2),
        softmax_scale=None,
    ):  # fmt: skip
        self.softmax_scale = softmax_scale
        self.lengths, self.rows, self.chunks, self.total_chunks, self.causal = (
            lengths,
            rows,
            chunks,
            total_chunks,
            causal,
        )
        self.dtype = dtype
        rng = np.random.default_rng(0)
        sizes = *(sum(group) + extra for group, extra in zip(rows, padding, strict=False)), sum(lengths) + padding[2]
        shapes = [(sizes[i], heads[i == 2], 16) for i in (0, 1, 2, 2, 0, 1)]
        draws = [rng.standard_normal(shape, np.float32).astype(dtype).astype(np.float32) for shape in shapes]
        self.inputs, self.douts = draws[:4], draws[4:]
        self.dlses = [rng.standard_normal((heads[0], size), np.float32) for size in sizes[:2]]

    def offsets(self):
        return [tensor([0, *np.cumsum(x)], "int32") for x in (*self.rows, self.lengths)]

    def call(self, *inputs, **options):
        arguments = *inputs, *self.offsets(), *self.chunks, self.total_chunks
        return fused_zigzag_llama3_flash_attn_forward_v2(
            *arguments, **{"causal": self.causal, "softmax_scale": self.softmax_scale} | options
        )

    def results(self):
        leaves = [tensor(x, self.dtype).requires_grad_() for x in self.inputs]
        results = self.call(*leaves)
        cotangents = *(tensor(x, self.dtype) for x in self.douts), *map(tensor, self.dlses)
        return [x.detach().float().cpu().numpy() for x in (*results, *torch.autograd.grad(results, leaves, cotangents))]

    def expected(self, arithmetic):
        """By the definition, sequence by sequence, group by group and head by head."""
        q0, q1, k, v = (x.astype(arithmetic.accumulate) for x in self.inputs)
        outs = [np.zeros_like(q) for q in (q0, q1)]
        lses = [np.full(x.shape, -np.inf, q0.dtype) for x in self.dlses]
        gradients = [np.zeros_like(x) for x in (q0, q1, k, v)]
        for g, q in enumerate((q0, q1)):
            starts = np.cumsum([0, *self.rows[g]])
            for start, n, first_key, length in zip(
                starts, self.rows[g], np.cumsum([0, *self.lengths]), self.lengths, strict=False
            ):
                rows, keys = slice(start, start + n), slice(first_key, first_key + length)
                position = self.chunks[g] * length // self.total_chunks + np.arange(n)
                mask = np.arange(length)[None] <= position[:, None] if self.causal else np.ones((n, length), bool)
                for head in range(q.shape[1]):
                    kv_head = head // (q.shape[1] // k.shape[1])
                    operands = q[rows, head], k[keys, kv_head], v[keys, kv_head], mask, self.softmax_scale or 0.25
                    outs[g][rows, head], lses[g][head, rows] = oracle.attend(*operands, arithmetic)
                    results = outs[g][rows, head], lses[g][head, rows]
                    cotangents = (x.astype(q.dtype) for x in (self.douts[g][rows, head], self.dlses[g][head, rows]))
                    of_head = oracle.HeadResults(*results, *cotangents)
                    dq, dk, dv = oracle.attend_gradients(*operands, of_head, arithmetic)
                    gradients[g][rows, head] = dq
                    gradients[2][keys, kv_head] += dk
                    gradients[3][keys, kv_head] += dv
        return [*outs, *lses, *(arithmetic.rounded(x) for x in gradients)]


PAIRS = {
    "zigzag": Pair((32, 0, 8, 64), ((4, 0, 1, 8), (4, 0, 1, 8)), (1, 6), 8, padding=(2, 3, 5), dtype="bfloat16"),
    "any chunks": Pair((35, 50), ((7, 3), (2, 20)), (1, 2), 5, softmax_scale=0.4),
    "late first": Pair((24, 48), ((4, 8), (4, 0)), (5, 0), 6, heads=(3, 3), dtype="float16"),
    "full": Pair((24, 40), ((3, 5), (3, 5)), (0, 7), 8, causal=False, padding=(1, 0, 3)),
    "a product of 33 bits": Pair((16, 8), ((4, 2), (4, 2)), (2**29, 3 * 2**28), 2**30),
    "odd": Pair((5, 1, 0), ((2, 0, 0), (3, 1, 0)), (0, 1), 2),
    "empty": Pair((0, 0), ((0, 0), (0, 0)), (0, 1), 2, padding=(3, 0, 2)),
}


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("fused", [True, False])
def test_both_paths_match_the_definition(name, fused, kernel_backend):
    pair = PAIRS[name]
    exact, straightforward = (pair.expected(x) for x in (oracle.EXACT, oracle.straightforward(pair.dtype)))
    with pieces.kernels(kernel_backend), ZigzagConfig(use_fused_triton_v2=fused):
        results = pair.results()
    for name, *arrays in zip(NAMES, results, exact, straightforward, strict=True):
        assert_close(name, *arrays)


@pytest.mark.parametrize("fused", [True, False])
def test_inputs_whose_last_dimension_is_not_contiguous(fused, kernel_backend):
    pair = PAIRS["any chunks"]
    inputs = [tensor(x, pair.dtype) for x in pair.inputs]
    transposed = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs]
    with pieces.kernels(kernel_backend), ZigzagConfig(use_fused_triton_v2=fused):
        for ours, theirs in zip(pair.call(*transposed), pair.call(*inputs), strict=True):
            assert torch.equal(ours, theirs)


def test_the_reference_is_the_default_without_a_gpu():
    with ZigzagConfig(verify_correctness=True):
        PAIRS["any chunks"].results()


@pytest.mark.parametrize(
    ("which", "values"),
    [
        (0, [0, 8, 10]),  # rows beyond the end of their sequence
        (1, [0, 4, 3]),
        (1, [0, 4, 9]),  # more than there are
        (2, [0, 33, 32]),
        (2, [0, 16, 64]),
        (2, [1, 16, 32]),
    ],
)
def test_impossible_lengths(which, values, kernel_backend, monkeypatch):
    """NaN everywhere, as the host does not look; the unfused path looks."""
    pair = Pair((16, 16), ((4, 4), (4, 4)), (2, 1), 4)
    offsets = pair.offsets()
    offsets[which] = tensor(values, "int32")
    monkeypatch.setattr(pair, "offsets", lambda: offsets)
    with pieces.kernels(kernel_backend):
        assert all(np.isnan(x).all() for x in pair.results())
        with ZigzagConfig(use_fused_triton_v2=False), pytest.raises(ValueError, match="cu_seqlens"):
            pair.results()


def test_what_does_not_fit_is_refused(monkeypatch):
    pair = Pair((16,), ((4,), (4,)), (0, 3), 4)
    q0, q1, k, v = (tensor(x) for x in pair.inputs)
    for inputs, options, message in (
        ((q0, q1[:, :2], k, v), {}, r"q1: expected heads, .*\(4, 4, 16\), got \(4, 2, 16\)"),
        ((q0, q1, k, v[:8]), {}, r"v: expected the shape of k"),
        ((q0, q1, k, v.to("meta")), {}, "v: expected the device of q0, .*, got meta"),
        ((q0, q1, k, v), {"softmax_scale": 0.0}, "softmax_scale"),
    ):
        with pytest.raises(ValueError, match=message):
            pair.call(*inputs, **options)
    pair.chunks = (0, 4)
    with pytest.raises(ValueError, match="chunk_idx_1: expected 0 to total_chunks - 1 = 3, got 4"):
        pair.call(q0, q1, k, v)
    pair.chunks, elsewhere = (0, 3), [x.to("meta") for x in pair.offsets()]
    monkeypatch.setattr(pair, "offsets", lambda: elsewhere)
    with pytest.raises(ValueError, match=r"cu_seqlens_q0: expected the device of q0, .*, got meta"):
        pair.call(q0, q1, k, v)
