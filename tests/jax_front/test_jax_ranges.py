"""Windows, chunks, caps, sinks, largest logits, real lengths and packed rows between the devices of a mesh."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import zigzag_jax
from tests.support.cases import RANGES, Case, make_inputs
from tests.support.frameworks import call_options, jax_packing
from tests.support.spread import (
    BACKENDS,
    KERNELS,
    METHODS,
    assert_batch_is_right,
    assert_same,
    global_arrays,
    mesh_of,
    offsets,
)

CASES = {case.name: case for case in RANGES}
ALL, IN_ROWS = CASES["w2-all"], CASES["w2-row-all"]
SPREAD = "w2-all", "w2-row-all", "w2-row-batch", "w3-all", "w3-row-window"
XLA_COMPILES = "w2-all", "w2-row-all"
"""Cases of which `make test` takes the reference too, which XLA compiles for seconds."""
SPREAD_ON = [
    pytest.param(
        CASES[name],
        backend,
        id=f"{name}-{backend}",
        marks=[pytest.mark.multigpu, *[pytest.mark.slow] * (backend == "reference" and name not in XLA_COMPILES)],
    )
    for name in SPREAD
    for backend in BACKENDS
]


def sinks_of(case):
    return (jnp.asarray(make_inputs(case)["sinks"]),) if case.sinks else ()


def prepared(case, cu_seqlens, method, backend, **changed):
    options = {"axis_name": "cp", "method": method, "backend": backend}
    return zigzag_jax.prepare_batch(cu_seqlens, **options, **jax_packing(case) | changed)


def results_of(attend, arrays, cotangents):
    """out, lse, dq, dk, dv, largest logits, dsinks of `attend(*arrays) -> out, lse, max_logits`."""

    def split(*arrays):
        out, lse, max_logits = attend(*arrays)
        return (out, lse), max_logits

    results, pullback, max_logits = jax.vjp(split, *arrays, has_aux=True)
    dq, dk, dv, *dsinks = pullback(cotangents)
    return *results, dq, dk, dv, max_logits, *dsinks


def spread(case, method, backend, check_vma=True, inside=True, **changed):
    """`(q, k, v, dout, dlse, cu_seqlens, *sinks) -> results`, differentiated inside of one `shard_map` or outside."""
    rows, lse = P("cp"), P(None, "cp")
    options = call_options(case) | {"axis_name": "cp", "method": method, "backend": backend}
    over_ranks = functools.partial(jax.shard_map, mesh=mesh_of(case.world_size), check_vma=check_vma)
    of_sinks = (P(),) * case.sinks

    def attend(q, k, v, *others):
        *sinks, cu_seqlens = others
        if isinstance(cu_seqlens, jax.Array) and (case.lengths_real is not None or case.row_length):
            cu_seqlens = prepared(case, cu_seqlens, method, backend, **changed)
        sinks = sinks[0] if sinks else None
        return zigzag_jax.zigzag_attention(q, k, v, cu_seqlens, sinks=sinks, return_lse=True, **options)

    def body(q, k, v, dout, dlse, cu_seqlens, *sinks):
        return results_of(lambda *arrays: attend(*arrays, cu_seqlens), (q, k, v, *sinks), (dout, dlse))

    if inside:
        in_specs = rows, rows, rows, rows, lse, P(), *of_sinks
        function = over_ranks(body, in_specs=in_specs, out_specs=(rows, lse, rows, rows, rows, P(), *of_sinks))
        return jax.jit(function)
    attend_all = over_ranks(attend, in_specs=(rows, rows, rows, *of_sinks, P()), out_specs=(rows, lse, P()))

    def outside(q, k, v, dout, dlse, cu_seqlens, *sinks):
        return results_of(lambda *arrays: attend_all(*arrays, cu_seqlens), (q, k, v, *sinks), (dout, dlse))

    return jax.jit(outside)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("case", "backend"), SPREAD_ON)
def test_all_ranks_give_the_results_of_the_whole_batch(case, backend, method):
    results = spread(case, method, backend)(*global_arrays(case), offsets(case), *sinks_of(case))
    assert_batch_is_right(case, results)


@pytest.mark.usefixtures("each_launch_once")
@pytest.mark.multigpu
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", [ALL, IN_ROWS], ids=str)
def test_gradients_of_a_whole_shard_map_with_types_and_without(case, method):
    """Of sinks too, which every rank has: JAX owes the sum over the ranks."""
    arrays = *global_arrays(case), offsets(case), *sinks_of(case)
    typed, untyped = (spread(case, method, KERNELS, check_vma, inside=False)(*arrays) for check_vma in (True, False))
    assert_batch_is_right(case, typed)
    assert_same(untyped, typed)


@pytest.mark.multigpu
@pytest.mark.parametrize("backend", BACKENDS)
def test_without_types_the_gradient_of_sinks_inside_of_shard_map_is_that_of_a_rank(backend):
    case, rows, lse = ALL, P("cp"), P(None, "cp")

    def body(q, k, v, dout, dlse, cu_seqlens, sinks):
        batch = prepared(case, cu_seqlens, "ring", backend)
        options = call_options(case) | {"axis_name": "cp", "method": "ring", "backend": backend}

        def attend(q, k, v, sinks):
            return zigzag_jax.zigzag_attention(q, k, v, batch, sinks=sinks, return_lse=True, **options)

        *results, dsinks = results_of(attend, (q, k, v, sinks), (dout, dlse))
        return *results, jax.lax.psum(dsinks, "cp")

    in_specs, out_specs = (rows, rows, rows, rows, lse, P(), P()), (rows, lse, rows, rows, rows, P(), P())
    mapped = jax.shard_map(body, mesh=mesh_of(2), in_specs=in_specs, out_specs=out_specs, check_vma=False)
    assert_batch_is_right(case, jax.jit(mapped)(*global_arrays(case), offsets(case), *sinks_of(case)))


def whole(attend, case, lengths, arrays=None):
    """The results of the whole batch by the `attend(q, k, v, lengths, sinks=)` of a mesh, from the global `arrays`."""

    def function(q, k, v, dout, dlse, *sinks):
        def call(q, k, v, *sinks):
            return attend(q, k, v, lengths, sinks=sinks[0] if sinks else None)

        return results_of(call, (q, k, v, *sinks), (dout, dlse))

    return jax.jit(function)(*(arrays or global_arrays(case)), *sinks_of(case))


def on_mesh(case, mesh, backend, **options):
    options = call_options(case) | {"backend": backend, "return_lse": True} | options
    return zigzag_jax.make_zigzag_attention(mesh, **options)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", [ALL, IN_ROWS], ids=str)
def test_heads_of_sinks_are_spread_as_those_of_queries(case, method):
    attend = on_mesh(case, mesh_of(2, 2, names=("tp", "cp")), KERNELS, head_axis="tp", method=method)
    packed = jax_packing(case)
    packed.pop("layout")
    lengths = packed.pop("lengths")
    batch = jax.jit(functools.partial(attend.prepare_batch, **packed))(offsets(case), lengths)
    assert (batch.layout, batch.lengths.tolist()) == (case.layout, list(case.lengths_real))
    results = whole(attend, case, batch)
    assert results[5].sharding.spec == results[6].sharding.spec == P("tp")
    assert_batch_is_right(case, results)


def test_sinks_and_real_lengths_on_a_mesh_whose_axes_are_types():
    """Arrays of no sharding are spread first; sinks of the mesh's function are those of calls without."""
    if jax.device_count() < 4:
        pytest.skip("needs 4 devices")
    mesh = jax.make_mesh((2, 2), ("tp", "cp"), devices=jax.devices()[:4])
    (sinks,) = sinks_of(ALL)
    fixed, given = (on_mesh(ALL, mesh, "reference", head_axis="tp", sinks=x) for x in (sinks, None))
    with jax.set_mesh(mesh):
        batch = given.prepare_batch(ALL.cu_seqlens, jnp.asarray(ALL.lengths_real, jnp.int32))
        rows, lse = P("cp", "tp"), P("tp", "cp")  # which gradients want of cotangents alone
        specs = rows, rows, rows, rows, lse
        arrays = [jax.reshard(x, NamedSharding(mesh, spec)) for x, spec in zip(global_arrays(ALL), specs, strict=True)]
        results = whole(given, ALL, batch, arrays)
        assert_same(jax.jit(fixed)(*global_arrays(ALL)[:3], batch), (*results[:2], results[5]))
    assert_batch_is_right(ALL, results)


