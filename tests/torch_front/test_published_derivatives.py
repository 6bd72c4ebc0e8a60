"""Derivatives of the published names, fused, unfused and verified: right, or refused in our words."""

import pytest
import torch
from torch.autograd import forward_ad

import zigzag_torch
from tests.support.cases import Case, make_inputs
from tests.support.pieces import fused_arguments, grouped_arguments, kernels, rank_tensors, tensor
from zigzag_kernels.derivatives import UNSUPPORTED_DERIVATIVE
from zigzag_torch import ZigzagConfig

CASE = Case(name="derivatives", world_size=2, lengths=(8, 0, 16), heads=2, kv_heads=1, head_dim=16)
RANK = 1
FLAGS = {
    "fused": {},
    "unfused": {"use_fused_triton_v2": False},
    "verified": {"verify_correctness": True},
}


Q, KV = (x.detach() for x in rank_tensors(CASE, RANK, make_inputs(CASE))[:2])


def varlen(q):
    """One device, on which q is the whole batch."""
    k, v = KV[:, : len(q)]
    offsets = tensor([0, len(q)], "int32")
    return zigzag_torch.zigzag_llama3_flash_attn_varlen_func(
        q, k, v, offsets, offsets, 0, 0, 1, slice(0), causal=True, return_attn_probs=True
    )[:2]


def grouped(q, name="execute_grouped_attention"):
    offsets = tensor(CASE.cu_seqlens, "int32")
    arguments = grouped_arguments(q, KV, offsets, RANK, CASE.world_size, True)
    if name != "execute_grouped_attention":
        arguments = fused_arguments(arguments, RANK)
    return getattr(zigzag_torch, name)(**arguments)[:2]


def stand_in(q):
    return grouped(q, "replace_grouped_attention_with_fused_triton_v2")


def two_chunks(q):
    k, v = KV[:, : len(q)]
    half, whole = tensor([0, len(q) // 2], "int32"), tensor([0, len(q)], "int32")
    return zigzag_torch.fused_zigzag_llama3_flash_attn_forward_v2(*q.chunk(2), k, v, half, half, whole, 0, 1, 2)


CALLS = {"varlen": varlen, "grouped": grouped, "stand-in": stand_in, "two chunks": two_chunks}


def loss_of(call):
    return lambda q: sum(x.square().sum() for x in call(q))


@pytest.fixture(params=["reference", "kernels"])
def backend(request, kernel_backend):
    name = kernel_backend if request.param == "kernels" else "reference"
    with kernels(name):
        yield name


def by_backward(loss, q):
    leaf = q.clone().requires_grad_()
    return torch.autograd.grad(loss(leaf), leaf)[0]


@pytest.mark.parametrize("flags", ["fused", "unfused"])
@pytest.mark.parametrize("name", CALLS)
def test_the_first_derivative_by_torch_func(name, flags, backend):
    loss, q = loss_of(CALLS[name]), Q
    with ZigzagConfig(**FLAGS[flags]):
        expected = by_backward(loss, q)
        torch.testing.assert_close(torch.func.grad(loss)(q), expected)
        _, pullback = torch.func.vjp(loss, q)
        torch.testing.assert_close(pullback(torch.ones((), device=q.device))[0], expected)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # PyTorch's own use of it
@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize("name", CALLS)
def test_other_derivatives_are_refused(name, flags, backend):
    call, q = CALLS[name], Q

    def twice():
        leaf = q.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(sum(x.sum() for x in call(leaf)), leaf, create_graph=True)
        torch.autograd.grad(gradient.square().sum(), leaf)

    def dual():
        with forward_ad.dual_level():
            call(forward_ad.make_dual(q, q))

    refused = {"twice": twice, "dual": dual, "jvp": lambda: torch.func.jvp(loss_of(call), (q,), (q,))}
    if flags != "verified":
        first = torch.func.grad(loss_of(call))
        refused["grad(grad)"] = lambda: torch.func.grad(lambda x: first(x).sum())(q)
    with ZigzagConfig(**FLAGS[flags]):
        for transform, function in refused.items():
            with pytest.raises(NotImplementedError) as caught:
                function()
            assert UNSUPPORTED_DERIVATIVE in str(caught.value), transform


@pytest.mark.parametrize("name", ["varlen", "stand-in", "two chunks"])
def test_verification_under_torch_func_is_refused(name):
    refusal = pytest.raises(NotImplementedError, match=r"ZIGZAG_VERIFY_CORRECTNESS: expected a call outside of the tra")
    with ZigzagConfig(verify_correctness=True), refusal:
        torch.func.grad(loss_of(CALLS[name]))(Q)
