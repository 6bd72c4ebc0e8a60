"""Helpers check what the host can read, and make poison of impossible values that it cannot."""

import functools

import jax
import numpy as np
import pytest
import torch

import zigzag_jax
import zigzag_torch
from tests.support.frameworks import jax_host_array

PACKAGES = {"torch": (zigzag_torch, torch.tensor), "jax": (zigzag_jax, jax_host_array)}
W = 2
FAULTS = {
    "uneven": [0, 15, 48],
    "decreasing": [0, 16, 8],
    "start": [4, 16],
    "too long": [0, 64],
    "wrapping around": [0, 2**31 - 4, -(2**31)],
}


@pytest.fixture(params=PACKAGES)
def package(request):
    """(module, a function that makes its arrays)."""
    return PACKAGES[request.param]


def helpers(module, x):
    """Every helper that deals out rows, as a function of `cu_seqlens` and rank."""
    return {
        "shard": lambda cu_seqlens, rank: module.shard(x, cu_seqlens, rank, W),
        "unshard": lambda cu_seqlens, rank: module.unshard(x, cu_seqlens, W),
        "position_ids": lambda cu_seqlens, rank: module.position_ids(cu_seqlens, rank, W, tokens=24),
        "local_cu_seqlens": lambda cu_seqlens, rank: module.local_cu_seqlens(cu_seqlens, W),
    }


def traced(module, function):
    """`function` where values are not at hand: under `jax.jit`, or under `vmap` of one batch."""
    if module is zigzag_jax:
        return jax.jit(function)
    return lambda *arrays: torch.vmap(function)(*(x[None] for x in arrays))[0]


@pytest.mark.parametrize("name", ["shard", "unshard", "position_ids", "local_cu_seqlens"])
@pytest.mark.parametrize("fault", FAULTS)
def test_impossible_lengths_are_refused_or_poison(package, name, fault):
    module, array = package
    cu_seqlens = array(np.array(FAULTS[fault], np.int32))
    if (name, fault) == ("local_cu_seqlens", "too long"):
        return  # it knows no number of rows
    ranks = array(np.array([0], np.int32))
    for x, poison in (
        (np.ones((48, 3), np.float32), np.nan),
        (np.ones(48, np.int32), -1),
        (np.ones(48, np.uint8), 255),
    ):
        helper = helpers(module, array(x))[name]
        with pytest.raises(ValueError, match=r"^(cu_seqlens|tokens|x): expected"):
            helper(cu_seqlens, 0)
        result = np.asarray(traced(module, helper)(cu_seqlens, ranks))
        wanted = poison if name in ("shard", "unshard") else -1
        np.testing.assert_array_equal(result, np.full_like(result, wanted))


@pytest.mark.parametrize("name", ["shard", "position_ids"])
@pytest.mark.parametrize("rank", [-1, 2, 2**32 + 1, 2**63 - 1])
def test_a_rank_that_is_none_is_refused_or_poison(package, name, rank):
    module, array = package
    helper, cu_seqlens = helpers(module, array(np.ones(48, np.float32)))[name], array(np.array([0, 16, 48], np.int32))
    for given in (rank, np.int64(rank), np.array([rank])) if module is zigzag_jax else (rank, torch.tensor([rank])):
        with pytest.raises(ValueError, match="rank: expected 0 to 1, got "):
            helper(cu_seqlens, given)
    poison = np.nan if name == "shard" else -1
    if module is zigzag_torch or abs(rank) < 2**31:
        ranks = array(np.array([rank], np.int64 if module is zigzag_torch else np.int32))
        result = np.asarray(traced(module, helper)(cu_seqlens, ranks))
        np.testing.assert_array_equal(result, np.full_like(result, poison))


def test_rows_behind_one_another_and_not_beside(package):
    """A `[batch, tokens]` array would be dealt out along its batch."""
    module, array = package
    x, cu_seqlens = array(np.zeros((2, 16), np.int32)), array(np.array([0, 16], np.int32))
    message = r"^x: expected \[total, ...\] with the 16 rows of cu_seqlens or more, got shape \(2, 16\)"
    for function in (
        lambda: module.shard(x, cu_seqlens, 0, W),
        lambda: module.unshard(x, cu_seqlens, W),
        lambda: module.pad_to_zigzag(x, cu_seqlens, W),
    ):
        with pytest.raises(ValueError, match=message):
            function()


