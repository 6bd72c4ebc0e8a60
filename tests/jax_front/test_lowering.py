"""The kernels compile for an H100 from JAX without a GPU: `programs/lowering.py`, in a process of its own."""

import importlib.util
import os
import subprocess
import sys

import pytest

from tests.kernels.test_hopper import HAS_TRITON
from tests.support.commands import ROOT

PLUGIN = importlib.util.find_spec("jax_cuda13_plugin")


@pytest.mark.skipif(PLUGIN is None, reason="needs JAX's CUDA plugin, not a GPU")
@pytest.mark.parametrize("part", ["gathered", "methods", "hopper"])
def test_all_kernels_compile_from_jax(tmp_path, part):
    if part == "hopper" and not HAS_TRITON:
        pytest.skip("needs a Triton that these kernels run with")
    command = [sys.executable, str(ROOT / "tests" / "programs" / "lowering.py"), part]
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=250, check=False)
    assert (result.returncode, result.stdout.split()) == (0, [part]), result.stderr[-2000:]
