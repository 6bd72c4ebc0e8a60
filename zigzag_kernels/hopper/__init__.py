"""Kernels for Hopper in Gluon, behind the same plan and tables as the portable ones, and the rule when they serve.

They are taken where they can serve and were not slower than the portable ones. `ZIGZAG_HOPPER`, read when a problem is
first seen, is 0 for the portable kernels always, and 1 for these wherever they can serve. `docs/hopper.md` has their
speed and their pipeline.
"""

import os

import triton

from ..problem import DTYPE_BYTES, Problem

VARIABLE = "ZIGZAG_HOPPER"
MIN_HEAD_DIM, MAX_HEAD_DIM = 40, 128  # smaller ones would fill less than half of a tile
TRITON = "3.6."  # Gluon changes from release to release: with 3.9 the kernels here do not compile
ALIGNMENT = 8  # elements: what the copy engine reads begins at multiples of 16 bytes
DESCRIPTOR_BYTES = 128  # of global memory for each descriptor that a program makes for the copy engine
FASTER_SHORT = 64  # with chunks shorter than blocks the portable kernel is faster up to this head_dim
FEW_ROWS = 2**17  # packed query rows of all heads: 1024 tiles, about eight for each multiprocessor


def forward_kernel(problem: Problem) -> str:
    """Name in the tile tables of the forward kernel for `problem`: one of `config.HOPPER_KERNELS`, or "forward"."""
    wanted = os.environ.get(VARIABLE)
    if wanted not in (None, "0", "1"):
        raise ValueError(f"{VARIABLE}: expected 0 or 1, got {wanted!r}")
    if wanted == "0" or not _can_serve(problem):
        return "forward"
    # A block of keys ends with its chunk, so blocks longer than chunks are wasteful; the host knows mean lengths alone.
    runs = 2 * problem.slots if problem.slots > 1 else 1  # parts of a sequence whose keys lie next to each other
    if problem.kv_tokens < 96 * runs * problem.sequences:
        return "hopper_forward_short" if wanted or problem.head_dim > FASTER_SHORT else "forward"
    return "hopper_forward_few" if problem.tokens * problem.group * problem.window < FEW_ROWS else "hopper_forward"


def _can_serve(problem: Problem) -> bool:
    return (
        problem.gluon
        and triton.__version__.startswith(TRITON)
        and problem.target == "9.0"
        and DTYPE_BYTES[problem.dtype] == 2
        and MIN_HEAD_DIM <= problem.head_dim <= MAX_HEAD_DIM
        and all(stride % ALIGNMENT == 0 for stride in (*problem.k_strides, *problem.v_strides))
    )
