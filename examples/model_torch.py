"""The model of `model.py` in PyTorch: plain functions of a dict of weights, attention by `zigzag_attention`."""

from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F

from model import BETAS, Sizes
from text import Room
from zigzag_torch import ShardedBatch, shard_documents, token_mean_loss, zigzag_attention


def trainer(
    weights: dict,
    sizes: Sizes,
    learning_rate: float,
    room: Room,
    device: str,
    group: dist.ProcessGroup | None = None,
    method: str = "allgather",
) -> Callable[[list], float]:
    """A function that takes one Adam step on documents and returns the loss before it. `weights` are NumPy arrays.

    With a `group`, each of its ranks computes its zigzag rows of the documents, which are given to all of them.
    """
    parameters = []

    def to_parameters(weights):
        if isinstance(weights, dict):
            return {name: to_parameters(x) for name, x in weights.items()}
        if isinstance(weights, list):
            return [to_parameters(x) for x in weights]
        parameters.append(torch.tensor(weights, device=device, requires_grad=True))
        return parameters[-1]

    weights = to_parameters(weights)
    optimizer = torch.optim.Adam(parameters, lr=learning_rate, betas=BETAS)
    rank, world_size = (group.rank(), group.size()) if group else (0, 1)

    size = {"tokens": room.rows(world_size), "max_documents": room.documents}  # the same for every batch

    def step(documents: list) -> float:
        optimizer.zero_grad()
        batch = shard_documents(documents, rank, world_size, **size).to(device)
        logits = forward(weights, sizes, batch, group, method)
        value = token_mean_loss(logits, batch.labels, batch.num_targets, group, gradients="sum")
        value.backward()
        for parameter in parameters if group else ():
            dist.all_reduce(parameter.grad, group=group)
        optimizer.step()
        return value.item()

    return step


def forward(
    weights: dict,
    sizes: Sizes,
    batch: ShardedBatch,
    group: dist.ProcessGroup | None = None,
    method: str = "allgather",
) -> torch.Tensor:
    """Logits `[T, 256]` of the byte that follows each of the `T` rows of this rank."""
    frequencies = torch.tensor(sizes.rope_frequencies, device=batch.input_ids.device)
    angles = batch.position_ids[:, None, None] * frequencies  # [T, 1, head_dim/2]
    prepared = batch.prepare(group, method=method)  # once for all layers, forward and backward

    def attend(q, k, v):
        return zigzag_attention(q, k, v, prepared, method=method, group=group)

    x = weights["embedding"][batch.input_ids]  # [T, dim]
    for layer in weights["layers"]:
        x = x + attention(layer, sizes, rms_norm(x, layer["attention_norm"]), angles, attend)
        x = x + swiglu(layer, rms_norm(x, layer["mlp_norm"]))
    return rms_norm(x, weights["norm"]) @ weights["logits"]


def attention(layer: dict, sizes: Sizes, x: torch.Tensor, angles: torch.Tensor, attend: Callable) -> torch.Tensor:
    q = (x @ layer["q"]).unflatten(1, (sizes.heads, -1))  # [T, heads, head_dim]
    k = (x @ layer["k"]).unflatten(1, (sizes.kv_heads, -1))  # [T, kv_heads, head_dim]
    v = (x @ layer["v"]).unflatten(1, (sizes.kv_heads, -1))
    out = attend(rotate(q, angles), rotate(k, angles), v)
    return out.flatten(1) @ layer["o"]


def swiglu(layer: dict, x: torch.Tensor) -> torch.Tensor:
    return (F.silu(x @ layer["gate"]) * (x @ layer["up"])) @ layer["down"]


def rms_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weight


def rotate(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """RoPE (Su et al., 2021): turns the pair (x[i], x[i + head_dim / 2]) of every head by angle i."""
    first, second = x.chunk(2, -1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
