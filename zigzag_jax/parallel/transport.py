"""Arguments that all transports have in common: the device tables, and the arrays kept for the backward pass."""

from typing import NamedTuple

import jax
from jax.lax import optimization_barrier


class Tables(NamedTuple):
    """Device tables of a batch: what each tile of queries and each tile of keys belongs to.

    `zigzag_kernels.plan.segment_tables` makes them. A ring has one of each per step, stacked in front.
    """

    segments: jax.Array
    sequences: jax.Array


class Residuals(NamedTuple):
    """Arguments and results of a forward pass, which its backward pass needs."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    out: jax.Array
    lse: jax.Array


def move_again(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Return `arrays` behind a barrier, so that the backward pass moves K/V a second time.

    Without the barrier XLA merges the collectives of both passes, and keeps the K/V of other ranks in between.
    """
    return optimization_barrier(arrays)
