"""What the options of ranges and layouts cannot be in PyTorch: errors that name the argument."""

import re

import pytest
import torch

from zigzag_torch import prepare_batch, zigzag_attention, zigzag_attention_gathered

ROW = {"layout": "row", "row_length": 16}
BAD_BATCHES = {
    "lengths: expected shape [N] = (2,)": {"lengths": [3]},
    "lengths: expected real lengths from 0 to the 4 rows": {"lengths": [5, 12]},
    "lengths: expected integers, got float": {"lengths": [1.0, 2.0]},
    "lengths: expected dtype int32, or other integers, got float32": {"lengths": torch.ones(2)},
    "lengths: expected a torch.Tensor or a list of ints, got int": {"lengths": 3},
    "layout: expected 'document' or 'row', got 'rows'": {"layout": "rows"},
    "row_length: expected None with layout 'document', got 16": {"row_length": 16},
    "rows: expected 1 with layout 'document', got 2": {"rows": 2},
    "row_length: expected a multiple of 2 * world_size = 4, the tokens": {"layout": "row"},
    "got 14": {"layout": "row", "row_length": 14},
    "rows: expected a positive number of packed rows, got 0": {**ROW, "rows": 0},
    "cu_seqlens: expected documents within a row of 8 tokens, got 4 to 16": {
        "layout": "row",
        "row_length": 8,
        "rows": 2,
    },
}


@pytest.mark.parametrize("message", BAD_BATCHES)
def test_batches_that_no_call_can_have(message):
    with pytest.raises(ValueError, match=re.escape(message)):
        prepare_batch([0, 4, 16], 0, 2, backend="reference", **BAD_BATCHES[message])


BAD_CALLS = {
    "window_size: expected (left, right)": {"window_size": 3},
    "got (3, True)": {"window_size": (3, True)},
    "got (3.0, -1)": {"window_size": (3.0, -1)},
    "attention_chunk: expected a number of tokens, or 0 for none, got -1": {"attention_chunk": -1},
    "attention_chunk: expected a number of tokens, or 0 for none, got False": {"attention_chunk": False},
    "softcap: expected a number from": {"softcap": -1.0},
    "sinks: expected shape [heads] = (4,) as in q, got (2,)": {"sinks": torch.ones(2)},
    "sinks: expected floating-point numbers, got int64": {"sinks": torch.ones(4, dtype=torch.int64)},
    "sinks: expected a torch.Tensor, got list": {"sinks": [0.0] * 4},
    "return_max_logits: expected True or False, got 1": {"return_max_logits": 1},
    "layout: expected 'document' or 'row', got 'both'": {"layout": "both"},
}


@pytest.mark.parametrize("message", BAD_CALLS)
def test_options_that_no_call_takes(message):
    q, k, v = torch.ones(14, 4, 16), torch.ones(14, 2, 16), torch.ones(14, 2, 16)
    cu_seqlens = torch.tensor([0, 9, 14], dtype=torch.int32)
    zigzag_attention(q, k, v, cu_seqlens, window_size=(3, 1))  # known now, and equal to (3, True)
    for call in (zigzag_attention, lambda *x, **y: zigzag_attention_gathered(*x, 0, 1, **y)):
        with pytest.raises(ValueError, match=re.escape(message)):
            call(q, k, v, cu_seqlens, **BAD_CALLS[message])


def test_a_prepared_batch_has_its_layout_and_its_rows():
    q, k, v = (torch.ones(rows, heads, 16) for rows, heads in ((8, 2), (16, 1), (16, 1)))
    batch = prepare_batch([0, 5, 16], 0, 2, backend="reference", **ROW)
    with pytest.raises(ValueError, match="layout: expected that of the prepared batch, 'row', got 'document'"):
        zigzag_attention_gathered(q, k, v, batch, 0, 2)
    short = prepare_batch([0, 5], 0, 2, layout="row", row_length=8, backend="reference")
    with pytest.raises(ValueError, match="q: expected 4 rows of each rank, as row_length and rows"):
        zigzag_attention_gathered(q, k, v, short, 0, 2, layout="row")
    with pytest.raises(ValueError, match="q: expected an even number of local rows of each packed row, got 7"):
        zigzag_attention_gathered(q[:7], k[:14], v[:14], [0, 5], 0, 2, layout="row")
    out = zigzag_attention_gathered(q, k, v, batch, 0, 2, layout="row")
    assert torch.equal(out, zigzag_attention_gathered(q, k, v, [0, 5, 16], 0, 2, layout="row"))
    moved = batch.to("cpu")
    assert (moved.layout, moved.row_length, moved.rows) == ("row", 16, 1)
