"""The one table of cases that tests, tuning and benchmarks run.

Tags: "interpret" is small enough for Triton's interpreter on a CPU, "gpu" is for compiled kernels, "bench" is what the
benchmark times, "quick" the part of it that does not take long.
"""

from dataclasses import dataclass
from itertools import accumulate

import ml_dtypes  # noqa: F401  (its import makes "bfloat16" a NumPy dtype)
import numpy as np

RESULTS = ("out", "lse", "dq", "dk", "dv")
INTERPRET, GPU, BENCH = frozenset({"interpret"}), frozenset({"gpu"}), frozenset({"bench"})
QUICK = frozenset({"quick"})


@dataclass(frozen=True, kw_only=True)
class Case:
    """A packed batch and how it is attended; `lengths` are global, multiples of `2 * world_size` from two ranks on."""

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

    def __post_init__(self):
        assert self.heads % self.kv_heads == 0, self
        assert self.world_size == 1 or all(length % (2 * self.world_size) == 0 for length in self.lengths), self

    def __str__(self):
        return self.name

    @property
    def cu_seqlens(self):
        """Global offsets `[N + 1]` as a list of ints."""
        return list(accumulate(self.lengths, initial=0))

    @property
    def tokens(self):
        """Local rows, the padding included: T."""
        return sum(self.lengths) // self.world_size + self.padding

    @property
    def total(self):
        """Global rows, the padding of every rank included: `world_size * T`."""
        return self.world_size * self.tokens


def select(*tags):
    """The cases with any of `tags`."""
    return [case for case in CASES if case.tags & set(tags)]


def make_inputs(case, seed=0):
    """Global `q, k, v, dout` `[total, heads, head_dim]` with values of `case.dtype`, and `dlse [heads, total]`.

    All are float32 arrays. Every row is another draw, so no two ranks hold the same, and the padding is as random as
    the rest: a kernel that reads it is found out.
    """
    rng = np.random.default_rng(seed)
    q_shape = (case.total, case.heads, case.head_dim)
    kv_shape = (case.total, case.kv_heads, case.head_dim)
    shapes = {"q": q_shape, "k": kv_shape, "v": kv_shape, "dout": q_shape}
    inputs = {
        name: rng.standard_normal(shape, dtype=np.float32).astype(case.dtype).astype(np.float32)
        for name, shape in shapes.items()
    }
    return inputs | {"dlse": rng.standard_normal((case.heads, case.total), dtype=np.float32)}


# Chunks of 63 to 129 tokens, one token, and none: around and far below the edges of every tile size in use.
_EDGES_W1 = (127, 1, 128, 129, 0, 63, 64, 65, 300)
_EDGES_W2 = tuple(4 * chunk for chunk in (127, 1, 128, 129, 0, 63, 64, 65))

# Sizes of the standard library's modules in tokens of four bytes, drawn at random, cut at 8192 and rounded down to 16:
# `examples/text.py` has the texts.
_DOCUMENTS = (5824, 7328, 1728, 6576, 8176, 1536, 8096, 656, 2960, 8128, 2848, 8176, 3504)


def _bench(name, lengths=(65536,), tags=BENCH, **changes):
    """A case that differs from one long sequence of 8192 local tokens in what is given."""
    base = {"world_size": 8, "heads": 32, "kv_heads": 8, "head_dim": 128, "dtype": "bfloat16"}
    return Case(name=name, lengths=lengths, tags=tags, **base | changes)


# What the benchmark times: one long sequence, many short documents, a few medium ones, one short sequence, documents of
# real lengths; then one change at a time to the long sequence.
_BENCH_CASES = (
    _bench("rectangle-d128", tags=BENCH | QUICK),
    _bench("rectangle-d64", head_dim=64, tags=BENCH | QUICK),
    _bench("short-d128", (16384,), tags=BENCH | QUICK),
    _bench("packed16-d128", (4096,) * 16, tags=BENCH | QUICK),
    _bench("packed64-d128", (1024,) * 64, tags=BENCH | QUICK),
    _bench("documents-d128", _DOCUMENTS, tags=BENCH | QUICK),
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
