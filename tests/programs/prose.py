"""Measures the prose of the project: docstrings, comments and pages, against the rules of CONTRIBUTING.md.

`python -m tests.programs.prose` prints every finding as `file:line: fault: text`, then the number of each fault. Paths
as arguments limit the files. The exit status is 1 if there is a finding.
"""

import argparse
import ast
import io
import re
import sys
import tokenize
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
SOURCES = ("zigzag_kernels", "zigzag_torch", "zigzag_jax", "bench", "examples", "tests/support")
PAGES = ("*.md", "docs", ".github")
HISTORY = "CHANGELOG.md"  # entries name changes; nobody reads them as an explanation

FIRST_WORDS = 20  # of a docstring
SENTENCE_WORDS = 45  # anywhere

# A docstring begins with what the thing is (a noun) or does (a verb): never with one of these words.
NO_OPENING = (
    "|what|that|those|this|these|it|they|which|whether|where|when|how|why|if|as|there|such|so|and|or|but|nor|for|in|on|at|"
    "by|with|from|to|of|under|after|before|while|because|although|not|also|both|"
)

# (name of the fault, pattern, what to write instead)
PATTERNS = [
    ("of which", r"\bof which\b", "begin a new sentence that repeats the noun"),
    ("done with", r"\b(?:is|are|was|were|be|has|have) done with\b", "finished, released, no longer needed"),
    ("in vain", r"\bin vain\b", "say what is wasted, or leave it out"),
    # "that cannot be read" is English; "lengths that cannot be" is not.
    ("cannot be", r"\b(?:that|which) cannot be\b(?! (?:\w+ly )?\w*(?:ed|en|wn|un|ne|t|ad|ld)\b)", "invalid"),
    ("impossible", r"\bimpossible (?:lengths?|ranks?|values?|tables?|entr|arguments?|offsets?)", "invalid"),
    ("those of", r"\bthose (?:of|that|which|who|with|in|from|for|to|on|whose)\b", "repeat the noun"),
    ("that of", r"\b(?:is|are|was|as|than|beside|to|has) that (?:of|which)\b", "repeat the noun"),
    ("that which", r"\bthat which\b", "repeat the noun"),
    ("What opens", r"(?:^|[.!?;] )What\b[^?]*?[.;]", "begin with the noun; a question keeps its question mark"),
    ("what is", r"\b(?:is|are|of|by|with|from|to|for|in) what (?:is|are|was|were|has|have|the|it|they|a|an|one)\b",
     "name the thing"),
    ("there where", r"\bthere where\b", "where"),
    ("ours", r"\bours\b", "name the project or the kernel"),
    ("leave at once", r"\b(?:leaves?|returns?|ends?) at once\b", "return immediately"),
    ("knows nothing", r"\bknows? nothing (?:else )?of\b", "does not depend on"),
    ("n for m", r"\b\d[\d.,]*(?: ms| s| MB| GB)? for \d[\d.,]*(?![\d.,]| [a-z])", "takes 165 ms instead of 205 ms"),
    ("nobody", r"\bfor nobody\b|\bby nobody\b", "say who does not"),
    ("mended", r"\bmend(?:s|ed|ing)?\b", "fix"),
    ("is told", r"\b(?:is|are|was) told (?:so|it)\b", "gets an error, is notified"),
    ("as it is there", r"\bas (?:long|soon) as there (?:is|are)\b", "say until when"),
    ("to be had", r"\bto be had\b|\bat hand\b", "available"),
    ("goes together", r"\b(?:go|goes|going) together\b", "compatible"),
    ("looked at", r"\b(?:is|are|was|were|been) looked at\b", "inspected, measured"),
]  # fmt: skip


# A new run of sentences in a docstring: after a blank line, an item of a list, an argument, an attribute.
ITEM = re.compile(r"\n(?=[ \t]*(?:\n|[-*] |\d+\. |[\w*][\w *,]*: ))")


class Finding(NamedTuple):
    """One place where prose breaks a rule."""

    file: str
    line: int
    fault: str
    text: str


class Prose(NamedTuple):
    """A run of sentences, and the line on which it begins."""

    text: str
    line: int
    is_docstring: bool = False


def plain(text: str) -> str:
    """Return `text` on one line, with each link as its label, a code span or quotation as one word, no list marks."""
    text = re.sub(r"!?\[((?:[^\[\]]|\[[^\]]*\])*)\]\([^)]*\)", r"\1", text)
    text = re.sub(r"``[^`]+``|`[^`]+`", "`code`", text, flags=re.DOTALL)
    text = re.sub(r'"[^"]{1,80}"', '"quoted"', text)
    text = re.sub(r"\[[^\]]*\]", "[shape]", text)
    text = re.sub(r"^\s*(?:[-*]|\d+\.|#+|>)\s+", "", text, flags=re.MULTILINE)
    return " ".join(text.replace("*", "").split())