@pytest.mark.parametrize("backend", BACKENDS)
def test_sinks_and_largest_logits_of_batches_spread_over_a_data_axis(backend):
    """The gradient of sinks is summed over all devices, and the largest logits are those of the whole batch."""
    case = dataclasses.replace(ALL, lengths_real=None, lengths=(60, 0, 44))
    others = dataclasses.replace(case, lengths=(8, 92, 4))
    batches = [global_arrays(case), global_arrays(others, seed=1)]
    arrays = [jnp.stack(x) for x in zip(*batches, strict=True)]
    lengths = jnp.stack([offsets(case), offsets(others)])
    (sinks,) = sinks_of(case)

    def results(attend, lengths, arrays):
        *qkv, dout, dlse = arrays
        return results_of(lambda q, k, v, sinks: attend(q, k, v, lengths, sinks=sinks), (*qkv, sinks), (dout, dlse))

    one = on_mesh(case, mesh_of(2), backend)
    apart = [jax.jit(functools.partial(results, one))(*x) for x in zip(lengths, batches, strict=True)]
    together = on_mesh(case, mesh_of(2, 2, names=("dp", "cp")), backend, batch_axis="dp")
    found = jax.jit(functools.partial(results, together))(lengths, arrays)
    for i, expected in enumerate(apart):
        for result, wanted in zip(found[:5], expected[:5], strict=True):
            np.testing.assert_allclose(result[i], wanted, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(found[5], jnp.maximum(apart[0][5], apart[1][5]))
    np.testing.assert_allclose(found[6], apart[0][6] + apart[1][6], rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("world_size", [1, 2])
def test_rows_of_a_batch_have_a_dimension_of_their_own(world_size, backend):
    """Offsets then count the tokens of all rows; a batch prepared for the rows serves both shapes."""
    case = dataclasses.replace(CASES["w2-row-batch"], world_size=world_size)
    q, k, v, *_ = global_arrays(case)
    mesh = mesh_of(world_size)
    attend = on_mesh(case, mesh, backend)
    compiled = jax.jit(attend)
    prepare = functools.partial(attend.prepare_batch, row_length=case.row_length, rows=case.rows)
    batch = jax.jit(prepare)(offsets(case))
    out, lse, max_logits = map(np.asarray, compiled(q, k, v, batch))
    share = case.row_length // world_size
    rows = [np.asarray(x).reshape(world_size, case.rows, share, *x.shape[1:]).swapaxes(0, 1) for x in (q, k, v)]
    rows = [jnp.asarray(x.reshape(case.rows, case.row_length, *x.shape[3:])) for x in rows]
    by_rows = functools.partial(
        zigzag_jax.zigzag_attention, **call_options(case), axis_name="cp", backend=backend, return_lse=True
    )
    specs = P(None, "cp"), P(None, "cp"), P(None, "cp"), P()
    out_specs = P(None, "cp"), P(None, None, "cp"), P()
    raw = jax.jit(jax.shard_map(by_rows, mesh=mesh, in_specs=specs, out_specs=out_specs))(*rows, offsets(case))
    for results in (tuple(map(np.asarray, x)) for x in (raw, compiled(*rows, batch))):
        of_rank = results[0].reshape(case.rows, world_size, share, *out.shape[1:]).swapaxes(0, 1)
        lse_of_rank = results[1].reshape(case.rows, case.heads, world_size, share).transpose(1, 2, 0, 3)
        assert_same((of_rank.reshape(out.shape), lse_of_rank.reshape(lse.shape), results[2]), (out, lse, max_logits))


SMALL = Case(name="small", world_size=2, lengths=(8, 20), heads=4, kv_heads=2, sinks=True, lengths_real=(8, 17))


@pytest.mark.multigpu
@pytest.mark.parametrize("backend", BACKENDS)
def test_real_lengths_that_cannot_be_give_nan_on_every_rank(backend):
    for lengths in ((9, 20), (-1, 20)):
        function = spread(SMALL, "allgather", backend, lengths=jnp.array(lengths, jnp.int32))
        results = function(*global_arrays(SMALL), offsets(SMALL), *sinks_of(SMALL))
        assert all(jnp.isnan(result).all() for result in results), lengths


@pytest.mark.multigpu
@pytest.mark.parametrize("backend", BACKENDS)
def test_documents_that_leave_their_row_give_nan_on_every_rank(backend):
    case = dataclasses.replace(CASES["w2-row-batch"], dtype="float32")
    function = spread(case, "ring", backend)
    for lengths in ((13, 28, 39, 22, 14), (13, 27, 30, 22, 24), (13, 27, 40, 22, 19)):  # twice across a border, and out
        wrong = jnp.cumsum(jnp.array([0, *lengths], jnp.int32))
        assert all(jnp.isnan(result).all() for result in function(*global_arrays(case), wrong)), lengths


@pytest.mark.multigpu
def test_whole_arrays_too_refuse_documents_on_the_host_that_leave_their_row():
    attend = zigzag_jax.make_zigzag_attention(mesh_of(2), layout="row")
    with pytest.raises(ValueError, match=r"documents within a row of 24 tokens, got 20 to 30 \(document 1\)"):
        attend.prepare_batch(np.array([0, 20, 30, 48]), row_length=24, rows=2)
    with pytest.raises(ValueError, match="expected to end in the last row of 24 tokens, at 24 or behind, got 20"):
        attend.prepare_batch([0, 8, 20], row_length=24, rows=2)


@pytest.mark.multigpu
@pytest.mark.parametrize("backend", BACKENDS)
def test_ranks_with_other_real_lengths_get_nan(backend):
    def body(q, k, v, cu_seqlens, lengths):
        batch = prepared(SMALL, cu_seqlens, "allgather", backend, lengths=lengths)
        return zigzag_jax.zigzag_attention(q, k, v, batch, axis_name="cp", backend=backend)

    in_specs = P("cp"), P("cp"), P("cp"), P(), P("cp")
    mapped = functools.partial(jax.shard_map, body, mesh=mesh_of(2), in_specs=in_specs, out_specs=P("cp"))
    arrays = *global_arrays(SMALL)[:3], offsets(SMALL)
    for lengths in ((8, 17), (8, 18)):
        out = jax.jit(mapped(check_vma=False))(*arrays, jnp.array([8, 17, *lengths], jnp.int32))
        assert jnp.isnan(out).all() == (lengths[1] == 18)
    with pytest.raises(ValueError, match=r"lengths: expected the same on every rank .* with P\(\) in in_specs"):
        mapped()(*arrays, jnp.array([8, 17] * 2, jnp.int32))


@pytest.mark.parametrize("backend", BACKENDS)
def test_largest_logits_have_no_gradient_and_a_name_for_remat_policies(backend, capsys):
    q, k, v, *_ = (x[:28] for x in global_arrays(SMALL))
    by_operation = functools.partial(zigzag_jax.zigzag_attention, return_max_logits=True, backend=backend)
    attend = jax.jit(by_operation)

    def loss(q, attend=attend):
        out, max_logits = attend(q, k, v)
        return jnp.sum(max_logits) * jnp.sum(out)

    max_logits = attend(q, k, v)[1]
    assert (max_logits.shape, max_logits.dtype) == ((4,), "float32")
    gradient = jax.grad(lambda q: jnp.sum(attend(q, k, v)[0]))(q)
    np.testing.assert_allclose(jax.grad(loss)(q), gradient * max_logits.sum(), rtol=1e-4, atol=1e-5)
    assert not jax.grad(lambda q: jnp.sum(attend(q, k, v)[1]))(q).any()
    policy = jax.checkpoint_policies.save_only_these_names("zigzag_max_logits")
    recomputed = jax.checkpoint(functools.partial(loss, attend=by_operation), policy=policy)
    jax.ad_checkpoint.print_saved_residuals(recomputed, q)
    assert any("f32[4]" in line and "'zigzag_max_logits'" in line for line in capsys.readouterr().out.splitlines())


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NumPy, in which the interpreter computes
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_foul_score_is_the_largest(backend):
    """Of the heads that see it, whatever a maximum makes of NaN."""
    q, k, v, *_ = (x[:28] for x in global_arrays(SMALL))
    attend = jax.jit(functools.partial(zigzag_jax.zigzag_attention, return_max_logits=True, backend=backend))
    for foul in (np.nan, np.inf):
        for arrays, heads in (((q.at[10, 0, 5].set(foul), k, v), {0}), ((q, k.at[10, 0, 5].set(foul), v), {0, 1})):
            assert set(np.flatnonzero(np.isnan(attend(*arrays)[1])).tolist()) == heads
        sinks = jnp.zeros(4).at[2].set(foul)
        assert set(np.flatnonzero(np.isnan(attend(q, k, v, sinks=sinks)[1])).tolist()) == {2}


def test_scan_over_checkpointed_layers_with_one_prepared_batch_and_sinks_of_each_layer():
    case = SMALL
    q, k, v, dout, _ = global_arrays(case)
    sinks = jnp.asarray(np.random.default_rng(0).standard_normal((3, 4)), jnp.float32)
    save = jax.checkpoint_policies.save_only_these_names("zigzag_out", "zigzag_lse")

    def loss(sinks, backend, remat):
        def body(sinks, q, k, v, dout, cu_seqlens):
            batch = prepared(case, cu_seqlens, "allgather", backend)

            @remat
            def layer(carry, sinks):
                out, max_logits = zigzag_jax.zigzag_attention(
                    carry, k, v, batch, axis_name="cp", sinks=sinks, return_max_logits=True, backend=backend
                )
                return carry + out, max_logits

            out, max_logits = jax.lax.scan(layer, q, sinks)
            return jax.lax.psum(jnp.sum(out * dout), "cp"), max_logits

        in_specs = P(), *[P("cp")] * 4, P()
        function = jax.shard_map(body, mesh=mesh_of(2), in_specs=in_specs, out_specs=(P(), P()))
        return function(sinks, q, k, v, dout, offsets(case))

    function = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=(1, 2))
    expected = function(sinks, "reference", lambda layer: layer)
    results = function(sinks, KERNELS, functools.partial(jax.checkpoint, policy=save))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), results, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_sinks_of_other_types_have_gradients_of_their_own_type(backend):
    q, k, v, *_ = (x[:28] for x in global_arrays(SMALL))
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        for dtype in ("float16", "bfloat16", "float32", "float64"):
            sinks = jnp.array([0.5, -1.0, -np.inf, 2.0], dtype)
            attend = functools.partial(zigzag_jax.zigzag_attention, q, k, v, backend=backend)
            gradient = jax.jit(jax.grad(lambda sinks, attend=attend: attend(sinks=sinks).sum()))(sinks)
            assert gradient.dtype == dtype
            assert jnp.isfinite(gradient).all()
            assert gradient[2] == 0
