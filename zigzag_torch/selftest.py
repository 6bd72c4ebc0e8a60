"""Compares a tiny attention with PyTorch's own: `python -m zigzag_torch.selftest` prints one line of JSON.

`zigzag-doctor` runs it in a process of its own, so that whatever is broken breaks there.
"""

import json
import time
from collections.abc import Callable
from typing import Any

import torch

from .api import zigzag_attention
from .launch import choose_backend

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
    """Return the largest difference of out, dq, dk and dv, each relative to its largest value, for one sequence."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    generator = torch.Generator(device).manual_seed(0)
    q, k, v, dout = (
        torch.randn(1, 96, heads, 64, generator=generator, device=device, dtype=dtype) for heads in (4, 2, 2, 4)
    )

    def results(attend: Callable[..., Any], *tensors):
        leaves = [x.detach().requires_grad_() for x in tensors]
        out = attend(*leaves)
        return out, *torch.autograd.grad(out, leaves, dout.to(out.dtype))

    def theirs(q, k, v):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(
            1, 2
        )

    pairs = zip(results(zigzag_attention, q, k, v), results(theirs, q.float(), k.float(), v.float()), strict=True)
    return max(((a.float() - b).abs().max() / b.abs().max()).item() for a, b in pairs)


if __name__ == "__main__":
    main()
