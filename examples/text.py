"""Real text to train on: the modules of Python's standard library, as documents of uneven lengths, in bytes."""

import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np


class Room(NamedTuple):
    """The most that a batch holds; `longest` limits the tokens of a document, None sets no limit."""

    tokens: int
    documents: int
    longest: int | None = None

    def rows(self, world_size: int) -> int:
        """Rows of each rank that hold any such batch, whose documents are padded to a multiple of 2W tokens."""
        padding = 0 if world_size == 1 else 2 * world_size - 1
        return -(-(self.tokens + self.documents * padding) // world_size)

    def row_length(self, rows: int, ranks: int) -> int:
        """Tokens of each of so many rows, cut into 2W chunks, that hold any such batch as `pack_rows` fills them."""
        longest = self.tokens if self.longest is None else self.longest
        tokens = -(-(self.tokens + (rows - 1) * longest) // rows)
        return -(-tokens // (2 * ranks)) * 2 * ranks


def documents(context: int) -> list[np.ndarray]:
    """Every module in the order of its name, uint8; one longer than `context` bytes is cut at its blank lines."""
    result = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        text = path.read_bytes()
        while len(text) > context:
            cut = text.rfind(b"\n\n", 0, context) + 2
            cut = cut if cut > 2 else context
            result.append(text[:cut])
            text = text[cut:]
        result.append(text)
    return [np.frombuffer(text, np.uint8) for text in result if len(text) > 1]


def batches(room: Room, context: int, seed: int = 0) -> Iterator[list[np.ndarray]]:
    """Endless batches of documents in random order, the last document of a batch cut to the room that is left."""
    pool = documents(context)
    rng = np.random.default_rng(seed)
    while True:
        batch, left = [], room.tokens
        for _ in range(room.documents):
            batch.append(pool[rng.integers(len(pool))][:left])
            left -= len(batch[-1])
        yield batch
