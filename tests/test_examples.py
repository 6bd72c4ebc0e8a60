"""What the README prints runs as printed, and the demo does what it says."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import CHOSEN, GPU

ROOT = Path(__file__).parents[1]
BLOCKS = re.findall(
    r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
)


def run(*command):
    """As from a shell: without what conftest.py says to this process."""
    env = {name: value for name, value in os.environ.items() if name not in CHOSEN}
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, timeout=280, cwd=ROOT, env=env, check=False
    )


def test_the_readme_has_examples_of_both_frameworks():
    assert [("import torch" in block, "import jax" in block) for block in BLOCKS] == [(True, False), (False, True)] * 2


@pytest.mark.skipif(GPU, reason="printed as they run on a CPU")
@pytest.mark.parametrize("index", range(len(BLOCKS)))
def test_readme_block_runs(index):
    result = run("-W", "error", "-c", BLOCKS[index])
    assert result.returncode == 0, result.stderr


def test_the_demo_runs_and_refuses_no_steps():
    result = run("examples/demo.py", "--steps", "2")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "All is well" in result.stdout
    assert (ROOT / "demo.png").stat().st_size > 10_000
    result = run("examples/demo.py", "--steps", "0")
    assert result.returncode == 2
    assert "expected at least 1, got 0" in result.stderr
