"""The model of `model.py` in JAX: plain functions of a dict of weights, attention by `zigzag_attention`."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from model import Sizes
from text import Room
from zigzag_jax import Batch, host, prepare_batch, token_mean_loss, zigzag_attention


def trainer(
    weights: dict,
    sizes: Sizes,
    learning_rate: float,
    room: Room,
    mesh: Mesh | None = None,
    method: str = "allgather",
) -> Callable[[list], float]:
    """A function that takes one Adam step on documents and returns the loss before it. `weights` are NumPy arrays.

    With a `mesh`, each device of its axis "cp" computes its zigzag rows of the documents, which are given whole.
    """
    weights = jax.device_put(weights, NamedSharding(mesh, P()) if mesh else None)
    means = squares = jax.tree.map(jnp.zeros_like, weights)
    steps = 0

    world_size, axis_name = (mesh.shape["cp"], "cp") if mesh else (1, None)
    size = {"tokens": room.rows(world_size), "max_documents": room.documents}  # the same for every batch

    def mean_loss(weights, batch):
        logits = forward(weights, sizes, batch, axis_name, method)
        return token_mean_loss(logits, batch.labels, batch.num_targets, axis_name=axis_name)

    @jax.jit
    def update(weights, means, squares, batch, step_size, correction):
        of_mesh = mean_loss
        if mesh:  # each device has its rows, and all have the rest
            of_mesh = jax.shard_map(mean_loss, mesh=mesh, in_specs=(P(), batch.specs("cp")), out_specs=P())
        value, gradients = jax.value_and_grad(of_mesh)(weights, batch)
        weights, means, squares = adam(weights, gradients, means, squares, step_size, correction)
        return value, weights, means, squares

    def step(documents: list) -> float:
        nonlocal weights, means, squares, steps
        steps += 1
        # 1 - 0.999 has four digits left in float32, so these are computed here, as torch.optim does.
        step_size, correction = learning_rate / (1 - 0.9**steps), (1 - 0.999**steps) ** 0.5
        batch = host.shard_documents(documents, world_size, **size)
        batch = put(batch, mesh) if mesh else batch
        value, weights, means, squares = update(weights, means, squares, batch, step_size, correction)
        return float(value)

    return step


def put(batch: host.ShardedBatch, mesh: Mesh) -> host.ShardedBatch:
    """The batch on the devices of `mesh`. Each process puts what its devices need; JAX compares the fingerprints."""

    def put_part(x, spec):
        return jax.make_array_from_callback(x.shape, NamedSharding(mesh, spec), lambda index: x[index])

    fingerprint = jax.device_put(batch.fingerprint, NamedSharding(mesh, P()))
    return dataclasses.replace(jax.tree.map(put_part, batch, batch.specs("cp")), fingerprint=fingerprint)


def adam(weights, gradients, means, squares, step_size, correction):
    """Adam (Kingma & Ba, 2014) with the constants of `torch.optim.Adam`."""
    means = jax.tree.map(lambda m, g: m + 0.1 * (g - m), means, gradients)
    squares = jax.tree.map(lambda s, g: 0.999 * s + 0.001 * g * g, squares, gradients)
    weights = jax.tree.map(
        lambda w, m, s: w - step_size * m / (jnp.sqrt(s) / correction + 1e-8), weights, means, squares
    )
    return weights, means, squares


def forward(weights: dict, sizes: Sizes, batch: host.ShardedBatch, axis_name: str | None, method: str) -> jax.Array:
    """Logits `[T, 256]` of the byte that follows each of the T rows; inside `shard_map` those of one device."""
    options = {"axis_name": axis_name, "method": method}
    prepared = prepare_batch(batch, **options)  # once for all layers, both ways
    attend = functools.partial(zigzag_attention, **options)
    angles = batch.position_ids[:, None, None] * sizes.rope_frequencies  # [T, 1, head_dim/2]
    x = weights["embedding"][batch.input_ids]  # [T, dim]
    for layer in weights["layers"]:
        x = x + attention(layer, sizes, rms_norm(x, layer["attention_norm"]), angles, prepared, attend)
        x = x + swiglu(layer, rms_norm(x, layer["mlp_norm"]))
    return rms_norm(x, weights["norm"]) @ weights["logits"]


def attention(
    layer: dict, sizes: Sizes, x: jax.Array, angles: jax.Array, batch: Batch, attend: Callable[..., jax.Array]
) -> jax.Array:
    q = (x @ layer["q"]).reshape(len(x), sizes.heads, -1)  # [T, heads, head_dim]
    k = (x @ layer["k"]).reshape(len(x), sizes.kv_heads, -1)  # [T, kv_heads, head_dim]
    v = (x @ layer["v"]).reshape(len(x), sizes.kv_heads, -1)
    out = attend(rotate(q, angles), rotate(k, angles), v, batch)
    return out.reshape(len(x), -1) @ layer["o"]


def swiglu(layer: dict, x: jax.Array) -> jax.Array:
    return (jax.nn.silu(x @ layer["gate"]) * (x @ layer["up"])) @ layer["down"]


def rms_norm(x: jax.Array, weight: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6) * weight


def rotate(x: jax.Array, angles: jax.Array) -> jax.Array:
    """RoPE (Su et al., 2021): turns the pair (x[i], x[i + head_dim / 2]) of every head by angle i."""
    first, second = jnp.split(x, 2, axis=-1)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
