"""Attention spread over a mesh axis against the float64 oracle of the unsharded batch: both methods, both backends."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

import oracle
import zigzag_jax
from cases import Case, make_inputs
from closeness import assert_close
from test_jax import BACKENDS, mesh_of, offsets, value_and_gradients

METHODS = ("allgather", "ring")
RESULTS = oracle.RankResult._fields
CASES = (
    Case(name="w1", world_size=1, lengths=(9, 0, 14), heads=4, kv_heads=2, padding=2, dtype="bfloat16"),
    Case(name="w2", world_size=2, lengths=(12, 0, 20, 0), heads=4, kv_heads=2, padding=3),
    Case(
        name="w2-full", world_size=2, lengths=(8, 28), heads=2, kv_heads=2, head_dim=24, causal=False, dtype="float16"
    ),
    Case(name="w4", world_size=4, lengths=(24, 8, 0, 40), heads=8, kv_heads=4, padding=1, dtype="bfloat16"),
    Case(name="w4-full", world_size=4, lengths=(0, 32, 16), heads=3, kv_heads=1, causal=False),
    Case(name="w8", world_size=8, lengths=(16, 48, 0), heads=4, kv_heads=2),
)


def rows_of(case):
    return oracle.gathered_rows(case.cu_seqlens, case.world_size, case.padding)


def global_arrays(case, seed=0):
    """q, k, v, dout, dlse of the whole batch, the rows of the ranks behind one another."""
    inputs, rows = make_inputs(case, seed), rows_of(case)
    arrays = (jnp.asarray(inputs[name][rows], case.dtype) for name in ("q", "k", "v", "dout"))
    return *arrays, jnp.asarray(inputs["dlse"][:, rows])


@functools.cache
def expected(case, arithmetic, seed=0):
    """RESULTS of the unsharded batch in the row order of `global_arrays`."""
    inputs, rows = make_inputs(case, seed), rows_of(case)
    q, k, v, dout, dlse = (inputs[name] for name in ("q", "k", "v", "dout", "dlse"))
    out, lse = oracle.attention(q, k, v, case.cu_seqlens, case.causal, arithmetic=arithmetic)
    gradients = oracle.attention_gradients(q, k, v, case.cu_seqlens, case.causal, None, dout, dlse, arithmetic)
    return out[rows], lse[:, rows], *(x[rows] for x in gradients)


def assert_right(case, results, seed=0):
    exact = expected(case, oracle.EXACT, seed)
    straightforward = expected(case, oracle.straightforward(case.dtype), seed)
    for name, result, *wanted in zip(RESULTS, results, exact, straightforward, strict=True):
        assert_close(name, result, *wanted)


def spread(case, mesh, axis="cp", check_vma=True, **options):
    """`(q, k, v, dout, dlse, cu_seqlens) -> RESULTS` of the whole batch, computed inside one `shard_map`."""

    def body(q, k, v, dout, dlse, cu_seqlens):
        attend = functools.partial(
            zigzag_jax.zigzag_attention, axis_name=axis, causal=case.causal, return_lse=True, **options
        )
        return value_and_gradients(lambda q, k, v: attend(q, k, v, cu_seqlens))(q, k, v, dout, dlse)

    rows, lse = P(axis), P(None, axis)
    in_specs, out_specs = (rows, rows, rows, rows, lse, P()), (rows, lse, rows, rows, rows)
    return jax.jit(jax.shard_map(body, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=check_vma))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_all_ranks_give_the_results_of_the_whole_batch(case, method, backend):
    function = spread(case, mesh_of(case.world_size), method=method, backend=backend)
    results = function(*global_arrays(case), offsets(case))
    assert [str(x.dtype) for x in results] == [case.dtype, "float32", *[case.dtype] * 3]
    assert_right(case, results)
