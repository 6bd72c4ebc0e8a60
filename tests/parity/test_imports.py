"""Each package imports in a fresh process without the other's framework, without a GPU, and without triton."""

import pytest

import zigzag_kernels
import zigzag_torch
from tests.support.commands import lines_of

MISSING = {
    "zigzag_kernels": ("torch", "jax", "jax_triton", "numpy", "triton"),
    "zigzag_kernels.doctor": ("torch", "jax", "jax_triton", "numpy", "triton", "zigzag_torch", "zigzag_jax"),
    "zigzag_kernels.documents": ("torch", "jax", "jax_triton", "numpy", "triton", "zigzag_torch", "zigzag_jax"),
    "zigzag_torch": ("jax", "jax_triton", "triton", "transformers", "accelerate", "zigzag_torch.fast_launch"),
    "zigzag_torch.hf": ("jax", "jax_triton", "triton", "accelerate"),
    "zigzag_jax": ("torch", "jax_triton", "triton", "flax"),
    "zigzag_jax.flax": ("torch", "jax_triton", "triton", "flax"),
    "zigzag_kernels.plan": ("torch", "jax", "jax_triton", "zigzag_torch", "zigzag_jax"),
}


@pytest.mark.parametrize("module", MISSING)
def test_import_boundaries(module):
    assert lines_of("import_without", module, "--missing", *MISSING[module]) == [""]


@pytest.mark.parametrize("module", ["zigzag_kernels", "zigzag_torch", "zigzag_jax"])
def test_triton_is_not_imported_before_a_kernel_is_asked_for(module):
    """Whoever wants the interpreter may still say so in the environment."""
    assert lines_of("import_without", module, "--seen", "triton") == [""]


def test_nothing_keeps_a_group_that_was_destroyed():
    """Modules that are imported later take it as a default, and threads of gloo would run while the process ends."""
    assert lines_of("destroyed_group") == ["[]"]


def test_the_public_surface_is_there():
    assert all(hasattr(zigzag_torch, name) for name in zigzag_torch.__all__)
    assert zigzag_torch.__version__ == zigzag_kernels.__version__
