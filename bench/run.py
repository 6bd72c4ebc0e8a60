"""Times one rank's attention in PyTorch and in JAX on the bench cases, after checking what it computes.

    python bench/run.py [--json FILE]

Needs a GPU, both frameworks and jax-triton. Medians of rounds in which the implementations take turns; TFLOP/s count
4 * head_dim for each unmasked score and query head forward, 2.5 times that backward. K/V buffers exceed the L2 cache.
"""

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch shares the GPU
sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "tests")]

import jax
import torch
import triton
from tqdm import tqdm

import zigzag_jax
import zigzag_torch
from cases import BENCH, CASES
from zigzag_torch import reference

RANK, ROUNDS, CALLS = 3, 7, 8


def unmasked_scores(case):
    """Scores of one query head that the causal mask leaves to `RANK`."""
    chunks = [length // (2 * case.world_size) for length in case.lengths]
    return sum(n * c * n + n * (n + 1) // 2 for n in chunks for c in (RANK, 2 * case.world_size - 1 - RANK))


def milliseconds(call, wait):
    """Time of one of `CALLS` calls that follow each other without waiting."""
    start = time.perf_counter()
    for _ in range(CALLS):
        result = call()
    wait(result)
    return (time.perf_counter() - start) * 1e3 / CALLS


def inputs(case):
    """q, gathered k and v, dout, cu_seqlens on the GPU; every row is another draw."""
    generator = torch.Generator("cuda").manual_seed(0)
    rows = {"q": case.tokens, "k": case.total, "v": case.total, "dout": case.tokens}
    heads = {"q": case.heads, "k": case.kv_heads, "v": case.kv_heads, "dout": case.heads}
    arrays = [
        torch.randn(rows[x], heads[x], case.head_dim, device="cuda", generator=generator).to(torch.bfloat16)
        for x in rows
    ]
    return *arrays, torch.tensor(case.cu_seqlens, dtype=torch.int32, device="cuda")


def torch_calls(case, q, k, v, dout, cu_seqlens):
    """(forward, backward): calls that return (out,) and (dq, dk, dv)."""
    batch = zigzag_torch.prepare_batch(cu_seqlens, RANK, case.world_size)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]

    def attend(q, k, v):
        return zigzag_torch.zigzag_attention_gathered(q, k, v, batch, RANK, case.world_size)

    out = attend(*leaves)
    return lambda: (attend(q, k, v),), lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True)


def jax_calls(case, *tensors):
    """As `torch_calls`, on the same memory."""
    q, k, v, dout, cu_seqlens = (jax.dlpack.from_dlpack(x) for x in tensors)
    batch = zigzag_jax.prepare_batch(cu_seqlens, RANK, case.world_size)

    def attend(q, k, v, batch):
        return zigzag_jax.zigzag_attention_gathered(q, k, v, batch, RANK, case.world_size)

    forward = jax.jit(lambda *x: (attend(*x),))
    _, pullback = jax.jit(lambda q, k, v: jax.vjp(lambda *x: attend(*x, batch), q, k, v))(q, k, v)
    backward = jax.jit(lambda pullback, dout: pullback(dout))
    return lambda: forward(q, k, v, batch), lambda: backward(pullback, dout)


def check(case, results, q, k, v, dout, cu_seqlens):
    """`AssertionError` unless the first and the last query head agree with float32, and JAX with torch bit for bit."""
    ours, theirs = results
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, torch.from_dlpack(b)), "torch and JAX differ"
    rank = torch.tensor([RANK], dtype=torch.int32, device="cuda")
    group = case.heads // case.kv_heads
    for head in (0, case.heads - 1):
        one = [x[:, h : h + 1].float() for x, h in ((q, head), (k, head // group), (v, head // group))]
        one[0].requires_grad_()
        out, _ = reference.attention(*one, cu_seqlens, rank, case.world_size, True, case.head_dim**-0.5)
        (dq,) = torch.autograd.grad(out, one[0], dout[:, head : head + 1].float())
        for name, exact, got in (("out", out, ours[0]), ("dq", dq, ours[1])):
            error = ((got[:, head : head + 1].float() - exact).norm() / exact.norm()).item()
            assert error < 5e-3, f"{case}: {name} of head {head} is off by {error:.1e}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, help="write what was measured to this file too")
    options = parser.parse_args()
    versions = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "jax": jax.__version__,
    }
    rows = []
    for case in tqdm([case for case in CASES if case.tags & BENCH], unit="case"):
        tensors = inputs(case)
        calls = {"torch": torch_calls(case, *tensors), "jax": jax_calls(case, *tensors)}
        check(case, [forward() + tuple(backward()) for forward, backward in calls.values()], *tensors)
        waits = {"torch": lambda _: torch.cuda.synchronize(), "jax": jax.block_until_ready}
        times = {(name, direction): [] for direction in (0, 1) for name in calls}
        for i in range(ROUNDS + 1):
            for (name, direction), measured in times.items():
                elapsed = milliseconds(calls[name][direction], waits[name])
                if i:  # the first round warms up
                    measured.append(elapsed)
        flops = 4 * case.head_dim * case.heads * unmasked_scores(case)
        for (name, direction), measured in times.items():
            median = statistics.median(measured)
            rows.append(
                {
                    "case": case.name,
                    "framework": name,
                    "direction": ("forward", "backward")[direction],
                    "ms": round(median, 3),
                    "spread_ms": round(max(measured) - min(measured), 3),
                    "tflops": round(flops * (1, 2.5)[direction] / median / 1e9),
                }
            )
        del tensors, calls
        torch.cuda.empty_cache()
    print(", ".join(f"{name} {value}" for name, value in versions.items()))
    print("| case | framework | direction | ms | spread | TFLOP/s |\n| --- | --- | --- | --- | --- | --- |")
    for row in rows:
        print("| " + " | ".join(str(x) for x in row.values()) + " |")
    if options.json:
        options.json.write_text(json.dumps({"versions": versions, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
