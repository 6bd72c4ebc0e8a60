"""Attention to K/V that travel around a ring of ranks."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from zigzag_kernels.problem import Problem

from .. import launch
from .agreement import BACKWARD, agree_on_call, resolve
from .collectives import exchange, wait
from .transport import Beside, Gradients, Residuals, Tables, part_of, problem_of_backward, readable, rows_of_backward


@dataclass(frozen=True)
class Ring:
    """Passes K/V of all heads from rank to rank, in flight while the rank attends to earlier K/V.

    At step `s` a rank has the keys of rank `(rank - s) % world_size`, and uses table `s`. No step can be skipped, even
    with a causal mask: a rank's late chunk attends to keys of every other rank. Tiles with nothing to compute return
    immediately. Each step adds to the float32 results of the step before. dK/dV travel one hop behind their K/V in
    `problem.call.grad_reduce_dtype`: the last hop brings them home.
    """

    problem: Problem
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

        With `beside` they are the arrays that it returns, and k and v are the rows of this part alone.
        """
        from zigzag_kernels import plan

        group = resolve(self.group_name)
        agree_on_call(group, self.problem)
        # Each step reads and writes these float32 results in place; the first one allocates them, unless whole
        # documents have.
        results: Any = (None, None)

        def start() -> None:
            nonlocal results
            if beside is not None:
                results = beside("float32")

        steps = zip(_around(k, v, group, start), tables.segments.unbind(), strict=True)
        for step, (keys, segments) in enumerate(steps):
            part = part_of(0, step > 0, "float32")
            results = plan.forward(launch.run, self.problem, q, *keys, segments, sinks=sinks, part=part, into=results)
        out, statistics = results
        # Rounded once, at the end: steps add in float32.
        return out.to(q.dtype), statistics

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

        dk and dv are sums over all ranks, dsinks over the rows of this one. With `beside` and `into` they are as
        in `AllGather.backward`.
        """
        from zigzag_kernels import plan

        group, reduce_dtype = resolve(self.group_name), self.problem.call.grad_reduce_dtype
        agree_on_call(group, self.problem, call=BACKWARD)
        residuals, cotangents = readable(residuals, dout, dlse)
        (q, k, v, *_), dout, strides = residuals, cotangents.dout, cotangents.strides
        problem = problem_of_backward(self.problem, q, dout)
        sums = [k.new_empty((2, *k.shape), dtype=getattr(torch, reduce_dtype)) for _ in range(2)]
        pairs = [x.unbind() for x in sums]
        rows, dsinks = rows_of_backward(problem, residuals, cotangents, sinks)
        dq: Any = None
        works = []

        def start() -> None:
            nonlocal dq
            if beside is not None:
                dq = beside("float32")

        steps = zip(_around(k, v, group, start), tables.segments.unbind(), tables.sequences.unbind(), strict=True)
        for step, (keys, segments, sequences) in enumerate(steps):
            # One buffer sends the sums so far while the other receives the next ones.
            here, there = step % 2, (step + 1) % 2
            wait(works, group)
            arguments = launch.run, problem, q, *keys, dout, rows
            part = part_of(0, step > 0, reduce_dtype)
            # Added to the sums that came with the hop before. The first step has none, and writes.
            plan.backward_keys(*arguments, sequences, part=part, into=pairs[here], **strides)
            # dK/dV of these keys go on to the rank that attends to them next, behind the keys, and dQ is computed
            # meanwhile. The tag keeps them apart from K/V, which are under way at the same time.
            works = exchange(sums[here], sums[there], group, tag=1)
            part = part_of(0, step > 0, "float32")
            dq = plan.backward_queries(*arguments, segments, part=part, into=dq, **strides)
        wait(works, group)
        assert dq is not None
        # After W hops the sums are back on the rank of their keys, in the buffer that the last hop wrote.
        dkv = sums[problem.world_size % 2]
        return dq.to(q.dtype), dkv.to(k.dtype) if into is None else into.copy_(dkv), dsinks


def _around(
    k: torch.Tensor, v: torch.Tensor, group, start: Callable[[], None]
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield (k, v) `[T, kv_heads, head_dim]` of rank `(rank - step) % W` at each step, while the next ones travel.

    `start` is called when the first transfer is under way.
    """
    # K and V travel as one message. This rank's own are copied, because the buffer is overwritten in the second step.
    own, heads, steps = torch.cat((k, v), 1), k.shape[1], group.size()
    buffers = own, torch.empty_like(own)
    keys = [(x[:, :heads], x[:, heads:]) for x in buffers]
    for step in range(steps):
        here, there = step % 2, (step + 1) % 2
        # The last K/V are not passed on: every rank has attended to them then.
        works = exchange(buffers[here], buffers[there], group) if step + 1 < steps else []
        if step == 0:
            start()
        yield keys[here]
        wait(works, group)
