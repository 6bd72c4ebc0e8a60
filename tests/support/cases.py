"""The one table of cases that tests, tuning and benchmarks run.

Tags: "interpret" cases are small enough for Triton's interpreter on a CPU, "gpu" cases are for compiled kernels, the
benchmark times "bench" cases, and "quick" marks the ones among them that do not take long.
"""

from dataclasses import dataclass
from itertools import accumulate, pairwise

import ml_dtypes  # noqa: F401  (its import makes "bfloat16" a NumPy dtype)
import numpy as np

RESULTS = ("out", "lse", "dq", "dk", "dv")
INTERPRET, GPU, BENCH = frozenset({"interpret"}), frozenset({"gpu"}), frozenset({"bench"})
QUICK = frozenset({"quick"})


@dataclass(frozen=True, kw_only=True)
class Case:
    """A packed batch and how it is attended; `lengths` are global, multiples of `2 * world_size` from two ranks on.

    In the "row" layout lengths are any, and packed rows of `row_length` tokens (0: one row, which is the whole batch)
    are multiples of `2 * world_size`; its `padding` counts global rows. `lengths_real` are the real lengths of
    documents that end with padding; with `sinks`, `make_inputs` draws one for each head.
    """

    name: str
    world_size: int
    lengths: tuple[int, ...]
    heads: int = 2
    kv_heads: int = 1
    head_dim: int = 16
    causal: bool = True
    softmax_scale: float | None = None  # None: 1 / sqrt(head_dim)
    dtype: str = "float32"
    padding: int = 0  # local rows behind the last sequence
    tags: frozenset[str] = INTERPRET
    window_size: tuple[int, int] = (-1, -1)
    attention_chunk: int = 0
    softcap: float = 0.0
    sinks: bool = False
    lengths_real: tuple[int, ...] | None = None
    layout: str = "document"
    row_length: int = 0

    def __post_init__(self):
        assert self.heads % self.kv_heads == 0, self
        step = 1 if self.world_size == 1 else 2 * self.world_size
        if self.lengths_real is not None:
            assert len(self.lengths_real) == len(self.lengths), self
            assert all(0 <= real <= length for real, length in zip(self.lengths_real, self.lengths, strict=True)), self
        if self.layout == "document":
            assert all(length % step == 0 for length in self.lengths), self
            return
        row_length = self.row_length or self.total
        assert row_length % step == 0, self
        assert self.total % max(row_length, 1) == 0, self
        borders = range(row_length, self.total, row_length) if row_length else ()
        assert not any(start < x < end for x in borders for start, end in pairwise(self.cu_seqlens)), self

    def __str__(self):
        return self.name

    @property
    def cu_seqlens(self):
        """Global offsets `[N + 1]` as a list of ints."""
        return list(accumulate(self.lengths, initial=0))

    @property
    def tokens(self):
        """Local rows, the padding included: T."""
        return self.total // self.world_size

    @property
    def total(self):
        """Global rows, the padding of every rank included: `world_size * T`."""
        return sum(self.lengths) + self.padding * (self.world_size if self.layout == "document" else 1)

    @property
    def rows(self):
        """Number of packed rows of `row_length` tokens."""
        return self.total // self.row_length if self.row_length else 1

    @property
    def has_options(self):
        """Return whether the case needs more than causal or full attention to whole documents."""
        return any(getattr(self, name) != getattr(_WITHOUT_OPTIONS, name) for name in _OPTIONS)

    @property
    def results(self):
        """Names of the results to compare: RESULTS, with options the largest logits, and with sinks their gradient."""
        return RESULTS + ("max_logits",) * self.has_options + ("dsinks",) * self.sinks


_OPTIONS = ("window_size", "attention_chunk", "softcap", "sinks", "lengths_real", "layout")
_WITHOUT_OPTIONS = Case(name="without options", world_size=1, lengths=())


def select(*tags):
    """The cases with any of `tags`."""
    return [case for case in CASES + RANGES if case.tags & set(tags)]


