"""The same attention in plain PyTorch, dense and differentiable: the backend of machines without a GPU.

Memory is proportional to heads * T * W * T scores; products and softmax are float32 whatever the inputs are.
"""

import functools

import torch

from zigzag_kernels.layout import impossible, row_position
from zigzag_kernels.problem import Problem

from .parallel import Local, Ring, Transport
from .parallel.collectives import all_gather, shift
from .shard import sequence_of_rows


def attention(
    transport: Transport,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    rank: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (out `[T, heads, head_dim]`, lse `[heads, T]` float32) of one rank; arguments as the kernels'.

    Between ranks K/V move as `transport` says, and autograd moves their gradients back.
    """
    problem = transport.problem
    attend = functools.partial(_attend, problem, cu_seqlens=cu_seqlens, rank=rank)
    ranks = torch.arange(problem.world_size, device=q.device)
    if isinstance(transport, Local):
        return attend(q, k, v, ranks=ranks)
    reduce_dtype = getattr(torch, problem.call.grad_reduce_dtype)
    k, v = k.to(reduce_dtype), v.to(reduce_dtype)  # their gradients move in the dtype that they do
    if isinstance(transport, Ring):
        kv, partials = torch.cat((k, v), 1), []
        queries = q.float()  # once, so that autograd sums dQ of all steps in float32
        for step in range(problem.world_size):
            peer = (rank - step) % problem.world_size
            partials.append(attend(queries, *kv.chunk(2, 1), ranks=peer))
            if step + 1 < problem.world_size:
                kv = shift(kv, 1, transport.group_name)
        out, lse = merge_partials(*(torch.stack(x) for x in zip(*partials, strict=True)))
        return out.to(q.dtype), lse
    windows = []
    for first in range(0, problem.kv_heads, problem.window):
        end = first + problem.window
        kv = torch.cat((k[:, first:end], v[:, first:end]), 1)
        kv = all_gather(kv, problem.world_size, transport.group_name)
        windows.append(attend(q[:, first * problem.group : end * problem.group], *kv.chunk(2, 1), ranks=ranks))
    outs, lses = zip(*windows, strict=True)
    return torch.cat(outs, 1), torch.cat(lses)


def _attend(
    problem: Problem,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    cu_seqlens: torch.Tensor,
    rank: torch.Tensor,
    ranks: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (out, lse) of the rows of `rank` over the keys of `ranks`; rows that see no key have out 0, lse -inf."""
    tokens, world_size = q.shape[0], problem.world_size
    sequence, offset, length = sequence_of_rows(cu_seqlens, world_size, tokens)
    q_position = row_position(offset, length, rank, world_size)
    k_position = row_position(offset, length, ranks[:, None], world_size).expand(len(ranks), tokens).reshape(-1)
    k_sequence = sequence.repeat(len(ranks))

    # A factor of the results, and of the inputs for the sake of the gradients.
    poison = torch.where(impossible(cu_seqlens, rank, world_size, tokens), float("nan"), 1.0)
    out, lse = dense(
        q.float() * poison,
        k.float() * poison,
        v.float() * poison,
        (sequence, q_position),
        (k_sequence, k_position),
        problem.call.causal,
        problem.call.softmax_scale,
    )
    return (out * poison).to(q.dtype), lse * poison


def varlen_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    causal: bool,
    softmax_scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (out `[rows, heads, head_dim]`, lse `[heads, rows]` float32) of sequences with keys in position order.

    The causal mask is aligned to the last row and the last key of each sequence, as in FlashAttention-2.
    """
    q_sequence, q_position, q_length = sequence_of_rows(cu_seqlens_q, 1, q.shape[0])
    k_sequence, k_position, _ = sequence_of_rows(cu_seqlens_k, 1, k.shape[0])
    k_length = cu_seqlens_k.diff()[q_sequence.clamp(min=0)] if len(cu_seqlens_k) > 1 else 0
    out, lse = dense(
        q.float(),
        k.float(),
        v.float(),
        (q_sequence, q_position + k_length - q_length),
        (k_sequence, k_position),
        causal,
        softmax_scale,
    )
    return out.to(q.dtype), lse


def dense(q, k, v, rows, keys, causal, softmax_scale) -> tuple[torch.Tensor, torch.Tensor]:
    """Return float32 (out, lse); `rows` and `keys` are (sequence, position) of each, and sequence -1 is padding.

    Rows that see no key have out 0 and lse -inf.
    """
    (q_sequence, q_position), (k_sequence, k_position) = rows, keys
    tokens, heads, head_dim = q.shape
    kv_heads = k.shape[1]
    visible = (q_sequence[:, None] == k_sequence[None, :]) & (k_sequence >= 0)[None, :]
    if causal:
        visible &= q_position[:, None] >= k_position[None, :]
    alone = ~visible.any(1)  # any finite score will do, the result is replaced

    grouped = q.reshape(tokens, kv_heads, heads // kv_heads, head_dim)
    scores = torch.einsum("tkgd,skd->kgts", grouped, k) * softmax_scale
    scores = scores.masked_fill(~(visible | alone[:, None]), float("-inf"))
    lse = torch.logsumexp(scores, -1)
    out = torch.einsum("kgts,skd->tkgd", torch.exp(scores - lse[..., None]), v).reshape(tokens, heads, head_dim)
    lse = lse.reshape(heads, tokens).masked_fill(alone, float("-inf"))
    return out.masked_fill(alone[:, None, None], 0.0), lse


def merge_partials(out: torch.Tensor, lse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge attention to `n` disjoint parts of the keys into attention to all of them; differentiable.

    `out [n, T, heads, head_dim]`, `lse [n, heads, T]` (natural logarithm) -> out `[T, heads, head_dim]` in the dtype of
    the parts, lse `[heads, T]` float32. A row that sees no key in a part has lse -inf there, and any finite out.
    """
    lse = lse.float()
    blind = torch.isneginf(lse).all(0)
    lse = lse.masked_fill(blind, 0.0)  # any finite value: -inf has no gradient
    total = torch.logsumexp(lse, 0)
    weights = torch.exp(lse - total).masked_fill(blind, 0.0)
    merged = torch.einsum("nht,nthd->thd", weights, out.float())
    return merged.to(out.dtype), total.masked_fill(blind, float("-inf"))
