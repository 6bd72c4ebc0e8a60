"""Documents of random tokens."""

import numpy as np


def made_documents(lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(1, 50, length) for length in lengths]
