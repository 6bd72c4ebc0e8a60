"""Every threshold that decides between two correct ways to compute, with its unit, GPU and measurement.

Thresholds change speed and memory, never the correctness of a result.
"""

from typing import Protocol

# How many KV heads an all-gather brings, on H200 and H100: docs/log/bench.md, "Between two GPUs".
FILLING_ROWS = 2**16
"""Query rows that fill a GPU: 512 tiles of 128 rows are several tiles for each multiprocessor of today's GPUs."""
LASTING_SCORES = 2**30
"""Scores of one KV head that keep an H200 busy for half a millisecond.

In the measurement, the host needed 0.4 ms to start the transfer of the next window.
"""

# In which order programs take tiles, on H200: docs/log/kernels.md, lines "heads side by side".
MULTIPROCESSORS = 128
"""Approximate number of multiprocessors of a GPU used for training; an H100 and an H200 have 132."""
FEW_PROGRAMS = 12 * MULTIPROCESSORS
"""Programs of a launch below which tiles of several heads run side by side."""
SEQUENCE_KEYS = 2**11
"""Mean keys from which on a sequence has tiles of keys that are much heavier than its average tile."""

# How many heads a program takes, on H200: docs/log/hopper.md, "Several heads for each program".
MANY_PROGRAMS = 3 * MULTIPROCESSORS
"""Fewest programs that a launch may have when each program takes several heads."""

# dK and dV in one launch or in two, on H200: docs/log/kernels.md, line "dK in one launch, dV in another".
SUMS_TOGETHER_HEAD_DIM = 128
"""Largest head_dim for which one portable launch sums both dK and dV, on GPUs whose tiles were measured."""

# Kernels for Hopper or portable ones, on H100: docs/log/hopper.md, "Speed", lines "64 × 128" and "16 × 512".
SMALL_HEAD_DIM = 64
"""Largest head_dim at which portable kernels win on short chunks, and blocks of the fused kernel have 128 rows."""
SHORT_CHUNK_KEYS = 96
"""Mean keys of a chunk below which blocks of 128 keys are mostly empty."""
SHORT_CHUNK_KEYS_DKDV = 256
"""Mean keys of a chunk below which, at a small head_dim, the portable dK/dV kernel is faster."""
VERY_NARROW_KEYS = 256
"""Keys that a mask lets a row see, below which portable dK/dV is faster at a small head_dim.

On H200: docs/log/hopper.md, "Windows, sinks and caps".
"""

# One backward kernel or two at a small head_dim, on H200: docs/log/hopper.md, "The fused kernel at head_dim 64".
SMALL_FUSED_KEYS = 2**12
"""Keys of a sequence, on one device, from which on one kernel was measured to be faster."""
SMALL_TURNS_SIDE_BY_SIDE = 4
"""Most KV heads that have their tiles in turn at a small head_dim, where walks have fewer blocks."""
SMALL_LONG_WALK = 2**14
"""The same as `LONG_WALK` at a small head_dim, with the most KV heads side by side.

Half as many heads side by side need twice the rows.
"""

# Which tiles of a kernel for Hopper, on H200: docs/log/hopper.md, "Windows, sinks and caps".
NARROW_KEYS = 1024
"""Keys that a row sees, up to which dK/dV tiles have 128 keys instead of 192 at a small head_dim."""

# Which tiles of a kernel for Hopper, on H100: docs/log/hopper.md, "Speed", lines "2048, one sequence" and "8192, one
# sequence".
FEW_ROWS = 2**17
"""Query rows of a sequence, over the window's heads, below which it has few tiles: 1024 tiles of 128 rows."""

# One backward kernel whose tiles take turns, or two kernels, on H200: docs/log/hopper.md, "In turns" and "Exponentials
# in halves".
TURNS_SIDE_BY_SIDE = 2
"""Most KV heads that have their tiles in turn."""
LONG_WALK = 2**15
"""Query rows of a sequence and KV head from which on one kernel in turns beats two kernels."""
VERY_LONG_WALK = 2**17
"""The same for a window between ranks, and for `deterministic=False`.

Windows of fewer rows were not measured. From this number on turns also take less time than sums in any order.
"""
MANY_TURNS = 4 * MULTIPROCESSORS
"""Programs of a launch from which on their unequal ends cost less than a second kernel."""

WIDE_WINDOW = 2**12
"""Keys of a window, and of a sequence, from which on one kernel in any order beats two kernels.

On one device, at head_dim 72 to 128, on H200: docs/log/hopper.md, "Windows in one kernel".
"""

# When programs of long sequences take several heads, on H200: docs/log/hopper.md, "Several heads for each program" and
# "The forward across the border between two heads".
MODERATE_KEYS = 2**15
"""Keys of a sequence or window up to which programs of the forward take several heads."""
MODERATE_KEYS_DQ = 2**14
"""Keys of a sequence or window up to which programs of dQ take several heads."""
MANY_ROWS = 2**19
"""Query rows of a launch of dQ, over the window's heads, that fill 1024 programs of four heads."""


def halo_moves_less(message_rows: int, rows: int, world_size: int) -> bool:
    """Return whether halos move fewer rows of K/V to a rank than an all-gather of `rows` rows from each rank.

    Each of a rank's two neighbours sends `message_rows`. If the host knows that halos suffice, a call whose caller
    named no method uses halos whenever this function returns True. The rule is the same for all GPUs: shorter transfers
    are faster everywhere.
    """
    return 2 * message_rows < (world_size - 1) * rows


class Sizes(Protocol):
    """Sizes that `choose_heads_k_stride` needs; `Problem` and `cost.Step` both have them."""

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

    A `stride` of None selects the fewest heads whose query rows fill a GPU and keep it busy while the K/V of the next
    heads arrive. With few heads at a time, buffers are small, and the GPU waits only for the first, short transfer.
    Raises `ValueError` unless `stride` divides `kv_heads`.
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
