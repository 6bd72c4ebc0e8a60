"""The model of `model.py` in JAX: modules of Flax NNX, attention to packed rows by `segmented_attention`."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from model import BETAS, VOCABULARY, Sizes
from text import Room
from zigzag_jax import SegmentedBatch, host, prepare_segments, segmented_attention, token_mean_loss


def trainer(
    weights: dict,
    sizes: Sizes,
    learning_rate: float,
    room: Room,
    mesh: Mesh | None = None,
    method: str = "allgather",
) -> Callable[[list], float]:
    """A function that takes one Adam step on documents and returns the loss before it. `weights` are NumPy arrays.

    With a `mesh` of the axes "data" and "context" the documents, which are given whole, are spread over all devices.
    """
    replicas, ranks = (mesh.shape["data"], mesh.shape["context"]) if mesh else (1, 1)
    rows = replicas, room.row_length(replicas, ranks), ranks
    attention = {"mesh": mesh, "batch_axis": "data" if mesh else None, "method": method}
    weights = jax.device_put(weights, NamedSharding(mesh, P()) if mesh else None)

    @nnx.jit
    def begin(weights):
        model = Model(sizes, attention, rngs=nnx.Rngs(0))
        model.load(weights)
        return model, nnx.Optimizer(model, optax.adam(learning_rate, *BETAS), wrt=nnx.Param)

    @nnx.jit
    def update(model, optimizer, packed):
        def mean_loss(model):
            batch = prepare_segments(packed.segment_ids, packed.position_ids, max_segments=room.documents, **attention)
            logits = model(packed.input_ids, packed.position_ids, batch)
            return token_mean_loss(logits, packed.labels, packed.num_targets)

        value, gradients = nnx.value_and_grad(mean_loss)(model)
        optimizer.update(model, gradients)
        return value

    model, optimizer = begin(weights)

    def step(documents: list) -> float:
        packed = host.pack_rows(documents, *rows)  # grain's or any other loader can do this in its workers
        return float(update(model, optimizer, put(packed, mesh) if mesh else packed))

    return step


def put(packed: host.PackedRows, mesh: Mesh) -> host.PackedRows:
    """The batch on the devices of `mesh`. Each process puts what its devices need; JAX compares the fingerprints."""

    def put_part(x, spec):
        return jax.make_array_from_callback(x.shape, NamedSharding(mesh, spec), lambda index: x[index])

    # Replicas have other rows, and the devices of one replica share each row.
    specs = packed.specs("context", "data")
    fingerprint = jax.device_put(packed.fingerprint, NamedSharding(mesh, specs.fingerprint))
    return jax.tree.map(put_part, packed, specs)._replace(fingerprint=fingerprint)


class Model(nnx.Module):
    """Logits `[B, S, 256]` of the byte that follows each token."""

    def __init__(self, sizes: Sizes, attention: dict, *, rngs: nnx.Rngs):
        self.embedding = nnx.Embed(VOCABULARY, sizes.dim, rngs=rngs)
        self.layers = nnx.List([Layer(sizes, attention, rngs=rngs) for _ in range(sizes.layers)])
        self.norm = nnx.RMSNorm(sizes.dim, rngs=rngs)
        self.logits = linear(sizes.dim, VOCABULARY, rngs=rngs)
        self.frequencies = tuple(sizes.rope_frequencies.tolist())

    def __call__(self, ids: jax.Array, positions: jax.Array, batch: SegmentedBatch) -> jax.Array:
        angles = positions[..., None, None] * jnp.array(self.frequencies, jnp.float32)  # [B, S, 1, head_dim / 2]
        x = self.embedding(ids)
        for layer in self.layers:
            x = layer(x, angles, batch)
        return self.logits(self.norm(x))

    def load(self, weights: dict) -> None:
        """Take the weights of `model.initial_weights`."""
        self.embedding.embedding[...] = weights["embedding"]
        self.norm.scale[...] = weights["norm"]
        self.logits.kernel[...] = weights["logits"]
        for layer, of_layer in zip(self.layers, weights["layers"], strict=True):
            for name, x in of_layer.items():
                module = getattr(layer, name)
                parameter = module.scale if isinstance(module, nnx.RMSNorm) else module.kernel
                parameter[...] = x


class Layer(nnx.Module):
    def __init__(self, sizes: Sizes, attention: dict, *, rngs: nnx.Rngs):
        of_heads, of_kv_heads = sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
        self.head_dim = sizes.head_dim
        self.attend = functools.partial(segmented_attention, **attention)
        self.attention_norm, self.mlp_norm = (nnx.RMSNorm(sizes.dim, rngs=rngs) for _ in range(2))
        self.q, self.o = linear(sizes.dim, of_heads, rngs=rngs), linear(of_heads, sizes.dim, rngs=rngs)
        self.k, self.v = (linear(sizes.dim, of_kv_heads, rngs=rngs) for _ in range(2))
        self.gate, self.up = (linear(sizes.dim, sizes.hidden, rngs=rngs) for _ in range(2))
        self.down = linear(sizes.hidden, sizes.dim, rngs=rngs)

    def __call__(self, x: jax.Array, angles: jax.Array, batch: SegmentedBatch) -> jax.Array:
        y = self.attention_norm(x)
        q, k, v = (project(y).reshape(*y.shape[:2], -1, self.head_dim) for project in (self.q, self.k, self.v))
        out = self.attend(rotate(q, angles), rotate(k, angles), v, batch)  # [B, S, heads, head_dim]
        x = x + self.o(out.reshape(*out.shape[:2], -1))
        y = self.mlp_norm(x)
        return x + self.down(jax.nn.silu(self.gate(y)) * self.up(y))


linear = functools.partial(nnx.Linear, use_bias=False)


def rotate(x: jax.Array, angles: jax.Array) -> jax.Array:
    """RoPE (Su et al., 2021): turns the pair (x[i], x[i + head_dim / 2]) of every head by angle i."""
    first, second = jnp.split(x, 2, axis=-1)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
