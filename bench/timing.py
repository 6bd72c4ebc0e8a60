"""Inputs, checks and clocks of all benchmarks; results are checked before anything is timed, and calls take turns."""

import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

import zigzag_torch
from bench.slices import form_of
from zigzag_torch import dense, reference
from zigzag_torch.shard import place_of_rows

ROUNDS, CALLS = 7, 8
ROUND_MS, MOST_CALLS = 20, 64  # milliseconds of a round, and the most calls in it
HOST_BURSTS, HOST_CALLS, HOST_SECONDS = 20, 8, 0.5  # bursts of calls that time the host, and the seconds they may take
SCORES = 2**27  # scores that the check computes at a time: 512 MiB for each array of scores
NAMES = "out", "dq", "dk", "dv", "dsinks"  # dsinks only in cases with sinks
CLOSE = 5e-3  # relative error that bfloat16 arithmetic may cause


class Calls(NamedTuple):
    """An attention that is ready to be timed, with the results of its calls in the layout of the inputs."""

    forward: Callable[[], object]
    backward: Callable[[], object]  # of one forward pass, again and again
    results: Callable[[], tuple[torch.Tensor, ...]]  # of `NAMES`


def require_gpu() -> str:
    """The name of the GPU; `SystemExit` where PyTorch sees none."""
    if not torch.cuda.is_available():
        raise SystemExit("PyTorch sees no GPU, which this script needs")
    return torch.cuda.get_device_name()


def inputs(case, device="cuda", seed=0):
    """q, gathered k and v, dout, cu_seqlens of one rank; every row is another draw."""
    generator = torch.Generator(device).manual_seed(seed)
    rows = {"q": case.tokens, "k": case.total, "v": case.total, "dout": case.tokens}
    heads = {"q": case.heads, "k": case.kv_heads, "v": case.kv_heads, "dout": case.heads}
    arrays = [
        torch.randn(rows[x], heads[x], case.head_dim, device=device, generator=generator).to(getattr(torch, case.dtype))
        for x in rows
    ]
    return *arrays, torch.tensor(case.cu_seqlens, dtype=torch.int32, device=device)


def sinks_of(case, device="cuda"):
    """Return (sinks `[heads]`,) of a case that has them, the same in each call, else ()."""
    if not case.sinks:
        return ()
    generator = torch.Generator(device).manual_seed(0)
    return (torch.randn(case.heads, device=device, generator=generator).to(getattr(torch, case.dtype)),)


def options_of(case):
    """Return the keyword arguments of an attention call that say which keys its rows see, besides sinks."""
    return {name: getattr(case, name) for name in ("causal", "window_size", "attention_chunk", "softcap", "layout")}


def autograd_calls(attend, leaves, dout):
    """`Calls` of a differentiable `attend(*leaves) -> out`; the forward pass saves tensors as in training."""
    leaves = [x.detach().requires_grad_() for x in leaves]
    out = attend(*leaves)

    def backward():
        return torch.autograd.grad(out, leaves, dout, retain_graph=True)

    return Calls(lambda: attend(*leaves), backward, lambda: (attend(*leaves).detach(), *backward()))


def torch_calls(case, rank, q, k, v, dout, cu_seqlens, *, backend=None, deterministic=True):
    """`Calls` of this library in PyTorch, for `rank`."""
    batch = zigzag_torch.prepare_batch(cu_seqlens, rank, case.world_size, backend=backend, **form_of(case))
    options = options_of(case) | {"backend": backend, "deterministic": deterministic}

    def attend(q, k, v, sinks=None):
        return zigzag_torch.zigzag_attention_gathered(q, k, v, batch, rank, case.world_size, sinks=sinks, **options)

    return autograd_calls(attend, (q, k, v, *sinks_of(case, q.device)), dout)


def places(case, rank, cu_seqlens):
    """(document, position) of the local rows of `rank`, and of the gathered ones; document -1 is padding."""
    ranks, row_length = torch.arange(case.world_size, device=cu_seqlens.device), form_of(case).get("row_length")
    both = (
        place_of_rows(cu_seqlens, of, case.world_size, case.tokens, row_length)
        for of in (ranks[rank : rank + 1], ranks[:, None])
    )
    return [reference.Places(*(x.reshape(-1) for x in found)) for found in both]


