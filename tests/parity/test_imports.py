"""Each package imports in a fresh process without the other's framework, without a GPU, and without triton."""

import subprocess
import sys

import pytest

FORBIDDEN = {
    "zigzag_kernels": ("torch", "jax", "jax_triton", "numpy", "triton"),
    "zigzag_kernels.doctor": ("torch", "jax", "jax_triton", "numpy", "triton", "zigzag_torch", "zigzag_jax"),
    "zigzag_torch": ("jax", "jax_triton", "triton"),
    "zigzag_jax": ("torch", "jax_triton", "triton"),
    "zigzag_kernels.plan": ("torch", "jax", "jax_triton", "zigzag_torch", "zigzag_jax"),
}


@pytest.mark.parametrize("module", FORBIDDEN)
def test_import_boundaries(module):
    # A module that is None in sys.modules cannot be imported: ImportError, whoever tries.
    code = f"import sys; sys.modules.update(dict.fromkeys({FORBIDDEN[module]!r})); import {module}"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("module", ["zigzag_kernels", "zigzag_torch", "zigzag_jax"])
def test_triton_is_not_imported_before_a_kernel_is_asked_for(module):
    """Whoever wants the interpreter may still say so in the environment."""
    code = f"import sys, {module}; assert 'triton' not in sys.modules"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr


def test_nothing_keeps_a_group_that_was_destroyed():
    """Modules that are imported later take it as a default, and threads of gloo would run while the process ends."""
    code = """
import torch.distributed as dist, zigzag_torch
from pathlib import Path
store = dist.HashStore()
dist.init_process_group("gloo", store=store, rank=0, world_size=1)
import torch._dynamo
dist.destroy_process_group()
print([thread.read_text() for thread in Path("/proc/self/task").glob("*/comm") if "gloo" in thread.read_text()])
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert result.stdout == "[]\n", result.stdout + result.stderr
