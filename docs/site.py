"""Hooks of MkDocs: pages beside the folder docs/ join the site, and links to source files become their names."""

import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
PROJECT = ("CHANGELOG.md", "CONTRIBUTING.md", "DESIGN.md", "GLOSSARY.md", "SECURITY.md")
LINK = re.compile(r"(?<!!)\[([^\]]*)\]\((?!\w+:|#)([^)#\s]*)(#[^)]*)?\)")


def on_files(files, config):
    """Add the pages of the repository's root, as `project/NAME.md`."""
    for name in PROJECT:
        text = (ROOT / name).read_text(encoding="utf-8")
        files.append(File.generated(config, f"project/{name}", content=text))
    return files


def on_page_markdown(markdown, page, config, files):
    """Point the links of a page at the site, and leave the first word of a fence, its language."""
    source = page.file.src_uri.removeprefix("project/") if page.file.generated_by else f"docs/{page.file.src_uri}"

    def link(match):
        label, target, anchor = match[1], match[2], match[3] or ""
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        if path in PROJECT:
            path = f"project/{path}"
        elif path == "README.md":
            path = "index.md"
        elif path.startswith("docs/"):
            path = path.removeprefix("docs/")
        elif (ROOT / path).exists():
            return f"`{path}`"
        return f"[{label}]({posixpath.relpath(path, posixpath.dirname(page.file.src_uri) or '.')}{anchor})"

    return LINK.sub(link, re.sub(r"^```(\w+) .*$", r"```\1", markdown, flags=re.MULTILINE))
