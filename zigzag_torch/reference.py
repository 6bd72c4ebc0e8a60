"""The same attention in plain PyTorch, dense and differentiable: the backend of machines without a GPU.

Memory is proportional to heads * T * W * T scores; products and softmax are float32 whatever the inputs are.
"""

import torch

from zigzag_kernels.layout import impossible, row_position

from .shard import sequence_of_rows


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    rank: torch.Tensor,
    world_size: int,
    causal: bool,
    softmax_scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out `[T, heads, head_dim]`, lse `[heads, T]` float32) of one rank; arguments as the kernels'."""
    tokens, heads, head_dim = q.shape
    kv_heads = k.shape[1]
    sequence, offset, length = sequence_of_rows(cu_seqlens, world_size, tokens)
    q_position = row_position(offset, length, rank, world_size)
    slots = torch.arange(world_size, device=q.device)[:, None]
    k_position = row_position(offset, length, slots, world_size).expand(world_size, tokens).reshape(-1)
    k_sequence = sequence.repeat(world_size)

    # A factor of the results, and of the inputs for the sake of the gradients.
    poison = torch.where(impossible(cu_seqlens, rank, world_size, tokens), float("nan"), 1.0)
    qf, kf, vf = (x.float() * poison for x in (q, k, v))

    visible = (sequence[:, None] == k_sequence[None, :]) & (k_sequence >= 0)[None, :]
    if causal:
        visible &= q_position[:, None] >= k_position[None, :]
    alone = ~visible.any(1)  # padding: any finite score will do, the result is replaced

    grouped = qf.reshape(tokens, kv_heads, heads // kv_heads, head_dim)
    scores = torch.einsum("tkgd,skd->kgts", grouped, kf) * softmax_scale
    scores = scores.masked_fill(~(visible | alone[:, None]), float("-inf"))
    lse = torch.logsumexp(scores, -1)
    out = torch.einsum("kgts,skd->tkgd", torch.exp(scores - lse[..., None]), vf).reshape(tokens, heads, head_dim)
    lse = lse.reshape(heads, tokens).masked_fill(alone, float("-inf"))
    out = out.masked_fill(alone[:, None, None], 0.0)

    return (out * poison).to(q.dtype), lse * poison
