"""`segmented_attention` of packed rows on a mesh, however the caller maps over it, and what it refuses by name."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import zigzag_jax
from tests.support import oracle
from tests.support.closeness import assert_sums_close
from tests.support.packed_rows import assert_rows_are_right, dealt_out, make_rows, results_of, row_order
from tests.support.spread import KERNELS, mesh_of, value_and_gradients
from zigzag_jax import host

# Neighbours with one id that restart, an id that returns, padding behind and a row of nothing else.
DOCUMENTS = [[(1, 5), (2, 7)], [(3, 16)], [(7, 1), (2, 9), (7, 6)], [(0, 16)]]
RESTARTING = [[(1, 8), (1, 5)], [(1, 16)], [(2, 3), (2, 3), (2, 10)], [(4, 15)]]
ROWS, AGAIN = make_rows(DOCUMENTS, 16), make_rows(RESTARTING, 16)
NAMES = "data", "context", "tensor"
ON_MESH = {"batch_axis": "data", "head_axis": "tensor", "max_segments": 3, "return_lse": True}
QKV, LSE, IDS = P("data", "context", "tensor"), P("data", "tensor", "context"), P("data", "context")
SHARDS = (QKV,) * 4 + (LSE, IDS, IDS)


def typed_mesh(shape, names=NAMES, kind=AxisType.Explicit):
    if jax.device_count() < np.prod(shape):
        pytest.skip(f"needs {np.prod(shape)} devices")
    return jax.make_mesh(shape, names, axis_types=(kind,) * len(shape), devices=jax.devices()[: np.prod(shape)])


def put(mesh, specs):
    """`ROWS` dealt out, on the devices of `mesh`."""
    return [jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip(dealt_out(ROWS, 2), specs, strict=True)]


def step(**options):
    """`(q, k, v, dout, dlse, segment_ids, positions) -> out, lse, dq, dk, dv`."""
    return value_and_gradients(functools.partial(zigzag_jax.segmented_attention, **options))


@pytest.mark.parametrize(
    ("documents", "rows", "method"),
    [(DOCUMENTS, ROWS, "ring"), (RESTARTING, AGAIN, "allgather")],
    ids=["ids", "restarting"],
)
def test_rows_on_a_mesh_of_three_axes(documents, rows, method):
    mesh = mesh_of(2, 2, 2, names=NAMES)
    results = jax.jit(step(mesh=mesh, method=method, backend=KERNELS, **ON_MESH))(*dealt_out(rows, 2))
    assert results[0].sharding.spec == QKV
    assert_rows_are_right(results, documents, rows, 2)


def test_without_a_mesh_one_device_has_the_rows():
    results = jax.jit(step(max_segments=3, return_lse=True, backend=KERNELS))(*ROWS)
    assert_rows_are_right(results, DOCUMENTS, ROWS, 1)


def test_axes_that_are_types():
    mesh = typed_mesh((2, 2, 2))
    with jax.set_mesh(mesh):
        arrays = put(mesh, SHARDS)
        results = jax.jit(step(backend="reference", **ON_MESH))(*arrays)
    for result, model in zip(results, (arrays[0], arrays[4], *arrays[:3]), strict=True):
        assert result.sharding.is_equivalent_to(model.sharding, result.ndim)
    assert_rows_are_right(results, DOCUMENTS, ROWS, 2)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_keys_that_are_whole_along_the_sequence(kind):
    """As MaxText leaves them: gradients come back as whole arrays too."""
    mesh = typed_mesh((2, 2, 2), kind=kind)
    whole = P("data", None, "tensor")
    specs = [QKV, whole, whole, *SHARDS[3:]]
    with jax.set_mesh(mesh):
        results = jax.jit(step(backend="reference", **ON_MESH))(*put(mesh, specs))
    assert_rows_are_right(results, DOCUMENTS, ROWS, 2)


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("keys", ["shards", "whole"])
def test_inside_a_shard_map_over_all_axes(keys, check_vma):
    mesh = mesh_of(2, 2, 2, names=NAMES)
    of_keys = QKV if keys == "shards" else P("data", None, "tensor")
    attend = functools.partial(zigzag_jax.segmented_attention, backend="reference", **ON_MESH)
    mapped = jax.shard_map(
        attend, mesh=mesh, in_specs=(QKV, of_keys, of_keys, IDS, IDS), out_specs=(QKV, LSE), check_vma=check_vma
    )
    results = jax.jit(value_and_gradients(mapped))(*dealt_out(ROWS, 2))
    assert_rows_are_right(results, DOCUMENTS, ROWS, 2)


def test_a_shard_map_over_some_axes_is_refused():
    mesh = mesh_of(2, 2, 2, names=NAMES)
    attend = functools.partial(zigzag_jax.segmented_attention, backend="reference", **ON_MESH)
    of_rows = (P("data"),) * 5
    mapped = jax.shard_map(attend, mesh=mesh, in_specs=of_rows, out_specs=(P("data"),) * 2, axis_names={"data"})
    with pytest.raises(ValueError, match=r"axis_names: expected a shard_map over all axes .* got one over .*data"):
        jax.eval_shape(mapped, *ROWS[:3], *ROWS[5:])


@pytest.mark.parametrize("backend", [KERNELS, "reference"])
def test_a_batch_is_prepared_once_for_layers_in_a_shard_map_of_each(backend):
    mesh = mesh_of(2, 2, 2, names=NAMES)
    common = {"batch_axis": "data", "backend": backend}
    attend = functools.partial(zigzag_jax.segmented_attention, head_axis="tensor", return_lse=True, **common)

    @jax.jit
    def whole_step(q, k, v, dout, dlse, segment_ids, positions):
        batch = zigzag_jax.prepare_segments(segment_ids, positions, max_segments=3, mesh=mesh, **common)
        layer = jax.shard_map(attend, mesh=mesh, in_specs=(QKV, QKV, QKV, batch.specs), out_specs=(QKV, LSE))
        layer = functools.partial(attend, mesh=mesh) if backend == "reference" else layer
        return value_and_gradients(lambda q, k, v: layer(q, k, v, batch))(q, k, v, dout, dlse)

    assert_rows_are_right(whole_step(*dealt_out(ROWS, 2)), DOCUMENTS, ROWS, 2)


@pytest.mark.parametrize("prepared", [False, True])
def test_windows_by_halos(prepared):
    mesh = mesh_of(2, 2, names=("data", "context"))
    rows = {"mesh": mesh, "batch_axis": "data", "method": "halo", "backend": "reference"}

    def attend(q, k, v, *ids, max_segments=3):
        if prepared:  # for the largest of two windows
            ids = (zigzag_jax.prepare_segments(*ids, max_segments=max_segments, window_size=(3, 0), **rows),)
        more = {} if prepared else {"max_segments": max_segments}
        return zigzag_jax.segmented_attention(q, k, v, *ids, window_size=(2, 0), return_lse=True, **rows, **more)

    results = jax.jit(value_and_gradients(attend))(*dealt_out(ROWS, 2))
    assert_rows_are_right(results, DOCUMENTS, ROWS, 2, options=oracle.Options(window_size=(2, 0)))


@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 2), (8, 1), (4, 2), (4, 4)])
def test_kv_heads_fewer_than_devices_of_the_head_axis(heads, kv_heads):
    """A device attends to those that its query heads share with other devices, or not."""
    mesh, documents = typed_mesh((2, 4), ("context", "tensor"), AxisType.Auto), [[(1, 3), (2, 5)]]
    rows = make_rows(documents, 8, heads=heads, kv_heads=kv_heads)
    options = {"mesh": mesh, "head_axis": "tensor", "max_segments": 2, "return_lse": True, "backend": "reference"}
    results = jax.jit(step(**options))(*dealt_out(rows, 2))
    assert_rows_are_right(results, documents, rows, 2)


def test_kv_heads_spread_over_the_first_of_two_head_axes():
    mesh, documents = typed_mesh((2, 2, 2), ("context", "kv", "group"), AxisType.Auto), [[(1, 3), (2, 5)]]
    rows = make_rows(documents, 8, heads=8, kv_heads=2)
    options = {"mesh": mesh, "head_axis": ("kv", "group"), "kv_head_axis": "kv", "max_segments": 2, "return_lse": True}
    results = jax.jit(step(backend="reference", **options))(*dealt_out(rows, 2))
    assert_rows_are_right(results, documents, rows, 2)


def test_kv_heads_that_devices_share_inside_a_shard_map():
    mesh, documents = mesh_of(2, 4, names=("context", "tensor")), [[(1, 3), (2, 5)]]
    rows = make_rows(documents, 8, heads=8, kv_heads=2)
    of_q, of_keys, of_ids = P(None, "context", "tensor"), P(None, "context"), P(None, "context")
    options = {"head_axis": "tensor", "max_segments": 2, "return_lse": True, "backend": "reference"}

    def mapped(**others):
        attend = functools.partial(zigzag_jax.segmented_attention, **options, **others)
        specs = {
            "in_specs": (of_q, of_keys, of_keys, of_ids, of_ids),
            "out_specs": (of_q, P(None, "tensor", "context")),
        }
        return jax.jit(value_and_gradients(jax.shard_map(attend, mesh=mesh, **specs)))

    assert_rows_are_right(mapped(kv_head_axis=())(*dealt_out(rows, 2)), documents, rows, 2)
    with pytest.raises(ValueError, match=r"k: expected .* got the same along the mesh axes \['tensor'\]"):
        mapped()(*dealt_out(rows, 2))


def test_options_reach_the_kernels():
    """The gradient of sinks, which all rows share, is summed over all devices."""
    sinks = np.linspace(-1, 1, 4, dtype=np.float32)
    options = {"causal": False, "window_size": (4, 2), "attention_chunk": 6, "softcap": 3.0, "softmax_scale": 0.4}
    mesh = mesh_of(2, 2, 2, names=NAMES)
    attend = functools.partial(zigzag_jax.segmented_attention, mesh=mesh, backend=KERNELS, **ON_MESH, **options)

    @jax.jit
    def run(q, k, v, dout, dlse, *ids):
        results, pullback = jax.vjp(lambda q, k, v, s: attend(q, k, v, *ids, sinks=s), q, k, v, jnp.asarray(sinks))
        return *results, *pullback((dout, dlse))

    *results, dsinks = run(*dealt_out(ROWS, 2))
    wanted = {"causal": options.pop("causal"), "softmax_scale": options.pop("softmax_scale")}
    wanted["options"] = oracle.Options(sinks=sinks, **options)
    assert_rows_are_right(results, DOCUMENTS, ROWS, 2, **wanted)
    terms = [
        results_of(ROWS, DOCUMENTS, x, **wanted)["sink_terms"]
        for x in (oracle.EXACT, oracle.straightforward("float32"))
    ]
    assert_sums_close("dsinks", dsinks, *terms)


def test_rows_without_ids_are_one_document_and_positions_alone_say_where_others_begin():
    mesh = mesh_of(2, 2, names=("data", "context"))
    options = {"mesh": mesh, "batch_axis": "data", "return_lse": True, "backend": "reference"}
    whole = make_rows([[(1, 16)]] * 2, 16)
    results = jax.jit(value_and_gradients(functools.partial(zigzag_jax.segmented_attention, **options)))(
        *dealt_out(whole, 2)[:5]
    )
    assert_rows_are_right(results, [[(1, 16)]] * 2, whole, 2)
    documents = [[(1, 5), (1, 11)], [(1, 16)]]
    rows = make_rows(documents, 16)
    function = functools.partial(zigzag_jax.segmented_attention, max_segments=2, **options)
    results = jax.jit(value_and_gradients(lambda q, k, v, positions: function(q, k, v, None, positions)))(
        *(x for x, name in zip(dealt_out(rows, 2), rows._fields, strict=True) if name != "segment_ids")
    )
    assert_rows_are_right(results, documents, rows, 2)


def test_documents_that_are_each_dealt_out():
    """Each device has as many tokens of each."""
    lengths, rows = [[(1, 8), (2, 4)], [(1, 16)]], make_rows([[(1, 8), (2, 4)], [(1, 16)]], 16)
    of_row = []
    for documents in lengths:
        places, start = [[], []], 0
        for _, tokens in [*documents, (0, 16 - sum(tokens for _, tokens in documents))]:
            for rank in range(2):
                places[rank] += list(start + oracle.rank_positions(tokens, rank, 2))
            start += tokens
        of_row.append(np.concatenate(places))
    order = np.stack(of_row)

    def deal(x):
        return np.take_along_axis(x, order.reshape(*order.shape, *(1,) * (x.ndim - 2)), 1)

    mesh = mesh_of(2, 2, names=("data", "context"))
    attend = jax.jit(functools.partial(
        zigzag_jax.segmented_attention, mesh=mesh, batch_axis="data", max_segments=2, backend="reference",
        layout="document", return_lse=True,
    ))  # fmt: skip
    q, k, v = map(deal, rows[:3])
    out, lse = attend(q, k, v, deal(rows.segment_ids), deal(rows.positions))
    wanted = results_of(rows, lengths, oracle.EXACT)
    np.testing.assert_allclose(out, deal(wanted["out"]), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(lse.swapaxes(1, 2), deal(wanted["lse"].swapaxes(1, 2)), rtol=1e-5, atol=1e-6)
    # Ids of rows that are cut as a whole differ between the devices.
    assert np.isnan(attend(q, k, v, dealt_out(rows, 2).segment_ids, None)[0]).any()


def test_rows_are_reordered_on_the_host_and_back():
    x = np.arange(2 * 24 * 3).reshape(2, 24, 3)
    for world_size in (1, 2, 3):
        reordered = host.reorder_rows(x, world_size)
        np.testing.assert_array_equal(reordered, x[:, row_order(24, world_size)])
        np.testing.assert_array_equal(host.reorder_rows(reordered, world_size, to_contiguous=True), x)
    with pytest.raises(ValueError, match=r"row_length: expected a multiple of 2 \* world_size = 10, .* got 24"):
        host.reorder_rows(x, 5)
    with pytest.raises(ValueError, match=r"x: expected rows \[B, S, ...\], got shape \(4,\)"):
        host.reorder_rows(x[0, :4, 0], 2)


def test_what_ids_and_positions_cannot_be_is_nan():
    mesh = mesh_of(2, 2, names=("data", "context"))
    attend = jax.jit(functools.partial(
        zigzag_jax.segmented_attention, mesh=mesh, batch_axis="data", max_segments=2, backend="reference"
    ))  # fmt: skip
    rows = dealt_out(make_rows([[(1, 8), (2, 8)]] * 4, 16), 2)
    assert np.isfinite(attend(*rows[:3], rows.segment_ids, rows.positions)).all()
    # One document too many in the first row: NaN on the devices that share it.
    ids = rows.segment_ids.copy()
    ids[0] = dealt_out(make_rows([[(1, 8), (2, 4), (3, 4)]], 16), 2).segment_ids[0]
    out = np.asarray(attend(*rows[:3], ids, None))
    assert np.isnan(out[:2]).all()
    assert np.isfinite(out[2:]).all()
    skipping = rows.positions + (rows.positions > 2)  # tokens that are not there
    assert np.isnan(attend(*rows[:3], rows.segment_ids, skipping)).all()
    # Positions in the order of the tokens, where q is in that of the ranks.
    in_order = make_rows([[(1, 16)]] * 4, 16)
    assert np.isnan(attend(*rows[:3], in_order.segment_ids, in_order.positions)).all()


def test_options_of_segments_may_be_arrays_and_are_checked_before_they_select_a_program():
    """Arrays have no hash, and True equals 1, for which there is a program already."""
    prepare = functools.partial(zigzag_jax.prepare_segments, np.ones((1, 8), np.int32), mesh=mesh_of(2), axis="cp")
    for number in (1, np.array(1)):
        batch = prepare(max_segments=number, attention_chunk=number, max_seqlen=number, backend="reference").batch
        assert (batch.cu_seqlens.tolist(), batch.max_seqlen) == ([0, 8, 8], 1)
    for wrong in (True, 1.0, [1]):
        with pytest.raises(ValueError, match="max_segments: expected a positive int, got"):
            prepare(max_segments=wrong, attention_chunk=1, max_seqlen=1, backend="reference")


def test_an_abstract_mesh_takes_its_devices_from_arrays():
    mesh, ids = mesh_of(2, names=("context",)), np.ones((1, 8), np.int32)
    prepare = functools.partial(zigzag_jax.prepare_segments, max_segments=1, mesh=mesh.abstract_mesh)
    with pytest.raises(ValueError, match=r"NamedSharding.*AbstractMesh"):
        prepare(ids)
    placed = jax.device_put(ids, NamedSharding(mesh, P(None, "context")))
    assert prepare(placed).batch.rank.tolist() == [0, 1]
    with jax.set_mesh(mesh):
        assert prepare(ids).batch.rank.tolist() == [0, 1]


def test_arguments_that_do_not_fit_are_refused_by_name():
    mesh, explicit = mesh_of(2, 2, names=("context", "tensor")), typed_mesh((2, 2), ("context", "tensor"))
    q, k, v, ids, positions = (jnp.asarray(getattr(ROWS, name)) for name in ("q", "k", "v", "segment_ids", "positions"))
    attend = functools.partial(zigzag_jax.segmented_attention, mesh=mesh, max_segments=3)
    with pytest.raises(ValueError, match=r"mesh: expected an axis 'cp', got the axes"):
        attend(q, k, v, ids, axis="cp")
    with pytest.raises(ValueError, match=r"mesh: expected one with the head_axis 'tensor', .* got None"):
        attend(q, k, v, ids, mesh=None, head_axis="tensor")
    with pytest.raises(ValueError, match="q: expected heads that the 2 devices of head_axis 'tensor' divide, got 3"):
        attend(q[:, :, :3], k[:, :, :1], v[:, :, :1], ids, head_axis="tensor")
    with pytest.raises(ValueError, match="q: expected rows that the 2 devices of batch_axis 'tensor' divide, got 3"):
        attend(q[:3], k[:3], v[:3], ids[:3], batch_axis="tensor")
    with pytest.raises(ValueError, match=r"q: expected tokens .* a multiple of 4, got 14"):
        attend(q[:, :14], k[:, :14], v[:, :14], ids[:, :14])
    with pytest.raises(ValueError, match=r"kv_head_axis: expected the first axes of head_axis 'tensor', got 'context'"):
        attend(q, k, v, ids, head_axis="tensor", kv_head_axis="context")
    with pytest.raises(ValueError, match=r"k: expected KV heads of which .* got 3 KV heads for 3 query heads"):
        attend(*(jnp.ones((4, 16, heads, 16)) for heads in (6, 3, 3)), ids, head_axis="tensor", kv_head_axis=())
    with pytest.raises(ValueError, match=r"k: expected \[B, S\] = \[4, 16\] as in q, got shape \(4, 8, 2, 16\)"):
        attend(q, k[:, :8], v[:, :8], ids)
    with pytest.raises(ValueError, match="max_segments: expected the most documents of a row"):
        attend(q, k, v, ids, max_segments=None)
    with pytest.raises(ValueError, match="segment_ids: expected ids or positions, as max_segments is 3, got None"):
        attend(q, k, v)
    with pytest.raises(ValueError, match=r"segment_ids: expected integers \[B, S\] = \[4, 16\] as in q, got shape"):
        attend(q, k, v, ids[:2])
    with pytest.raises(ValueError, match="positions: expected integers"):
        attend(q, k, v, ids, positions.astype(float))
    with pytest.raises(ValueError, match="segment_ids: expected integers that int32 holds, got"):
        attend(q, k, v, np.asarray(ids, np.int64) << 33)  # JAX would make padding of them
    batch = jax.jit(functools.partial(zigzag_jax.prepare_segments, max_segments=3, mesh=mesh))(ids)
    with pytest.raises(ValueError, match="method: expected that of the prepared batch, 'allgather', got 'ring'"):
        attend(q, k, v, batch, method="ring")
    with pytest.raises(ValueError, match="positions: expected None with a batch of prepare_segments"):
        attend(q, k, v, batch, positions)
    with pytest.raises(ValueError, match="q: expected rows of 16 tokens, as the prepared batch has, got 8"):
        attend(q[:, :8], k[:, :8], v[:, :8], batch)
    alone = zigzag_jax.prepare_segments(ids[:1], max_segments=3)
    with pytest.raises(ValueError, match="q: expected the 1 rows of a device in the prepared batch, got 4"):
        zigzag_jax.segmented_attention(q, k, v, alone, backend="reference")
    spread = jax.device_put(q, NamedSharding(explicit, P(None, "context", "tensor")))
    with pytest.raises(ValueError, match=r"q: expected an array that is spread over .* 'tensor' too, .* or head_axis"):
        attend(spread, k, v, ids, mesh=explicit)


def test_one_launch_for_all_rows_of_a_device():
    """A loop over rows would launch the kernels of each by itself."""
    launched = []
    run = zigzag_jax.launch.run
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zigzag_jax.launch, "run", lambda made, *arrays: launched.append(made) or run(made, *arrays))
        attend = functools.partial(zigzag_jax.segmented_attention, max_segments=3, backend=KERNELS)
        jax.make_jaxpr(attend)(*ROWS[:3], ROWS.segment_ids)
    assert [made.kernel.fn.__name__ for made in launched][-1:] == ["attention_forward"]
    assert len(launched) == 2  # and one that builds the tables
