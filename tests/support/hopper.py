"""Marks for tests of the kernels for Hopper: one needs to compile them, another to run them."""

import pytest
import torch
import triton

from tests.support.machine import GPU
from zigzag_kernels.hopper import rules

COMPILES = triton.__version__.startswith(rules.TRITON)
RUNS = GPU and torch.cuda.get_device_capability() == (9, 0) and COMPILES
needs_triton = pytest.mark.skipif(not COMPILES, reason="needs a Triton that these kernels run with")
needs_hopper = pytest.mark.skipif(not RUNS, reason="needs a Hopper GPU and a Triton that these kernels run with")
