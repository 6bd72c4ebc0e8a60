"""A small Llama-style model of bytes: the sizes and initial weights that `model_torch` and `model_jax` share."""

from dataclasses import dataclass

import numpy as np

VOCABULARY = 256
# Of Adam. Optax takes powers in float32, which holds the second exactly; of 1 - 0.999 it has four digits.
BETAS = 0.9, 1 - 2**-10


@dataclass(frozen=True)
class Sizes:
    """`hidden` is the width of the SwiGLU; `heads` query heads share `kv_heads` KV heads."""

    layers: int = 2
    dim: int = 96
    heads: int = 6
    kv_heads: int = 2
    hidden: int = 256
    rope_base: float = 10_000.0

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads

    @property
    def rope_frequencies(self) -> np.ndarray:
        """`[head_dim / 2]` float32: radians that each pair of features turns by from one position to the next."""
        return (self.rope_base ** -np.linspace(0, 1, self.head_dim // 2, endpoint=False)).astype(np.float32)


def initial_weights(sizes: Sizes, seed: int = 0) -> dict:
    """Nested dicts and lists of float32 arrays; matrices are `[in, out]`."""
    rng = np.random.default_rng(seed)

    def matrix(rows, columns):
        return (rng.standard_normal((rows, columns)) * rows**-0.5).astype(np.float32)

    def layer():
        return {
            "attention_norm": np.ones(sizes.dim, np.float32),
            "q": matrix(sizes.dim, sizes.heads * sizes.head_dim),
            "k": matrix(sizes.dim, sizes.kv_heads * sizes.head_dim),
            "v": matrix(sizes.dim, sizes.kv_heads * sizes.head_dim),
            "o": matrix(sizes.heads * sizes.head_dim, sizes.dim),
            "mlp_norm": np.ones(sizes.dim, np.float32),
            "gate": matrix(sizes.dim, sizes.hidden),
            "up": matrix(sizes.dim, sizes.hidden),
            "down": matrix(sizes.hidden, sizes.dim),
        }

    return {
        "embedding": rng.standard_normal((VOCABULARY, sizes.dim)).astype(np.float32),
        "layers": [layer() for _ in range(sizes.layers)],
        "norm": np.ones(sizes.dim, np.float32),
        "logits": matrix(sizes.dim, VOCABULARY),
    }