def sentences(text: str) -> list[str]:
    """Split plain `text` where a sentence ends; abbreviations that the project uses do not end one."""
    parts = re.split(r"(?<!e\.g\.)(?<!i\.e\.)(?<!et al\.)(?<=[.!?])\s+(?=[A-Z`\[(\"'])", text)
    return [part for part in parts if part]


def words(sentence: str) -> int:
    """Count the words of a sentence: a code span or a shape is one, punctuation is none."""
    return sum(any(letter.isalnum() for letter in word) for word in sentence.split())


def docstrings(source: str) -> Iterator[Prose]:
    """Yield the docstrings of a module, its classes and functions, and the strings that follow constants."""
    for node in ast.walk(ast.parse(source)):
        body = getattr(node, "body", None)
        for statement in body if isinstance(body, list) else []:
            text = statement.value.value if isinstance(statement, ast.Expr) and _is_text(statement.value) else ""
            line = statement.lineno
            for run in ITEM.split(text):
                if run.strip():
                    yield Prose(run, line + len(run) - len(run.lstrip("\n")), is_docstring=line == statement.lineno)
                line += run.count("\n") + 1


def _is_text(value: ast.expr) -> bool:
    return isinstance(value, ast.Constant) and isinstance(value.value, str)


def comments(source: str) -> Iterator[Prose]:
    """Yield comments; those on lines of their own that follow each other are one run of sentences."""
    run, begin, end = [], 0, 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT:
            continue
        text, line, own = token.string.lstrip("#!: "), token.start[0], not token.line[: token.start[1]].strip()
        if run and own and line == end + 1:
            run.append(text)
        else:
            if run:
                yield Prose("\n".join(run), begin)
            run, begin = [text], line
        end = line if own else 0
    if run:
        yield Prose("\n".join(run), begin)


def paragraphs(page: str) -> Iterator[Prose]:
    """Yield the paragraphs of a page, the items of its lists and the rows of its tables, without code blocks."""
    run, begin, fenced = [], 0, False
    for line, text in enumerate([*page.split("\n"), ""], 1):
        fence = text.lstrip().startswith("```")
        fenced ^= fence
        item = re.match(r"\s*(?:[-*]|\d+\.|\||#+)(?:\s|$)|\|", text)
        if run and (fence or fenced or item or not text.strip()):
            yield Prose("\n".join(run), begin)
            run = []
        if text.strip() and not fence and not fenced and not text.startswith("    "):
            if not run:
                begin = line
            run.append(text)


def faults(prose: Prose) -> Iterator[tuple[str, str]]:
    """Yield (fault, the words that have it) for one run of sentences."""
    text = plain(prose.text)
    for number, sentence in enumerate(sentences(text)):
        if prose.is_docstring and number == 0:
            if words(sentence) > FIRST_WORDS:
                yield "long first sentence", f"{words(sentence)} words: {sentence}"
            opening = re.match(r"[\w']+", sentence)
            if opening and f"|{opening[0].lower()}|" in NO_OPENING:
                yield "opening", sentence
        if words(sentence) > SENTENCE_WORDS and "|" not in sentence:
            yield "long sentence", f"{words(sentence)} words: {sentence}"
    for name, pattern, instead in PATTERNS:
        for match in re.finditer(pattern, text):
            yield name, f"...{text[max(0, match.start() - 30) : match.end() + 20]}... ({instead})"


def files() -> list[Path]:
    """Return the files whose prose is measured."""
    found = [path for folder in SOURCES for path in (ROOT / folder).rglob("*.py")]
    for page in PAGES:
        found += ROOT.glob(page) if "*" in page else (ROOT / page).rglob("*.md")
    return sorted(path for path in found if path.name != HISTORY)


def measure(path: Path) -> list[Finding]:
    """Return the findings of one file."""
    source, name = path.read_text(encoding="utf-8"), path.relative_to(ROOT).as_posix()
    runs = [*docstrings(source), *comments(source)] if path.suffix == ".py" else paragraphs(source)
    return [
        Finding(name, prose.line, *fault) for prose in sorted(runs, key=lambda run: run.line) for fault in faults(prose)
    ]


def main(arguments: list[str] | None = None) -> int:
    """Print the findings; return 1 if there is one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="*", help="files or folders; everything if there are none")
    options = parser.parse_args(arguments)
    asked = [(ROOT / path).resolve() for path in options.paths] or [ROOT]
    chosen = [path for path in files() if any(path.is_relative_to(place) for place in asked)]
    findings = [finding for path in chosen for finding in measure(path)]
    for finding in findings:
        print(f"{finding.file}:{finding.line}: {finding.fault}: {finding.text}")
    for fault, count in Counter(finding.fault for finding in findings).most_common():
        print(f"{count:6}  {fault}")
    print(f"{len(findings):6}  findings in {len(chosen)} files")
    return int(bool(findings))


if __name__ == "__main__":
    sys.exit(main())
