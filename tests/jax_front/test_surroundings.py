"""What JAX switches on around a call changes no bit of its results, in the forward pass or in the backward pass."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import zigzag_jax
from tests.support.machine import GPU

pytestmark = pytest.mark.slow
W, HEADS, KV_HEADS, HEAD_DIM = 2, 4, 2, 16
CU_SEQLENS = np.array([0, 8, 8, 24], np.int32)
TOKENS = 14  # of a rank, the last two of them padding


@contextlib.contextmanager
def refusals():
    """All that only raise errors: what one of them refuses, all of them refuse."""
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"), jax.debug_nans(True):
        yield


SURROUNDINGS = {
    "refusals": refusals,
    "x64": lambda: jax.enable_x64(True),
    "matmul precision": lambda: jax.default_matmul_precision("bfloat16"),
}


def attention(backend):
    return lambda q, k, v: zigzag_jax.zigzag_attention(q, k, v, CU_SEQLENS, return_lse=True, backend=backend)


def batched(backend):
    return lambda *qkv: zigzag_jax.zigzag_attention(*(x[None] for x in qkv), return_lse=True, backend=backend)


def gathered(backend):
    def call(q, k, v):
        batch = zigzag_jax.prepare_batch(CU_SEQLENS, 1, W, backend=backend)
        return zigzag_jax.zigzag_attention_gathered(q[:TOKENS], k, v, batch, 1, W, return_lse=True, backend=backend)

    return call


def with_options(backend):
    """All of them, over packed rows of 28 tokens with documents of real lengths."""

    def call(q, k, v):
        packed = {"layout": "row", "row_length": W * TOKENS, "lengths": np.array([8, 0, 11], np.int32)}
        batch = zigzag_jax.prepare_batch(np.array([0, 9, 9, 24], np.int32), 1, W, backend=backend, **packed)
        options = {"window_size": (5, 3), "attention_chunk": 7, "softcap": 2.0, "causal": False, "layout": "row"}
        sinks = q[0].sum(-1).at[2].set(-np.inf)
        return zigzag_jax.zigzag_attention_gathered(
            q[:TOKENS], k, v, batch, 1, W, sinks=sinks, return_max_logits=True, backend=backend, **options
        )

    return call


def on_a_mesh(backend, method):
    def call(q, k, v):
        mesh = jax.make_mesh((W,), ("cp",), axis_types=(jax.sharding.AxisType.Auto,))
        attend = zigzag_jax.make_zigzag_attention(mesh, return_lse=True, backend=backend, method=method)
        return attend(q, k, v, CU_SEQLENS)

    return call


def prepared_on_a_mesh(q, k, v):
    mesh = jax.make_mesh((W,), ("cp",), axis_types=(jax.sharding.AxisType.Auto,))

    def body(q, k, v):
        batch = zigzag_jax.prepare_batch(CU_SEQLENS, axis_name="cp", backend="reference")
        return zigzag_jax.zigzag_attention(q, k, v, batch, axis_name="cp", backend="reference")

    return (jax.shard_map(body, mesh=mesh, in_specs=P("cp"), out_specs=P("cp"))(q, k, v),)


def merged(q, k, v):
    lse = q.astype(jnp.float32).sum(-1).T
    return zigzag_jax.merge_partials(jnp.stack((q, q + q)), jnp.stack((lse, -lse)))


def moved(q, k, v):
    local = zigzag_jax.shard(q, CU_SEQLENS, 1, W)
    padded, _ = zigzag_jax.pad_to_zigzag(q, CU_SEQLENS, 4)
    whole = zigzag_jax.unshard(jnp.concatenate((local, local)), CU_SEQLENS, W)
    return whole, padded, zigzag_jax.unpad(padded, CU_SEQLENS, 4)


def calls_on_one_device(kernel_backend):
    """{name: function of (q, k, v)} for every differentiable call."""
    by_backend = {"attention": attention, "batched": batched, "gathered": gathered, "with options": with_options}
    named = {f"{n} {b}": f(b) for n, f in by_backend.items() for b in ("reference", kernel_backend)}
    return named | {"merge_partials": merged, "shard and pad": moved}


def calls_on_a_mesh(kernel_backend):
    """As `calls_on_one_device`."""
    methods = "allgather", "ring"
    named = {f"{m} {b}": on_a_mesh(b, m) for m in methods for b in ("reference", kernel_backend)}
    return named | {"prepared": prepared_on_a_mesh}


def integers():
    """Results of the calls that return integers."""
    segment_ids = np.array([1, 1, 2, 2, 2, 0], np.int32)
    return (
        zigzag_jax.local_cu_seqlens(CU_SEQLENS, W),
        zigzag_jax.position_ids(CU_SEQLENS, 1, W),
        zigzag_jax.position_ids(jnp.asarray(CU_SEQLENS), jnp.int32(1), W, TOKENS),
        zigzag_jax.cu_seqlens_from_segment_ids(segment_ids, 4),
        zigzag_jax.cu_seqlens_from_segment_ids(segment_ids, 4, positions=np.array([0, 1, 0, 1, 0, 0], np.int32)),
        zigzag_jax.pad_to_zigzag(jnp.zeros((24, 1)), CU_SEQLENS, 4)[1],
    )


def inputs(dtype):
    rng = np.random.default_rng(0)
    return [
        jnp.asarray(rng.standard_normal((W * TOKENS, heads, HEAD_DIM), np.float32), dtype)
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    ]


def forward_pass(call, arrays, compiled):
    """(results of `call`, the function that makes its gradients)."""
    outputs, pullback = jax.vjp(jax.jit(call) if compiled else call, *arrays)
    return tuple(outputs), pullback


def backward_pass(outputs, pullback, where=contextlib.nullcontext):
    """The gradients, computed inside of a context."""
    cotangents = tuple(jnp.asarray(np.linspace(-1, 1, x.size).reshape(x.shape), x.dtype) for x in outputs)
    with where():
        return tuple(pullback(cotangents))


def assert_same_bits(where, ours, theirs):
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert a.dtype == b.dtype, f"{where}: {i}"
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), f"{where}: {i}"


def assert_close(where, ours, theirs):
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert a.dtype == b.dtype, f"{where}: {i}"
        np.testing.assert_allclose(np.float32(a), np.float32(b), rtol=1e-2, atol=1e-5, err_msg=f"{where}: {i}")


def ways(calls, apart):
    """(name, call, whether to compile it): all compiled, those in `apart` operation by operation as well."""
    return [
        (name, call, compiled)
        for name, call in calls.items()
        for compiled in (True, False)
        if compiled or name in apart
    ]


@functools.cache
def without_surroundings(make_calls, kernel_backend, dtype, name, compiled):
    """(results, the function that makes gradients, gradients) of the call `name`."""
    passed = forward_pass(make_calls(kernel_backend)[name], inputs(dtype), compiled)
    return *passed, backward_pass(*passed)


def check(name, make_calls, kernel_backend, apart=()):
    """Compare a forward pass inside, and a backward pass inside of one that was outside, with passes outside.

    JAX traces a backward pass when it is called, in the surroundings of that moment.
    """
    there = SURROUNDINGS[name]
    dtype = "float32" if name == "matmul precision" else "bfloat16"
    for call_name, call, compiled in ways(make_calls(kernel_backend), apart):
        outputs, pullback, gradients = without_surroundings(make_calls, kernel_backend, dtype, call_name, compiled)
        with there():
            inside = forward_pass(call, inputs(dtype), compiled)
        for ours, theirs in (
            (inside[0] + backward_pass(*inside), outputs + gradients),
            (backward_pass(outputs, pullback, there), gradients),
        ):
            where = f"{call_name}, compiled: {compiled}"
            if GPU and "reference" in call_name:  # XLA's own reductions there may take another order
                assert_close(where, ours, theirs)
            else:
                assert_same_bits(where, ours, theirs)


@pytest.mark.usefixtures("each_launch_once")
@pytest.mark.parametrize("name", SURROUNDINGS)
def test_no_bit_changes(name, kernel_backend):
    """Operation by operation, JAX also looks for NaN in what a compiled function keeps to itself."""
    looking_for_nan = ("attention reference", "merge_partials") if name == "refusals" else ()
    check(name, calls_on_one_device, kernel_backend, (f"gathered {kernel_backend}", *looking_for_nan))
    expected = integers()
    with SURROUNDINGS[name]():
        ours = integers()
    assert_same_bits("integers", ours, expected)


@pytest.mark.multigpu
@pytest.mark.parametrize("name", SURROUNDINGS)
def test_no_bit_changes_between_devices(name, kernel_backend):
    check(name, calls_on_a_mesh, kernel_backend)
