"""The model of `model.py` in PyTorch: plain functions of a dict of weights, attention by `zigzag_attention`."""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from model import Sizes
from text import NO_TARGET, TextBatch
from zigzag_torch import Batch, position_ids, prepare_batch, zigzag_attention


def trainer(weights: dict, sizes: Sizes, learning_rate: float, device: str) -> Callable[[TextBatch], float]:
    """A function that takes one Adam step on a batch and returns the loss before it. `weights` are NumPy arrays."""
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

    def step(batch: TextBatch) -> float:
        optimizer.zero_grad()
        value = loss(weights, sizes, *(torch.tensor(x, device=device) for x in batch))
        value.backward()
        optimizer.step()
        return value.item()

    return step


def loss(
    weights: dict, sizes: Sizes, tokens: torch.Tensor, targets: torch.Tensor, cu_seqlens: torch.Tensor
) -> torch.Tensor:
    """Mean cross entropy in nats a byte; `tokens, targets [T]`, `cu_seqlens [N + 1]`, all int32."""
    logits = forward(weights, sizes, tokens, cu_seqlens)
    return F.cross_entropy(logits, targets.long(), ignore_index=NO_TARGET)


def forward(weights: dict, sizes: Sizes, tokens: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    """Logits `[T, 256]` of the byte that follows each of `tokens [T]`."""
    batch = prepare_batch(cu_seqlens)  # once for all layers, forward and backward
    positions = position_ids(cu_seqlens, rank=0, world_size=1, tokens=len(tokens))
    angles = positions[:, None, None] * torch.tensor(sizes.rope_frequencies, device=tokens.device)  # [T, 1, head_dim/2]
    x = weights["embedding"][tokens]  # [T, dim]
    for layer in weights["layers"]:
        x = x + attention(layer, sizes, rms_norm(x, layer["attention_norm"]), angles, batch)
        x = x + swiglu(layer, rms_norm(x, layer["mlp_norm"]))
    return rms_norm(x, weights["norm"]) @ weights["logits"]


def attention(layer: dict, sizes: Sizes, x: torch.Tensor, angles: torch.Tensor, batch: Batch) -> torch.Tensor:
    q = (x @ layer["q"]).unflatten(1, (sizes.heads, -1))  # [T, heads, head_dim]
    k = (x @ layer["k"]).unflatten(1, (sizes.kv_heads, -1))  # [T, kv_heads, head_dim]
    v = (x @ layer["v"]).unflatten(1, (sizes.kv_heads, -1))
    out = zigzag_attention(rotate(q, angles), rotate(k, angles), v, batch)
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
