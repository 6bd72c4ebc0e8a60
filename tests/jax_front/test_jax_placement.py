"""Devices on which attention would be wrong, or done many times, are refused by name, or served rightly."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import zigzag_jax
from tests.support.cases import Case
from tests.support.machine import GPU
from tests.support.spread import (
    BACKENDS,
    KERNELS,
    METHODS,
    assert_batch_is_right,
    assert_same,
    global_arrays,
    mesh_of,
    offsets,
    value_and_gradients,
)

CASE = Case(name="placement", world_size=2, lengths=(8, 20), heads=4, kv_heads=2, padding=2)


def spread_call(specs, mesh=None, **options):
    """`zigzag_attention` in `shard_map`, with these specs of q, k, v and cu_seqlens."""
    attend = functools.partial(zigzag_jax.zigzag_attention, axis_name="cp", backend="reference")
    mesh = mesh_of(2) if mesh is None else mesh
    return jax.jit(jax.shard_map(attend, mesh=mesh, in_specs=specs, out_specs=P("cp"), **options))


@pytest.mark.parametrize("whole", ["q", "k", "v"])
def test_rows_that_are_the_same_on_every_rank_are_refused(whole):
    specs = [P() if name == whole else P("cp") for name in "qkv"]
    arrays = [x[:16] if name == whole else x[:32] for name, x in zip("qkv", global_arrays(CASE), strict=False)]
    arrays = [jnp.concatenate([x, x])[: 16 if name == whole else 32] for name, x in zip("qkv", arrays, strict=True)]
    with pytest.raises(ValueError, match=f"{whole}: expected the rows of each rank, .* along the mesh axis 'cp'"):
        spread_call((*specs, P()))(*arrays, jnp.array([0, 32], jnp.int32))


def test_lengths_that_differ_where_there_are_no_types_give_nan():
    """Without `check_vma` nothing promises that ranks have the same, and nobody has prepared a batch."""
    arrays = [x[:32] for x in global_arrays(CASE)[:3]]
    call = spread_call((*[P("cp")] * 3, P("cp")), check_vma=False)
    out = call(*(jnp.resize(x, (32, *x.shape[1:])) for x in arrays), jnp.array([0, 16, 32, 0, 8, 32], jnp.int32))
    assert np.isnan(out).all()
    out = call(*(jnp.resize(x, (32, *x.shape[1:])) for x in arrays), jnp.array([0, 16, 32] * 2, jnp.int32))
    assert not np.isnan(out).any()


@pytest.mark.parametrize("dtype", ["int32", "uint8", "bool", "bfloat16", "float32", "complex64"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_ranks_that_read_other_data_of_the_same_lengths_get_nan(backend, dtype):
    """The whole batch of each rank behind one another, as processes have one each: `P()` would promise one for all."""

    def body(q, k, v, unsharded):
        batch = zigzag_jax.prepare_batch(offsets(CASE), axis_name="cp", unsharded=unsharded, backend=backend)
        return zigzag_jax.zigzag_attention(q, k, v, batch, axis_name="cp", backend=backend)

    mapped = functools.partial(jax.shard_map, body, mesh=mesh_of(2), in_specs=P("cp"), out_specs=P("cp"))
    arrays = global_arrays(CASE)[:3]
    tokens = np.arange(len(arrays[0])) % (2 if dtype == "bool" else 256)
    swapped = np.concatenate((tokens[1::-1], tokens[2:]))
    call = jax.jit(mapped(check_vma=False))
    for other, alike in ((tokens, True), (swapped, False), (np.roll(tokens, 1), False)):
        out = call(*arrays, jnp.asarray(np.concatenate((tokens, other)), dtype))
        assert np.isnan(out).any() == np.isnan(out).all() == (not alike)
    with pytest.raises(ValueError, match=r"unsharded: expected the same on every rank .* with P\(\) in in_specs"):
        mapped()(*arrays, jnp.asarray(np.concatenate((tokens, tokens)), dtype))


def test_a_mesh_compares_the_whole_batch():
    attend = zigzag_jax.make_zigzag_attention(mesh_of(2), backend="reference")
    q, k, v, *_ = global_arrays(CASE)
    batch = jax.jit(attend.prepare_batch)(offsets(CASE), unsharded=np.arange(len(q)))
    call = jax.jit(attend)
    assert_same([call(q, k, v, batch)], [call(q, k, v, offsets(CASE))])
    mesh, tokens = mesh_of(2), np.arange(len(q))
    for other, alike in ((tokens, True), (tokens[::-1], False)):  # as two processes make one of what each has read
        parts = [jax.device_put(x, device) for x, device in zip((tokens, other), mesh.devices, strict=True)]
        read = jax.make_array_from_single_device_arrays(tokens.shape, NamedSharding(mesh, P()), parts)
        out = call(q, k, v, jax.jit(attend.prepare_batch)(offsets(CASE), unsharded=read))
        assert np.isnan(out).any() == np.isnan(out).all() == (not alike)
    with pytest.raises(ValueError, match="unsharded: expected an array of JAX or NumPy, got list"):
        attend.prepare_batch(offsets(CASE), unsharded=[1])


@pytest.mark.parametrize("compiled", [False, True])
def test_arrays_of_several_devices_outside_shard_map_are_refused(compiled):
    arrays = [jax.device_put(x, NamedSharding(mesh_of(2), P("cp"))) for x in global_arrays(CASE)[:3]]
    attend = functools.partial(zigzag_jax.zigzag_attention, backend=KERNELS)
    with pytest.raises(ValueError, match="q: expected arrays of one device, or a call inside shard_map, got 2 devices"):
        (jax.jit(attend) if compiled else attend)(*arrays, jnp.array([0, len(arrays[0])], jnp.int32))


def test_automatic_axes_inside_shard_map_are_refused():
    mesh = mesh_of(2, 2, names=("cp", "tp"))
    attend = functools.partial(zigzag_jax.zigzag_attention, axis_name="cp", backend=KERNELS)
    in_specs = P("cp"), P("cp"), P("cp"), P()
    call = jax.shard_map(attend, mesh=mesh, in_specs=in_specs, out_specs=P("cp"), axis_names={"cp"})
    with pytest.raises(ValueError, match=r"axis_names: expected a shard_map over all axes .* automatic axes \['tp'\]"):
        jax.jit(call)(*global_arrays(CASE)[:3], offsets(CASE))


@pytest.mark.skipif(GPU, reason="here None means the kernels")
def test_no_dense_attention_is_lowered_for_a_gpu_that_is_not_here():
    q = jnp.ones((8, 1, 16))
    attend = jax.jit(zigzag_jax.zigzag_attention)
    with pytest.raises(
        RuntimeError, match=r"backend: expected lower_for\(target\) around this, or a machine with a GPU"
    ):
        attend.trace(q, q, q).lower(lowering_platforms=("cuda",))
    named = jax.jit(functools.partial(zigzag_jax.zigzag_attention, backend="reference"))
    assert named.trace(q, q, q).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.skipif(GPU, reason="here kernels can be compiled")
def test_kernels_are_not_lowered_by_a_process_that_interprets_them():
    q = jnp.ones((8, 1, 16))
    attend = jax.jit(zigzag_jax.zigzag_attention)
    attend.trace(q, q, q)
    for _ in range(2):  # nor does JAX keep what it traced outside
        with zigzag_jax.lower_for("9.0"), pytest.raises(RuntimeError, match="backend: 'triton' cannot compile"):
            attend.trace(q, q, q)
    assert "dot_general" in str(attend.trace(q, q, q).jaxpr)
    for target in ("H100", 9.0, "90", "sm_90"):
        with pytest.raises(ValueError, match=r"target: expected a compute capability such as '9.0', got"):
            zigzag_jax.lower_for(target)


def test_an_axis_that_nobody_named_is_refused():
    """Its devices would gather the heads and all do the same."""
    mesh = mesh_of(2, 2, names=("cp", "tp"))
    attend = zigzag_jax.make_zigzag_attention(mesh, backend="reference")
    arrays = [jax.device_put(x, NamedSharding(mesh, P("cp", "tp"))) for x in global_arrays(CASE)[:3]]
    with pytest.raises(ValueError, match=r"q: expected .* dimension 1 is spread over 'tp' too, and would be gathered"):
        attend(*arrays, offsets(CASE))
    typed = jax.make_mesh((2, 2), ("cp", "tp"), devices=jax.devices()[:4])
    attend = jax.jit(zigzag_jax.make_zigzag_attention(typed, backend="reference"))
    with jax.set_mesh(typed), pytest.raises(ValueError, match="dimension 1 is spread over 'tp' too"):
        attend(*(jax.device_put(x, NamedSharding(typed, P("cp", "tp"))) for x in arrays), offsets(CASE))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_batch_is_prepared_once_for_all_layers(method, backend):
    attend = zigzag_jax.make_zigzag_attention(mesh_of(2), method=method, return_lse=True, backend=backend)
    batch = jax.jit(attend.prepare_batch)(offsets(CASE))
    assert (batch.segments is None) == (backend == "reference")
    results = jax.jit(value_and_gradients(lambda q, k, v: attend(q, k, v, batch)))(*global_arrays(CASE))
    assert_batch_is_right(CASE, results)
    if backend == "reference":
        single = zigzag_jax.prepare_batch(offsets(CASE), 0, 2, method=method, backend=backend)
        with pytest.raises(ValueError, match=r"cu_seqlens: expected, .* a batch of attention.prepare_batch"):
            attend(*global_arrays(CASE)[:3], single)


@pytest.mark.slow
def test_a_batch_is_prepared_on_a_mesh_whose_axes_are_types():
    mesh = jax.make_mesh((2,), ("cp",), axis_types=(AxisType.Explicit,), devices=mesh_of(2).devices.flatten())
    attend = zigzag_jax.make_zigzag_attention(mesh, backend="reference")
    arrays = global_arrays(CASE)[:3]
    with jax.set_mesh(mesh):
        call, batch = jax.jit(attend), jax.jit(attend.prepare_batch)(offsets(CASE))
        assert_same([call(*arrays, batch)], [call(*arrays, offsets(CASE))])


MESH_MISTAKES = {
    "no mesh": ({"mesh": "cp"}, r"mesh: expected a jax.sharding.Mesh, got str"),
    "number": ({"axis": 0}, "axis: expected the name of a mesh axis, or a tuple of names, got 0"),
    "none": ({"axis": ()}, r"axis: expected a mesh axis, or several, got \(\)"),
    "unknown": ({"batch_axis": "dp"}, "mesh: expected an axis 'dp', got the axes"),
    "twice": ({"head_axis": "cp"}, "head_axis: expected an axis other than 'cp', which axis is already"),
    "flag": ({"return_lse": 1}, "return_lse: expected True or False, got 1"),
}
CALL_MISTAKES = {
    "tokens": ({"q": (31, 4, 16)}, r"q: expected tokens that the 2 devices of axis 'cp' divide, got 31"),
    "heads": ({"k": (32, 3, 16)}, r"k: expected heads that the 2 devices of head_axis 'tp' divide, got 3"),
    "flat": ({"v": (32, 64)}, r"v: expected \[tokens, heads, head_dim\] or \[batch, ...\], got shape \(32, 64\)"),
    "lengths": ({"cu_seqlens": (2, 2)}, r"cu_seqlens: expected shape \[N \+ 1\], got \(2, 2\)"),
    "batches": (
        {"q": (2, 32, 4, 16), "k": (2, 32, 2, 16), "v": (2, 32, 2, 16), "cu_seqlens": (3, 2)},
        r"cu_seqlens: expected \[batch, N \+ 1\] with batch 2 as in q, got \(3, 2\)",
    ),
}


@pytest.mark.parametrize("case", MESH_MISTAKES)
def test_mistakes_with_a_mesh_are_named(case):
    changed, message = MESH_MISTAKES[case]
    arguments = {"mesh": mesh_of(2, 2, names=("cp", "tp"))} | changed
    with pytest.raises(ValueError, match=message):
        zigzag_jax.make_zigzag_attention(**arguments)


def test_an_option_that_there_is_not_is_named():
    with pytest.raises(TypeError, match=r"axis_name: expected one of the options causal, window_size, .* method"):
        zigzag_jax.make_zigzag_attention(mesh_of(2), axis_name="cp")


@pytest.mark.parametrize("case", CALL_MISTAKES)
def test_mistakes_in_a_call_are_named_in_short(case):
    changed, message = CALL_MISTAKES[case]
    shapes = {"q": (32, 4, 16), "k": (32, 2, 16), "v": (32, 2, 16), "cu_seqlens": (2,)} | changed
    arrays = {name: jnp.zeros(shape, jnp.int32 if name == "cu_seqlens" else None) for name, shape in shapes.items()}
    attend = zigzag_jax.make_zigzag_attention(mesh_of(2, 2, names=("cp", "tp")), head_axis="tp", backend="reference")
    with pytest.raises(ValueError, match=message) as raised:
        attend(**arrays)
    assert len(str(raised.value)) < 200
