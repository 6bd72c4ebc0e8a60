"""Predicts the efficiency of both methods up to 1024 ranks, and the memory that they need.

    python -m bench.lab.predict

Prints the tables of docs/reference/cost.md; docs/pictures/prediction.py draws them. `zigzag_kernels.cost.Machine` says
on which speeds the numbers rest, and which of those are assumptions.
"""

import argparse
import math
import random
from bisect import bisect_right

from zigzag_kernels.cost import Machine, Step, extra_memory, predict, predict_slowest
from zigzag_kernels.documents import plan_documents
from zigzag_kernels.layout import MAX_OFFSET

RANKS = [2**i for i in range(1, 11)]
TOKENS = (2048, 8192, 65536)  # of a rank, of one sequence
HEADS = {"heads": 32, "kv_heads": 8, "head_dim": 128}
DOCUMENTS = (65536, 16384, 4096, 1024)  # tokens of each
PLANNED_RANKS = (2, 4, 8, 64)
SPREAD, LONGEST = 1.2, 16384  # standard deviation of the logarithm of lengths, and the most tokens of a document
STRIDES = (1, 2, 4, 8)
# H100 machines have NVLink in nodes of eight: a larger domain is imagined, to tell the links apart.
LINKS = {"NVLink": Machine(node=RANKS[-1]), "nodes of 8": Machine(), "InfiniBand": Machine(node=1)}
METHODS = {"all-gather": "allgather", "ring": "ring"}


def layer(tokens: int, ranks: int, method: str, heads_k_stride: int | None = None) -> Step:
    lengths = (tokens * ranks,)
    return Step(lengths=lengths, world_size=ranks, method=METHODS[method], heads_k_stride=heads_k_stride, **HEADS)


def percent(tokens: int, ranks: int, method: str, link: str) -> float:
    return 100 * predict(layer(tokens, ranks, method), LINKS[link]).efficiency


def gigabytes(step: Step) -> float:
    return sum(extra_memory(step).values()) / 1e9


def most_ranks(tokens: int, heads_k_stride: int) -> int:
    """Ranks up to which the all-gather fits into the memory of one GPU, were there nothing else in it."""
    limit = Machine().memory / 1e9
    ranks = range(1, MAX_OFFSET // tokens + 1)  # of a sequence that int32 offsets hold
    return bisect_right(ranks, limit, key=lambda w: gigabytes(layer(tokens, w, "all-gather", heads_k_stride)))


def efficiency_table() -> list[str]:
    """Markdown: a row for each number of ranks, both methods in each cell."""
    columns = [(tokens, link) for tokens in TOKENS for link in LINKS]
    lines = ["| ranks | " + " | ".join(f"{tokens:,}, {link}" for tokens, link in columns) + " |"]
    lines.append("| --- " * (1 + len(columns)) + "|")
    for ranks in RANKS:
        cells = [" / ".join(f"{percent(tokens, ranks, x, link):.1f}" for x in METHODS) for tokens, link in columns]
        lines.append(f"| {ranks} | " + " | ".join(cells) + " |")
    return lines


def document_table() -> list[str]:
    """Markdown: efficiency of eight ranks of one node when their 8,192 tokens are of documents of several lengths."""
    ranks, total = 8, 8 * 8192
    lines = ["| method | " + " | ".join(f"{total // n} × {n:,}" for n in DOCUMENTS) + " |"]
    lines.append("| --- " * (1 + len(DOCUMENTS)) + "|")
    for name, method in METHODS.items():
        steps = [Step(lengths=(n,) * (total // n), world_size=ranks, method=method, **HEADS) for n in DOCUMENTS]
        lines.append(f"| {name} | " + " | ".join(f"{100 * predict(x, Machine()).efficiency:.0f}" for x in steps) + " |")
    return lines


def document_lengths(ranks: int) -> list[int]:
    """Return lognormal lengths of documents, 2,400 tokens in the mean, that fill 90 % of 8,192 rows of each rank."""
    draw, left, lengths = random.Random(0), round(0.9 * 8192 * ranks), []
    while left:
        length = round(draw.lognormvariate(math.log(2400) - SPREAD**2 / 2, SPREAD))
        lengths.append(min(max(length, 16), LONGEST, left))
        left -= lengths[-1]
    return lengths


def plan_table() -> list[str]:
    """Markdown: documents of uneven lengths, all of them split, and in the rows of a plan."""
    plans = {"all documents split, all-gather": {"split_above": 0}, "a plan of documents": {"tokens": 8192}}
    lines = ["| rows, ranks | " + " | ".join(f"{ranks:,}" for ranks in PLANNED_RANKS) + " |"]
    lines.append("| --- " * (1 + len(PLANNED_RANKS)) + "|")
    for name, options in plans.items():
        made = [plan_documents(document_lengths(ranks), ranks, **options) for ranks in PLANNED_RANKS]
        found = [predict_slowest(plan.step(**HEADS), Machine()).efficiency for plan in made]
        cells = (f"{plan.split_tokens:,} moved, {100 * x:.1f} %" for plan, x in zip(made, found, strict=True))
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def memory_table() -> list[str]:
    """Markdown: a row for each number of local tokens, the ranks up to which each stride fits."""
    lines = ["| local tokens | " + " | ".join(f"stride {stride}" for stride in STRIDES) + " | default | ring needs |"]
    lines.append("| --- " * (3 + len(STRIDES)) + "|")
    for tokens in TOKENS:
        cells = [f"{most_ranks(tokens, stride):,}" for stride in STRIDES]
        default = layer(tokens, 2, "all-gather").window
        needs = gigabytes(layer(tokens, 2, "ring"))
        lines.append(f"| {tokens:,} | " + " | ".join(cells) + f" | stride {default} | {needs:.2f} GB |")
    return lines


if __name__ == "__main__":
    argparse.ArgumentParser(prog="python -m bench.lab.predict", description=__doc__.partition("\n")[0]).parse_args()
    print("\n".join([*efficiency_table(), "", *document_table(), "", *plan_table(), "", *memory_table()]))
