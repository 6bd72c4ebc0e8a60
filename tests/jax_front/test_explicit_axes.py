"""Public functions of arrays that a mesh spreads whose axes are types: the values of whole arrays, or words of ours."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import zigzag_jax

WORLD_SIZE, TOTAL, WIDTH = 2, 64, 4
OFFSETS = np.array([0, 16, 48, 48], np.int32)
IN_ROWS = np.array([0, 5, 32, 64], np.int32)
UNPADDED = np.array([0, 15, 47, 47], np.int32)
X = np.arange(TOTAL * WIDTH, dtype=np.float32).reshape(TOTAL, WIDTH)
SEGMENT_IDS = np.repeat(np.array([3, 3, 1, 0], np.int32), 16)
POSITIONS = np.tile(np.arange(16, dtype=np.int32), 4)
PARTS, PART_LSE = np.stack((X, -X)).reshape(2, TOTAL, 1, WIDTH), np.linspace(0, 1, 2 * TOTAL).reshape(2, 1, TOTAL)
ROW = {"layout": "row", "row_length": 32}

HELPERS = {
    "shard": (lambda x, c: zigzag_jax.shard(x, c, 1, WORLD_SIZE), X, OFFSETS),
    "shard, traced rank": (lambda x, c: zigzag_jax.shard(x, c, jnp.array([1]), WORLD_SIZE), X, OFFSETS),
    "shard, row": (lambda x, c: zigzag_jax.shard(x, c, 1, WORLD_SIZE, **ROW), X, IN_ROWS),
    "shard, rows": (lambda x, c: zigzag_jax.shard(x, c, 1, WORLD_SIZE, **ROW), X.reshape(2, 32, -1), IN_ROWS),
    "unshard": (lambda x, c: zigzag_jax.unshard(x, c, WORLD_SIZE), X, OFFSETS),
    "unshard, rows": (lambda x, c: zigzag_jax.unshard(x, c, WORLD_SIZE, **ROW), X.reshape(4, 16, -1), IN_ROWS),
    "position_ids": (lambda c: zigzag_jax.position_ids(c, 1, WORLD_SIZE, 32), OFFSETS),
    "position_ids, row": (lambda c: zigzag_jax.position_ids(c, 1, WORLD_SIZE, 32, layout="row"), IN_ROWS),
    "local_cu_seqlens": (lambda c: zigzag_jax.local_cu_seqlens(c, WORLD_SIZE), OFFSETS),
    "local_cu_seqlens, row": (lambda c: zigzag_jax.local_cu_seqlens(c, WORLD_SIZE, rank=1, **ROW), IN_ROWS),
    "pad_to_zigzag": (lambda x: zigzag_jax.pad_to_zigzag(x, UNPADDED, WORLD_SIZE, 72, value=7), X),
    "unpad": (lambda x: zigzag_jax.unpad(x, UNPADDED, WORLD_SIZE), X),
    "segment_ids": (lambda i: zigzag_jax.cu_seqlens_from_segment_ids(i, 4, return_lengths=True), SEGMENT_IDS),
    "segment_ids, positions": (
        lambda i, p: zigzag_jax.cu_seqlens_from_segment_ids(i, 8, positions=p),
        SEGMENT_IDS.reshape(2, 32),
        POSITIONS.reshape(2, 32),
    ),
    "from position_ids": (lambda p: zigzag_jax.cu_seqlens_from_position_ids(p, 4), POSITIONS),
    "prepare_batch": (lambda c: zigzag_jax.prepare_batch(c, 1, WORLD_SIZE, backend="reference"), OFFSETS),
    "merge_partials": (zigzag_jax.merge_partials, PARTS, PART_LSE.astype(np.float32)),
}
SPECS = {"first": P("dp"), "second": P(None, "cp"), "both": P("dp", "cp"), "two axes": P(("dp", "cp"))}


@functools.cache
def typed_mesh():
    if jax.device_count() < 4:
        pytest.skip("needs 4 devices")
    return jax.make_mesh((2, 2), ("dp", "cp"), axis_types=(AxisType.Explicit,) * 2, devices=jax.devices()[:4])


def spread(x, spec):
    """`x` spread by as much of `spec` as it has dimensions that the mesh divides."""
    size = {"dp": 2, "cp": 2, ("dp", "cp"): 4, None: 1}
    axes = [axis if n % size[axis] == 0 else None for n, axis in zip(x.shape, spec, strict=False)]
    return jax.device_put(x, NamedSharding(typed_mesh(), P(*axes)))


@pytest.mark.parametrize(
    "spec", [pytest.param(x, marks=[pytest.mark.slow] * (x in ("first", "second"))) for x in SPECS]
)  # both axes spread either dimension too
@pytest.mark.parametrize("name", HELPERS)
def test_helpers_of_spread_arrays_give_the_values_of_whole_ones(name, spec):
    helper, *arrays = HELPERS[name]
    wanted = jax.tree.leaves(helper(*map(jnp.asarray, arrays)))
    with jax.set_mesh(typed_mesh()):
        given = [spread(x, SPECS[spec]) for x in arrays]
        results = [jax.tree.leaves(function(*given)) for function in (helper, jax.jit(helper))]
    for result in results:
        jax.tree.map(np.testing.assert_array_equal, result, wanted)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("name", ["shard", "unshard", "pad_to_zigzag", "unpad"])
def test_gradients_are_spread_as_the_arrays_are(name, spec):
    helper, x, *rest = HELPERS[name]

    def loss(x):
        return sum((y * jnp.arange(y.shape[0])[:, None]).sum() for y in jax.tree.leaves(helper(x, *rest)) if y.ndim > 1)

    wanted = jax.grad(loss)(jnp.asarray(x))
    with jax.set_mesh(typed_mesh()):
        given = spread(x, SPECS[spec])
        gradient = jax.jit(jax.grad(loss))(given)
    np.testing.assert_array_equal(gradient, wanted)
    assert gradient.sharding.is_equivalent_to(given.sharding, gradient.ndim)


@pytest.mark.parametrize("of_lse", [P(), P("cp"), P(None, "dp"), P(None, "cp", "dp")], ids=str)
@pytest.mark.parametrize("of_out", [P(), P("cp"), P(None, "dp"), P(None, None, "cp"), P(None, "dp", "cp")], ids=str)
def test_parts_are_merged_however_out_and_lse_are_spread(of_out, of_lse):
    out, lse = (np.random.default_rng(0).standard_normal(shape, np.float32) for shape in ((2, 8, 4, 16), (2, 4, 8)))
    wanted = zigzag_jax.merge_partials(jnp.asarray(out), jnp.asarray(lse))
    with jax.set_mesh(typed_mesh()):
        given = spread(out, of_out), spread(lse, of_lse)
        for merge in (zigzag_jax.merge_partials, jax.jit(zigzag_jax.merge_partials)):
            jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), merge(*given), wanted)


@pytest.mark.parametrize("compiled", [False, True])
def test_attention_of_spread_rows_outside_shard_map_is_refused(compiled):
    q = np.ones((TOTAL, 2, 16), np.float32)
    attend = functools.partial(zigzag_jax.zigzag_attention, backend="reference")
    with jax.set_mesh(typed_mesh()):
        heads = spread(q, P(None, "cp"))
        np.testing.assert_allclose(attend(heads, heads, heads, OFFSETS)[:48], 1, rtol=1e-6)
        rows = spread(q, P("cp"))
        with pytest.raises(ValueError, match=r"q: expected rows that no mesh axis spreads, .* spread over \('cp',\)"):
            (jax.jit(attend) if compiled else attend)(rows, rows, rows, jnp.asarray(OFFSETS))
