"""Tests that every block of the README and of docs/ runs as printed, and that the demo does what it says."""

import ast
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.support.commands import ROOT, shell_environment
from tests.support.machine import GPU, HANGS

PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
# (page, number of the block in it, how it is fenced, what it says)
BLOCKS = [
    (page.relative_to(ROOT).as_posix(), number, *block)
    for page in PAGES
    for number, block in enumerate(
        re.findall(r"^```([^\n]*)\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    )
]
PYTHON_KINDS = {"python", "python torchrun", "python group", "python ring_flash_attn"}
KINDS = PYTHON_KINDS | {"sh", "sh gpu", "sh nsys", "sh install", "text"}
# Around a block that takes the group of its process as it finds it.
WITH_GROUP = """import torch.distributed as dist
dist.init_process_group()
{block}
dist.barrier()
dist.destroy_process_group()
del group
"""


def blocks(*kinds):
    return pytest.mark.parametrize(
        ("kind", "block"),
        [
            pytest.param(kind, block, id=f"{page} {number}")
            for page, number, kind, block in BLOCKS
            if kind in kinds and not (GPU and page == "README.md")  # that one is printed as it runs on a CPU
        ],
    )


NO_GPU = "ZIGZAG_VERIFY_CORRECTNESS"  # there, and told so, the published names compare the reference with itself


def run(*command, **environment):
    """As from a shell in which the tools of this Python come first."""
    env = shell_environment()
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
    return subprocess.run(
        command, capture_output=True, text=True, timeout=HANGS, cwd=ROOT, env=env | environment, check=False
    )


def run_python(*arguments, **environment):
    return run(sys.executable, *arguments, **environment)


def assert_ran(result):
    assert result.returncode == 0, result.stdout + result.stderr


def run_block(forks, block, directory, ranks=1):
    file = directory / "block.py"
    file.write_text(block)
    for code, lines, errors in forks.run(file, ranks=ranks, strict=ranks == 1, ignored=[NO_GPU]):
        assert code == 0, "\n".join([*lines, errors])


def test_every_block_says_what_it_is():
    assert {kind for _, _, kind, _ in BLOCKS} <= KINDS
    torch_block, jax_block = (block for page, _, kind, block in BLOCKS if page == "README.md" and "python" in kind)
    assert "zigzag_attention(q, k, v, batch, group=group)" in torch_block
    assert 'zigzag_attention(q, k, v, batch, axis_name="cp")' in jax_block


@pytest.mark.slow
@blocks("python", "python torchrun", "python group")
def test_python_block_runs(kind, block, forks, tmp_path):
    run_block(forks, block, tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(GPU, reason="as many GPUs as ranks are needed")
@blocks("python torchrun", "python group")
def test_python_block_runs_on_two_ranks(kind, block, forks, tmp_path):
    run_block(forks, WITH_GROUP.format(block=block) if kind == "python group" else block, tmp_path, ranks=2)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ring_flash_attn") is None, reason="needs the package ring-flash-attn")
@blocks("python ring_flash_attn")
def test_python_block_runs_with_the_package(kind, block, tmp_path):
    file = tmp_path / "block.py"
    file.write_text(block)
    assert_ran(run_python("-m", "tests.programs.with_stand_ins", str(file)))


@pytest.mark.slow
@blocks("sh", "sh gpu", "sh nsys")
def test_shell_block_runs(kind, block):
    if kind != "sh" and not GPU:
        pytest.skip("needs a GPU")
    if kind == "sh nsys" and not shutil.which("nsys"):
        pytest.skip("needs nsys")
    if "zigzag-doctor" in block and not (Path(sys.executable).parent / "zigzag-doctor").exists():
        pytest.skip("needs an installation that has the console script")
    assert_ran(run("bash", "-e", "-c", block))


@blocks("sh install")
def test_what_is_installed_exists(kind, block):
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    asked = re.findall(r"pip install -e '\.\[(.*?)\]'", block)
    assert asked
    assert {extra for group in asked for extra in group.split(",")} <= set(extras)


@pytest.mark.parametrize(
    ("script", "extra"),
    [("train_torch", "torch"), ("custom_config", "torch"), ("train_jax", "flax"), ("train_hf", "hf")],
)
def test_an_extra_has_what_its_example_imports(script, extra):
    """With the modules beside it that the example imports; NumPy comes with every extra."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    asked, names = extras[extra], {script}
    if any(x == "zigzag-attention[jax]" for x in asked):
        asked = asked + extras["jax"]
    provided = {re.match(r"[\w-]+", x)[0] for x in asked} | {"zigzag_torch", "zigzag_jax", "zigzag_kernels"}
    pending, imported = [script], set()
    while pending:
        tree = ast.parse((ROOT / "examples" / f"{pending.pop()}.py").read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                imported.add(node.module.partition(".")[0])
            elif isinstance(node, ast.Import):
                imported |= {x.name.partition(".")[0] for x in node.names}
        beside = {name for name in imported if (ROOT / "examples" / f"{name}.py").exists()} - names
        names |= beside
        pending += beside
    needed = imported - names - set(sys.stdlib_module_names)
    assert needed
    assert needed <= provided


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


@pytest.mark.slow
def test_the_demo_runs_and_refuses_no_steps(forks, tmp_path):
    picture = tmp_path / "demo.png"
    result = run_python("examples/demo.py", "--steps", "2", "--picture", str(picture))
    assert result.returncode == 0, result.stdout + result.stderr
    assert "All is well" in result.stdout
    assert picture.stat().st_size > 10_000
    ((code, _, errors),) = forks.run("examples/demo.py", "--steps", "0")
    assert code == 2
    assert "expected at least 1, got 0" in errors


NO_FOLDER = "expected a file in a folder that exists, got missing"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "options", "message"),
    [
        ("train_torch", ["--steps", "0"], "--steps: expected at least 1, got 0"),
        (
            "train_torch",
            ["--json", "missing/losses.json"],
            f"--json: {NO_FOLDER}",
        ),
        (
            "train_jax",
            ["--json", "missing/losses.json"],
            f"--json: {NO_FOLDER}",
        ),
        ("train_jax", ["--processes", "2"], "--processes: expected --coordinator with it"),
        ("train_hf", ["--json", "missing/losses.json"], f"--json: {NO_FOLDER}"),
        ("demo", ["--picture", "missing/demo.png"], f"--picture: {NO_FOLDER}"),
    ],
)
def test_an_example_refuses_options_before_it_trains(forks, script, options, message):
    ((code, _, errors),) = forks.run(f"examples/{script}.py", *options)
    assert code == 2
    assert message in errors
