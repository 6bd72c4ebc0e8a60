"""ZIGZAG_VERIFY_CORRECTNESS: what it finds, what it lets pass, and that it runs the kernels."""

import re
from unittest import mock

import pytest
import torch

import zigzag_torch
from tests.support.commands import lines_of
from tests.support.machine import GPU
from tests.support.remembered import each_launch_once
from zigzag_torch import ZigzagConfig, launch
from zigzag_torch.compat import llama3, verify

DEVICE = torch.device("cuda" if GPU else "cpu")
OFFSETS, TOKENS, HEADS, HEAD_DIM = [0, 40, 41, 43, 107, 128], 128, 2, 16
TRAINING = 1e-6  # the size of cotangents when a loss is a mean over many tokens


@pytest.fixture(autouse=True, scope="module")
def _each_launch_once():
    """Most of these tests launch the same; what they change is behind the launches."""
    with each_launch_once():
        yield


def arrays(dtype, query=1.0, key_mean=0.0, value_mean=0.0, cotangent=1.0):
    """q, k, v, dout of random numbers, with that size of q and dout and these means of k and v."""
    generator = torch.Generator().manual_seed(1)
    q, k, v, dout = (torch.randn(TOKENS, heads, HEAD_DIM, generator=generator) for heads in (HEADS, 1, 1, HEADS))
    tensors = q * query, k + key_mean, v + value_mean, dout * cotangent
    q, k, v, dout = (x.to(DEVICE, dtype) for x in tensors)
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), dout


def verified(q, k, v, dout, causal=True):
    """A call of a published name, forward and backward, compared."""
    offsets = torch.tensor(OFFSETS, dtype=torch.int32, device=DEVICE)
    with ZigzagConfig(verify_correctness=True):
        out, lse, _ = zigzag_torch.zigzag_llama3_flash_attn_varlen_func(
            q, k, v, offsets, offsets, 64, 64, 1, slice(0), causal=causal, return_attn_probs=True
        )
        return torch.autograd.grad((out, lse), (q, k, v), (dout, dout.float().sum(-1).T))


DATA = {
    "plain": {},
    "training": {"cotangent": TRAINING},
    "large": {"cotangent": 1e3},
    "peaked": {"query": 8.0},
    "one key": {"query": 40.0},
    "biased keys": {"key_mean": 10.0},
    "biased values": {"value_mean": 10.0},
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("data", DATA)
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # NumPy's, of scores of other sequences
def test_right_results_pass(data, dtype):
    verified(*arrays(dtype, **DATA[data]))


class Changed(torch.autograd.Function):
    """The same numbers, and in the backward pass `change(gradient)`."""

    @staticmethod
    def forward(ctx, x, change):
        ctx.change = change
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return ctx.change(gradient), None


def one_row(x, factor, row=77):
    x = x.clone()
    x[row] *= factor
    return x


def attention_with(change_out=lambda x: x, change_lse=lambda x: x, **changed):
    """`zigzag_attention` with other results, and other gradients of the inputs named in `changed`."""

    def call(q, k, v, *others, **options):
        named = {"q": q, "k": k, "v": v}
        for name, change in changed.items():
            named[name] = Changed.apply(named[name], change)
        out, lse = zigzag_torch.zigzag_attention(*named.values(), *others, **options)
        return change_out(out), change_lse(lse)

    return mock.patch.object(llama3, "zigzag_attention", call)


WRONG = {
    "dq negated": ({"q": torch.neg}, r"the gradient of q .* by 2\.0e\+00 of its norm"),
    "dk negated": ({"k": torch.neg}, r"the gradient of k .* by 2\.0e\+00 of its norm"),
    "dv negated": ({"v": torch.neg}, r"the gradient of v .* by 2\.0e\+00 of its norm"),
    "dq zero": ({"q": torch.zeros_like}, r"the gradient of q .* by 1\.0e\+00 of its norm"),
    "dk of one row": ({"k": lambda x: one_row(x, -1)}, "the gradient of k "),
    "dv off": ({"v": lambda x: 1.1 * x}, r"the gradient of v .* by (9\.9e-02|1\.0e-01) of its norm"),
    "out off": ({"change_out": lambda x: 1.05 * x}, r"out .* by (4\.9e-02|5\.\de-02) of its norm"),
    "one row of out": ({"change_out": lambda x: one_row(x, 2)}, "out "),
    "NaN in out": ({"change_out": lambda x: one_row(x, float("nan"))}, "out .* 32 elements are infinite or NaN in one"),
    "lse off": ({"change_lse": lambda x: x + 0.05}, "lse "),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("cotangent", [1.0, TRAINING])
@pytest.mark.parametrize("case", WRONG)
def test_wrong_results_are_found_and_named(case, cotangent, dtype):
    wrong, message = WRONG[case]
    with attention_with(**wrong), pytest.raises(AssertionError) as raised:
        verified(*arrays(dtype, cotangent=cotangent))
    assert re.match(f"ZIGZAG_VERIFY_CORRECTNESS: {message}", str(raised.value)), raised.value


def test_without_the_flag_nothing_is_compared():
    q, k, v, _ = arrays(torch.float32)
    offsets = torch.tensor(OFFSETS, dtype=torch.int32, device=DEVICE)
    with attention_with(change_out=lambda x: 2 * x):
        out = zigzag_torch.zigzag_llama3_flash_attn_varlen_func(q, k, v, offsets, offsets, 64, 64, 1, slice(0))
    assert not out.isnan().any()


@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning", "ignore:invalid value:RuntimeWarning")  # NumPy's
def test_nan_in_both_is_no_difference():
    q, k, v, dout = arrays(torch.float32)
    q = one_row(q.detach(), float("nan"), TOKENS - 1).requires_grad_()
    dq, *_ = verified(q, k, v, dout)
    assert dq[-1].isnan().all()
    assert dq[:-1].isfinite().all()


def test_the_kernels_are_what_is_verified():
    """On a CPU in the interpreter, since TRITON_INTERPRET asks for it."""
    with mock.patch.object(launch, "run", wraps=launch.run, together=None) as run:
        verified(*arrays(torch.float32))
    assert {call.args[0].kernel.__name__ for call in run.call_args_list} >= {"attention_forward", "backward_dkdv"}


def test_a_graph_may_be_used_twice():
    q, k, v, dout = arrays(torch.float32)
    with ZigzagConfig(verify_correctness=True):
        offsets = torch.tensor(OFFSETS, dtype=torch.int32, device=DEVICE)
        out = zigzag_torch.zigzag_llama3_flash_attn_varlen_func(q, k, v, offsets, offsets, 64, 64, 1, slice(0))
        first, second = (torch.autograd.grad(out, (q, k, v), dout, retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_the_random_numbers_of_the_caller_stay_as_they_are():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    verified(*arrays(torch.float32))
    assert torch.rand(3).equal(expected)


@pytest.mark.skipif(GPU, reason="a GPU runs the kernels")
def test_without_kernels_the_comparison_says_that_it_says_nothing():
    assert lines_of("verify_without_kernels") == [
        "UserWarning ZIGZAG_VERIFY_CORRECTNESS: without a GPU the fused path is the reference, and so is the unfused "
        "one; TRITON_INTERPRET=1 interprets the kernels"
    ]


def test_a_tensor_of_another_type_is_a_difference():
    x = torch.ones(4, 2, 8, device=DEVICE)
    with (
        ZigzagConfig(verify_correctness=True),
        pytest.raises(AssertionError, match=r"out .* differ: .*float16 against .*float32"),
    ):
        verify.choose_path(lambda x: (x.half(),), lambda x: (x * 1,), {"x": x}, ("out",))
