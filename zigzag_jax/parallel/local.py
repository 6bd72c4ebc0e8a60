"""Attention to K/V that are all on this rank."""

from dataclasses import dataclass

import jax

from zigzag_kernels.problem import Problem

from .. import launch
from .transport import Residuals, Tables


@dataclass(frozen=True)
class Local:
    """Moves nothing: one launch computes the forward pass."""

    problem: Problem

    def forward(self, q: jax.Array, k: jax.Array, v: jax.Array, tables: Tables) -> tuple[jax.Array, jax.Array]:
        """Return (out `[T, heads, head_dim]`, lse `[heads, T]` float32)."""
        from zigzag_kernels import plan

        return plan.forward(launch.run, self.problem, q, k, v, tables.segments)

    def backward(
        self, residuals: Residuals, dout: jax.Array, dlse: jax.Array | None, tables: Tables
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Return (dq, dk, dv) for the cotangents of out and lse; `dlse` None means zeros."""
        from zigzag_kernels import plan

        strides = {"dout_strides": self.problem.q_strides}  # XLA makes dout as dense as q
        return plan.backward(launch.run, self.problem, *residuals, dout, dlse, *tables, **strides)
