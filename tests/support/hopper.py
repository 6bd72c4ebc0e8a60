"""Tests of the kernels for Hopper: marks for compiling and running them, and shapes and planners that reach them."""

import pytest
import torch
import triton

from tests.support.machine import GPU
from tests.support.planners import RememberingPlanner
from zigzag_kernels.hopper import rules

COMPILES = triton.__version__.startswith(rules.TRITON)
RUNS = GPU and torch.cuda.get_device_capability() == (9, 0) and COMPILES
needs_triton = pytest.mark.skipif(not COMPILES, reason="needs a Triton that these kernels run with")
needs_hopper = pytest.mark.skipif(not RUNS, reason="needs a Hopper GPU and a Triton that these kernels run with")

PAIR = {"attention_forward_hopper", "backward_dkdv_hopper", "backward_dq_hopper"}
"""Kernels of a call whose backward pass has one kernel for dK/dV and one for dQ."""
FUSED = {"attention_forward_hopper", "clear_sums", "backward_fused_hopper", "finish_dq"}
"""Kernels of a call whose backward pass has one kernel, and two around it for the sums of dQ."""
OF_SINKS = {"sum_sink_rows", "sum_sink_parts"}
"""Kernels of any family for the gradients of sinks."""


def hopper_head_dim(otherwise: int) -> int:
    """Return a head_dim for tests of calls in 16 bits: on a Hopper GPU 128, `otherwise` elsewhere.

    Rules of speed prefer the kernels for Hopper at 128 even where sequences have a few tokens. All tests of calls take
    the same numbers of heads too, so that kernels which were compiled for one test serve the others.
    """
    return 128 if RUNS else otherwise


def assert_kernels_for_hopper(planner: RememberingPlanner, expected: set[str]) -> None:
    """Assert that `planner`, on a Hopper GPU, planned the attention kernels `expected`, such as PAIR, and no others."""
    if RUNS:
        assert planner.functions - OF_SINKS == expected
