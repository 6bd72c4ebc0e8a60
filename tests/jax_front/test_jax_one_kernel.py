"""Windows of KV heads whose gradients one kernel computes, between the devices of a mesh."""

import functools

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import zigzag_jax
from tests.support.cases import RESULTS, Case, make_inputs
from tests.support.parts import FRAMEWORKS, Rank
from tests.support.rank import gathered_rows
from tests.support.spread import (
    KERNELS,
    assert_batch_is_right,
    assert_same,
    global_arrays,
    mesh_of,
    offsets,
    value_and_gradients,
)
from tests.support.windows import LEAST_HEAD_DIM, STANDS_IN, in_one_kernel

pytestmark = pytest.mark.multigpu

CASE = Case(
    name="one-kernel", world_size=2, lengths=(12, 28), heads=6, kv_heads=3, head_dim=LEAST_HEAD_DIM, padding=2,
    dtype="bfloat16",
)  # fmt: skip


def spread():
    """The results of the whole batch, one KV head at a time."""

    def body(q, k, v, dout, dlse, lengths):
        options = {"axis_name": "cp", "backend": KERNELS, "heads_k_stride": 1, "return_lse": True}
        attend = functools.partial(zigzag_jax.zigzag_attention, cu_seqlens=lengths, **options)
        return value_and_gradients(attend)(q, k, v, dout, dlse)

    rows, lse = P("cp"), P(None, "cp")
    specs = {"in_specs": (rows, rows, rows, rows, lse, P()), "out_specs": (rows, lse, rows, rows, rows)}
    return jax.jit(jax.shard_map(body, mesh=mesh_of(CASE.world_size), **specs))(*global_arrays(CASE), offsets(CASE))


def test_windows_in_one_kernel_match_the_oracle():
    pair = spread()
    with in_one_kernel():
        results = spread()
        rows = gathered_rows(CASE)
        inputs, torch_launches = make_inputs(CASE), FRAMEWORKS["torch"]
        players = [Rank(CASE, inputs, rank, torch_launches, gluon=not STANDS_IN) for rank in range(CASE.world_size)]
        played = [player.windows(rows) for player in players]
    assert_batch_is_right(CASE, results)
    if STANDS_IN:
        assert_same(results, pair)
    of_rows = [np.concatenate([x[name] for x in played], int(name == "lse")) for name in RESULTS[:3]]
    for name, result, wanted in zip(RESULTS, results, of_rows, strict=False):
        np.testing.assert_array_equal(result, wanted.astype(result.dtype), name)
