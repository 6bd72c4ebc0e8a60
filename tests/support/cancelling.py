"""A batch between two ranks whose contributions almost cancel, so that rounding of one of them shows in the sum."""

import numpy as np

from tests.support.cases import Case
from tests.support.rank import rank_rows

CASE = Case(name="cancelling", world_size=2, lengths=(64,), causal=False, dtype="bfloat16")


def make_inputs(seed=0):
    """Global q, k, v, dout, dlse of `CASE`.

    Queries are orthogonal to keys, so that all scores are 0 and all probabilities the same power of two. Rank 1 has the
    values and cotangents of rank 0 with the other sign, and the queries and keys as they are, but for the last bits.
    """
    rng = np.random.default_rng(seed)
    first, second = (rank_rows(CASE, rank) for rank in range(CASE.world_size))
    bit = 2.0**-7  # of a bfloat16 from 1 to 2

    def pair(heads, sign):
        x = np.zeros((CASE.total, heads, CASE.head_dim), np.float32)
        shape = CASE.tokens, heads, CASE.head_dim
        x[first] = 1 + bit * rng.integers(0, 90, shape)
        x[second] = sign * (x[first] + bit * rng.integers(0, 30, shape))
        return x

    inputs = {"q": pair(CASE.heads, 1), "k": pair(CASE.kv_heads, 1)}
    inputs["q"][..., CASE.head_dim // 2 :] = 0
    inputs["k"][..., : CASE.head_dim // 2] = 0
    inputs |= {"v": pair(CASE.kv_heads, -1), "dout": pair(CASE.heads, -1)}
    return inputs | {"dlse": np.zeros((CASE.heads, CASE.total), np.float32)}
