"""The model of `model.py` in PyTorch: plain functions of a dict of weights, attention by `zigzag_attention`."""

from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F

from model import Sizes
from text import NO_TARGET, TextBatch
from zigzag_torch import pad_to_zigzag, position_ids, prepare_batch, shard, zigzag_attention


def trainer(
    weights: dict,
    sizes: Sizes,
    learning_rate: float,
    device: str,
    group: dist.ProcessGroup | None = None,
    method: str = "allgather",
) -> Callable[[TextBatch], float]:
    """A function that takes one Adam step on a batch and returns the loss before it. `weights` are NumPy arrays.

    With a `group`, each of its ranks computes its zigzag rows of the batch, which is given to all of them.
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
    optimizer = torch.optim.Adam(parameters, lr=learning_rate)
    rank, world_size = (group.rank(), group.size()) if group else (0, 1)

    def step(batch: TextBatch) -> float:
        optimizer.zero_grad()
        known = int((batch.targets != NO_TARGET).sum())  # of all ranks
        value = loss(weights, sizes, *deal_out(batch, rank, world_size, device), group, method) / known
        value.backward()
        if group:  # the loss is a sum over all rows, so its gradient is a sum over the ranks
            value = value.detach()
            for x in (value, *(parameter.grad for parameter in parameters)):
                dist.all_reduce(x, group=group)
        optimizer.step()
        return value.item()

    return step


def deal_out(batch: TextBatch, rank: int, world_size: int, device: str) -> list[torch.Tensor]:
    """Tokens and targets `[T]` of the rank, and global `cu_seqlens`; documents are padded to a multiple of 2W bytes."""
    tokens, targets, cu_seqlens = map(torch.from_numpy, batch)
    room = len(tokens) + (len(cu_seqlens) - 1) * (2 * world_size - 1 if world_size > 1 else 0)
    total = -(-room // world_size) * world_size  # the same for every batch
    tokens, padded_cu_seqlens = pad_to_zigzag(tokens, cu_seqlens, world_size, total)
    targets, _ = pad_to_zigzag(targets - NO_TARGET, cu_seqlens, world_size, total)  # pads with 0
    rows = (shard(x, padded_cu_seqlens, rank, world_size) for x in (tokens, targets + NO_TARGET))
    return [x.to(device) for x in (*rows, padded_cu_seqlens)]


def loss(
    weights: dict,
    sizes: Sizes,
    tokens: torch.Tensor,
    targets: torch.Tensor,
    cu_seqlens: torch.Tensor,
    group: dist.ProcessGroup | None = None,
    method: str = "allgather",
) -> torch.Tensor:
    """Sum of the cross entropies of this rank's rows, in nats; `tokens, targets [T]`, `cu_seqlens [N + 1]`, int32."""
    logits = forward(weights, sizes, tokens, cu_seqlens, group, method)
    return F.cross_entropy(logits, targets.long(), ignore_index=NO_TARGET, reduction="sum")


def forward(
    weights: dict,
    sizes: Sizes,
    tokens: torch.Tensor,
    cu_seqlens: torch.Tensor,
    group: dist.ProcessGroup | None = None,
    method: str = "allgather",
) -> torch.Tensor:
    """Logits `[T, 256]` of the byte that follows each of `tokens [T]`."""
    rank, world_size = (group.rank(), group.size()) if group else (0, 1)
    positions = position_ids(cu_seqlens, rank, world_size, tokens=len(tokens))
    angles = positions[:, None, None] * torch.tensor(sizes.rope_frequencies, device=tokens.device)  # [T, 1, head_dim/2]
    batch = prepare_batch(cu_seqlens, method=method, group=group)  # once for all layers, forward and backward

    def attend(q, k, v):
        return zigzag_attention(q, k, v, batch, method=method, group=group)

    x = weights["embedding"][tokens]  # [T, dim]
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
