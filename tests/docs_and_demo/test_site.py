"""Tests that the reference of the site has every public name, option and environment variable, and that links hold."""

import inspect
import re
import shlex
import shutil
import subprocess
import sys
from importlib import import_module

import pytest

from tests.support.commands import ROOT

REFERENCE = ROOT / "docs" / "reference"
API = {  # module: its page
    "zigzag_torch": "torch.md",
    "zigzag_torch.hf": "hf.md",
    "zigzag_jax": "jax.md",
    "zigzag_jax.flax": "flax.md",
    "zigzag_jax.host": "host.md",
}
PACKAGES = ("zigzag_kernels", "zigzag_torch", "zigzag_jax")


def public(module) -> dict[str, object]:
    """Return the public names of a module: its `__all__`, or the functions and classes that it defines."""
    names = getattr(module, "__all__", None) or [
        name for name, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__
    ]
    return {name: getattr(module, name) for name in names if not name.startswith("_")}


def shown(page: str, module: str) -> set[str]:
    """Return the names of a module whose docstrings a page shows."""
    text = (REFERENCE / page).read_text(encoding="utf-8")
    return {name.split(".")[-1] for name in re.findall(rf"^::: {re.escape(module)}\.([\w.]+)$", text, re.MULTILINE)}


@pytest.mark.parametrize(("module", "page"), API.items())
def test_the_reference_shows_every_public_name(module, page):
    assert shown(page, module) == set(public(import_module(module)))


def functions(module) -> dict[str, object]:
    """Return the public functions of a module, and the public methods of its classes."""
    found = {}
    for name, value in public(module).items():
        if inspect.isclass(value):
            methods = {f"{name}.{key}": x for key, x in vars(value).items() if not key.startswith("_")}
            found |= {key: x for key, x in methods.items() if inspect.isfunction(x)}
        else:
            found[name] = value
    return found


@pytest.mark.parametrize("module", API)
def test_every_option_is_described(module):
    """The page of a function is its docstring, which names each of its parameters."""
    missing = [
        f"{name}: {option}"
        for name, function in functions(import_module(module)).items()
        for option in inspect.signature(function).parameters
        if option != "self" and not re.search(rf"\b{option}\b", inspect.getdoc(function) or "")
    ]
    assert missing == []


def test_the_reference_has_every_environment_variable():
    sources = [path.read_text(encoding="utf-8") for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    variables = {name for source in sources for name in re.findall(r"\bZIGZAG_[A-Z0-9_]*[A-Z0-9]\b", source)}
    page = (REFERENCE / "environment.md").read_text(encoding="utf-8")
    assert variables == set(re.findall(r"^\| `(ZIGZAG_\w+)`", page, re.MULTILINE))


def test_a_broken_link_stops_the_site(tmp_path):
    """Builds the site by the command of the Makefile, from a copy of the pages in which one link leads nowhere."""
    for source in (*ROOT.glob("*.md"), ROOT / "mkdocs.yml"):
        shutil.copy(source, tmp_path)
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    for folder in ("bench", "examples", *PACKAGES):
        (tmp_path / folder).symlink_to(ROOT / folder)
    recipe = re.search(r"\$\(BIN\)/(mkdocs build.*)", (ROOT / "Makefile").read_text(encoding="utf-8"))[1]
    command = [sys.executable, "-m", *shlex.split(recipe)]
    page = tmp_path / "docs/guide/production.md"
    page.write_text(page.read_text(encoding="utf-8") + "\n[nowhere](nowhere.md)\n", encoding="utf-8")
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode != 0
    (warning,) = re.findall(r"^WARNING.*", result.stderr, re.MULTILINE)
    assert "'nowhere.md'" in warning
