"""Every threshold by which this library chooses between two right ways, with its unit and where it was measured.

Thresholds change speed and memory, never results. The measurements are in `docs/kernels.md` (portable kernels),
`docs/hopper.md` (kernels for Hopper) and `docs/parallel.md` (transfers).
"""

from typing import Protocol

# Transfers between ranks: H200 and H100, docs/parallel.md.
FILLING_ROWS = 2**16
"""Query rows that fill a GPU: 512 tiles of 128 rows, several for each multiprocessor of any GPU so far."""
LASTING_SCORES = 2**30
"""Scores of one KV head that keep a GPU busy for half a millisecond (H200); a host took 0.4 ms to send a window."""

# Order of programs and heads in a program: H100 and H200, docs/kernels.md.
MULTIPROCESSORS = 128
"""Multiprocessors of a GPU that models are trained on, about."""
FEW_PROGRAMS = 12 * MULTIPROCESSORS
"""Programs of a launch below which tiles of several heads run side by side."""
MANY_PROGRAMS = 3 * MULTIPROCESSORS
"""Programs of a launch that are left, at least, when a program takes several heads."""

# Choice between kernels for Hopper and portable ones: H100, docs/hopper.md.
SHORT_CHUNK_KEYS = 96
"""Mean keys of a chunk below which blocks of 128 keys are mostly empty."""
SMALL_HEAD_DIM = 64
"""Largest head_dim for which portable kernels are faster on short chunks, and two backward kernels than one."""
SHORT_CHUNK_KEYS_DKDV = 256
"""Mean keys of a chunk below which, at a small head_dim, the portable dK/dV kernel is faster."""
FEW_ROWS = 2**17
"""Packed query rows of a sequence, all heads, below which it has few tiles: 1024 tiles of 128 rows."""


class Sizes(Protocol):
    """Sizes that the stride of an all-gather depends on: a `Problem` has them, and a `cost.Step`."""

    @property
    def tokens(self) -> int: ...
    @property
    def heads(self) -> int: ...
    @property
    def kv_heads(self) -> int: ...
    @property
    def world_size(self) -> int: ...
    @property
    def sequences(self) -> int: ...


def choose_heads_k_stride(stride: int | None, sizes: Sizes) -> int:
    """Return the number of KV heads that one all-gather brings.

    It is `stride`, or if None the fewest heads whose query rows fill a GPU and keep it busy while the next are sent.
    Few heads at a time mean small buffers, and that the GPU waits for the first of several transfers only.
    `ValueError` unless `stride` divides `kv_heads`.
    """
    kv_heads = sizes.kv_heads
    if stride is None:
        keys = sizes.world_size * sizes.tokens // max(sizes.sequences, 1)  # of the average sequence
        for divisor in (s for s in range(1, kv_heads) if kv_heads % s == 0):
            rows = sizes.tokens * sizes.heads // kv_heads * divisor
            if rows >= FILLING_ROWS and rows * keys >= LASTING_SCORES:
                return divisor
        return kv_heads
    if isinstance(stride, bool) or not isinstance(stride, int) or stride < 1 or kv_heads % stride:
        raise ValueError(f"heads_k_stride: expected a divisor of the {kv_heads} KV heads, got {stride!r}")
    return stride