def make_inputs(case, seed=0):
    """Global `q, k, v, dout` `[total, heads, head_dim]` with values of `case.dtype`, and `dlse [heads, total]`.

    All are float32 arrays. Every row is random, so that no two ranks have the same rows. Padding is random too, so that
    tests find a kernel that reads it. There are `sinks [heads]` if the case has them. With four or more heads, the sink
    of the third is -inf, which has no effect, and the sink of the fourth takes all weight.
    """
    rng = np.random.default_rng(seed)
    q_shape = (case.total, case.heads, case.head_dim)
    kv_shape = (case.total, case.kv_heads, case.head_dim)
    shapes = {"q": q_shape, "k": kv_shape, "v": kv_shape, "dout": q_shape}
    inputs = {
        name: rng.standard_normal(shape, dtype=np.float32).astype(case.dtype).astype(np.float32)
        for name, shape in shapes.items()
    }
    inputs["dlse"] = rng.standard_normal((case.heads, case.total), dtype=np.float32)
    if case.sinks:
        inputs["sinks"] = rng.standard_normal(case.heads, dtype=np.float32)
        if case.heads >= 4:
            inputs["sinks"][2:4] = -np.inf, 100.0
    return inputs


# Chunks of 63 to 129 tokens, one token, and none: around and far below the edges of every tile size in use.
_EDGES_W1 = (127, 1, 128, 129, 0, 63, 64, 65, 300)
_EDGES_W2 = tuple(4 * chunk for chunk in (127, 1, 128, 129, 0, 63, 64, 65))

# Sizes of the standard library's modules in tokens of four bytes, drawn at random, cut at 8192 and rounded down to 16:
# `examples/text.py` has the texts.
DOCUMENTS = (5824, 7328, 1728, 6576, 8176, 1536, 8096, 656, 2960, 8128, 2848, 8176, 3504)


def _bench(name, lengths=(65536,), tags=BENCH, **changes):
    """Return the case of one long sequence of 8192 local tokens, with the given changes."""
    base = {"world_size": 8, "heads": 32, "kv_heads": 8, "head_dim": 128, "dtype": "bfloat16"}
    return Case(name=name, lengths=lengths, tags=tags, **base | changes)


# The cases of the benchmark: one long sequence, many short documents, a few medium ones, one short sequence, documents
# of real lengths; then one change at a time to the long sequence.
_BENCH_CASES = (
    _bench("rectangle-d128", tags=BENCH | QUICK),
    _bench("rectangle-d64", head_dim=64, tags=BENCH | QUICK),
    _bench("short-d128", (16384,), tags=BENCH | QUICK),
    _bench("packed16-d128", (4096,) * 16, tags=BENCH | QUICK),
    _bench("packed64-d128", (1024,) * 64, tags=BENCH | QUICK),
    _bench("documents-d128", DOCUMENTS, tags=BENCH | QUICK),
    _bench("short-d64", (16384,), head_dim=64),
    _bench("packed16-d64", (4096,) * 16, head_dim=64),
    _bench("packed64-d64", (1024,) * 64, head_dim=64),
    _bench("rectangle-d96", head_dim=96),
    _bench("rectangle-d256", head_dim=256),
    _bench("rectangle-w1", (8192,), world_size=1),
    _bench("rectangle-w2", (16384,), world_size=2),
    _bench("rectangle-w32", (262144,), world_size=32),
    _bench("rectangle-32/32", kv_heads=32),
    _bench("rectangle-8/1", heads=8, kv_heads=1),
    _bench("rectangle-64/8", heads=64),
    _bench("rectangle-t512", (4096,)),
    _bench("rectangle-t32k", (262144,)),
    _bench("rectangle-full", causal=False),
    _bench("rectangle-fp16", dtype="float16"),
)

