"""Every threshold by which this library chooses between two correct ways, with its unit, GPU and measurement.

Thresholds change speed and memory, never results.
"""

from typing import Protocol

# How many KV heads an all-gather brings, on H200 and H100: docs/log/bench.md, "Between two GPUs".
FILLING_ROWS = 2**16
"""Query rows that fill a GPU: 512 tiles of 128 rows, several for each multiprocessor of any GPU so far."""
LASTING_SCORES = 2**30
"""Scores of one KV head that keep an H200 busy for half a millisecond.

A host took 0.4 ms to start the transfer of the next window.
"""

# In which order programs take tiles, on H200: docs/log/kernels.md, "heads side by side".
MULTIPROCESSORS = 128
"""Multiprocessors, about, of a GPU that models are trained on (an H100 and an H200 have 132)."""
FEW_PROGRAMS = 12 * MULTIPROCESSORS
"""Programs of a launch below which tiles of several heads run side by side."""

# How many heads a program takes, on H200: docs/log/hopper.md, "Taking several heads".
MANY_PROGRAMS = 3 * MULTIPROCESSORS
"""Programs of a launch that are left, at least, when a program takes several heads."""

# dK and dV in one launch or in two, on H200: docs/log/kernels.md, "dK in one launch, dV in another".
SUMS_TOGETHER_HEAD_DIM = 128
"""Largest head_dim whose dK and dV are summed by one portable launch, where tiles were measured."""

# Kernels for Hopper or portable ones, on H100: the tables of docs/log/hopper.md, lines "64 × 128" and "16 × 512".
SMALL_HEAD_DIM = 64
"""Largest head_dim at which portable kernels win on short chunks, and two backward kernels beat the fused one."""
SHORT_CHUNK_KEYS = 96
"""Mean keys of a chunk below which blocks of 128 keys are mostly empty."""
SHORT_CHUNK_KEYS_DKDV = 256
"""Mean keys of a chunk below which, at a small head_dim, the portable dK/dV kernel is faster."""
VERY_NARROW_KEYS = 256
"""Keys that a row sees at most, by a window or chunks, below which the same holds of any sequence."""

# Which tiles of a kernel for Hopper, on H200: docs/log/hopper.md, "dK/dV of windows".
NARROW_KEYS = 1024
"""Most keys of a row for which a tile of dK/dV has 128 keys at a small head_dim, not 192."""

# Which tiles of a kernel for Hopper, on H100: the same tables, lines "2048, one sequence" and "8192, one sequence".
FEW_ROWS = 2**17
"""Packed query rows of a sequence below which it has few tiles: 1024 tiles of 128 rows.

The rows of all heads of the window count.
"""

# When programs of long sequences take several heads, on H200: docs/log/hopper.md, "Several heads of long sequences".
MODERATE_KEYS = 2**14
"""Keys of a sequence or window up to which the start and end of a program take a noticeable time."""
MANY_ROWS = 2**19
"""Packed query rows of a launch that fill 1024 programs of four heads and 128 rows.

The rows of all heads of the window count.
"""


def halo_moves_less(message_rows: int, rows: int, world_size: int) -> bool:
    """Return whether halos move fewer rows of K/V to a rank than an all-gather of `rows` rows from each.

    Both sides of a rank send `message_rows`. Where the host knows that halos suffice, calls that name no method take
    halos if this holds, whatever the GPU: their transfers are shorter, and fewer bytes wait for the first of them.
    """
    return 2 * message_rows < (world_size - 1) * rows


class Sizes(Protocol):
    """Sizes that the stride of an all-gather depends on: a `Problem` has them, and a `cost.Step`."""

    @property
    def rows(self) -> int: ...
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
        keys = sizes.world_size * sizes.rows // max(sizes.sequences, 1)  # of the average sequence
        for divisor in (s for s in range(1, kv_heads) if kv_heads % s == 0):
            rows = sizes.rows * sizes.heads // kv_heads * divisor
            if rows >= FILLING_ROWS and rows * keys >= LASTING_SCORES:
                return divisor
        return kv_heads
    if isinstance(stride, bool) or not isinstance(stride, int) or stride < 1 or kv_heads % stride:
        raise ValueError(f"heads_k_stride: expected a divisor of the {kv_heads} KV heads, got {stride!r}")
    return stride
