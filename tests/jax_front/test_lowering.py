"""The kernels compile for an H100 from JAX without a GPU: `programs/lowering.py`, in a process of its own."""

import importlib.util

import pytest

from tests.support.commands import lines_of
from tests.support.hopper import COMPILES

PLUGIN = importlib.util.find_spec("jax_cuda13_plugin")


@pytest.mark.skipif(PLUGIN is None, reason="needs JAX's CUDA plugin, not a GPU")
@pytest.mark.parametrize("parts", ["gathered ranges outside", "methods plans segmented", "hopper"])
def test_all_kernels_compile_from_jax(triton_cache, parts):
    """Few processes compile: each imports JAX, and knows the kernels of its parts before."""
    if parts == "hopper" and not COMPILES:
        pytest.skip("needs a Triton that these kernels run with")
    assert lines_of("lowering", *parts.split(), **triton_cache) == parts.split()


@pytest.mark.skipif(PLUGIN is not None, reason="JAX's CUDA plugin is installed")
def test_the_plugin_that_is_missing_is_named():
    assert lines_of("lowering", "unplugged") == ["unplugged"]
