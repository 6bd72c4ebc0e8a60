"""The files around the code agree with it: pages name files that exist, and the hosted checks run targets of `make`."""

import re

import pytest

import zigzag_kernels
from tests.support.commands import ROOT

PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
WORKFLOW = ROOT / ".github/workflows/ci.yml"
FOLDERS = "zigzag_kernels|zigzag_torch|zigzag_jax|tests|bench|docs|examples"


def anchors_of(text: str) -> set[str]:
    """Return the anchors of the headings of a page; a heading that is repeated gets a number."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    names = [re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings]
    return {f"{name}-{before}" if (before := names[:i].count(name)) else name for i, name in enumerate(names)}


@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if page.name != "CHANGELOG.md"],  # whose entries name files of their time
    ids=lambda page: page.relative_to(ROOT).as_posix(),
)
def test_every_file_that_a_page_names_exists(page):
    named = re.findall(rf"`((?:{FOLDERS})/[\w./-]+)`", page.read_text(encoding="utf-8"))
    assert [name for name in named if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_heading_that_a_page_links_to_exists(page):
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#([^)]+)\)", page.read_text(encoding="utf-8")):
        text = ((page.parent / target) if target else page).read_text(encoding="utf-8")
        assert anchor in anchors_of(text), f"{target}#{anchor}"


def test_the_changelog_and_the_citation_have_the_version():
    changelog, citation = ((ROOT / name).read_text(encoding="utf-8") for name in ("CHANGELOG.md", "CITATION.cff"))
    version, date = re.search(r"^## \[([\d.]+)\] - ([\d-]+)$", changelog, re.MULTILINE).groups()
    assert version == zigzag_kernels.__version__
    assert f"\nversion: {version}\ndate-released: {date}\n" in citation


def test_the_hosted_checks_run_the_targets_of_the_makefile():
    defined = set(re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    called = set(re.findall(r"target: ([a-z-]+)", WORKFLOW.read_text(encoding="utf-8")))
    assert called == {"lint", "docs", "test", "test-all", "compile", "newest"}
    assert called <= defined


@pytest.mark.parametrize("folder", ["tests", "bench"])
def test_no_import_changes_the_switches_of_the_kernels(folder):
    """Every test of the same process would run with them."""
    assigned = re.compile(
        r"^os\.environ\[[\"']ZIGZAG_|^os\.environ(?:\.update|\.setdefault| \|=).*ZIGZAG_", re.MULTILINE
    )
    files = (ROOT / folder).rglob("*.py")
    assert [file.name for file in files if assigned.search(file.read_text(encoding="utf-8"))] == []
