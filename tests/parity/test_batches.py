"""A prepared batch serves the rank that it was prepared for, and no other."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import zigzag_jax
import zigzag_torch
from tests.support.machine import GPU

PACKAGES = {
    "torch": (zigzag_torch, functools.partial(torch.tensor, device="cuda" if GPU else "cpu")),
    "jax": (zigzag_jax, jnp.asarray),
}
W = 2
OFFSETS = np.array([0, 8, 24], np.int32)


@pytest.fixture(params=PACKAGES)
def package(request):
    """(module, a function that makes its arrays)."""
    return PACKAGES[request.param]


def attention(package, batch, rank, backend):
    module, array = package
    q, kv = (array(np.ones((rows, 1, 16), np.float32)) for rows in (12, 24))
    return module.zigzag_attention_gathered(q, kv, kv, batch, rank, W, return_lse=True, backend=backend)


def all_nan(results):
    return all(np.isnan(np.asarray(x.tolist())).all() for x in results)


def test_the_rank_must_be_given(package):
    module, array = package
    with pytest.raises(ValueError, match="rank: expected the rank to prepare for, as world_size is 2, got None"):
        module.prepare_batch(array(OFFSETS), world_size=W)
    assert module.prepare_batch(array(OFFSETS), backend="reference").world_size == 1


def test_a_rank_that_the_host_knows_is_compared(package):
    module, array = package
    for rank in (0, np.int64(0)):
        batch = module.prepare_batch(array(OFFSETS), rank, W, backend="reference")
        attention(package, batch, 0, "reference")
        with pytest.raises(ValueError, match="rank: expected that of the prepared batch, 0, got 1"):
            attention(package, batch, 1, "reference")


@pytest.mark.parametrize("with_tables", [False, True])
@pytest.mark.parametrize("prepared_by_number", [False, True])
def test_a_rank_that_only_the_device_knows_gives_nan_if_it_is_another(
    package, with_tables, prepared_by_number, kernel_backend
):
    module, array = package
    backend = kernel_backend if with_tables else "reference"
    ranks = [array(np.array([rank], np.int32)) for rank in range(W)]
    batch = module.prepare_batch(array(OFFSETS), 0 if prepared_by_number else ranks[0], W, backend=backend)
    assert (batch.segments is not None) == with_tables
    assert all_nan(attention(package, batch, ranks[1], backend))
    right = attention(package, batch, ranks[0], backend)
    assert not all_nan(right)
    for ours, theirs in zip(right, attention(package, array(OFFSETS), 0, backend), strict=True):
        np.testing.assert_array_equal(np.asarray(ours.tolist()), np.asarray(theirs.tolist()))


def test_jit_forgets_the_number_and_compares_on_the_device():
    batches = [zigzag_jax.prepare_batch(OFFSETS, rank, W, backend="reference") for rank in range(W)]
    package = PACKAGES["jax"]
    attend = jax.jit(lambda batch: attention(package, batch, 1, "reference"))
    assert all_nan(attend(batches[0]))
    assert not all_nan(attend(batches[1]))
    assert attend._cache_size() == 1
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *batches)  # batches of all ranks are one pytree
    out, _ = jax.vmap(lambda batch: attention(package, batch, batch.rank, "reference"))(stacked)
    assert not np.isnan(out).any()


def test_another_rank_gives_nan_gradients(kernel_backend):
    device = "cuda" if GPU else "cpu"
    cu_seqlens = torch.tensor(OFFSETS, device=device)
    batch = zigzag_torch.prepare_batch(cu_seqlens, 0, W, backend=kernel_backend)
    q, k, v = (torch.ones(rows, 1, 16, device=device, requires_grad=True) for rows in (12, 24, 24))
    rank = torch.tensor([1], device=device)
    out = zigzag_torch.zigzag_attention_gathered(q, k, v, batch, rank, W, backend=kernel_backend)
    for gradient in torch.autograd.grad(out.sum(), (q, k, v)):
        assert gradient.isnan().all()
