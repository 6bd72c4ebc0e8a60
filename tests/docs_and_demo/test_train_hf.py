"""The example that trains a model of transformers has the losses of the stock attention, on any number of ranks."""

import ast
import json
import re
import sys
import tomllib

import numpy as np
import pytest

from tests.support.commands import ROOT
from tests.support.machine import GPUS

SCRIPT = "examples/train_hf.py", "--tokens", "256", "--context", "128", "--dtype", "float32"
# Float32 summed in another order; Adam makes more of it with every step.
TOLERANCE = 5e-5


def losses(forks, tmp_path, *arguments, ranks=1):
    """(number of the first step, losses) of a run on so many ranks, which counts the tokens of each step."""
    file = tmp_path / "results.json"
    ended = forks.run(*SCRIPT, *arguments, "--json", file, ranks=ranks, HF_HUB_OFFLINE="1")
    for code, _, errors in ended:
        assert code == 0, errors
    results = json.loads(file.read_text())
    assert sum("loss" in line for _, lines, _ in ended for line in lines) == len(results["losses"])
    assert all(128 < tokens <= 512 for tokens in results["tokens"])  # of one batch or two
    assert results["tokens_per_second"] > 0
    return results["first"], results["losses"]


@pytest.mark.slow
@pytest.mark.multigpu
def test_another_number_of_ranks_goes_on_from_a_checkpoint(forks, tmp_path):
    first, alone = losses(forks, tmp_path, "--steps", "5", "--checkpointing", "none")
    assert (first, len(alone)) == (0, 5)
    save = "--save", str(tmp_path / "checkpoints")
    _, begun = losses(forks, tmp_path, "--steps", "3", *save, "--method", "ring", ranks=2)
    first, resumed = losses(forks, tmp_path, "--steps", "5", *save)
    assert (first, len(resumed)) == (3, 2)
    np.testing.assert_allclose(begun + resumed, alone, rtol=0, atol=TOLERANCE)


@pytest.mark.slow
@pytest.mark.multigpu
@pytest.mark.skipif(0 < len(GPUS) < 4, reason="needs four GPUs, or none")
def test_replicas_of_groups_have_the_losses_of_stock_attention_in_replicas(forks, tmp_path):
    model = "--model", "tiny-llama", "--layers", "1", "--steps", "3"
    _, ours = losses(forks, tmp_path, *model, "--replicas", "2", "--checkpointing", "full", ranks=4)
    _, stock = losses(forks, tmp_path, *model, "--attention", "sdpa", ranks=2)
    np.testing.assert_allclose(ours, stock, rtol=0, atol=TOLERANCE)


def imported(name):
    """The packages that an example imports, and those of the examples that it imports."""
    found, tree = set(), ast.parse((ROOT / "examples" / f"{name}.py").read_text())
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) else []
        for module in {x.partition(".")[0] for x in names}:
            is_example = (ROOT / "examples" / f"{module}.py").exists()
            found |= imported(module) if is_example else {module}
    return found


def test_its_extra_installs_what_it_imports():
    extra = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["hf"]
    installed = {re.match(r"[\w-]+", requirement).group() for requirement in extra} | {"zigzag_torch"}
    assert {"torch", "transformers", "tqdm"} <= imported("train_hf") - sys.stdlib_module_names <= installed
