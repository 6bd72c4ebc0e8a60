"""The calls of the simple benchmark and the profile: the unfused path and its fused replacement on the same inputs."""

from functools import partial

import torch

from tests.support import pieces
from zigzag_torch import execute_grouped_attention, replace_grouped_attention_with_fused_triton_v2

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def calls(world_size, lengths, heads, kv_heads, head_dim, rank=0):
    """({name: call}, leaves): both paths on float16 inputs of one rank, causal, and what they have gradients for.

    `lengths` are of the sequences on one rank. A call returns (out, lse, dict).
    """
    generator = torch.Generator(DEVICE).manual_seed(0)
    shapes = (sum(lengths), heads, head_dim), (2, world_size * sum(lengths), kv_heads, head_dim)
    q, kv = (torch.randn(shape, device=DEVICE, dtype=torch.float16, generator=generator) for shape in shapes)
    cu_seqlens = torch.tensor([0, *lengths], device=DEVICE).cumsum(0, dtype=torch.int32) * world_size
    arguments = pieces.grouped_arguments(q, kv, cu_seqlens, rank, world_size, True)
    leaves = [x.requires_grad_() for x in (*arguments["chunk_q_list"], kv)]
    return {
        "Original": partial(execute_grouped_attention, **arguments),
        "Fused V2": partial(replace_grouped_attention_with_fused_triton_v2, **pieces.fused_arguments(arguments, rank)),
    }, leaves


def with_gradients(call, leaves):
    """`call()`, and the gradients of its first result."""
    out, _, _ = call()
    return out, *torch.autograd.grad(out, leaves, torch.ones_like(out))
