"""Batches of whole and split documents: plans made by hand, the arrays of each rank, and the oracle's results."""

import functools
from dataclasses import dataclass, field
from itertools import accumulate

import numpy as np

from tests.support import oracle
from tests.support.closeness import assert_close
from tests.support.rank import rows_of_results
from zigzag_kernels.cost.counts import Mask
from zigzag_kernels.documents import DocumentPlan

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 16
ROWS = {"q": HEADS, "k": KV_HEADS, "v": KV_HEADS, "dout": HEADS}  # arrays of a rank with one row a token
FINITE = ("dout", "dlse")  # cotangents of padding are 0 in any program


@dataclass(frozen=True)
class PlanCase:
    """The lengths of the whole documents of each rank and of the split documents, and the options of attention."""

    name: str
    whole: tuple[tuple[int, ...], ...]
    split: tuple[int, ...]
    whole_tokens: int
    split_tokens: int
    mask: dict = field(default_factory=dict, hash=False)
    sinks: bool = False
    softcap: float = 0.0
    methods: tuple[str, ...] = ("allgather", "ring")

    def __str__(self):
        return self.name

    @property
    def world_size(self):
        return len(self.whole)

    @property
    def plan(self):
        lengths = *self.split, *(length for documents in self.whole for length in documents)
        numbers = iter(range(len(self.split), len(lengths)))
        whole = tuple(tuple(next(numbers) for _ in documents) for documents in self.whole)
        most = max(map(len, whole)) + 1  # an entry to spare in both tables
        tokens, split = self.whole_tokens + self.split_tokens, tuple(range(len(self.split)))
        sizes = tokens, self.split_tokens, whole, split, most, len(split) + 1
        return DocumentPlan(lengths, self.world_size, *sizes, Mask())

    @property
    def reach(self):
        """Keyword arguments of `prepare_batch` that say how far rows see, for halos."""
        return {name: self.mask[name] for name in ("window_size", "attention_chunk") if name in self.mask}

    @property
    def options(self):
        """Keyword arguments of attention, besides sinks."""
        return self.mask | {"softcap": self.softcap}


BOTH = {"whole": ((9, 14), (20, 3)), "split": (33,), "whole_tokens": 26, "split_tokens": 20}
THREE = {"whole": ((9, 2), (), (12,)), "split": (40, 7), "whole_tokens": 13, "split_tokens": 18}
ONE = {"methods": ("allgather",)}
CASES = [
    PlanCase("w2", **BOTH),
    PlanCase("w2-window", **BOTH, mask={"window_size": (3, 0)}, sinks=True, methods=("halo", "allgather", "ring")),
    PlanCase("w2-wide-window", **BOTH, mask={"window_size": (15, 4), "causal": False}, softcap=3.0, **ONE),
    PlanCase("w2-chunks", **BOTH, mask={"attention_chunk": 7}, methods=("allgather", "halo")),
    PlanCase("w2-whole-only", ((9, 14), (20,)), (), 26, 0, sinks=True),
    PlanCase("w2-whole-halo", ((9, 14), (20,)), (), 26, 0, mask={"window_size": (3, 0)}, methods=("halo",)),
    PlanCase("w2-split-only", ((), ()), (33, 5), 0, 22, **ONE),
    PlanCase("w2-empty-rank", ((9, 14), ()), (), 23, 0, **ONE),
    PlanCase("w2-one-split-token", ((9,), (20,)), (1,), 20, 3),  # other ranks hold its padding alone
    PlanCase("w3", **THREE, sinks=True),
    PlanCase("w3-full", **THREE, mask={"causal": False}, **ONE),
    PlanCase("w4", ((9,), (12, 3), (), (17,)), (40, 30, 5), 18, 22, sinks=True),
]


@functools.cache
def arrays_of(case):
    """{name: array} of the whole batch: q, k, v, dout, dlse and sinks."""
    rng, total = np.random.default_rng(0), sum(case.plan.lengths)
    arrays = {name: rng.standard_normal((total, heads, HEAD_DIM), np.float32) for name, heads in ROWS.items()}
    return arrays | {
        "dlse": rng.standard_normal((HEADS, total), np.float32),
        "sinks": rng.standard_normal(HEADS, np.float32),
    }


def rank_arrays(case, rank):
    """{name: array} of one rank: inputs are NaN in padding."""
    rows, arrays = np.array(case.plan.rows(rank)), arrays_of(case)
    taken = {name: arrays[name][rows] for name in ROWS} | {"dlse": arrays["dlse"][:, rows]}
    for name, x in taken.items():
        (x.T if name == "dlse" else x)[rows < 0] = 0 if name in FINITE else np.nan
    return taken | {"sinks": arrays["sinks"]}


@functools.cache
def _expected(case, arithmetic):
    inputs = arrays_of(case)
    options = oracle.Options(
        case.mask.get("window_size", (-1, -1)),
        case.mask.get("attention_chunk", 0),
        case.softcap,
        inputs["sinks"] if case.sinks else None,
    )
    offsets = [*accumulate(case.plan.lengths, initial=0)]
    return oracle.rank_attention(
        inputs["q"], inputs["k"], inputs["v"], offsets, 0, 1, case.mask.get("causal", True), dout=inputs["dout"],
        dlse=inputs["dlse"], arithmetic=arithmetic, options=options,
    )._asdict()  # fmt: skip


def assert_rank_is_right(where, case, rank, results):
    """Assert that `results` {name: array} of one rank are the oracle's at its tokens, and zero or -inf in padding.

    `dsinks` is the sum over ranks; `max_logits` is the same on every rank.
    """
    rows = np.array(case.plan.rows(rank))
    real = rows >= 0
    wanted = [
        rows_of_results(_expected(case, arithmetic), rows[real])
        for arithmetic in (oracle.EXACT, oracle.straightforward("float32"))
    ]
    for name, x in results.items():
        if name in ("dsinks", "max_logits"):
            own = x
        else:
            by_row = x.T if name == "lse" else x
            assert (by_row[~real] == (-np.inf if name == "lse" else 0)).all(), f"{where}: padding of {name}"
            own = by_row[real].T if name == "lse" else by_row[real]
        assert_close(f"{where}: {name}", own, *(expected[name] for expected in wanted))
