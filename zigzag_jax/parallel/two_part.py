"""The transport of batches of two parts: whole documents, whose keys are all on this rank, and split documents."""

from dataclasses import dataclass
from typing import Any

import jax

from zigzag_kernels.problem import Problem

from .. import launch
from .allgather import AllGather
from .halo import Halo
from .ring import Ring
from .transport import Inputs, Residuals, Tables, rows_of_backward


@dataclass(frozen=True)
class TwoPart:
    """Computes attention of whole documents, which need no transfer, and of split documents.

    The first `problem.call.whole_tokens` rows of each rank are for whole documents; `whole` is their problem. The other
    rows are for split documents; `split` is their transport, or None if there are no such rows. Kernels of both parts
    get all of q, and write their own rows of the same results, so that XLA copies nothing. Whole documents and the
    first transfer do not wait for each other.
    """

    problem: Problem
    whole: Problem
    split: AllGather | Halo | Ring | None

    def forward(self, inputs: Inputs, tables: Tables) -> tuple[jax.Array, jax.Array]:
        """Return (out, statistics) as `Local.forward`; k and v are this rank's `[T, kv_heads, head_dim]`."""
        from zigzag_kernels import plan

        of_whole, of_split = self._parts_of(tables)
        q, k, v, sinks = inputs

        def attend(dtype: str | None) -> tuple[jax.Array, jax.Array]:
            part = plan.Part(dtype=dtype)
            return plan.forward(launch.run, self.whole, q, k, v, of_whole.segments, sinks=sinks, part=part)

        return attend(None) if self.split is None else self.split.forward(self._split_rows(inputs), of_split, attend)

    def backward(self, residuals: Residuals, dout: jax.Array, dlse: jax.Array | None, tables: Tables) -> Inputs:
        """Return gradients as `Local.backward`; dk and dv of this rank's rows are summed over the ranks."""
        from zigzag_kernels import plan

        of_whole, of_split = self._parts_of(tables)
        q, k, v, _ = residuals.inputs
        strides: Any = {"dout_strides": self.whole.q_strides}
        dsinks = None

        def attend(dtype: str | None) -> tuple[jax.Array, jax.Array, jax.Array]:
            nonlocal dsinks
            rows, dsinks = rows_of_backward(self.whole, residuals, dout, dlse)
            arguments = launch.run, self.whole, q, k, v, dout, rows
            dk, dv = plan.backward_keys(*arguments, of_whole.sequences, **strides)
            part = plan.Part(dtype=dtype)
            return plan.backward_queries(*arguments, of_whole.segments, part=part, **strides), dk, dv

        if self.split is None:
            dq, dk, dv = attend(None)
            return Inputs(dq, dk, dv, dsinks)
        split = residuals._replace(inputs=self._split_rows(residuals.inputs))
        gradients = self.split.backward(split, dout, dlse, of_split, attend)
        return gradients if dsinks is None else gradients._replace(sinks=dsinks + gradients.sinks)

    def _split_rows(self, inputs: Inputs) -> Inputs:
        """Return `inputs` with only the rows of k and v that move; q keeps all rows, which the tables name."""
        first = self.whole.rows
        return inputs._replace(k=inputs.k[first:], v=inputs.v[first:])

    def _parts_of(self, tables: Tables) -> tuple[Tables, Tables]:
        """Return the tables of the whole and of the split documents."""
        if self.split is None:
            return tables, tables
        whole, split = zip(*tables, strict=True)
        return Tables(*whole), Tables(*split)