# Masks of models: gpt-oss (window 128, sinks), Mistral (4,096), Gemma 2 (a cap) and Gemma 3 (1,024, head_dim 256); on
# one device, and as the share of a rank. The same lengths without a mask show what a mask gains.
MASKS = (
    _bench("full-d128", (16384,), world_size=1),
    _bench("full-4x4k-d128", (4096,) * 4, world_size=1),
    _bench("window4096-d128", (16384,), world_size=1, window_size=(4095, 0)),
    _bench("window1024-d128", (16384,), world_size=1, window_size=(1023, 0)),
    _bench("softcap-d128", (16384,), world_size=1, softcap=50.0),
    _bench("documents16-window-d128", (1024,) * 16, world_size=1, window_size=(1023, 0)),
    _bench("full-d64", (16384,), world_size=1, heads=64, head_dim=64),
    _bench("sinks-d64", (16384,), world_size=1, heads=64, head_dim=64, sinks=True),
    _bench("window128-d64", (16384,), world_size=1, heads=64, head_dim=64, window_size=(127, 0)),
    _bench("window128-sinks-d64", (16384,), world_size=1, heads=64, head_dim=64, window_size=(127, 0), sinks=True),
    _bench("window1024-d256", (16384,), world_size=1, heads=16, head_dim=256, window_size=(1023, 0)),
    _bench("softcap-d256", (16384,), world_size=1, heads=16, head_dim=256, softcap=50.0),
    _bench("eighth-window1024-d128", window_size=(1023, 0)),
    _bench("documents-row-d128", DOCUMENTS, layout="row"),
)

