"""The committed pictures are those that `python -m docs.pictures` draws, and show the rules that they are about."""

import re
from itertools import combinations

import numpy as np
import pytest

from docs.pictures import layouts, measured, pipeline, ranges
from docs.pictures.__main__ import PICTURES, draw_all
from tests.support.commands import ROOT
from tests.support.oracle import Options, visible

FOLDER = ROOT / "docs" / "pictures"
NUMBER = re.compile(r"-?\d+\.\d+")


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    draw_all(folder)
    return folder


def test_every_picture_is_committed_and_described():
    assert {path.stem for path in FOLDER.glob("*.svg")} == set(PICTURES)
    assert re.findall(r"^\| `([\w-]+)\.svg` \| \w", (FOLDER / "README.md").read_text(encoding="utf-8"), re.M) == [
        *PICTURES
    ]


@pytest.mark.parametrize("name", PICTURES)
def test_a_committed_picture_is_the_drawn_one(drawn, name):
    new, old = ((folder / f"{name}.svg").read_text(encoding="utf-8") for folder in (drawn, FOLDER))
    assert NUMBER.sub("#", new) == NUMBER.sub("#", old), "draw it again: python -m docs.pictures"
    # Coordinates may differ in the last digit with the arithmetic of another machine.
    np.testing.assert_allclose(*([float(x) for x in NUMBER.findall(text)] for text in (new, old)), atol=0.01)


@pytest.mark.parametrize("panel", ranges.PANELS, ids=lambda panel: panel.title)
def test_the_picture_of_a_mask_shows_what_rows_see_and_no_block_that_none_sees(panel):
    cells, tokens = ranges.find_cells(panel), np.arange(ranges.TOKENS)
    options = Options(window_size=(panel.left, -1), attention_chunk=panel.chunk)
    expected = visible(tokens, tokens, ranges.TOKENS, True, options)
    np.testing.assert_array_equal(cells.seen, expected)
    by_block = (-1, ranges.TILE, ranges.TOKENS // ranges.TILE, ranges.TILE)  # [tile of rows, row, block of keys, key]
    some, every = expected.reshape(by_block).any((1, 3)), expected.reshape(by_block).all((1, 3))
    np.testing.assert_array_equal(cells.read, some.repeat(ranges.TILE, 0).repeat(ranges.TILE, 1))
    np.testing.assert_array_equal(cells.read & ~cells.masked, every.repeat(ranges.TILE, 0).repeat(ranges.TILE, 1))


def test_the_document_layout_and_plans_balance_the_work_and_the_row_layout_does_not(monkeypatch):
    monkeypatch.setattr(layouts, "_draw", lambda batch, *_: layouts.work(batch))
    document, row, parts = layouts.draw_document_layout(), layouts.draw_row_layout(), layouts.draw_two_parts()
    assert document == pytest.approx([25] * 4, abs=0.01)
    assert max(parts) < 1.05 * 25 < max(row)


def test_the_drawn_pipeline_overwrites_no_block_that_a_consumer_still_reads():
    spans = pipeline.make_schedule().spans
    shared = [span for span in spans if span.lane.startswith("products")]  # all consumers have the same tensor cores
    lanes = {span.lane: [x for x in spans if x.lane == span.lane] for span in spans} | {"tensor cores": shared}
    for lane in lanes.values():
        for first, second in combinations(lane, 2):
            assert first.end <= second.begin or second.end <= first.begin
    for number in range(pipeline.BLOCKS):
        for kind, colour in (("K", pipeline.SCORES), ("V", pipeline.VALUES)):
            stage = lanes[f"{kind}, stage {number % pipeline.STAGES}"]
            (at,) = (i for i, span in enumerate(stage) if span.text == f"{number}")
            reads = [span for span in shared if span.text == f"{number}" and span.colour == colour]
            assert len(reads) == pipeline.CONSUMERS
            assert all(stage[at].end <= span.begin < span.end <= stage[at + 1].end for span in reads)


def test_the_pictures_of_speed_show_the_log():
    times, log = measured.relative_times(), measured.LOG.read_text(encoding="utf-8")
    assert "| packed64-d128 | 0.183 + 0.664 |" in log
    assert "| packed64-d128 | 2.65 + 7.60 | 0.624 + 2.04 |" in log
    assert times["packed64-d128"]["unfused"] == pytest.approx((2.65 + 7.60) / (0.183 + 0.664))
    assert times["packed64-d128"]["flash2-torch"] == pytest.approx((0.624 + 2.04) / (0.183 + 0.664))
    assert "| documents, plan | 104.3 | 99.8 | 105.7 | 99.8 | 84.2 | 99.5 |" in log
    assert measured.efficiencies()["documents", "plan", "PyTorch, CUDA graph"] == 105.7
    assert measured.efficiencies()["documents", "plan", "JAX"] == 99.5
