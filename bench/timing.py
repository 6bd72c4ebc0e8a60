"""What the benchmarks share: inputs, the check that comes before any time, and rounds in which calls take turns."""

import time

import torch

import zigzag_torch
from zigzag_torch import reference

ROUNDS, CALLS = 7, 8


def inputs(case, device="cuda"):
    """q, gathered k and v, dout, cu_seqlens of one rank; every row is another draw."""
    generator = torch.Generator(device).manual_seed(0)
    rows = {"q": case.tokens, "k": case.total, "v": case.total, "dout": case.tokens}
    heads = {"q": case.heads, "k": case.kv_heads, "v": case.kv_heads, "dout": case.heads}
    arrays = [
        torch.randn(rows[x], heads[x], case.head_dim, device=device, generator=generator).to(getattr(torch, case.dtype))
        for x in rows
    ]
    return *arrays, torch.tensor(case.cu_seqlens, dtype=torch.int32, device=device)


def torch_calls(case, rank, q, k, v, dout, cu_seqlens, backend=None):
    """(forward, backward): calls that return (out,) and (dq, dk, dv) of `rank`."""
    batch = zigzag_torch.prepare_batch(cu_seqlens, rank, case.world_size, backend=backend)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]

    def attend(q, k, v):
        return zigzag_torch.zigzag_attention_gathered(
            q, k, v, batch, rank, case.world_size, causal=case.causal, backend=backend
        )

    out = attend(*leaves)
    return lambda: (attend(q, k, v),), lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True)


def check_close(name, got, expected):
    """`AssertionError` unless `got` is as close to `expected` as bfloat16 arithmetic leaves it."""
    error = ((got.float() - expected.float()).norm() / expected.float().norm()).item()
    assert error < 5e-3, f"{name} is off by {error:.1e}"


def check_head(case, rank, head, out, dq, q, k, v, dout, cu_seqlens):
    """`AssertionError` unless one query head of `out` and `dq` agrees with the float32 reference."""
    kv_head = head // (case.heads // case.kv_heads)
    one = [x[:, h : h + 1].float() for x, h in ((q, head), (k, kv_head), (v, kv_head))]
    one[0].requires_grad_()
    device_rank = torch.tensor([rank], dtype=torch.int32, device=q.device)
    exact, _ = reference.attention(*one, cu_seqlens, device_rank, case.world_size, case.causal, case.head_dim**-0.5)
    (exact_dq,) = torch.autograd.grad(exact, one[0], dout[:, head : head + 1].float())
    for name, expected, got in (("out", exact, out), ("dq", exact_dq, dq)):
        check_close(f"{case}, rank {rank}: {name} of head {head}", got[:, head : head + 1], expected)


def milliseconds(call, wait):
    """Time of one of `CALLS` calls that follow each other without waiting."""
    start = time.perf_counter()
    for _ in range(CALLS):
        result = call()
    wait(result)
    return (time.perf_counter() - start) * 1e3 / CALLS


def in_turns(calls):
    """{key: milliseconds of each of `ROUNDS` rounds} for {key: (call, wait)}, after one round that warms up."""
    times = {key: [] for key in calls}
    for i in range(ROUNDS + 1):
        for key, (call, wait) in calls.items():
            elapsed = milliseconds(call, wait)
            if i:
                times[key].append(elapsed)
    return times
