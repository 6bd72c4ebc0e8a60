"""A self-test that compares a tiny attention with JAX's own and prints one line of JSON.

`zigzag-doctor` runs `python -m zigzag_jax.selftest` in a separate process, so that a crash does not stop the doctor.
"""

import functools
import json
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from .api import zigzag_attention
from .launch import choose_backend

TOKENS, WINDOW = 96, 20
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

    The test computes one sequence with a causal mask, then with a causal window and sinks. JAX's attention has no
    sinks, so a sink is one more key there.
    """
    keys = jax.random.split(jax.random.key(0), 5)
    shapes = (1, TOKENS, 4, 64), (1, TOKENS, 2, 64), (1, TOKENS, 2, 64), (4,), (1, TOKENS, 4, 64)
    *arrays, dout = (jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True))
    positions = jnp.arange(TOKENS)
    distance = positions[:, None] - positions

    def results(attend: Callable[..., Any], *arrays):
        out, pullback = jax.vjp(attend, *arrays)
        return out, *pullback(dout.astype(out.dtype))

    def ours(left, q, k, v, sinks):
        return zigzag_attention(q, k, v, window_size=(left, 0), sinks=None if left < 0 else sinks)

    def theirs(left, q, k, v, sinks):
        seen = (distance >= 0) & ((distance <= left) | (left < 0))
        bias = jnp.broadcast_to(jnp.where(seen, 0.0, -jnp.inf), (1, 4, TOKENS, TOKENS))
        of_sink = jnp.full_like(sinks, -jnp.inf) if left < 0 else sinks
        bias = jnp.concatenate((bias, jnp.broadcast_to(of_sink[:, None, None], (1, 4, TOKENS, 1))), 3)
        k, v = (jnp.concatenate((x, jnp.zeros_like(x[:, :1])), 1) for x in (k, v))
        return jax.nn.dot_product_attention(q, k, v, bias=bias)

    @functools.partial(jax.jit, static_argnums=0)
    def compare(left, *arrays):
        found = results(functools.partial(ours, left), *arrays)
        exact = results(functools.partial(theirs, left), *(x.astype("float32") for x in arrays))
        pairs = [*zip(found, exact, strict=True)][: 5 if left >= 0 else 4]
        return jnp.stack([jnp.abs(a.astype("float32") - b).max() / jnp.abs(b).max() for a, b in pairs]).max()

    return max(compare(left, *arrays).item() for left in (-1, WINDOW))


if __name__ == "__main__":
    main()
