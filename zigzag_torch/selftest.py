"""A self-test that compares a tiny attention with PyTorch's own and prints one line of JSON.

`zigzag-doctor` runs `python -m zigzag_torch.selftest` in a separate process, so that a crash does not stop the doctor.
"""

import json
import time
from collections.abc import Callable
from typing import Any

import torch

from .api import zigzag_attention
from .launch import choose_backend

TOKENS, WINDOW = 96, 20
TOLERANCE = 2e-2  # of bfloat16 results; without a GPU they are float32 and far closer


def main() -> None:
    report: dict[str, Any] = {
        "gpu": torch.cuda.is_available(),
        "cuda": torch.version.cuda,
        "amd": torch.version.hip is not None,
    }
    device = torch.device("cuda" if report["gpu"] else "cpu")
    try:
        report["backend"] = choose_backend(None, device)
        start = time.perf_counter()
        report["difference"] = difference(device)
        report["seconds"] = time.perf_counter() - start
        if not report["difference"] < TOLERANCE:
            report["error"] = f"results differ by {report['difference']:.1e}"
    except Exception as error:
        report["error"] = f"{type(error).__name__}: {error}"
    print(json.dumps(report))


def difference(device: torch.device) -> float:
    """Return the largest error of out and gradients, relative to the largest value of each.

    The test computes one sequence with a causal mask, then with a causal window and sinks. PyTorch's attention has no
    sinks, so a sink is one more key there.
    """
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    generator = torch.Generator(device).manual_seed(0)
    shapes = (1, TOKENS, 4, 64), (1, TOKENS, 2, 64), (1, TOKENS, 2, 64), (4,), (1, TOKENS, 4, 64)
    *arrays, dout = (torch.randn(x, generator=generator, device=device, dtype=dtype) for x in shapes)
    positions = torch.arange(TOKENS, device=device)
    distance = positions[:, None] - positions
    errors = []
    for left in (-1, WINDOW):
        seen = (distance >= 0) & ((distance <= left) | (left < 0))

        def results(attend: Callable[..., Any], *tensors):
            leaves = [x.detach().requires_grad_() for x in tensors]
            out = attend(*leaves)
            return out, *torch.autograd.grad(out, leaves, dout.to(out.dtype), allow_unused=True)

        def ours(q, k, v, sinks, left=left):
            return zigzag_attention(q, k, v, window_size=(left, 0), sinks=None if left < 0 else sinks)

        def theirs(q, k, v, sinks, left=left, seen=seen):
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            bias = torch.zeros_like(seen, dtype=q.dtype).masked_fill(~seen, float("-inf"))
            if left >= 0:
                k, v = (torch.nn.functional.pad(x, (0, 0, 0, 1)) for x in (k, v))
                column = sinks[:, None, None].expand(-1, TOKENS, 1)
                bias = torch.cat([bias.expand(len(sinks), -1, -1), column], 2)
            attend = torch.nn.functional.scaled_dot_product_attention
            return attend(q, k, v, attn_mask=bias, enable_gqa=True).transpose(1, 2)

        pairs = zip(results(ours, *arrays), results(theirs, *(x.float() for x in arrays)), strict=True)
        errors += [((a.float() - b).abs().max() / b.abs().max()).item() for a, b in pairs if a is not None]
    return max(errors)


if __name__ == "__main__":
    main()
