"""Calls of `zigzag_torch` on tensors without data, forward and backward: one rank of each case, every public way."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._tools.fake_collectives  # noqa: F401
from torch.testing._internal.distributed.fake_pg import FakeStore

import zigzag_torch
from tests.support.cases import CASES
from zigzag_torch import prepare_batch, zigzag_attention, zigzag_attention_gathered

RANK = 1  # of two ranks and more
PACKAGE = "zigzag_torch"


def make(output) -> torch.Tensor:
    """Return what a launch would have written, without data."""
    return torch.empty(output.shape, dtype=getattr(torch, output.dtype), device="meta")


def stand_ins() -> dict[str, Callable]:
    """Return what else has to be replaced: there are no other ranks to compare the calls with."""
    return {"compare": lambda *_, **__: None}


@contextlib.contextmanager
def groups() -> Iterator[Callable[[int], Any]]:
    """Yield a function from a number of ranks to a process group in which nothing is sent."""
    largest = max(case.world_size for case in CASES)
    dist.init_process_group("cpu:fake,meta:fake", rank=RANK, world_size=largest, store=FakeStore())
    try:
        yield functools.cache(lambda size: dist.new_group(range(size)))
    finally:
        dist.destroy_process_group()


def calls(case, group_of: Callable[[int], Any]) -> dict[str, Callable[[], None]]:
    """Return {name: one training step}."""
    made = gathered(case)
    if case.world_size > 1:
        made |= between_ranks(case, group_of(case.world_size)) | {"two chunks": functools.partial(two_chunks, case)}
    else:
        made |= one_device(case)
    return made


def gathered(case) -> dict[str, Callable[[], None]]:
    rank, options = min(RANK, case.world_size - 1), {"causal": case.causal}

    def attend(q, k, v, batch=None, **more):
        batch = lengths(case) if batch is None else batch
        return zigzag_attention_gathered(q, k, v, batch, rank, case.world_size, **options | more)

    def arrays():
        return (local(case, case.heads), *(tensor(case, case.total, case.kv_heads) for _ in "kv"))

    def strided():
        q = tensor(case, case.tokens, 2 * case.heads)[:, : case.heads]
        return (q, *tensor(case, case.total, 2 * case.kv_heads).split(case.kv_heads, 1))

    def misaligned():
        q, k, v = arrays()
        return q, tensor(case, 1 + k.numel())[1:].view(k.shape), v

    def prepared():
        batch = prepare_batch(lengths(case), rank, case.world_size)
        for _ in range(2):
            step(lambda *qkv: attend(*qkv, batch), *arrays())

    return {
        "gathered": lambda: step(lambda *qkv: attend(*qkv, return_lse=True), *arrays()),
        "gathered, in any order": lambda: step(lambda *qkv: attend(*qkv, deterministic=False), *arrays()),
        "gathered, strided": lambda: step(attend, *strided(), transposed=True),
        "gathered, misaligned": lambda: step(attend, *misaligned()),
        "gathered, two layers": prepared,
    }


def one_device(case) -> dict[str, Callable[[], None]]:
    def packed(deterministic):
        q, k, v = tensor(case, case.tokens, case.heads + 2 * case.kv_heads).split(
            (case.heads, case.kv_heads, case.kv_heads), 1
        )
        options = {"causal": case.causal, "softmax_scale": 0.25, "deterministic": deterministic}
        step(lambda q, k, v: zigzag_attention(q, k, v, lengths(case), **options), q, k, v)

    return {
        "one device": lambda: packed(True),
        "one device, in any order": lambda: packed(False),
        "one device, batched": lambda: step(lambda *qkv: zigzag_attention(*qkv), *batched(case)),
    }


def between_ranks(case, group) -> dict[str, Callable[[], None]]:
    def attend(batch=None, layers=1, **options):
        batch = lengths(case) if batch is None else batch
        for _ in range(layers):
            q, k, v = (local(case, heads) for heads in (case.heads, case.kv_heads, case.kv_heads))
            step(lambda *qkv: zigzag_attention(*qkv, batch, group=group, causal=case.causal, **options), q, k, v)

    def prepared(method):
        attend(prepare_batch(lengths(case), method=method, group=group), layers=2, method=method)

    def with_batches():
        step(lambda *qkv: zigzag_attention(*qkv, group=group, return_lse=True), *batched(case))

    dtype = getattr(torch, case.dtype)
    return {
        "all-gather": lambda: attend(return_lse=True),
        "all-gather, a head at a time": lambda: attend(heads_k_stride=1, grad_reduce_dtype=dtype),
        "all-gather, two layers": lambda: prepared("allgather"),
        "all-gather, batched": with_batches,
        "ring": lambda: attend(method="ring", return_lse=True),
        "ring, own dtype": lambda: attend(method="ring", grad_reduce_dtype=dtype),
        "ring, two layers": lambda: prepared("ring"),
    }


def two_chunks(case) -> None:
    """The published forward of two groups of rows: keys in position order."""
    first, second = local(case, case.heads), local(case, case.heads)
    k, v = (tensor(case, case.total, case.kv_heads) for _ in "kv")
    chunks = RANK, 2 * case.world_size - 1 - RANK, 2 * case.world_size
    offsets = lengths(case)

    def attend(q0, q1, k, v):
        attention = zigzag_torch.fused_zigzag_llama3_flash_attn_forward_v2
        return attention(q0, q1, k, v, offsets, offsets, offsets, *chunks, causal=case.causal)

    step(attend, first, second, k, v)


def step(attend: Callable, *arrays: torch.Tensor, transposed: bool = False) -> None:
    """Attend, and take the gradients; `transposed` gives a gradient of `out` whose heads are far apart."""
    leaves = [x.detach().requires_grad_() for x in arrays]
    results = attend(*leaves)
    results = results if isinstance(results, tuple) else (results,)
    cotangents = [torch.empty_like(x) for x in results]
    if transposed:
        cotangents = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in cotangents]
    torch.autograd.grad(results, leaves, cotangents)


def lengths(case) -> torch.Tensor:
    return torch.empty(len(case.lengths) + 1, dtype=torch.int32, device="meta")


def local(case, heads: int) -> torch.Tensor:
    return tensor(case, case.tokens, heads)


def batched(case) -> list[torch.Tensor]:
    """Return q, k and v of two sequences of equal length, about as long as those of `case` together."""
    half = max(case.tokens // 4, 1) * 2
    heads = case.heads, case.kv_heads, case.kv_heads
    return [tensor(case, 2 * half, n).view(2, half, n, case.head_dim) for n in heads]


def tensor(case, rows: int, *heads: int) -> torch.Tensor:
    shape = (rows, *heads, case.head_dim) if heads else (rows,)
    return torch.empty(shape, dtype=getattr(torch, case.dtype), device="meta")
