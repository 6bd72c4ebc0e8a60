"""Attention to packed rows that are cut into chunks: random packings against the oracle, and impossible ones."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch

import zigzag_jax
import zigzag_torch
from tests.support.cases import Case, make_inputs
from tests.support.frameworks import attend_jax, attend_torch
from tests.support.machine import GPU
from tests.support.rank import assert_rank_is_right, rank_arrays
from zigzag_kernels.modes import KVLayout
from zigzag_kernels.problem import table_shapes

ATTEND = {"torch": attend_torch, "jax": attend_jax}
PACKAGES = {"torch": (zigzag_torch, torch.tensor), "jax": (zigzag_jax, jnp.asarray)}


def random_case(rng, world_size):
    """Documents of any lengths in up to three packed rows, of which the last may end with padding."""
    row_length, rows = 2 * world_size * int(rng.integers(1, 8)), int(rng.integers(1, 4))
    lengths, room = [], rows * row_length
    while room:
        left_in_row = (room - 1) % row_length + 1
        lengths.append(int(rng.integers(0, left_in_row + 1)))
        room -= lengths[-1]
        if room < row_length and rng.random() < 0.3:
            break
    kv_heads, group = ((1, 1), (1, 2), (2, 1))[rng.integers(3)]
    return Case(
        name="random",
        world_size=world_size,
        lengths=tuple(lengths),
        padding=room,
        heads=kv_heads * group,
        kv_heads=kv_heads,
        causal=bool(rng.random() < 0.7),
        dtype=str(rng.choice(["float32", "bfloat16"])),
        layout="row",
        row_length=row_length,
    )


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("framework", ATTEND)
def test_the_reference_is_right_on_every_rank(framework, world_size):
    rng = np.random.default_rng(10 + world_size)
    for _ in range(6 if framework == "torch" else 1):
        case = random_case(rng, world_size)
        inputs = make_inputs(case)
        for rank in range(world_size):
            result = ATTEND[framework](case, *rank_arrays(case, inputs, rank), rank, "reference")
            assert_rank_is_right(case, inputs, rank, {framework: result})


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8])
def test_kernels_are_right(world_size):
    rng = np.random.default_rng(20 + world_size)
    for _ in range(5):
        case = random_case(rng, world_size)
        inputs, rank = make_inputs(case), int(rng.integers(world_size))
        result = attend_torch(case, *rank_arrays(case, inputs, rank), rank, "triton" if GPU else "interpret")
        assert_rank_is_right(case, inputs, rank, {"torch": result})


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize(
    ("offsets", "rank", "lengths"),
    [
        ([0, 20, 32], 0, None),  # over the border of two rows
        ([0, 7, 15], 1, None),  # padding in the first row
        ([0, 16, 8], 0, None),
        ([4, 16], 0, None),
        ([0, 16, 32, 40], 0, None),  # more than there are rows
        ([0, 7, 16, 30], 2, None),  # no such rank
        ([0, 7, 16, 30], 1, [8, 9, 14]),
        ([0, 7, 16, 30], 1, [7, -1, 14]),
    ],
)
def test_impossible_rows_give_nan_everywhere(package, offsets, rank, lengths, kernel_backend):
    """What only the device knows cannot raise: it must not look like a result either."""
    module, array = PACKAGES[package]
    to = (lambda x: array(x).cuda()) if GPU and package == "torch" else array
    q, kv = to(np.ones((16, 2, 16), np.float32)), to(np.ones((32, 1, 16), np.float32))
    cu_seqlens, ranks = to(np.array(offsets, np.int32)), to(np.array([rank], np.int32))
    real = None if lengths is None else to(np.array(lengths, np.int32))
    for backend in (kernel_backend, "reference"):
        batch = module.prepare_batch(
            cu_seqlens, ranks, 2, layout="row", row_length=16, rows=2, lengths=real, backend=backend
        )
        out, lse = module.zigzag_attention_gathered(
            q, kv, kv, batch, ranks, 2, return_lse=True, layout="row", backend=backend
        )
        assert np.isnan(np.asarray(out.tolist())).all()
        assert np.isnan(np.asarray(lse.tolist())).all()


@pytest.mark.parametrize("package", PACKAGES)
def test_tables_of_no_rows_are_as_long_as_others(package, kernel_backend):
    """Kernels look for the entry of the padding, which the row layout has one more of, whatever the length of a row."""
    module, array = PACKAGES[package]
    on_device = (lambda x: array(x).cuda()) if GPU and package == "torch" else array
    shapes = []
    for length in (0, 8):
        cu_seqlens = on_device(np.array([0, length, length], np.int32))
        batch = module.prepare_batch(cu_seqlens, 0, 2, layout="row", row_length=length, backend=kernel_backend)
        shapes.append((tuple(batch.segments.shape), tuple(batch.sequences.shape)))
    assert shapes[0] == shapes[1] == table_shapes(KVLayout.GATHERED, 2, 2, row_layout=True)


@pytest.mark.parametrize("package", PACKAGES)
def test_offsets_on_the_host_are_refused(package):
    module, _ = PACKAGES[package]
    for offsets, lengths, message in (
        ([0, 20, 32], None, "cu_seqlens: expected documents within a row of 16 tokens, got 0 to 20 .document 0."),
        ([0, 7, 15], None, "cu_seqlens: expected to end in the last row of 16 tokens"),
        ([0, 16, 32, 40], None, "cu_seqlens: expected to end at or before the 32 rows"),
        ([0, 7, 16, 30], [7, 10, 1], "lengths: expected .* got 10 .sequence 1."),
    ):
        with pytest.raises(ValueError, match=f"^{message}"):
            module.prepare_batch(offsets, 0, 2, layout="row", row_length=16, rows=2, lengths=lengths)
