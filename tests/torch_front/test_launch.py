"""A kernel that was launched before is launched again without Triton's look at every argument, and yet alike."""

import pytest
import torch
import triton

from tests.support.commands import ROOT
from tests.support.problems import small_problem
from zigzag_torch.fast_launch import LATER_RELEASES
from zigzag_torch.launch import can_launch_gluon
from zigzag_torch.parallel.transport import problem_of_backward


@pytest.fixture
def run_relaunch(forks, triton_cache):
    def run(*options):
        (ended,) = forks.run(ROOT / "tests" / "programs" / "relaunch.py", *options, **triton_cache)
        assert ended.code == 0, ended.errors[-4000:]

    return run


@pytest.mark.slow
@pytest.mark.parametrize("in_c", [True, False])
def test_a_compiled_kernel_is_launched_again_as_triton_would(run_relaunch, in_c):
    """The same kernel for arrays of the same types and alignment on the same GPU, another one for others."""
    if in_c and not triton.__version__.startswith(("3.6.", *LATER_RELEASES)):
        pytest.skip("what this release of Triton has in C is not known")
    run_relaunch(*(["--in-c"] if in_c else []))


def test_without_the_fast_path_triton_is_handed_the_same(run_relaunch):
    run_relaunch("--slowly")


def test_a_backward_pass_takes_the_copy_engine_if_it_can_read_all_arrays():
    """Where residuals and gradients begin is known when the backward pass runs."""
    made = small_problem(128, gluon=True)
    for odd in ("q", "k", "v", "dout", None):
        rows = {"q": made.q_strides, "k": made.k_strides, "v": made.v_strides, "dout": made.q_strides}
        arrays = {}
        for name, (token, head) in rows.items():
            memory = torch.zeros(3 * token + 8, dtype=torch.bfloat16)[4 if name == odd else 0 :]
            arrays[name] = memory.as_strided((2, token // head, head), (token, head, 1))
        keys = arrays["k"], arrays["v"]
        assert problem_of_backward(made, arrays["q"], arrays["dout"], keys).gluon == (odd is None), odd


def test_only_arrays_that_begin_at_multiples_of_16_bytes_are_for_the_copy_engine():
    x = torch.zeros(32, dtype=torch.float16)
    assert can_launch_gluon("triton", x, x[8:])
    assert not can_launch_gluon("triton", x, x[4:])
    assert not can_launch_gluon("interpret", x)
