"""Modes of functions, profiles and traces hear of the operators, which eager calls go around; unused results do not."""

from unittest import mock

import pytest
import torch
from torch.overrides import TorchFunctionMode

import zigzag_torch
from tests.support.machine import GPU
from zigzag_torch.parallel import Local

DEVICE = "cuda" if GPU else "cpu"
OPERATORS = ["zigzag::segment_tables", "zigzag::attention_forward", "zigzag::attention_backward"]


@pytest.fixture
def attend(kernel_backend):
    """Attention of rank 1 of 2, as a function of its q alone, and that q."""
    q, k, v = (torch.randn(rows, 1, 16, device=DEVICE) for rows in (4, 8, 8))
    cu_seqlens = torch.tensor([0, 8], dtype=torch.int32, device=DEVICE)

    def attend(q, **options):
        return zigzag_torch.zigzag_attention_gathered(q, k, v, cu_seqlens, 1, 2, backend=kernel_backend, **options)

    return attend, q.requires_grad_()


class Heard(TorchFunctionMode):
    """Names in `names` the functions that a mode of functions hears of."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **kwargs or {})


def test_a_mode_of_functions_hears_of_the_operators(attend):
    attend, q = attend
    expected = attend(q)
    with Heard() as heard:
        assert torch.equal(attend(q), expected)
    for operator in OPERATORS[:2]:
        assert any(operator.replace("::", ".") in name for name in heard.names)


def test_a_profile_names_the_operators(attend):
    attend, q = attend
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, acc_events=True) as profile:
        attend(q).sum().backward()
    assert {event.key for event in profile.key_averages()} >= {*OPERATORS}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_a_trace_holds_the_operators(attend):
    attend, q = attend
    q = q.detach()
    traced = torch.jit.trace(attend, (q,), check_trace=False)
    assert torch.equal(traced(2 * q), attend(2 * q))


@pytest.mark.parametrize("used", ["out", "lse"])
def test_only_a_used_lse_brings_a_gradient(used, attend):
    attend, q = attend
    out, lse = attend(q, return_lse=True)
    with mock.patch.object(Local, "backward", autospec=True, side_effect=Local.backward) as backward:
        {"out": out, "lse": lse}[used].sum().backward()
    (_, _, _, dlse, _, _), _ = backward.call_args
    assert (dlse is not None) == (used == "lse")
