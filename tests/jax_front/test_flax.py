"""The layers of Flax, Linen and NNX, with our attention give what they give with Flax's own, or refuse by name."""

import functools
import inspect

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from tests.support.packed_rows import make_rows
from tests.support.spread import mesh_of
from zigzag_jax import host, prepare_segments
from zigzag_jax.flax import linen_attention, nnx_attention

FEATURES, S = 32, 16
DOCUMENTS = [[(1, 5), (2, 7), (0, 4)], [(3, 16)]]
ROWS = make_rows(DOCUMENTS, S)
PAIRS = [(linen_attention(causal=False), nn.dot_product_attention), (nnx_attention(), nnx.dot_product_attention)]
# Projections of layers too, which a GPU multiplies in 19 bits otherwise.
pytestmark = pytest.mark.usefixtures("_float32_products")
close = functools.partial(jax.tree.map, functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5))


@pytest.fixture
def _float32_products():
    with jax.default_matmul_precision("highest"):
        yield


def inputs(*shape):
    return jax.random.normal(jax.random.key(0), (*shape, FEATURES))


def value_and_gradient(function, weights, x):
    """The outputs, and the gradients of the sum of their squares."""

    def loss(weights, x):
        out = function(weights, x)
        return jnp.sum(out**2), out

    (_, out), gradients = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(weights, x)
    return out, gradients


@pytest.mark.parametrize(("batch", "causal"), [((), False), ((2, 3), True)], ids=str)
def test_a_linen_layer(batch, causal):
    x = inputs(*batch, S)
    layer = functools.partial(nn.MultiHeadDotProductAttention, num_heads=4)
    own, ours = layer(), layer(attention_fn=linen_attention(causal=causal))
    weights = jax.jit(own.init)(jax.random.key(1), x)
    mask = nn.make_causal_mask(x[..., 0]) if causal else None
    wanted = value_and_gradient(functools.partial(own.apply, mask=mask), weights, x)
    close(value_and_gradient(ours.apply, weights, x), wanted)


@pytest.mark.parametrize(("batch", "causal"), [((), True), ((2, 3), False)], ids=str)
def test_an_nnx_layer(batch, causal):
    """With fewer KV heads than query heads."""
    x = inputs(*batch, S)
    layer = nnx.MultiHeadAttention(num_heads=4, num_kv_heads=2, in_features=FEATURES, decode=False, rngs=nnx.Rngs(0))
    results = []
    for attend in (layer.attention_fn, nnx_attention()):
        layer.attention_fn = attend
        graph, weights = nnx.split(layer)
        results.append(
            value_and_gradient(lambda w, x, graph=graph: nnx.merge(graph, w)(x, is_causal=causal), weights, x)
        )
    close(results[1], results[0])


def mask_of_documents():
    """The causal mask of the documents of `ROWS`, in the order of the tokens."""
    ids = ROWS.segment_ids
    return nn.combine_masks(nn.make_causal_mask(ids), nn.make_attention_mask(ids, ids, jnp.equal))


def documents_on_a_mesh(function, weights, x):
    """`function(weights, x, batch)` of rows in the order of two devices, as `value_and_gradient` of those in order.

    What comes of padding counts for nothing.
    """
    rows = {"mesh": mesh_of(2, 2, names=("data", "context")), "batch_axis": "data"}
    real = (ROWS.segment_ids != 0)[..., None]

    def apply(weights, x):
        x, ids, positions, shown = (host_order(y) for y in (x, ROWS.segment_ids, ROWS.positions, real))
        x = jax.lax.with_sharding_constraint(x, jax.NamedSharding(rows["mesh"], P("data", "context")))
        batch = prepare_segments(ids, positions, max_segments=2, **rows)
        return host_order(function(weights, x, batch) * shown, to_contiguous=True)

    def host_order(x, **options):
        return x[:, host.reorder_rows(np.arange(S)[None], 2, **options)[0]]

    return value_and_gradient(apply, weights, x)


def test_documents_in_a_linen_layer_on_a_mesh():
    x, mesh, real = inputs(2, S), mesh_of(2, 2, names=("data", "context")), (ROWS.segment_ids != 0)[..., None]
    layer = functools.partial(nn.MultiHeadDotProductAttention, num_heads=4)
    own = layer()
    # Rematerialised, so that the batch goes through a transformation of Flax as well.
    ours = nn.remat(nn.MultiHeadDotProductAttention)(
        num_heads=4, attention_fn=linen_attention(causal=True, mesh=mesh, batch_axis="data")
    )
    weights = jax.jit(own.init)(jax.random.key(1), x)
    wanted = value_and_gradient(lambda w, x: own.apply(w, x, mask=mask_of_documents()) * real, weights, x)
    close(documents_on_a_mesh(lambda w, x, batch: ours.apply(w, x, mask=batch), weights, x), wanted)


