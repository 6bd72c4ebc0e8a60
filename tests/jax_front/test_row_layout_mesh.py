"""The row layout inside `shard_map`, where each device has its own rows, and under settings of the user."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import zigzag_jax
from tests.support import oracle
from tests.support.cases import RANGES, RESULTS, make_inputs
from tests.support.closeness import assert_close
from tests.support.rank import batch_results, gathered_rows, rows_of_results
from tests.support.spread import BACKENDS, METHODS, assert_same, global_arrays, mesh_of, offsets, value_and_gradients

OFFSETS, WORLD_SIZE, ROWS = [0, 5, 16, 20, 31], 4, {"layout": "row", "row_length": 16}


def helpers_of(x, cu_seqlens, rank):
    """What a rank asks of the helpers."""
    return (
        zigzag_jax.shard(x, cu_seqlens, rank, WORLD_SIZE, **ROWS),
        zigzag_jax.position_ids(cu_seqlens, rank, WORLD_SIZE, 8, **ROWS),
        zigzag_jax.local_cu_seqlens(cu_seqlens, WORLD_SIZE, rank=rank, **ROWS),
    )


@pytest.mark.parametrize("check_vma", [True, False])
def test_every_device_gets_its_own_rows(check_vma):
    x, cu_seqlens = jnp.arange(32.0), jnp.array(OFFSETS, jnp.int32)
    of_ranks = [helpers_of(x, cu_seqlens, rank) for rank in range(WORLD_SIZE)]
    wanted = [np.concatenate(results) for results in zip(*of_ranks, strict=True)]
    mesh = mesh_of(WORLD_SIZE)
    body = functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(P(), P()), out_specs=(P("cp"),) * 3, check_vma=check_vma
    )
    spread = jax.jit(body(lambda x, cu_seqlens: helpers_of(x, cu_seqlens, jax.lax.axis_index("cp"))))
    assert_same(spread(x, cu_seqlens), wanted)


def test_promotion_and_wide_integers_change_nothing():
    x, cu_seqlens, ids = jnp.arange(32.0), jnp.array(OFFSETS, jnp.int32), np.array([[1, 1, 2, 0], [1, 0, 2, 2]])

    def results():
        return (
            *helpers_of(x, cu_seqlens, 1),
            zigzag_jax.unshard(x, cu_seqlens, WORLD_SIZE, **ROWS),
            *zigzag_jax.cu_seqlens_from_segment_ids(ids, 8, return_lengths=True),
            zigzag_jax.cu_seqlens_from_position_ids(ids * 0, 8),
        )

    wanted = results()
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        assert_same(results(), wanted)
    with jax.enable_x64(True):
        ours = results()
        assert_same(ours, wanted)
        assert [x.dtype for x in ours] == [x.dtype for x in wanted]


@pytest.mark.multigpu
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["w2-row-batch", "w3-row-window"])
def test_devices_attend_to_packed_rows(name, method, backend):
    case = next(case for case in RANGES if case.name == name)
    common = {"axis_name": "cp", "method": method, "backend": backend, "layout": "row"}

    def body(q, k, v, dout, dlse, cu_seqlens):
        packed = {"row_length": case.row_length or case.total, "rows": case.rows}
        batch = zigzag_jax.prepare_batch(cu_seqlens, **common, **packed)
        options = common | {"causal": case.causal, "window_size": case.window_size, "return_lse": True}
        attend = functools.partial(zigzag_jax.zigzag_attention, **options)
        return value_and_gradients(lambda q, k, v: attend(q, k, v, batch))(q, k, v, dout, dlse)

    rows, lse = P("cp"), P(None, "cp")
    specs = {"in_specs": (rows, rows, rows, rows, lse, P()), "out_specs": (rows, lse, rows, rows, rows)}
    spread = jax.jit(jax.shard_map(body, mesh=mesh_of(case.world_size), **specs))
    results = spread(*global_arrays(case), offsets(case))
    exact, straightforward = (
        rows_of_results(batch_results(case, make_inputs(case), x), gathered_rows(case))
        for x in (oracle.EXACT, oracle.straightforward(case.dtype))
    )
    for result, x in zip(RESULTS, results, strict=True):
        assert_close(f"{name}, {method}, {backend}: {result}", x, exact[result], straightforward[result])
