"""The cases of masks are checked as they would be on a GPU, and the table shows what was measured."""

from dataclasses import replace

import pytest
import torch

from bench import masks
from tests.support.machine import GPU

DEVICE, BACKEND = ("cuda", "triton") if GPU else ("cpu", "interpret")


@pytest.mark.parametrize(
    "name",
    [
        "window128-sinks-d64",
        "softcap-d128",
        "eighth-window1024-d128",
        "eighth-documents-row-d128",
    ],
)
def test_each_kind_of_case_is_checked_against_the_reference(name, monkeypatch):
    case = next(case for case in masks.CASES if case.name == name)
    monkeypatch.setattr(masks, "CHECKED_TOKENS", 96)
    masks.check(replace(case, heads=4, kv_heads=2), DEVICE, BACKEND)


def test_a_wrong_result_is_not_timed(monkeypatch):
    case = replace(masks.CASES[0], heads=2, kv_heads=1, head_dim=16)
    monkeypatch.setattr(masks, "CHECKED_TOKENS", 32)
    monkeypatch.setattr(masks, "gradients", lambda out, leaves, dout: [out])
    attend, backends = masks.ours, []

    def doubled(case, cu_seqlens, backend=None):
        backends.append(backend)
        factor = len(backends)
        return lambda *leaves: factor * attend(case, cu_seqlens, backend)(*leaves)

    monkeypatch.setattr(masks, "ours", doubled)
    with pytest.raises(AssertionError, match="full-d128: out is off"):
        masks.check(case, DEVICE, BACKEND)


def test_a_table_has_a_line_for_each_case_and_direction():
    rows = [
        {"case": "a", "implementation": masks.OURS, "direction": "forward", "ms": 2.0, "tflops": 10.0},
        {"case": "a", "implementation": masks.THEIRS, "direction": "forward", "ms": 3.0, "tflops": 7.0},
        {"case": "b", "implementation": masks.OURS, "direction": "backward", "ms": 1.0, "tflops": 5.0},
        {"case": "b", "implementation": masks.THEIRS, "failed": "no such mask"},
    ]
    _, _, *lines = masks.table(rows)
    assert lines == [
        "| a | forward | 2.000 | 10 | 3.000 | 1.50 |",
        "| b | backward | 1.000 | 5 |  |  |",
        "b: FlashAttention-4: no such mask",
    ]


@pytest.mark.parametrize(
    "name", ["documents16-window-d128", "eighth-full-d128", "eighth-documents-d128", "eighth-documents-row-d128"]
)
def test_pieces_have_the_keys_that_their_rows_see(name):
    """Attention to the copied keys of each piece, which the other library gets, has the results of its rows."""
    case = next(case for case in masks.CASES if case.name == name)
    lengths = tuple(max(length // 128, 16) // 16 * 16 for length in case.lengths)
    case = replace(case, lengths=lengths, heads=2, kv_heads=1, head_dim=16, window=None)
    leaves, _, cu_seqlens = masks.inputs(case, "cpu")
    leaves = [x.detach().float() for x in leaves]
    expected = masks.ours(case, cu_seqlens, "reference")(*leaves)
    q, k, v = masks.keys_of_pieces(case, leaves)
    row = key = 0
    for piece in case.pieces:
        rows, keys = slice(row, row + piece.rows), slice(key, key + piece.keys)
        scores = torch.einsum("thd,sd->hts", q[rows], k[keys, 0]) / 4
        hidden = torch.arange(piece.keys) > torch.arange(piece.position, piece.keys)[:, None]
        out = torch.einsum("hts,sd->thd", scores.masked_fill(hidden, float("-inf")).softmax(-1), v[keys, 0])
        torch.testing.assert_close(out, expected[rows])
        row, key = row + piece.rows, key + piece.keys
    assert row == len(q)
    assert key == len(k)
    assert case.scores == sum(sum(range(piece.position + 1, piece.keys + 1)) for piece in case.pieces)