CASES = (
    # One device: plain packed attention, any length.
    Case(name="w1", world_size=1, lengths=(37, 11), heads=4, kv_heads=2, softmax_scale=0.4),
    Case(name="w1-full", world_size=1, lengths=(33, 20), head_dim=24, causal=False, dtype="float16"),
    Case(name="w1-odd-group", world_size=1, lengths=(5, 0, 29, 1), heads=3, head_dim=40, dtype="bfloat16", padding=3),
    Case(name="w1-many-tiles", world_size=1, lengths=(190,), head_dim=64, dtype="bfloat16"),
    # Packing.
    Case(
        name="w2-uneven",
        world_size=2,
        lengths=(40, 8, 64),
        heads=4,
        kv_heads=2,
        softmax_scale=0.1,
        dtype="bfloat16",
    ),
    Case(name="w2-full", world_size=2, lengths=(24, 48), heads=4, kv_heads=2, causal=False),
    Case(name="w2-padding", world_size=2, lengths=(36, 12), padding=5, dtype="float16"),
    Case(name="w2-several-tiles", world_size=2, lengths=(400,)),
    Case(name="w2-one-token-chunks", world_size=2, lengths=(4, 4, 8, 4), heads=4, kv_heads=2),
    Case(name="w2-empty-first", world_size=2, lengths=(0, 16, 40)),
    Case(name="w2-empty-middle", world_size=2, lengths=(28, 0, 16), dtype="bfloat16"),
    Case(name="w2-empty-last", world_size=2, lengths=(44, 8, 0), padding=2),
    Case(name="w2-empty-runs", world_size=2, lengths=(0, 0, 8, 0, 0, 0, 20, 0, 0), causal=False),
    Case(name="w2-all-empty", world_size=2, lengths=(0, 0, 0), padding=4, dtype="float16"),
    Case(name="w2-no-rows", world_size=2, lengths=(0, 0)),
    # Heads.
    Case(name="w2-mha", world_size=2, lengths=(32, 12), heads=3, kv_heads=3, head_dim=24, dtype="float16"),
    Case(name="w2-mqa", world_size=2, lengths=(16, 4, 28), heads=8, kv_heads=1, dtype="bfloat16"),
    Case(name="w2-odd-groups", world_size=2, lengths=(20, 36), heads=6, kv_heads=2),
    Case(name="w2-d8", world_size=2, lengths=(36, 24), heads=4, kv_heads=2, head_dim=8, dtype="bfloat16", padding=1),
    Case(name="w2-d8-full", world_size=2, lengths=(28, 16), head_dim=8, causal=False),
    Case(name="w2-d64", world_size=2, lengths=(60, 20), head_dim=64, dtype="float16"),
    Case(name="w2-d80", world_size=2, lengths=(48, 20), head_dim=80, causal=False, dtype="bfloat16"),
    Case(name="w2-d96", world_size=2, lengths=(56,), head_dim=96, dtype="bfloat16"),
    Case(name="w2-d128", world_size=2, lengths=(72, 28), head_dim=128, dtype="float16"),
    Case(name="w2-d256", world_size=2, lengths=(52,), head_dim=256, dtype="bfloat16"),
    # World sizes, odd ones too.
    Case(
        name="w3",
        world_size=3,
        lengths=(30, 6, 90),
        heads=6,
        kv_heads=2,
        softmax_scale=0.4,
        dtype="bfloat16",
    ),
    Case(name="w3-full", world_size=3, lengths=(66, 12), head_dim=40, causal=False, padding=1),
    Case(name="w4", world_size=4, lengths=(64, 8, 120), heads=4, kv_heads=2),
    Case(name="w5", world_size=5, lengths=(50, 10, 0, 120), dtype="float16"),
    Case(name="w8", world_size=8, lengths=(160,), heads=4, kv_heads=2, dtype="bfloat16"),
    Case(name="w8-short", world_size=8, lengths=(16, 48, 0, 32, 16), causal=False, padding=3),
    # For compiled kernels: the edges of real tiles.
    Case(
        name="w1-edges", world_size=1, lengths=_EDGES_W1, heads=4, kv_heads=2, head_dim=128, dtype="bfloat16", tags=GPU
    ),
    Case(name="w1-edges-full", world_size=1, lengths=_EDGES_W1, head_dim=80, causal=False, tags=GPU),
    Case(
        name="w1-d256", world_size=1, lengths=(1100, 3), heads=4, kv_heads=2, head_dim=256, dtype="bfloat16", tags=GPU
    ),
    Case(
        name="w2-edges",
        world_size=2,
        lengths=_EDGES_W2,
        heads=8,
        kv_heads=2,
        head_dim=128,
        softmax_scale=0.15,
        dtype="bfloat16",
        tags=GPU,
    ),
    Case(name="w2-edges-full", world_size=2, lengths=_EDGES_W2, head_dim=64, causal=False, dtype="float16", tags=GPU),
    Case(name="w2-edges-mha", world_size=2, lengths=_EDGES_W2, heads=3, kv_heads=3, head_dim=64, tags=GPU),
    Case(name="w2-d16", world_size=2, lengths=(2052,), head_dim=16, tags=GPU),
    Case(
        name="w4-d8", world_size=4, lengths=(1032, 504, 8), heads=4, kv_heads=2, head_dim=8, dtype="bfloat16", tags=GPU
    ),
    Case(name="w3-d96", world_size=3, lengths=(1536, 774), heads=6, kv_heads=2, head_dim=96, dtype="float16", tags=GPU),
    Case(name="w4-d24", world_size=4, lengths=(1032, 504, 8), heads=3, head_dim=24, dtype="bfloat16", tags=GPU),
    Case(name="w4-d256", world_size=4, lengths=(1024, 520, 8), head_dim=256, dtype="float16", tags=GPU),
    Case(
        name="w4-llama",
        world_size=4,
        lengths=(1024, 512),
        heads=32,
        kv_heads=8,
        head_dim=128,
        dtype="bfloat16",
        tags=GPU,
    ),
    Case(name="w5-d40", world_size=5, lengths=(1290, 650, 0, 10), head_dim=40, dtype="bfloat16", padding=9, tags=GPU),
    Case(name="w8-one", world_size=8, lengths=(4096,), heads=4, kv_heads=1, head_dim=128, dtype="bfloat16", tags=GPU),
    Case(
        name="w8-64-short",
        world_size=8,
        lengths=(128,) * 64,
        heads=4,
        kv_heads=1,
        head_dim=64,
        dtype="bfloat16",
        tags=GPU,
    ),
    Case(
        name="w8-64-uneven",
        world_size=8,
        lengths=tuple(16 * (1 + 7 * i % 13) for i in range(64)),
        heads=8,
        kv_heads=2,
        head_dim=128,
        dtype="float16",
        padding=77,
        tags=GPU,
    ),
    Case(
        name="w8-one-token-chunks", world_size=8, lengths=(16,) * 48, heads=8, head_dim=128, dtype="bfloat16", tags=GPU
    ),
    *_BENCH_CASES,
)


def _ranges(name, world_size, lengths, **changes):
    """A case with options, for backends that know them, in the interpreter or on a CPU."""
    return Case(name=name, world_size=world_size, lengths=lengths, tags=frozenset({"ranges"}), **changes)


