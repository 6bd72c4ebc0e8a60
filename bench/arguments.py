"""Types of command line arguments that scripts share, which reject a wrong argument before anything is measured."""

import argparse
from pathlib import Path


def new_file(text: str) -> Path:
    """Return the path of a file to write; an error unless its folder exists."""
    path = Path(text)
    if path.is_dir() or not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"expected a file in a folder that exists, got {text!r}")
    return path


def positive(text: str) -> int:
    """Return a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)
