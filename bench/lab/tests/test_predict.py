"""The page that shows what the cost model predicts says what the model says."""

import re

import pytest

from bench.lab import predict
from tests.support.commands import ROOT

PAGE = (ROOT / "docs" / "reference" / "cost.md").read_text(encoding="utf-8")


def test_the_page_shows_what_the_model_says():
    for line in predict.efficiency_table() + predict.document_table() + predict.plan_table() + predict.memory_table():
        assert line in PAGE, f"docs/reference/cost.md: run python -m bench.lab.predict; missing {line}"


def test_the_page_prints_what_it_says(capsys):
    (block,) = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    exec(block, {})
    said = re.findall(r"[\d.]+", " ".join(re.findall("# (.*)", block)))
    printed = capsys.readouterr().out.split()
    assert [float(x) for x in printed] == pytest.approx([float(x) for x in said], rel=1e-4)
