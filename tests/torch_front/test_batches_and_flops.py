"""Prepared batches in the hands of a trainer, and the floating point operations that PyTorch counts."""

import dataclasses
from itertools import accumulate

import pytest
import torch
from torch.utils import _pytree as pytree

import zigzag_torch
from tests.support.commands import lines_of
from tests.support.machine import GPU
from tests.support.processes import run_ranks
from zigzag_kernels.cost.counts import backward_flops, forward_flops, unmasked_scores

DEVICE = torch.device("cuda" if GPU else "cpu")
LENGTHS, WORLD_SIZE, HEADS, KV_HEADS, HEAD_DIM = (24, 0, 8, 40), 2, 4, 2, 16
TOKENS = sum(LENGTHS) // WORLD_SIZE


def offsets(device=DEVICE):
    return torch.tensor([*accumulate(LENGTHS, initial=0)], dtype=torch.int32, device=device)


def arrays(rows=WORLD_SIZE * TOKENS, tokens=TOKENS, device=DEVICE):
    generator = torch.Generator().manual_seed(0)
    shapes = (tokens, HEADS, HEAD_DIM), (rows, KV_HEADS, HEAD_DIM), (rows, KV_HEADS, HEAD_DIM)
    return [torch.randn(shape, generator=generator).to(device).requires_grad_() for shape in shapes]


@pytest.fixture(params=["reference", "kernels"])
def backend(request, kernel_backend):
    return request.param if request.param == "reference" else kernel_backend


def gradients(batch, backend):
    leaves = arrays()
    out = zigzag_torch.zigzag_attention_gathered(*leaves, batch, 1, WORLD_SIZE, backend=backend)
    return out, *torch.autograd.grad(out.square().sum(), leaves)


def assert_same(results, expected):
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


@pytest.mark.parametrize("made_in_inference_mode", [True, False])
def test_a_batch_prepared_in_inference_mode_can_be_trained_on(backend, made_in_inference_mode):
    expected = gradients(zigzag_torch.prepare_batch(offsets(), 1, WORLD_SIZE, backend=backend), backend)
    cu_seqlens = offsets()
    with torch.inference_mode():
        if made_in_inference_mode:
            cu_seqlens = offsets()
        batch = zigzag_torch.prepare_batch(cu_seqlens, 1, WORLD_SIZE, backend=backend)
    assert not any(x.is_inference() for x in pytree.tree_leaves(batch) if isinstance(x, torch.Tensor))
    assert_same(gradients(batch, backend), expected)


def test_a_batch_moves_as_a_tensor_does(backend):
    batch = zigzag_torch.prepare_batch(offsets(), 1, WORLD_SIZE, backend=backend)
    expected, there = gradients(batch, backend), batch.to("meta")
    assert (there.world_size, there.method, there.compared_by) == (WORLD_SIZE, "allgather", None)
    tensors = [x for x in pytree.tree_leaves(there) if isinstance(x, torch.Tensor)]
    assert [x.device.type for x in tensors] == ["meta"] * (2 if backend == "reference" else 4)
    assert_same(gradients(batch.to("cpu", non_blocking=True).to(DEVICE), backend), expected)


def test_a_batch_is_a_pytree(backend):
    batch = zigzag_torch.prepare_batch(offsets(), 1, WORLD_SIZE, backend=backend)
    doubled = pytree.tree_map_only(torch.Tensor, lambda x: 2 * x, {"batch": batch})["batch"]
    assert type(doubled) is zigzag_torch.Batch
    assert doubled.cu_seqlens.equal(2 * batch.cu_seqlens)
    assert doubled.world_size == WORLD_SIZE
    leaves, structure = pytree.tree_flatten(batch)
    assert_same(gradients(pytree.tree_unflatten(leaves, structure), backend), gradients(batch, backend))
    shared = dataclasses.replace(batch, method="ring", compared_by="a group")
    again = pytree.tree_map_only(torch.Tensor, lambda x: x, shared)
    assert (again.world_size, again.method, again.compared_by) == (WORLD_SIZE, "ring", "a group")
    assert pytree.treespec_loads(pytree.treespec_dumps(structure)) == structure


