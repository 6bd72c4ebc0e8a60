"""Halos between the devices of a mesh, against the float64 oracle of the whole batch, and what they do not serve."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import zigzag_jax
from tests.support.halos import HALOS
from tests.support.spread import (
    BACKENDS,
    KERNELS,
    assert_batch_is_right,
    assert_same,
    global_arrays,
    halo_arrays,
    mesh_of,
    spread_halos,
)

CASES = {case.name: case for case in HALOS}
QUICK = ("w2-packed", KERNELS), ("w2-row", KERNELS), ("w3-packed", KERNELS), ("w2-short", "reference")
SPREAD = [
    pytest.param(
        CASES[name],
        backend,
        id=f"{name}-{backend}",
        marks=[pytest.mark.multigpu, *[pytest.mark.slow] * ((name, backend) not in QUICK)],
    )
    for name in CASES
    for backend in BACKENDS
]


@pytest.mark.parametrize(("case", "backend"), SPREAD)
def test_all_ranks_give_the_results_of_the_whole_batch(case, backend):
    assert_batch_is_right(case, spread_halos(case, backend)(*halo_arrays(case)))


@pytest.mark.multigpu
def test_types_of_shard_map_change_no_bit():
    case = CASES["w2-short"]
    typed, untyped = (spread_halos(case, KERNELS, check_vma)(*halo_arrays(case)) for check_vma in (True, False))
    assert_same(untyped, typed)


def on_mesh(backend=KERNELS, **options):
    options = {"method": "halo", "backend": backend, "return_lse": True} | options
    return zigzag_jax.make_zigzag_attention(mesh_of(2), **options)


QKV = [np.ones((40, heads, 16), np.float32) for heads in (2, 1, 1)]


@pytest.mark.multigpu
@pytest.mark.parametrize("backend", [KERNELS, pytest.param("reference", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("options", "form", "promise", "message"),
    [
        (
            {"window_size": (4, 0)},
            {"lengths": np.array([5, 32])},  # the third chunk of the first document has one token
            None,
            "cu_seqlens: expected chunks of at least the 4 rows of a halo, got 2",
        ),
        ({"window_size": (2, 0)}, {}, 31, "max_seqlen: expected at least the 32 tokens of document 1, got 31"),
        ({"layout": "row"}, {"row_length": 40}, 8, "max_seqlen: expected at least the 32 tokens of document 1, got 8"),
    ],
)
def test_a_broken_promise_gives_nan_on_all_devices_and_a_reason(options, form, promise, message, backend):
    attend, cu_seqlens = on_mesh(backend, **options), jnp.array([0, 8, 40], jnp.int32)
    batch = attend.prepare_batch(cu_seqlens, max_seqlen=promise, **form)
    out, lse = jax.jit(attend)(*QKV, batch)
    assert np.isnan(out).all()
    assert np.isnan(lse).all()
    limits = {"halo": batch.halo, "max_seqlen": batch.max_seqlen or None}
    with pytest.raises(ValueError, match=message):
        zigzag_jax.validate(cu_seqlens, 2, layout=batch.layout, **form, **limits)
    with pytest.raises(ValueError, match=message):
        attend.prepare_batch([0, 8, 40], max_seqlen=promise, **form)


def test_a_layer_with_a_smaller_window_may_use_the_halo_of_a_larger_one():
    """Without a prepared batch the halo is that of the call; one sequence needs no lengths."""
    (q, k, v), cu_seqlens = [np.asarray(x) for x in global_arrays(CASES["w2-all-rows"])[:3]], jnp.array([0, 48])
    batch = on_mesh(window_size=(9, 0)).prepare_batch(cu_seqlens)
    small = jax.jit(on_mesh(window_size=(5, 0)))
    for x, y, z in zip(small(q, k, v, batch), small(q, k, v, cu_seqlens), small(q, k, v), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5)
        np.testing.assert_array_equal(y, z)


@pytest.mark.parametrize("apart", [False, True])
def test_documents_on_the_host_that_halos_do_not_serve_are_refused_without_a_batch(apart):
    """With whole arrays, of one packed row or of several, and inside `shard_map`."""
    qkv, offsets = QKV, [0, 8, 40]
    if apart:
        qkv, offsets = [x[None] for x in QKV], np.array([offsets])
    message = "cu_seqlens: expected chunks of at least the 4 rows of a halo, got 2 tokens in a chunk of the document"
    with pytest.raises(ValueError, match=message):
        on_mesh(window_size=(4, 0))(*qkv, offsets)
    jax.eval_shape(lambda *x: on_mesh(window_size=(2, 0))(*x, offsets), *qkv)
    attend = functools.partial(zigzag_jax.zigzag_attention, axis_name="cp", method="halo", window_size=(4, 0))
    with pytest.raises(ValueError, match=message):
        jax.shard_map(lambda *x: attend(*x, [0, 8, 40]), mesh=mesh_of(2), in_specs=P("cp"), out_specs=P("cp"))(*QKV)


def test_what_halos_do_not_serve_is_refused_by_name():
    cu_seqlens = jnp.array([0, 40], jnp.int32)
    batch = on_mesh(window_size=(4, 0)).prepare_batch(cu_seqlens)
    for options, lengths, message in (
        ({"window_size": (5, 0)}, batch, "window_size: expected at most the 4 positions"),
        ({}, batch, "window_size: expected a limit to the left"),
        ({"window_size": (4, 1), "causal": False}, batch, "causal: expected True"),
        ({"window_size": (11, 0)}, None, "window_size: expected at most the 10 rows of a chunk"),
        ({"window_size": (11, 0), "layout": "row"}, cu_seqlens, "window_size: expected at most the 10 rows of a chunk"),
    ):
        with pytest.raises(ValueError, match=message):
            on_mesh(**options)(*QKV, lengths)


@pytest.mark.slow
def test_calls_that_name_no_method_take_halos_where_they_serve():
    """In the row layout and of sequences of one length; a layer that sees farther gathers, with the same batch."""
    case = CASES["w3-row"]
    q, k, v = (np.asarray(x, np.float32) for x in global_arrays(case)[:3])
    rows = {"row_length": case.total}
    cu_seqlens = jnp.asarray(case.cu_seqlens, jnp.int32)

    def make(**options):
        options = {"layout": "row", "backend": KERNELS} | options
        return zigzag_jax.make_zigzag_attention(mesh_of(3), **options)

    local = make(window_size=(11, 0))
    batch = local.prepare_batch(cu_seqlens, **rows)
    assert (batch.method, batch.halo) == ("halo", 11)
    assert make(window_size=(11, 0), method="ring").prepare_batch(cu_seqlens, **rows).method == "ring"
    assert make().prepare_batch(cu_seqlens, **rows).method == "allgather"
    gathered = jax.jit(make(method="allgather", window_size=(11, 0)))(q, k, v, cu_seqlens)
    with_batch, without = (jax.jit(local)(q, k, v, given) for given in (batch, cu_seqlens))
    np.testing.assert_allclose(with_batch, gathered, atol=1e-5)
    np.testing.assert_array_equal(without, with_batch)
    everywhere = jax.jit(make(method="allgather"))(q, k, v, cu_seqlens)
    np.testing.assert_array_equal(jax.jit(make())(q, k, v, batch), everywhere)
