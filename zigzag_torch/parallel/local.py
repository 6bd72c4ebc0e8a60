"""Attention to K/V that are all on this rank."""

from dataclasses import dataclass

import torch

from zigzag_kernels.problem import Problem

from .. import launch
from .transport import Gradients, Residuals, Tables, readable, row_strides, with_strides


@dataclass(frozen=True)
class Local:
    """Moves nothing: one launch computes the forward pass."""

    problem: Problem

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tables: Tables, sinks: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (out `[T, heads, head_dim]`, statistics), which are lse `[heads, T]` float32.

        With `return_max_logits` they are `[2, heads, T]`: lse, and the largest score of each row.
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

        residuals = readable(residuals)
        q, k, v, *_ = residuals
        dout = launch.last_dim_contiguous(dout)
        problem = with_strides(self.problem, row_strides(q), row_strides(k), row_strides(v))
        problem = launch.without_gluon_if_misaligned(problem, k, v, q, dout)
        dlse = None if dlse is None else dlse.contiguous()
        dq, dk, dv, *dsinks = plan.backward(
            launch.run, problem, *residuals, dout, dlse=dlse, segments=tables.segments, sequences=tables.sequences,
            dout_strides=row_strides(dout), sinks=sinks,
        )  # fmt: skip
        return dq, (dk, dv), dsinks[0] if dsinks else None
