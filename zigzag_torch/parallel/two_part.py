"""The transport of batches of two parts: whole documents, whose keys are all on this rank, and split documents."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from zigzag_kernels.problem import Problem, segment_table_shapes, table_shapes

from .. import launch
from .agreement import BACKWARD, agree_on_call, resolve
from .allgather import AllGather
from .halo import Halo
from .ring import Ring
from .transport import Gradients, Residuals, Tables, part_of, problem_of_backward, readable, rows_of_backward

if TYPE_CHECKING:
    from zigzag_kernels.plan import Part


@dataclass(frozen=True)
class TwoPart:
    """Computes attention of whole documents while the first keys of the split documents are under way.

    The first `problem.call.whole_tokens` rows of each rank are for whole documents; `whole` is their problem. The other
    rows are for split documents; `split` is their transport, or None if there are no such rows. Both parts write their
    rows of the same results.
    """

    problem: Problem
    whole: Problem
    split: AllGather | Halo | Ring | None
    group_name: str

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tables: Tables, sinks: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (out, statistics) as `Local.forward`; k and v are this rank's `[T, kv_heads, head_dim]`."""
        from zigzag_kernels import plan

        of_whole, of_split = self._parts_of(tables)
        problem = launch.without_gluon_if_misaligned(self.whole, k, v)

        def attend(dtype: str | None) -> tuple[torch.Tensor, torch.Tensor]:
            return plan.forward(launch.run, problem, q, k, v, of_whole.segments, sinks=sinks, part=_part(dtype))

        if self.split is None:
            agree_on_call(resolve(self.group_name), self.problem)
            return attend(None)
        # Kernels of the split part get all of q, and their tables name its rows; transfers move only its rows of k, v.
        first = self.whole.rows
        return self.split.forward(q, k[first:], v[first:], of_split, sinks, beside=attend)

    def backward(
        self,
        residuals: Residuals,
        dout: torch.Tensor,
        dlse: torch.Tensor | None,
        tables: Tables,
        sinks: torch.Tensor | None = None,
    ) -> Gradients:
        """Return the gradients, in the form of `AllGather.backward`."""
        from zigzag_kernels import plan

        of_whole, of_split = self._parts_of(tables)
        residuals, cotangents = readable(residuals, dout, dlse)
        (q, k, v, out, lse), dout, strides = residuals, cotangents.dout, cotangents.strides
        problem = problem_of_backward(self.whole, q, dout, (k, v))
        dkv, first = k.new_empty((2, *k.shape)), self.whole.rows
        dsinks = None

        # The transport of the split part calls this function after its first transfer has begun.
        def attend(dtype: str | None) -> torch.Tensor:
            nonlocal dsinks
            rows, dsinks = rows_of_backward(problem, residuals, cotangents, sinks)
            arguments = launch.run, problem, q, k, v, dout, rows
            plan.backward_keys(*arguments, of_whole.sequences, into=dkv.unbind(), **strides)
            return plan.backward_queries(*arguments, of_whole.segments, part=_part(dtype), **strides)

        if self.split is None:
            agree_on_call(resolve(self.group_name), self.problem, call=BACKWARD)
            return attend(None), dkv, dsinks
        own = Residuals(q, k[first:], v[first:], out, lse)
        dq, _, more = self.split.backward(own, *cotangents, of_split, sinks, beside=attend, into=dkv[:, first:])
        return dq, dkv, None if dsinks is None else dsinks.add_(more)

    def _parts_of(self, tables: Tables) -> tuple[Tables, Tables]:
        """Return views of the tables of the whole and the split documents, which follow each other in `tables`."""
        call, sequences = self.problem.call, self.problem.sequences
        # `prepare_batch` puts the tables of both parts into one array of each kind, so that a batch has two tensors.
        (segments, _), (keys, _) = segment_table_shapes(call.whole_documents)
        whole = Tables(tables.segments[:segments], tables.sequences[:keys])
        if self.split is None:
            return whole, whole
        of_segments, of_sequences = table_shapes(call.method.kv_layout, sequences, self.problem.world_size)
        rest = tables.segments[segments:].view(of_segments), tables.sequences[keys:].view(of_sequences)
        return whole, Tables(*rest)


def _part(dtype: str | None) -> "Part":
    return part_of(0, False, dtype)
