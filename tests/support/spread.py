"""A batch in JAX, whole or sharded over a mesh: its arrays, its function with gradients, and its expected results."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import zigzag_jax
from tests.support import oracle
from tests.support.cases import make_inputs
from tests.support.closeness import assert_close
from tests.support.frameworks import call_options, jax_packing
from tests.support.halos import reach_options
from tests.support.machine import GPU
from tests.support.rank import batch_results, gathered_rows, rows_of_results

METHODS = ("allgather", "ring")
KERNELS = "triton" if GPU else "interpret"
BACKENDS = (KERNELS, "reference")


def offsets(case):
    return jnp.asarray(case.cu_seqlens, jnp.int32)


def global_arrays(case, seed=0):
    """Return q, k, v, dout, dlse of the whole batch, in the order of the ranks."""
    inputs, rows = make_inputs(case, seed), gathered_rows(case)
    arrays = (jnp.asarray(inputs[name][rows], case.dtype) for name in ("q", "k", "v", "dout"))
    return *arrays, jnp.asarray(inputs["dlse"][:, rows])


@functools.cache
def batch_in_rank_order(case, arithmetic, seed):
    """The case's results for the unsharded batch, in the row order of `global_arrays`."""
    results = rows_of_results(batch_results(case, make_inputs(case, seed), arithmetic), gathered_rows(case))
    return tuple(results[name] for name in case.results)


def assert_batch_is_right(case, results, seed=0):
    """The `results` of all ranks behind one another equal the oracle's for the whole batch."""
    exact = batch_in_rank_order(case, oracle.EXACT, seed)
    straightforward = batch_in_rank_order(case, oracle.straightforward(case.dtype), seed)
    for name, result, *wanted in zip(case.results, results, exact, straightforward, strict=True):
        assert_close(name, result, *wanted)


def value_and_gradients(function):
    """`(q, k, v, dout, dlse, *rest) -> out, lse, dq, dk, dv`."""

    def call(q, k, v, dout, dlse, *rest):
        results, pullback = jax.vjp(lambda *qkv: function(*qkv, *rest), q, k, v)
        return *results, *pullback((dout, dlse))

    return call


def assert_same(results, expected):
    for result, wanted in zip(results, expected, strict=True):
        np.testing.assert_array_equal(result, wanted)


def mesh_of(*shape, names=("cp",)):
    count = math.prod(shape)
    if jax.device_count() < count:
        pytest.skip(f"needs {count} devices")
    return Mesh(np.array(jax.devices()[:count]).reshape(shape), names)


def spread_halos(case, backend, check_vma=True):
    """`(q, k, v, dout, dlse, cu_seqlens, *sinks)` by halos -> out, lse, dq, dk, dv, largest logits, dsinks."""
    rows, lse, of_sinks = P("cp"), P(None, "cp"), (P(),) * case.sinks
    common = {"axis_name": "cp", "method": "halo", "backend": backend}

    def body(q, k, v, dout, dlse, cu_seqlens, *sinks):
        batch = zigzag_jax.prepare_batch(cu_seqlens, **common, **jax_packing(case), **reach_options(case))

        def attend(q, k, v, *sinks):
            options = call_options(case) | common | {"sinks": sinks[0] if sinks else None, "return_lse": True}
            out, lse, max_logits = zigzag_jax.zigzag_attention(q, k, v, batch, **options)
            return (out, lse), max_logits

        results, pullback, max_logits = jax.vjp(attend, q, k, v, *sinks, has_aux=True)
        dq, dk, dv, *dsinks = pullback((dout, dlse))
        if not check_vma:
            dsinks = [jax.lax.psum(x, "cp") for x in dsinks]
        return *results, dq, dk, dv, max_logits, *dsinks

    in_specs, out_specs = (rows, rows, rows, rows, lse, P(), *of_sinks), (rows, lse, rows, rows, rows, P(), *of_sinks)
    mesh = mesh_of(case.world_size)
    return jax.jit(jax.shard_map(body, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=check_vma))


def halo_arrays(case):
    """The arguments of `spread_halos`."""
    sinks = (jnp.asarray(make_inputs(case)["sinks"]),) if case.sinks else ()
    return *global_arrays(case), offsets(case), *sinks