def test_offsets_that_are_a_column_of_something(backend):
    columns = torch.stack([offsets(), -offsets()], 1)
    batch = zigzag_torch.prepare_batch(columns[:, 0], 1, WORLD_SIZE, backend=backend)
    expected = zigzag_torch.prepare_batch(offsets(), 1, WORLD_SIZE, backend=backend)
    assert_same(gradients(batch, backend), gradients(expected, backend))


def test_one_device_takes_a_batch_that_was_prepared_for_another_method(backend):
    batch = zigzag_torch.prepare_batch(offsets(), 0, 1, method="ring", backend=backend)
    leaves = arrays(tokens=sum(LENGTHS))
    out = zigzag_torch.zigzag_attention(*leaves, batch, method="allgather", backend=backend)
    assert torch.equal(out, zigzag_torch.zigzag_attention(*leaves, offsets(), backend=backend))


def count(forward):
    """The operations that PyTorch counts of `forward()`, and of the backward pass of its result."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        out = forward()
    with FlopCounterMode(display=False) as backward_counter:
        out.sum().backward()
    return counter.get_total_flops(), backward_counter.get_total_flops()


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("rank", range(WORLD_SIZE))
def test_flops_are_those_of_the_scores_that_the_mask_leaves(rank, causal, kernel_backend):
    def forward():
        batch = zigzag_torch.prepare_batch(offsets(), rank, WORLD_SIZE, backend=kernel_backend)
        return zigzag_torch.zigzag_attention_gathered(
            *arrays(), batch, rank, WORLD_SIZE, causal=causal, backend=kernel_backend
        )

    scores = unmasked_scores(LENGTHS, rank, WORLD_SIZE, causal), HEADS, HEAD_DIM
    assert count(forward) == (forward_flops(*scores), backward_flops(*scores))


def check_ranks(rank, world_size, backend):
    for method in ("allgather", "ring"):
        for causal in (True, False):

            def forward(method=method, causal=causal):
                leaves = arrays(TOKENS)
                group = torch.distributed.group.WORLD
                return zigzag_torch.zigzag_attention(
                    *leaves, offsets("cpu"), group=group, method=method, causal=causal, backend=backend
                )

            scores = unmasked_scores(LENGTHS, rank, world_size, causal), HEADS, HEAD_DIM
            assert count(forward) == (forward_flops(*scores), backward_flops(*scores)), (method, causal)


@pytest.mark.skipif(GPU, reason="gloo groups, on a CPU")
def test_flops_between_ranks_are_those_of_each_rank(kernel_backend, tmp_path):
    run_ranks(WORLD_SIZE, tmp_path, check_ranks, kernel_backend)


@pytest.mark.parametrize("causal", [True, False])
def test_flops_without_values_are_those_of_one_sequence(causal, kernel_backend):
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils.flop_counter import FlopCounterMode

    with FakeTensorMode(), FlopCounterMode(display=False) as counter:
        q, k, v = (torch.empty(64, heads, HEAD_DIM, device=DEVICE) for heads in (HEADS, KV_HEADS, KV_HEADS))
        cu_seqlens = torch.tensor([0, 64], dtype=torch.int32, device=DEVICE)
        zigzag_torch.zigzag_attention(q, k, v, cu_seqlens, causal=causal, backend=kernel_backend)
    assert counter.get_total_flops() == forward_flops(unmasked_scores((64,), 0, 1, causal), HEADS, HEAD_DIM)


@pytest.mark.parametrize("first", ["zigzag_torch", "torch.utils.flop_counter"])
def test_formulas_are_there_whichever_module_is_imported_first(first):
    """A process of its own, whose `zigzag_torch` leaves triton alone (`parity/test_imports.py`)."""
    assert lines_of("flop_formulas", first) == ["4 formulas"]
