"""Compares a tiny attention and its gradients with JAX's own: `python -m zigzag_jax.selftest` prints a line of JSON.

`zigzag-doctor` runs it in a process of its own, which contains any crash.
"""

import json
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from .api import zigzag_attention
from .launch import choose_backend

TOKENS, WINDOW = 96, 20
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
    """Return the largest error of out and gradients, relative to the largest value of each.

    One sequence is attended to causally, then in a causal window with sinks. To JAX a sink is one more key.
    """
    keys = jax.random.split(jax.random.key(0), 5)
    shapes = (1, TOKENS, 4, 64), (1, TOKENS, 2, 64), (1, TOKENS, 2, 64), (4,), (1, TOKENS, 4, 64)
    *arrays, dout = (jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True))
    distance = jnp.arange(TOKENS)[:, None] - jnp.arange(TOKENS)

    def results(attend: Callable[..., Any], *arrays):
        out, pullback = jax.vjp(attend, *arrays)
        return out, *pullback(dout.astype(out.dtype))

    @partial(jax.jit, static_argnums=0)
    def compare(left, *arrays):
        seen = (distance >= 0) & ((distance <= left) | (left < 0))

        def ours(q, k, v, *sinks):
            return zigzag_attention(q, k, v, window_size=(left, 0), sinks=sinks[0] if sinks else None)

        def theirs(q, k, v, *sinks):
            bias = jnp.where(seen, 0.0, -jnp.inf)[None, None]
            if sinks:
                k, v = (jnp.pad(x, ((0, 0), (0, 1), (0, 0), (0, 0))) for x in (k, v))
                column = jnp.broadcast_to(sinks[0][None, :, None, None], (1, len(sinks[0]), TOKENS, 1))
                bias = jnp.concatenate([jnp.broadcast_to(bias, (*column.shape[:3], TOKENS)), column], 3)
            return jax.nn.dot_product_attention(q, k, v, bias=bias)

        pairs = zip(results(ours, *arrays), results(theirs, *(x.astype("float32") for x in arrays)), strict=True)
        return jnp.stack([jnp.abs(a.astype("float32") - b).max() / jnp.abs(b).max() for a, b in pairs]).max()

    return max(compare(-1, *arrays[:3]).item(), compare(WINDOW, *arrays).item())


if __name__ == "__main__":
    main()
