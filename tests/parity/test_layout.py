"""Sharding, positions and padding of both frameworks against the definition, and random packings of kernels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import zigzag_jax
import zigzag_torch
from tests.support.cases import CASES, Case, make_inputs
from tests.support.frameworks import attend_torch
from tests.support.machine import GPU
from tests.support.rank import assert_rank_is_right, rank_arrays, rank_rows

PACKAGES = {"torch": (zigzag_torch, torch.tensor), "jax": (zigzag_jax, jnp.asarray)}
LAYOUTS = [case for case in CASES if case.total < 500 and "bench" not in case.tags]


@pytest.fixture(params=PACKAGES)
def package(request):
    """(module, a function that makes its arrays)."""
    return PACKAGES[request.param]


@pytest.mark.parametrize("case", LAYOUTS, ids=str)
def test_shard_unshard_and_positions(package, case):
    module, array = package
    compiled = jax.jit if module is zigzag_jax else lambda function: function
    offsets = np.array(case.cu_seqlens, np.int32)
    cu_seqlens = array(offsets)
    world_size = case.world_size
    rows = np.arange(1, case.total + 1)
    shard = compiled(lambda x, cu_seqlens, rank: module.shard(x, cu_seqlens, rank, world_size))
    position_ids = compiled(lambda cu_seqlens, rank: module.position_ids(cu_seqlens, rank, world_size, case.tokens))
    unshard = compiled(lambda x, cu_seqlens: module.unshard(x, cu_seqlens, world_size))
    shards = [shard(array(rows), cu_seqlens, rank) for rank in range(world_size)]
    for rank, ours in enumerate(shards):
        theirs = rank_rows(case, rank)
        np.testing.assert_array_equal(np.asarray(ours), rows[theirs])
        positions = np.asarray(position_ids(cu_seqlens, rank))
        wanted = [theirs_row - offsets[offsets <= theirs_row].max() for theirs_row in theirs]
        used = case.tokens - case.padding
        np.testing.assert_array_equal(positions[:used], wanted[:used])
        assert not positions[used:].any()
    gathered = array(np.concatenate([np.asarray(x) for x in shards]))
    np.testing.assert_array_equal(np.asarray(unshard(gathered, cu_seqlens)), rows)
    local = np.asarray(module.local_cu_seqlens(cu_seqlens, world_size))
    np.testing.assert_array_equal(local, offsets // world_size)


def test_positions_read_the_length_if_they_must(package):
    module, array = package
    cu_seqlens = array(np.array([0, 8, 16], np.int32))
    assert np.asarray(module.position_ids(cu_seqlens, 1, 2)).tolist() == [2, 3, 4, 5] * 2


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_padding_and_back(package, world_size):
    module, array = package
    lengths = (5, 0, 12, 1)
    offsets = np.cumsum([0, *lengths]).astype(np.int32)
    x = np.arange(1, offsets[-1] + 1, dtype=np.float32)[:, None] * np.ones((1, 2), np.float32)
    padded, padded_offsets = module.pad_to_zigzag(array(x), array(offsets), world_size)
    module.validate(padded_offsets, world_size, padded.shape[0])
    step = 1 if world_size == 1 else 2 * world_size
    new = np.asarray(padded_offsets)
    assert (np.diff(new) == [-(-n // step) * step for n in lengths]).all()
    for i, n in enumerate(lengths):
        np.testing.assert_array_equal(np.asarray(padded)[new[i] : new[i] + n], x[offsets[i] : offsets[i + 1]])
        assert not np.asarray(padded)[new[i] + n : new[i + 1]].any()
    np.testing.assert_array_equal(np.asarray(module.unpad(padded, array(offsets), world_size)), x)
    longer, _ = module.pad_to_zigzag(array(x), array(offsets), world_size, total=60)
    assert longer.shape == (60, 2)
    with pytest.raises(ValueError, match="total: expected a multiple of world_size"):
        module.pad_to_zigzag(array(x), array(offsets), world_size, total=3)


@pytest.mark.parametrize(
    ("offsets", "world_size", "total", "message"),
    [
        ([0, 6], 2, None, "multiples of 2 \\* world_size = 4, got 6 \\(sequence 0\\); pad_to_zigzag"),
        ([0, 8, 4], 2, None, "expected no decrease, got 8 then 4 \\(sequence 1\\)"),
        ([4, 8], 2, None, "expected to begin with 0, got 4"),
        ([0, 8], 2, 4, "at or before the 4 rows there are, got 8"),
    ],
)
def test_validate_says_what_is_wrong(package, offsets, world_size, total, message):
    module, array = package
    with pytest.raises(ValueError, match=message):
        module.validate(array(np.array(offsets, np.int32)), world_size, total)
    module.validate(array(np.array([0, 7, 7, 9], np.int32)), 1, 9)  # one rank takes any lengths


def test_shard_wants_rows_for_every_rank(package):
    module, array = package
    for function in (lambda x, c: module.shard(x, c, 0, 2), lambda x, c: module.unshard(x, c, 2)):
        with pytest.raises(ValueError, match="x: expected a multiple of world_size = 2 rows, got 5"):
            function(array(np.zeros(5, np.float32)), array(np.array([0, 4], np.int32)))


@st.composite
def packings(draw):
    """A random small packed batch: any world size, lengths, grouping, mask and type."""
    world_size = draw(st.integers(1, 6))
    step = 1 if world_size == 1 else 2 * world_size
    chunks = draw(st.lists(st.integers(0, 9), min_size=0, max_size=6))
    kv_heads, group = draw(st.sampled_from([(1, 1), (1, 3), (2, 2), (1, 5)]))
    return Case(
        name="random",
        world_size=world_size,
        lengths=tuple(step * n * (1 if world_size > 1 else draw(st.integers(1, 7))) for n in chunks),
        heads=kv_heads * group,
        kv_heads=kv_heads,
        head_dim=draw(st.sampled_from([16, 24])),
        causal=draw(st.booleans()),
        dtype=draw(st.sampled_from(["float32", "bfloat16", "float16"])),
        padding=draw(st.integers(0, 5)),
    )


# Few and the same every time: an interpreted case takes seconds, a compiled one five compilations.
@pytest.mark.slow
@settings(max_examples=20)
@given(case=packings(), data=st.data())
def test_random_packings_match_the_oracle(case, data):
    rank = data.draw(st.integers(0, case.world_size - 1))
    inputs = make_inputs(case, seed=2)
    result = attend_torch(case, *rank_arrays(case, inputs, rank), rank, "triton" if GPU else "interpret")
    assert_rank_is_right(case, inputs, rank, {"torch": result})
