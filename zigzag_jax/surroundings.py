"""Protection of this package's arithmetic from JAX settings that a user's program may have made stricter."""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import jax

P = ParamSpec("P")
R = TypeVar("R")


def under_own_promotion(function: Callable[P, R]) -> Callable[P, R]:
    """Wrap `function` to run with JAX's standard promotion of dtypes and ranks, whatever the user has set."""

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            return function(*args, **kwargs)

    return wrapped
