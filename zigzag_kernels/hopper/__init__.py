"""Kernels for Hopper in Gluon, behind the same plan and tables as the portable ones, and the rules when they serve.

They are taken where they can serve and were not slower than the portable ones. `ZIGZAG_HOPPER`, read when a problem is
first seen, is 0 for the portable kernels always, and 1 for these wherever they can serve. `docs/hopper.md` has their
speed and their pipeline.
"""

import math
import os

import triton

from ..checks import DTYPE_BYTES
from ..heuristics import FEW_ROWS, SHORT_CHUNK_KEYS, SHORT_CHUNK_KEYS_DKDV, SMALL_HEAD_DIM
from ..problem import Problem

VARIABLE = "ZIGZAG_HOPPER"
MIN_HEAD_DIM, MAX_HEAD_DIM = 40, 128  # smaller ones would fill less than half of a tile
TRITON = "3.6.", "3.7.", "3.8.", "3.9."  # Gluon changes from release to release: those that the kernels ran with
ALIGNMENT = 8  # elements: what the copy engine reads begins at multiples of 16 bytes
DESCRIPTOR_BYTES = 128  # of global memory for each descriptor that a program makes for the copy engine


def forward_kernel(problem: Problem) -> str:
    """Name in the tile tables of the forward kernel for `problem`: one of `config.HOPPER_KERNELS`, or "forward"."""
    return f"hopper_forward{_size(problem)}" if _taken(problem, SHORT_CHUNK_KEYS) else "forward"


def backward_kernels(problem: Problem, dout_strides: tuple[int, int]) -> tuple[str, str]:
    """Names in the tile tables of the dK/dV and the dQ kernel for `problem`."""
    strides = *problem.q_strides, *dout_strides
    short = "_short" if _shorter(problem, SHORT_CHUNK_KEYS) else ""
    return (
        f"hopper_dkdv{short}" if _taken(problem, SHORT_CHUNK_KEYS_DKDV, *strides) else "backward_dkdv",
        f"hopper_dq{_size(problem)}" if _taken(problem, SHORT_CHUNK_KEYS) else "backward_dq",
    )


def takes_fused_backward(problem: Problem, dout_strides: tuple[int, int]) -> bool:
    """Whether one kernel does the work of both of `backward_kernels` for `problem`, in no fixed order.

    It was slower than both where head_dim is small or chunks are short.
    """
    if problem.call.deterministic or not _taken(problem, math.inf, *problem.q_strides, *dout_strides):
        return False
    return os.environ.get(VARIABLE) == "1" or not _shorter(problem, SHORT_CHUNK_KEYS)


def _taken(problem: Problem, short: float, *strides: int) -> bool:
    """Whether a kernel here serves `problem`, one that others are faster than with chunks of fewer than `short` keys
    if head_dim is small. The copy engine reads k, v, and arrays of these `strides`."""
    wanted = os.environ.get(VARIABLE)
    if wanted not in (None, "0", "1"):
        raise ValueError(f"{VARIABLE}: expected 0 or 1, got {wanted!r}")
    can_serve = (
        problem.gluon
        and triton.__version__.startswith(TRITON)
        and problem.target == "9.0"
        and DTYPE_BYTES[problem.dtype] == 2
        and MIN_HEAD_DIM <= problem.head_dim <= MAX_HEAD_DIM
        and all(stride > 0 and stride % ALIGNMENT == 0 for stride in (*problem.k_strides, *problem.v_strides, *strides))
    )
    pays = wanted == "1" or problem.head_dim > SMALL_HEAD_DIM or not _shorter(problem, short)
    return wanted != "0" and can_serve and pays


def _size(problem: Problem) -> str:
    """Which of the tile tables of a kernel that walks through keys serves `problem`, as the end of its name."""
    if _shorter(problem, SHORT_CHUNK_KEYS):
        return "_short"
    return "_few" if problem.tokens * problem.group * problem.window < FEW_ROWS * problem.sequences else ""


def _shorter(problem: Problem, keys: float) -> bool:
    """Whether chunks have fewer `keys`: a block of keys ends with its chunk. The host knows mean lengths alone."""
    runs = 2 * problem.slots if problem.slots > 1 else 1  # parts of a sequence whose keys lie next to each other
    return problem.kv_tokens < keys * runs * problem.sequences
