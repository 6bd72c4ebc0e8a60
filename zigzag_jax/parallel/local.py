"""The transport of calls whose K/V are all on this rank."""

from dataclasses import dataclass

import jax

from zigzag_kernels.problem import Problem

from .. import launch
from .transport import Inputs, Residuals, Tables


@dataclass(frozen=True)
class Local:
    """Moves no data: one launch computes the forward pass."""

    problem: Problem

    def forward(self, inputs: Inputs, tables: Tables) -> tuple[jax.Array, jax.Array]:
        """Return (out `[T, heads, head_dim]`, statistics).

        The statistics are lse `[heads, T]` float32. With `return_max_logits` they are `[2, heads, T]`: lse, and the
        largest logit of each row.
        """
        from zigzag_kernels import plan

        q, k, v, sinks = inputs
        return plan.forward(launch.run, self.problem, q, k, v, tables.segments, sinks=sinks)

    def backward(self, residuals: Residuals, dout: jax.Array, dlse: jax.Array | None, tables: Tables) -> Inputs:
        """Return the gradients of the inputs for the cotangents of out and lse; `dlse` None means zeros."""
        from zigzag_kernels import plan

        (q, k, v, sinks), out, lse = residuals
        strides = {"dout_strides": self.problem.q_strides}  # in XLA, dout is contiguous like q
        dq, dk, dv, *dsinks = plan.backward(
            launch.run, self.problem, q, k, v, out, lse, dout, dlse=dlse, segments=tables.segments,
            sequences=tables.sequences, sinks=sinks, **strides,
        )  # fmt: skip
        return Inputs(dq, dk, dv, dsinks[0] if dsinks else None)
