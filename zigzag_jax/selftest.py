"""Compares a tiny attention and its gradients with JAX's own: `python -m zigzag_jax.selftest` prints a line of JSON.

`zigzag-doctor` runs it in a process of its own, which contains any crash.
"""

import json
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from .api import zigzag_attention
from .launch import choose_backend

TOLERANCE = 2e-2  # of bfloat16 results; without a GPU they are float32 and far closer


def main() -> None:
    platform = jax.default_backend()
    report: dict[str, Any] = {"gpu": platform == "gpu"}
    try:
        report["backend"] = choose_backend(None)
        start = time.perf_counter()
        report["difference"] = difference(jnp.bfloat16 if report["gpu"] else jnp.float32)
        report["seconds"] = time.perf_counter() - start
        if not report["difference"] < TOLERANCE:
            report["error"] = f"results differ by {report['difference']:.1e}"
    except Exception as error:
        report["error"] = f"{type(error).__name__}: {error}"
    print(json.dumps(report))


def difference(dtype) -> float:
    """Return the largest error of out, dq, dk and dv, relative to the largest value of each, for causal sequences."""
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v, dout = (jax.random.normal(keys[i], (1, 96, heads, 64), dtype) for i, heads in enumerate((4, 2, 2, 4)))

    def results(attend: Callable[..., Any], *arrays):
        out, pullback = jax.vjp(attend, *arrays)
        return out, *pullback(dout.astype(out.dtype))

    def theirs(q, k, v):
        return jax.nn.dot_product_attention(q, k, v, is_causal=True)

    @jax.jit
    def compare(*arrays):
        ours, exact = results(zigzag_attention, *arrays), results(theirs, *(x.astype("float32") for x in arrays))
        pairs = zip(ours, exact, strict=True)
        return jnp.stack([jnp.abs(a.astype("float32") - b).max() / jnp.abs(b).max() for a, b in pairs]).max()

    return compare(q, k, v).item()


if __name__ == "__main__":
    main()