# Windows of one key, smaller than a tile of 32, a tile and one more or less, larger than a chunk, larger than the
# document; then chunks, caps, sinks, real lengths, the row layout, and all of them together.
RANGES = (
    _ranges("w1-window-one", 1, (37, 11), window_size=(0, -1)),
    _ranges("w1-window-left", 1, (70, 9), window_size=(5, -1), heads=4, kv_heads=2, dtype="bfloat16"),
    _ranges("w1-window-tile-minus", 1, (100,), window_size=(31, -1)),
    _ranges("w1-window-tile", 1, (100, 3), window_size=(32, -1), dtype="float16"),
    _ranges("w1-window-tile-plus", 1, (100,), window_size=(33, 0), causal=False),
    _ranges("w1-window-both", 1, (64, 37), window_size=(4, 7), causal=False),
    _ranges("w1-window-right", 1, (61, 40), window_size=(-1, 3), causal=False, padding=5),
    _ranges("w1-window-left-full", 1, (61, 40), window_size=(3, -1), causal=False, dtype="bfloat16"),
    _ranges("w1-window-beyond", 1, (40, 7), window_size=(200, 100), causal=False),
    _ranges("w1-chunk", 1, (75, 16, 33), attention_chunk=16),
    _ranges("w1-chunk-full", 1, (75, 16), attention_chunk=20, causal=False),
    _ranges("w1-chunk-window", 1, (90,), attention_chunk=40, window_size=(10, -1)),
    _ranges("w1-softcap", 1, (50, 23), softcap=2.0, softmax_scale=1.0, heads=4, kv_heads=2),
    _ranges("w1-sinks", 1, (50, 0, 23), sinks=True, heads=4, kv_heads=2, padding=3),
    _ranges("w1-lengths", 1, (50, 8, 23), lengths_real=(41, 0, 23), causal=False),
    _ranges("w2-window-one", 2, (40, 12), window_size=(0, -1)),
    _ranges("w2-window-left", 2, (64, 8, 28), window_size=(5, 0), heads=4, kv_heads=2, padding=2, dtype="bfloat16"),
    _ranges("w2-window-chunk-plus", 2, (80, 16), window_size=(25, -1)),
    _ranges("w2-window-both", 2, (48, 40), window_size=(6, 14), causal=False),
    _ranges("w2-window-right", 2, (48, 40), window_size=(-1, 2), causal=False),
    _ranges("w2-chunk", 2, (76, 24), attention_chunk=13, dtype="float16"),
    _ranges("w2-softcap", 2, (44, 20), softcap=1.5, softmax_scale=0.8, dtype="bfloat16"),
    _ranges("w2-sinks", 2, (36, 12), sinks=True, heads=4, kv_heads=2, padding=5),
    _ranges("w2-sinks-full", 2, (36, 12), sinks=True, causal=False, dtype="bfloat16"),
    _ranges("w2-lengths", 2, (36, 8, 40), lengths_real=(33, 0, 18)),
    _ranges("w2-lengths-full", 2, (36, 8, 40), lengths_real=(33, 1, 18), causal=False),
    _ranges(
        "w2-all",
        2,
        (60, 0, 44),
        lengths_real=(57, 0, 40),
        window_size=(17, -1),
        attention_chunk=32,
        softcap=3.0,
        sinks=True,
        heads=4,
        kv_heads=2,
        padding=1,
    ),
    _ranges("w3-window", 3, (90, 12), window_size=(20, -1), heads=6, kv_heads=2),
    _ranges("w3-window-both", 3, (66, 30), window_size=(9, 30), causal=False, dtype="float16"),
    _ranges("w3-all", 3, (66, 30), window_size=(9, -1), softcap=2.0, sinks=True, lengths_real=(61, 30)),
    _ranges("w2-row", 2, (13, 0, 30, 1, 18), layout="row", padding=2),
    _ranges("w2-row-full", 2, (13, 30, 1, 18), layout="row", padding=6, causal=False),
    _ranges("w2-row-batch", 2, (13, 27, 40, 22, 14), layout="row", padding=4, row_length=40, dtype="bfloat16"),
    _ranges("w3-row-window", 3, (50, 7, 30), layout="row", padding=3, window_size=(11, -1)),
    _ranges(
        "w2-row-all",
        2,
        (21, 9, 34, 5),
        layout="row",
        padding=3,
        lengths_real=(20, 9, 30, 0),
        window_size=(12, 4),
        causal=False,
        softcap=3.0,
        sinks=True,
        heads=4,
        kv_heads=2,
    ),
)