def exact(case, rank, kv_head, q, k, v, dout, cu_seqlens):
    """out, dq `[T, group, head_dim]`, dk, dv `[W * T, 1, head_dim]` of one KV head and its query heads, in float32.

    With sinks, dsinks `[group]` too. By plain PyTorch, a block of query rows at a time, because all scores of a long
    sequence would not fit.
    """
    rows, keys = places(case, rank, cu_seqlens)
    group = case.heads // case.kv_heads
    mine = slice(kv_head * group, (kv_head + 1) * group)
    k, v = (x[:, kv_head : kv_head + 1].float().requires_grad_() for x in (k, v))
    sinks = [x[mine].float().requires_grad_() for x in sinks_of(case, q.device)]
    outs, dqs, sums = [], [], [torch.zeros_like(x) for x in (k, v, *sinks)]
    block = max(1, SCORES // (group * case.total))
    mask = reference.Mask(case.causal, case.window_size, case.attention_chunk)
    for chosen in torch.arange(case.tokens, device=q.device).split(block):
        one = q[chosen, mine].float().requires_grad_()
        visible = reference.see(mask, reference.Places(*(x[chosen] for x in rows)), keys)
        arguments = visible, *(sinks or [None]), case.head_dim**-0.5, case.softcap
        out, *_ = dense.dense_forward(one, k, v, *arguments)
        dq, *more = torch.autograd.grad(out, (one, k, v, *sinks), dout[chosen, mine].float())
        for total, x in zip(sums, more, strict=True):
            total += x
        outs.append(out.detach())
        dqs.append(dq)
    return torch.cat(outs), torch.cat(dqs), *sums


def check_close(name, got, expected):
    """`AssertionError` unless `got` is as close to `expected` as bfloat16 arithmetic leaves it."""
    error = ((got.float() - expected.float()).norm() / expected.float().norm()).item()
    assert error < CLOSE, f"{name} is off by {error:.1e}"


def check(case, rank, kv_head, results, expected):
    """Raise `AssertionError` unless `results` of `NAMES` agree with the results of `exact` in one KV head."""
    group = case.heads // case.kv_heads
    for name, got, right in zip(NAMES[: len(expected)], results, expected, strict=True):
        heads = 1 if name in ("dk", "dv") else group
        mine = slice(kv_head * heads, (kv_head + 1) * heads)
        of_head = got[mine] if name == "dsinks" else got[:, mine]
        check_close(f"{case}, rank {rank}: {name} of KV head {kv_head}", of_head, right)


def milliseconds(call, wait):
    """Time of one of `CALLS` calls that follow each other without waiting."""
    return host_sample([call], CALLS, wait)


def host_sample(calls: Sequence[Callable], count: int, wait: Callable) -> float:
    """Milliseconds of one of `count` calls by the clock of the host, `calls` in rotation; one `wait` is in it."""
    start = time.perf_counter()
    for i in range(count):
        result = calls[i % len(calls)]()
    wait(result)
    return (time.perf_counter() - start) * 1e3 / count


def cuda_sample(calls: Sequence[Callable], count: int) -> float:
    """Return the same time as `host_sample`, measured by events in the stream of the calls."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for i in range(count):
        calls[i % len(calls)]()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / count


def host_ms(call: Callable, wait: Callable) -> float:
    """Median milliseconds of the host for one of a few calls, one after the other as in a training step.

    There are few calls, so that no call waits for room in the device's queue. The first call after a wait would be
    slower, by a time that depends more on the machine than on the call.
    """
    times, start = [], time.perf_counter()
    wait(call())
    while len(times) < HOST_BURSTS and (len(times) < 3 or time.perf_counter() - start < HOST_SECONDS):
        began = time.perf_counter()
        for _ in range(HOST_CALLS):
            result = call()
        times.append((time.perf_counter() - began) * 1e3 / HOST_CALLS)
        wait(result)
    return statistics.median(times)


def calls_per_round(ms: float) -> int:
    """Calls that fill a round if one takes `ms` milliseconds: at least two, so that they follow each other."""
    return min(MOST_CALLS, max(2, math.ceil(ROUND_MS / ms)))


def in_turns(samplers, tick=lambda: None, rounds=None):
    """{key: results of `rounds` calls, else `ROUNDS`} for {key: call}, which take turns, after a round that warms up.

    The order is another one in every round, as clocks depend on what ran before; it is the same in every run. `tick` is
    called after each round.
    """
    measured = {key: [] for key in samplers}
    order, generator = list(samplers), random.Random(0)
    for i in range((rounds or ROUNDS) + 1):
        for key in order:
            result = samplers[key]()
            if i:
                measured[key].append(result)
        generator.shuffle(order)
        tick()
    return measured


def matmul_tflops(dtype, size=8192, device="cuda"):
    """Median TFLOP/s of a product of random square matrices: the speed that this GPU reaches in practice."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    sample = cuda_sample if device == "cuda" else lambda *x: host_sample(*x, wait=lambda _: None)
    times = in_turns({"matmul": lambda: sample([lambda: a @ b], CALLS)})["matmul"]
    return 2 * size**3 / statistics.median(times) / 1e9
