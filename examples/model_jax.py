"""The model of `model.py` in JAX: plain functions of a dict of weights, attention by `zigzag_attention`."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from model import Sizes
from text import NO_TARGET, TextBatch
from zigzag_jax import Batch, pad_to_zigzag, position_ids, prepare_batch, shard, zigzag_attention


def trainer(
    weights: dict, sizes: Sizes, learning_rate: float, mesh: Mesh | None = None, method: str = "allgather"
) -> Callable[[TextBatch], float]:
    """A function that takes one Adam step on a batch and returns the loss before it. `weights` are NumPy arrays.

    With a `mesh`, each device of its axis "cp" computes its zigzag rows of the batch, which is given whole.
    """
    weights = jax.device_put(weights, NamedSharding(mesh, P()) if mesh else None)
    means = squares = jax.tree.map(jnp.zeros_like, weights)
    steps = 0

    def mean_loss(weights, *batch):
        return loss(weights, sizes, *batch, axis_name="cp" if mesh else None, method=method)

    if mesh:
        specs = P(), P("cp"), P("cp"), P()  # all have the same weights and cu_seqlens
        mean_loss = jax.shard_map(mean_loss, mesh=mesh, in_specs=specs, out_specs=P())

    @jax.jit
    def update(weights, means, squares, batch, step_size, correction):
        value, gradients = jax.value_and_grad(mean_loss)(weights, *batch)
        weights, means, squares = adam(weights, gradients, means, squares, step_size, correction)
        return value, weights, means, squares

    def step(batch: TextBatch) -> float:
        nonlocal weights, means, squares, steps
        steps += 1
        # 1 - 0.999 has four digits left in float32, so these are computed here, as torch.optim does.
        step_size, correction = learning_rate / (1 - 0.9**steps), (1 - 0.999**steps) ** 0.5
        dealt_out = deal_out(batch, mesh) if mesh else batch
        value, weights, means, squares = update(weights, means, squares, dealt_out, step_size, correction)
        return float(value)

    return step


def deal_out(batch: TextBatch, mesh: Mesh) -> TextBatch:
    """The batch on the devices of `mesh`, each with its zigzag rows; documents are padded to a multiple of 2W bytes."""
    world_size = mesh.shape["cp"]
    room = len(batch.tokens) + (len(batch.cu_seqlens) - 1) * (2 * world_size - 1 if world_size > 1 else 0)
    total = -(-room // world_size) * world_size  # the same for every batch

    def rows(x):
        padded, cu_seqlens = pad_to_zigzag(x, batch.cu_seqlens, world_size, total)
        ranks = [shard(padded, cu_seqlens, rank, world_size) for rank in range(world_size)]
        return np.concatenate(ranks), np.asarray(cu_seqlens)

    def put(x, spec):  # each process puts what its devices need
        return jax.make_array_from_callback(x.shape, NamedSharding(mesh, spec), lambda index: x[index])

    tokens, cu_seqlens = rows(batch.tokens)
    targets, _ = rows(batch.targets - NO_TARGET)  # pads with 0
    return TextBatch(put(tokens, P("cp")), put(targets + NO_TARGET, P("cp")), put(cu_seqlens, P()))


def adam(weights, gradients, means, squares, step_size, correction):
    """Adam (Kingma & Ba, 2014) with the constants of `torch.optim.Adam`."""
    means = jax.tree.map(lambda m, g: m + 0.1 * (g - m), means, gradients)
    squares = jax.tree.map(lambda s, g: 0.999 * s + 0.001 * g * g, squares, gradients)
    weights = jax.tree.map(
        lambda w, m, s: w - step_size * m / (jnp.sqrt(s) / correction + 1e-8), weights, means, squares
    )
    return weights, means, squares


def loss(
    weights: dict,
    sizes: Sizes,
    tokens: jax.Array,
    targets: jax.Array,
    cu_seqlens: jax.Array,
    axis_name: str | None = None,
    method: str = "allgather",
) -> jax.Array:
    """Mean cross entropy in nats a byte; `tokens, targets [T]`, `cu_seqlens [N + 1]`, all int32.

    Inside `shard_map` each device has T of the rows, and the mean is over those of all devices of the axis.
    """
    log_p = jax.nn.log_softmax(forward(weights, sizes, tokens, cu_seqlens, axis_name, method))
    known = targets != NO_TARGET
    picked = jnp.take_along_axis(log_p, jnp.where(known, targets, 0)[:, None], axis=1)[:, 0]
    total, count = -jnp.sum(picked, where=known), known.sum()
    if axis_name is not None:
        total, count = jax.lax.psum((total, count), axis_name)
    return total / count


def forward(
    weights: dict, sizes: Sizes, tokens: jax.Array, cu_seqlens: jax.Array, axis_name: str | None, method: str
) -> jax.Array:
    """Logits `[T, 256]` of the byte that follows each of `tokens [T]`."""
    batch = prepare_batch(cu_seqlens, axis_name=axis_name, method=method)  # once for all layers, forward and backward
    attend = functools.partial(zigzag_attention, axis_name=axis_name, method=method)
    positions = position_ids(cu_seqlens, batch.rank, batch.world_size, tokens=len(tokens))
    angles = positions[:, None, None] * sizes.rope_frequencies  # [T, 1, head_dim/2]
    x = weights["embedding"][tokens]  # [T, dim]
    for layer in weights["layers"]:
        x = x + attention(layer, sizes, rms_norm(x, layer["attention_norm"]), angles, batch, attend)
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
