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
from pathlib import Path

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch shares the GPU
sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "tests")]

import jax
import torch
import triton
from tqdm import tqdm

import timing
import zigzag_jax
from cases import BENCH, CASES
from zigzag_kernels import cost

RANK = 3
FLOPS = cost.forward_flops, cost.backward_flops


def jax_calls(case, *tensors):
    """As `timing.torch_calls`, on the same memory."""
    q, k, v, dout, cu_seqlens = (jax.dlpack.from_dlpack(x) for x in tensors)
    batch = zigzag_jax.prepare_batch(cu_seqlens, RANK, case.world_size)

    def attend(q, k, v, batch):
        return zigzag_jax.zigzag_attention_gathered(q, k, v, batch, RANK, case.world_size)

    forward = jax.jit(lambda *x: (attend(*x),))
    _, pullback = jax.jit(lambda q, k, v: jax.vjp(lambda *x: attend(*x, batch), q, k, v))(q, k, v)
    backward = jax.jit(lambda pullback, dout: pullback(dout))
    return lambda: forward(q, k, v, batch), lambda: backward(pullback, dout)


def check(case, results, *tensors):
    """`AssertionError` unless the first and the last query head agree with float32, and JAX with torch bit for bit."""
    ours, theirs = results
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, torch.from_dlpack(b)), "torch and JAX differ"
    for head in (0, case.heads - 1):
        timing.check_head(case, RANK, head, ours[0], ours[1], *tensors)


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
        tensors = timing.inputs(case)
        calls = {"torch": timing.torch_calls(case, RANK, *tensors), "jax": jax_calls(case, *tensors)}
        check(case, [forward() + tuple(backward()) for forward, backward in calls.values()], *tensors)
        waits = {"torch": lambda _: torch.cuda.synchronize(), "jax": jax.block_until_ready}
        times = timing.in_turns(
            {(name, direction): (calls[name][direction], waits[name]) for direction in (0, 1) for name in calls}
        )
        scores = cost.unmasked_scores(case.lengths, RANK, case.world_size, case.causal)
        for (name, direction), measured in times.items():
            median = statistics.median(measured)
            rows.append(
                {
                    "case": case.name,
                    "framework": name,
                    "direction": ("forward", "backward")[direction],
                    "ms": round(median, 3),
                    "spread_ms": round(max(measured) - min(measured), 3),
                    "tflops": round(FLOPS[direction](scores, case.heads, case.head_dim) / median / 1e9),
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
