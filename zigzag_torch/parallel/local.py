"""The transport of calls whose K/V are all on this rank."""

from dataclasses import dataclass

import torch

from zigzag_kernels.problem import Problem

from .. import launch
from .transport import Gradients, Residuals, Tables, problem_of_backward, readable


@dataclass(frozen=True)
class Local:
    """Moves no data: one launch computes the forward pass."""

    problem: Problem

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tables: Tables, sinks: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (out `[T, heads, head_dim]`, statistics).

        The statistics are lse `[heads, T]` float32. With `return_max_logits` they are `[2, heads, T]`: lse, and the
        largest score of each row.
        """
        from zigzag_kernels import plan

        problem = launch.without_gluon_if_misaligned(self.problem, k, v)
        return plan.forward(launch.run, problem, q, k, v, tables.segments, sinks=sinks)

    def backward(
        self,
        residuals: Residuals,
        dout: torch.Tensor,
        dlse: torch.Tensor | None,
        tables: Tables,
        sinks: torch.Tensor | None = None,
    ) -> Gradients:
        """Return (dq, (dk, dv), dsinks) for the gradients of out and lse; `dlse` None means zeros."""
        from zigzag_kernels import plan

        residuals, cotangents = readable(residuals, dout, dlse)
        q, k, v, *_ = residuals
        problem = problem_of_backward(self.problem, q, cotangents.dout, (k, v))
        dq, dk, dv, *dsinks = plan.backward(
            launch.run, problem, *residuals, cotangents.dout, dlse=cotangents.dlse, segments=tables.segments,
            sequences=tables.sequences, sinks=sinks, **cotangents.strides,
        )  # fmt: skip
        return dq, (dk, dv), dsinks[0] if dsinks else None