def test_documents_in_an_nnx_layer_on_a_mesh():
    x, mesh, real = inputs(2, S), mesh_of(2, 2, names=("data", "context")), (ROWS.segment_ids != 0)[..., None]
    layer = nnx.MultiHeadAttention(num_heads=4, num_kv_heads=2, in_features=FEATURES, decode=False, rngs=nnx.Rngs(0))
    graph, weights = nnx.split(layer)
    wanted = value_and_gradient(lambda w, x: nnx.merge(graph, w)(x, mask=mask_of_documents()) * real, weights, x)
    layer.attention_fn = nnx_attention(mesh=mesh, batch_axis="data")
    graph, _ = nnx.split(layer)

    def ours(weights, x, batch):
        return nnx.merge(graph, weights)(x, mask=batch, is_causal=True)

    close(documents_on_a_mesh(ours, weights, x), wanted)


def test_all_arguments_of_flax_have_their_names():
    """Linen leaves out arguments that a signature does not have, and so would drop a mask in silence."""
    for ours, own in (
        (linen_attention(causal=True), nn.dot_product_attention),
        (nnx_attention(), nnx.dot_product_attention),
    ):
        assert [*inspect.signature(ours).parameters] == [*inspect.signature(own).parameters]


def test_types_are_those_of_flax():
    q, k, v = (jnp.ones((1, S, 2, 16), dtype) for dtype in (jnp.bfloat16, jnp.float32, jnp.bfloat16))
    for ours, own in (
        (linen_attention(causal=False), nn.dot_product_attention),
        (nnx_attention(), nnx.dot_product_attention),
    ):
        for dtype in (None, jnp.bfloat16):
            wanted = jax.eval_shape(functools.partial(own, dtype=dtype), q, k, v)
            assert jax.eval_shape(functools.partial(ours, dtype=dtype), q, k, v) == wanted
    promoted = jax.eval_shape(
        functools.partial(nnx_attention(), promote_dtype=lambda x, dtype: [y.astype(jnp.float16) for y in x]), q, k, v
    )
    assert promoted.dtype == jnp.float16


REFUSED = {
    "bias": {"bias": jnp.zeros((1, 2, S, S))},
    "mask": {"mask": jnp.ones((1, 1, S, S), bool)},
    "dropout_rate": {"dropout_rate": 0.1, "dropout_rng": jax.random.key(0)},
    "sow_weights": {"module": object()},
}


@pytest.mark.parametrize("attend", [linen_attention(causal=True), nnx_attention()], ids=["linen", "nnx"])
@pytest.mark.parametrize("name", REFUSED)
def test_what_attention_cannot_do_is_refused(attend, name):
    q = jnp.ones((1, S, 2, 16))
    with pytest.raises(ValueError, match=f"{name}: expected "):
        attend(q, q, q, **REFUSED[name])


def test_layers_that_ask_for_it_are_refused():
    x, attend = inputs(1, S), linen_attention(causal=True)
    for name, options, call in (
        ("mask", {}, {"mask": nn.make_causal_mask(jnp.ones((1, S)))}),
        ("sow_weights", {}, {"sow_weights": True}),
        ("dropout_rate", {"dropout_rate": 0.5, "deterministic": False}, {"dropout_rng": jax.random.key(0)}),
        (
            "qk_attn_weights_einsum",
            {f"{x}_einsum_cls": lambda: jnp.einsum for x in ("qk_attn_weights", "attn_weights_value")},
            {},
        ),
    ):
        layer = nn.MultiHeadDotProductAttention(num_heads=2, attention_fn=attend, **options)
        with pytest.raises(ValueError, match=f"{name}: expected"):
            jax.eval_shape(functools.partial(layer.init, **call), jax.random.key(0), x)
    quiet = nn.MultiHeadDotProductAttention(num_heads=2, attention_fn=attend, dropout_rate=0.5, deterministic=True)
    assert jax.eval_shape(quiet.init, jax.random.key(0), x)
    layer = nnx.MultiHeadAttention(
        num_heads=2, in_features=FEATURES, attention_fn=nnx_attention(), dropout_rate=0.5, rngs=nnx.Rngs(0)
    )
    for name, call in (
        ("dropout_rate", {"deterministic": False}),
        ("sow_weights", {"deterministic": True, "sow_weights": True}),
    ):
        with pytest.raises(ValueError, match=f"{name}: expected"):
            layer(x, decode=False, **call)
    layer.init_cache((1, S, FEATURES))
    with pytest.raises(ValueError, match="mask: expected"):
        layer(x[:, :1], decode=True, deterministic=True)


def test_options_that_no_attention_has_are_refused():
    for make in (functools.partial(linen_attention, causal=True), nnx_attention):
        with pytest.raises(TypeError, match="windowsize: expected one of the options mesh, axis"):
            make(windowsize=(4, 0))
