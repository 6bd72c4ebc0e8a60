"""Real text to train on: the modules of Python's standard library, packed as documents of uneven lengths, in bytes."""

import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

NO_TARGET = -1


class TextBatch(NamedTuple):
    """A packed batch of fixed shapes: what is missing is 0 tokens without a target, and documents of length 0."""

    tokens: np.ndarray  # [tokens] int32, bytes
    targets: np.ndarray  # [tokens] int32, the next byte of the same document, or NO_TARGET
    cu_seqlens: np.ndarray  # [documents + 1] int32


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


def batches(tokens: int, documents_per_batch: int, context: int, seed: int = 0) -> Iterator[TextBatch]:
    """Endless batches of documents in random order, the last document of a batch cut to the room that is left."""
    pool = documents(context)
    rng = np.random.default_rng(seed)
    while True:
        batch = TextBatch(
            np.zeros(tokens, np.int32),
            np.full(tokens, NO_TARGET, np.int32),
            np.zeros(documents_per_batch + 1, np.int32),
        )
        start = 0
        for i in range(documents_per_batch):
            text = pool[rng.integers(len(pool))][: tokens - start]
            end = start + len(text)
            batch.tokens[start:end] = text
            batch.targets[start : max(start, end - 1)] = text[1:]
            batch.cu_seqlens[i + 1] = start = end
        yield batch
