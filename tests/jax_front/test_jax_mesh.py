"""`make_zigzag_attention` on meshes of several axes, and `cu_seqlens` out of segment ids."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import zigzag_jax
from tests.support import oracle
from tests.support.cases import Case, make_inputs
from tests.support.closeness import assert_close
from tests.support.spread import (
    KERNELS,
    METHODS,
    assert_batch_is_right,
    assert_same,
    batch_in_rank_order,
    global_arrays,
    mesh_of,
    offsets,
    value_and_gradients,
)

CASE = Case(name="mesh", world_size=2, lengths=(8, 0, 20), heads=4, kv_heads=2, padding=2)
FOUR = dataclasses.replace(CASE, world_size=4, lengths=(8, 24))


def whole(attend, case):
    """RESULTS of the whole batch by the `attend(q, k, v, cu_seqlens)` of a mesh."""
    function = value_and_gradients(lambda *qkv: attend(*qkv, offsets(case)))
    return jax.jit(function)(*global_arrays(case))


@pytest.mark.parametrize("method", METHODS)
def test_heads_spread_over_a_second_axis(method):
    mesh = mesh_of(2, 2, names=("tp", "cp"))
    attend = zigzag_jax.make_zigzag_attention(
        mesh, head_axis="tp", method=method, return_lse=True, causal=CASE.causal, backend=KERNELS
    )
    results = whole(attend, CASE)
    assert results[0].sharding.spec == P("cp", "tp")
    assert_batch_is_right(CASE, results)


@pytest.mark.parametrize("method", METHODS)
def test_tokens_spread_over_two_axes_in_a_third(method):
    """Ranks are counted along both; devices along the third do the same, and gradients are not counted twice."""
    mesh = mesh_of(2, 2, 2, names=("dp", "node", "gpu"))
    attend = zigzag_jax.make_zigzag_attention(
        mesh, ("node", "gpu"), method=method, return_lse=True, backend="reference"
    )
    assert_batch_is_right(FOUR, whole(attend, FOUR))


@pytest.mark.parametrize("method", METHODS)
def test_packed_batches_spread_over_a_data_axis(method):
    """`[batch, tokens, ...]`, each of the batch packed in its own way."""
    cases = [dataclasses.replace(CASE, lengths=lengths) for lengths in ((8, 0, 20), (16, 12, 0), (4, 4, 4), (0, 0, 28))]
    cases = [dataclasses.replace(case, padding=(32 - sum(case.lengths)) // 2) for case in cases]
    attend = zigzag_jax.make_zigzag_attention(
        mesh_of(2, 2, names=("dp", "cp")), batch_axis="dp", method=method, return_lse=True, backend=KERNELS
    )
    arrays = [jnp.stack(x) for x in zip(*(global_arrays(case) for case in cases), strict=True)]
    lengths = jnp.stack([offsets(case) for case in cases])
    results = jax.jit(value_and_gradients(lambda *qkv: attend(*qkv, lengths)))(*arrays)
    for i, case in enumerate(cases):
        assert_batch_is_right(case, [x[i] for x in results])


def test_equal_lengths_on_a_mesh_whose_axes_are_types():
    """What `jax.make_mesh` makes: arrays of no sharding are spread first. `[batch, tokens, ...]` needs no lengths."""
    if jax.device_count() < 4:
        pytest.skip("needs 4 devices")
    mesh = jax.make_mesh((2, 2), ("dp", "cp"), devices=jax.devices()[:4])
    q, k, v = (jnp.asarray(make_inputs(CASE)[name][:24]).reshape(2, 12, -1, 16) for name in "qkv")
    lengths = jnp.array([0, 12], jnp.int32)
    in_zigzag = jax.vmap(
        lambda x: jnp.concatenate([zigzag_jax.shard(x, lengths, rank, 2) for rank in range(2)]), out_axes=0
    )

    def loss(attend, order, q, k, v):
        return jnp.sum(attend(*map(order, (q, k, v))) ** 2)

    spread = zigzag_jax.make_zigzag_attention(mesh, batch_axis="dp", backend="reference")
    one = functools.partial(zigzag_jax.zigzag_attention, backend="reference")
    wanted = jax.jit(jax.value_and_grad(functools.partial(loss, one, lambda x: x), (0, 1, 2)))(q, k, v)
    with jax.set_mesh(mesh):
        results = jax.jit(jax.value_and_grad(functools.partial(loss, spread, in_zigzag), (0, 1, 2)))(q, k, v)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), results, wanted)


def test_what_does_not_fit_the_mesh_is_refused():
    mesh = mesh_of(2, names=("cp",))
    for option in ("axis", "head_axis", "batch_axis"):
        with pytest.raises(ValueError, match=r"mesh: expected an axis 'tp', got the axes \('cp',\)"):
            zigzag_jax.make_zigzag_attention(mesh, **{option: "tp"})
    attend = zigzag_jax.make_zigzag_attention(mesh_of(2, 2, names=("cp", "dp")), batch_axis="dp")
    with pytest.raises(ValueError, match=r"q: expected \[batch, tokens, heads, head_dim\] to spread over batch_axis"):
        attend(*global_arrays(CASE)[:3])
    with pytest.raises(ValueError, match="k: expected an array of JAX or NumPy, got list"):
        zigzag_jax.make_zigzag_attention(mesh)(jnp.ones((4, 1, 16)), [1.0], jnp.ones((4, 1, 16)))
    with pytest.raises(ValueError, match="sinks: expected an array of JAX or NumPy, got list"):
        zigzag_jax.make_zigzag_attention(mesh)(*[jnp.ones((4, 1, 16))] * 3, sinks=[1.0])
    with pytest.raises(ValueError, match="cu_seqlens: expected an array of JAX or NumPy, got list"):
        attend(*[jnp.ones((2, 4, 1, 16))] * 3, [[0, 4], [0, 4]])


def test_lengths_out_of_segment_ids():
    convert = functools.partial(zigzag_jax.cu_seqlens_from_segment_ids, max_sequences=5)
    for ids, wanted in (
        ([1, 1, 1, 2, 3, 3, 0, 0], [0, 3, 4, 6, 6, 6]),  # increasing, padding behind
        ([7, 7, 2, 2, 2, 7, 7, 7], [0, 2, 5, 8, 8, 8]),  # ids that return
        ([0, 0, 1, 1, 0, 2, 2, 0], [0, 2, 4, 5, 7, 7]),  # padding before and between counts as sequences
        ([0] * 8, [0] * 6),
        ([], [0] * 6),
        ([1, 2, 3, 4, 5, 5, 0, 0], [0, 1, 2, 3, 4, 6]),
        ([1, 2, 3, 4, 5, 6, 0, 0], [0, 1, 2, 3, 4, -1]),  # one too many
    ):
        ids = np.array(ids, np.int32)
        assert_same([convert(ids), jax.jit(convert)(ids)], [wanted] * 2)
    with pytest.raises(ValueError, match="cu_seqlens: expected no decrease"):
        zigzag_jax.validate(convert(np.arange(1, 8)), 1)

    ids, positions = np.array([[1, 1, 1, 2, 2, 0], [1] * 6]), np.array([[0, 1, 0, 0, 1, 0], [0, 1, 2, 3, 4, 5]])
    assert_same(
        [jax.vmap(lambda ids, positions: convert(ids, positions=positions))(ids, positions)],
        [[[0, 2, 3, 5, 5, 5], [0, 6, 6, 6, 6, 6]]],
    )
    # Positions of padding between sequences begin nothing.
    between = convert(np.array([1, 1, 0, 0, 2, 2]), positions=np.array([0, 1, 0, 0, 0, 1]))
    assert_same([between], [[0, 2, 4, 6, 6, 6]])


def test_a_row_of_a_batch_begins_a_sequence():
    """Though the last document of a row and the first of the next have the same id."""
    convert = functools.partial(zigzag_jax.cu_seqlens_from_segment_ids, max_sequences=6)
    for ids, wanted in (
        ([[1, 1, 1, 1], [1, 1, 2, 2]], [0, 4, 6, 8, 8, 8, 8]),
        ([[1, 1, 2, 0], [0, 2, 2, 0]], [0, 2, 3, 4, 5, 7, 7]),  # padding inside is a sequence of its own
        ([[]], [0] * 7),
    ):
        ids = np.array(ids, np.int32)
        assert_same([convert(ids), jax.jit(convert)(ids)], [wanted] * 2)
    ids, positions = np.ones((2, 4), np.int32), np.array([[0, 1, 0, 1], [0, 1, 2, 3]])
    assert_same([convert(ids, positions=positions)], [[0, 2, 4, 8, 8, 8, 8]])


def test_segment_ids_must_be_integers_in_rows():
    convert = zigzag_jax.cu_seqlens_from_segment_ids
    with pytest.raises(ValueError, match=r"segment_ids: expected integers \[total\] or .* got shape \(1, 2, 4\) int32"):
        convert(jnp.ones((1, 2, 4), jnp.int32), 2)
    with pytest.raises(ValueError, match=r"positions: expected integers \(4,\) as segment_ids, got shape \(3,\) int32"):
        convert(jnp.ones(4, jnp.int32), 2, jnp.ones(3, jnp.int32))
    with pytest.raises(ValueError, match="max_sequences: expected a positive int, got 0"):
        convert(jnp.ones(4, jnp.int32), 0)


def test_attention_of_a_batch_packed_by_segment_ids():
    """Tokens with the same id see each other and no others; padding between sequences harms nobody."""
    ids = np.repeat([3, 0, 1, 4, 0], [8, 4, 12, 4, 4])
    case = dataclasses.replace(CASE, lengths=(8, 4, 12, 4), padding=2)
    cu_seqlens = zigzag_jax.cu_seqlens_from_segment_ids(ids, 6)
    attend = zigzag_jax.make_zigzag_attention(mesh_of(2), backend=KERNELS)
    out = attend(*global_arrays(case)[:3], cu_seqlens)
    exact, straightforward = (
        batch_in_rank_order(case, x, 0) for x in (oracle.EXACT, oracle.straightforward(case.dtype))
    )
    assert_close("out", out, exact[0], straightforward[0])


@pytest.mark.parametrize("window_size", [(-1, -1), [3, -1]])
def test_preparing_compiles_one_program_and_a_second_batch_none(window_size, caplog):
    """The batches differ in all lengths; a window as a list must not stop the reuse.

    Besides the program, each array on the host is staged.
    """
    mesh = mesh_of(2, names=("cp",))

    def prepare(*lengths):
        attend = zigzag_jax.make_zigzag_attention(mesh, backend=KERNELS, window_size=window_size)
        cu_seqlens, real = np.cumsum([0, *lengths], dtype=np.int32), np.asarray(lengths, np.int32)
        with jax.log_compiles():
            batch = attend.prepare_batch(cu_seqlens, lengths=real)
        compiled = [x for x in caplog.messages if x.startswith("Compiling") and "jit(stage)" not in x]
        caplog.clear()
        return np.asarray(batch.cu_seqlens).tolist(), compiled

    jax.clear_caches()
    offsets, compiled = prepare(12, 16)
    assert offsets == [0, 12, 28]
    assert len(compiled) == 1, compiled
    assert prepare(16, 12) == ([0, 16, 28], [])


def test_options_of_a_batch_may_be_arrays_and_are_checked_before_they_select_a_program():
    """Arrays have no hash, and True equals 1, for which there is a program already."""
    make = functools.partial(zigzag_jax.make_zigzag_attention, mesh_of(2), backend="reference")
    for given in (int, np.array):
        batch = make(attention_chunk=given(4)).prepare_batch([0, 12], max_seqlen=given(12))
        assert batch.max_seqlen == 12
        batch = make(layout="row").prepare_batch([0, 5, 8], row_length=given(8), rows=given(1))
        assert (batch.row_length, batch.rows, batch.rank.tolist()) == (8, 1, [0, 1])
    make(attention_chunk=1).prepare_batch([0, 4], max_seqlen=4)
    with pytest.raises(ValueError, match="attention_chunk: expected a number of tokens, or 0 for none, got True"):
        make(attention_chunk=True).prepare_batch([0, 4], max_seqlen=4)
    with pytest.raises(ValueError, match=r"method: expected 'allgather', 'ring' or 'halo', got \['ring'\]"):
        make(method=["ring"]).prepare_batch([0, 12])