def test_positions_of_garbage_are_not_made(package):
    module, array = package
    with pytest.raises(ValueError, match="tokens: expected a number, as 536870910 local rows are above"):
        module.position_ids(array(np.array([0, 2**31 - 8], np.int32)), 0, 4)
    with pytest.raises(ValueError, match="tokens: expected at least the 8 local rows of cu_seqlens, got 4"):
        module.position_ids(array(np.array([0, 16], np.int32)), 0, 2, 4)


@pytest.mark.parametrize("make", [list, tuple, np.array, functools.partial(np.array, dtype=np.uint16)])
def test_offsets_of_the_host_are_converted(package, make):
    module, array = package
    offsets, x = make([0, 16, 48]), array(np.arange(48.0, dtype=np.float32))
    wanted = array(np.array([0, 16, 48], np.int32))
    for name in ("shard", "unshard", "position_ids", "local_cu_seqlens"):
        helper = helpers(module, x)[name]
        np.testing.assert_array_equal(np.asarray(helper(offsets, 1)), np.asarray(helper(wanted, 1)))
    for results in zip(module.pad_to_zigzag(x, offsets, 3), module.pad_to_zigzag(x, wanted, 3), strict=True):
        np.testing.assert_array_equal(*map(np.asarray, results))
    module.validate(offsets, W, np.int64(48))
    q = array(np.ones((24, 1, 16), np.float32))
    kv = array(np.ones((48, 1, 16), np.float32))
    rank, world_size = np.int64(1), np.int32(2)
    attend = functools.partial(module.zigzag_attention_gathered, q, kv, kv, backend="reference")
    ours = attend(offsets, rank, world_size, causal=np.True_, softmax_scale=np.float32(0.5))
    np.testing.assert_array_equal(np.asarray(ours), np.asarray(attend(wanted, 1, 2, softmax_scale=0.5)))
    with pytest.raises(ValueError, match="cu_seqlens: expected lengths that are multiples of 2"):
        attend(make([0, 15, 48]), 0, 2)


def test_offsets_of_other_integers_that_int32_does_not_hold():
    q = torch.ones(8, 1, 16)
    attend = functools.partial(zigzag_torch.zigzag_attention, q, q, q, backend="reference")
    torch.testing.assert_close(attend(torch.tensor([0, 8])), attend(torch.tensor([0, 8], dtype=torch.int32)))
    assert attend(torch.tensor([0, 2**32 + 8])).isnan().all()
    with pytest.raises(ValueError, match=r"^cu_seqlens: expected integers that int32 holds, got 4294967304 at \[1\]"):
        attend([0, 2**32 + 8])
    with pytest.raises(ValueError, match=r"^cu_seqlens: expected integers, got float 8.0 at \[1\]"):
        attend([0, 8.0])


def test_the_value_of_padding(package):
    module, array = package
    labels, offsets = array(np.array([5, 6, 7, 8, 9], np.int32)), [0, 3, 5]
    padded, _ = module.pad_to_zigzag(labels, offsets, W, 10, value=-100)
    assert np.asarray(padded).tolist() == [5, 6, 7, -100, 8, 9, -100, -100, -100, -100]
    for value in (0.5, 2**31, float("nan"), None, "0", True):
        with pytest.raises(ValueError, match="value: expected "):
            module.pad_to_zigzag(labels, offsets, W, value=value)
    half = array(np.ones(5, np.float16))
    padded, _ = module.pad_to_zigzag(half, offsets, W, value=float("-inf"))
    assert np.isneginf(np.asarray(padded)[3])
    with pytest.raises(ValueError, match="value: expected a number that float16 holds"):
        module.pad_to_zigzag(half, offsets, W, value=1e300)


def test_full_attention_to_padding_is_refused(package):
    module, array = package
    x = array(np.ones((5, 1, 16), np.float32))
    padded, cu_seqlens = module.pad_to_zigzag(x, [0, 3, 5], W)
    batch = module.prepare_batch(cu_seqlens, 0, W, backend="reference")
    local = module.shard(padded, cu_seqlens, 0, W)
    for lengths in (cu_seqlens, batch):
        attend = functools.partial(module.zigzag_attention_gathered, local, padded, padded, lengths, 0, W)
        attend(backend="reference")
        with pytest.raises(ValueError, match=r"causal: expected True .* give prepare_batch the real lengths"):
            attend(backend="reference", causal=False)
    whole, lengths = module.pad_to_zigzag(x, [0, 4], W)  # nothing to pad
    half = module.shard(whole, lengths, 0, W)
    module.zigzag_attention_gathered(half, whole, whole, lengths, 0, W, causal=False, backend="reference")
