"""The transport of method "halo", which receives the halos of this rank's chunks from its neighbours."""

from dataclasses import dataclass
from typing import Any

import torch

from zigzag_kernels.halo import KEY_SLOTS, HaloSlot
from zigzag_kernels.problem import Problem

from .. import launch
from .agreement import BACKWARD, agree_on_call, resolve
from .collectives import exchange_with_neighbours, wait
from .streams import on, streams_of
from .transport import Beside, Gradients, Residuals, Tables, part_of, problem_of_backward, readable, rows_of_backward


@dataclass(frozen=True)
class Halo:
    """Sends the last rows of each chunk to the next chunk's rank, while kernels compute rows without a halo.

    Rows that need no halo read the rank's own K/V in place. The first rows of each chunk read a buffer, which has the
    halo and, behind it, a copy of the K/V of these rows; so no row is computed in two parts. The two kinds of rows have
    separate streams, so that the programs of both run side by side. The backward pass moves halos again, because
    keeping them would take memory in every layer. It sends dK/dV of the halos back in `problem.call.grad_reduce_dtype`.
    Their owner first adds the gradients of the copies, and then the gradients that it receives, always in this order.

    `problem` describes the rank's own K/V, and `of_halo` the buffer.
    """

    problem: Problem
    of_halo: Problem
    group_name: str

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        tables: Tables,
        sinks: torch.Tensor | None = None,
        *,
        beside: Beside | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (out, statistics) as `Local.forward`; k and v are this rank's `[T, kv_heads, head_dim]`.

        `beside` is as in `AllGather.forward`.
        """
        from zigzag_kernels import plan

        group = resolve(self.group_name)
        agree_on_call(group, self.problem)
        problem = launch.without_gluon_if_misaligned(self.problem, k, v)
        # Halos travel while kernels compute the rows that need none.
        keys, works = self._exchange(problem, k, v, tables, group)
        current, side, _ = streams_of(k.device)
        # The next launch allocates the results. `side` may write them too, because it has waited for all earlier work
        # on their memory.
        side.wait_stream(current)
        results: Any = (None, None) if beside is None else beside(None)
        # Table 0 has the rows that need no halo, table 1 the first rows of each chunk. Together they write every row
        # once.
        results = plan.forward(launch.run, problem, q, k, v, tables.segments[0], sinks=sinks, into=results)
        with on(side):
            wait(works, group)
            plan.forward(launch.run, self.of_halo, q, *keys, tables.segments[1], sinks=sinks, into=results)
        current.wait_stream(side)
        return results

    def backward(
        self,
        residuals: Residuals,
        dout: torch.Tensor,
        dlse: torch.Tensor | None,
        tables: Tables,
        sinks: torch.Tensor | None = None,
        *,
        beside: Beside | None = None,
        into: torch.Tensor | None = None,
    ) -> Gradients:
        """Return (dq, dk and dv `[2, T, kv_heads, head_dim]`, dsinks) of this rank's rows.

        dk and dv are sums over all ranks, dsinks is the sum over the rows of this rank. `beside` and `into` are as in
        `AllGather.backward`.
        """
        from zigzag_kernels import plan

        group, reduce_dtype = resolve(self.group_name), self.problem.call.grad_reduce_dtype
        agree_on_call(group, self.problem, call=BACKWARD)
        residuals, cotangents = readable(residuals, dout, dlse)
        (q, k, v, *_), dout, strides = residuals, cotangents.dout, cotangents.strides
        problem, of_halo = (problem_of_backward(x, q, dout, y) for x, y in ((self.problem, (k, v)), (self.of_halo, ())))
        keys, works = self._exchange(problem, k, v, tables, group)
        dq = q.new_empty(q.shape) if beside is None else beside(None)
        rows, dsinks = rows_of_backward(problem, residuals, cotangents, sinks)
        sums = k.new_empty((2, *k.shape), dtype=getattr(torch, reduce_dtype))
        # dK and dV of the four slots: two halos, whose gradients are sent back, and two copies of own rows.
        of_slots = sums.new_empty((2, KEY_SLOTS, problem.call.halo_rows, *k.shape[1:]))
        received = torch.empty_like(of_slots[:, : HaloSlot.LATE_HALO])
        # The sequence table of own keys has about half as many entries as the table of the buffer, and fills the second
        # half of its memory.
        of_own, of_halos = tables.sequences[0, tables.sequences.shape[1] // 2 :], tables.sequences[1]
        own = (launch.run, problem, q, k, v, dout, rows)
        apart = (launch.run, of_halo, q, *keys, dout, rows)
        part = part_of(0, False, reduce_dtype)
        in_slots: Any = of_slots.flatten(1, 2).unbind()
        current, side, _ = streams_of(k.device)
        side.wait_stream(current)  # for the rows, and for all work on the memory that it writes
        plan.backward_keys(*own, of_own, part=part, into=sums.unbind(), **strides)
        with on(side):
            wait(works, group)
            plan.backward_keys(*apart, of_halos, part=part, into=in_slots, **strides)
            # The gradient of the early halo goes back to the previous rank, and of the late halo to the next rank,
            # while dQ is computed.
            works = exchange_with_neighbours(
                (of_slots[:, HaloSlot.EARLY_HALO].unbind(), of_slots[:, HaloSlot.LATE_HALO].unbind()),
                (received[:, 1].unbind(), received[:, 0].unbind()),
                group,
            )
        plan.backward_queries(*own, tables.segments[0], into=dq, **strides)
        with on(side):
            plan.backward_queries(*apart, tables.segments[1], into=dq, **strides)
        current.wait_stream(side)
        # The order of additions is fixed, so that the same inputs give the same bits: first the gradients of own
        # copies, then the gradients from neighbours.
        slots = HaloSlot.EARLY_ROWS.value, HaloSlot.LATE_ROWS.value
        add, dkv = (launch.run, problem), sums.unbind()
        plan.add_halo_rows(*add, in_slots, in_slots, tables.segments[1], dkv, slots=slots)
        wait(works, group)
        sent: Any = received.flatten(1, 2).unbind()
        plan.add_halo_rows(*add, sent, sent, tables.segments[2], dkv, slots=(0, 1))
        return dq, sums.to(k.dtype) if into is None else into.copy_(sums), dsinks

    def _exchange(
        self, problem: Problem, k: torch.Tensor, v: torch.Tensor, tables: Tables, group
    ) -> tuple[tuple[torch.Tensor, torch.Tensor], list]:
        """Return ((k, v) `[4 * halo_rows, kv_heads, head_dim]` of the buffer, the transfers that fill its halos)."""
        from zigzag_kernels import plan

        rows = plan.halo_rows(launch.run, problem, k, v, tables.segments[1:])
        slots = rows.unflatten(0, (len(HaloSlot), problem.call.halo_rows))
        works = exchange_with_neighbours(
            ((slots[HaloSlot.LATE_SENT],), (slots[HaloSlot.EARLY_SENT],)),
            ((slots[HaloSlot.EARLY_HALO],), (slots[HaloSlot.LATE_HALO],)),
            group,
        )
        k_near, v_near = slots[:KEY_SLOTS].flatten(0, 1).split(k.shape[1], 1)
        return (k_near, v_near), works
