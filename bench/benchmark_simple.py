"""Times the unfused path against the fused one, one rank, causal, float16, after comparing what they compute.

    python bench/benchmark_simple.py

Medians of rounds in which the two take turns. Without a GPU both are plain PyTorch, which says nothing of the kernels.
"""

import statistics
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from bench.grouped import DEVICE, calls, with_gradients
from bench.timing import in_turns, milliseconds

WORLD_SIZE, HEAD_DIM = 4, 128
SIZES = (  # lengths of the sequences on one rank, heads, KV heads
    ([512], 32, 32),
    ([2048], 32, 8),
    ([8192], 32, 8),
    ([512] * 16, 32, 8),
    ([128] * 64, 32, 8),
)


def wait(_):
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def compare(title, calls):
    """Check that both `calls` agree, time them in turns, and print the medians."""
    for ours, theirs in zip(*(call() for call in calls.values()), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-2, rtol=1e-2)
    times = in_turns({name: partial(milliseconds, call, wait) for name, call in calls.items()})
    medians = {name: statistics.median(measured) for name, measured in times.items()}
    print(title)
    for name, median in medians.items():
        print(f"{name}: {median:.3f} ms")
    print(f"Speedup: {medians['Original'] / medians['Fused V2']:.2f}x\n", flush=True)


def main():
    print(torch.cuda.get_device_name() if DEVICE == "cuda" else "CPU: both paths are plain PyTorch")
    for lengths, heads, kv_heads in SIZES if DEVICE == "cuda" else SIZES[:1]:
        paths, leaves = calls(WORLD_SIZE, lengths, heads, kv_heads, HEAD_DIM)
        size = f"{len(lengths)} x {lengths[0]} local tokens, W = {WORLD_SIZE}, {heads}/{kv_heads} heads, d = {HEAD_DIM}"
        with torch.no_grad():
            compare(f"Forward, {size}", {name: lambda call=call: call()[:1] for name, call in paths.items()})
        both = {name: lambda call=call: with_gradients(call, leaves) for name, call in paths.items()}  # noqa: B023
        compare(f"Forward and backward, {size}", both)


if __name__ == "__main__":
    main()
