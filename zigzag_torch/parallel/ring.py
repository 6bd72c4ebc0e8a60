"""The transport of method "ring", which passes K/V around a ring of ranks."""

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
    """Passes K/V of all heads from rank to rank, while kernels compute attention to the K/V received before.

    At ring step `s` a rank has the keys of rank `(rank - s) % world_size`, and uses table `s`. No ring step can be
    skipped, even with a causal mask: a rank's late chunk attends to keys of every other rank. Tiles with nothing to
    compute return immediately. Each step adds to the float32 results of the step before. dK/dV travel one hop behind
    their K/V, in `problem.call.grad_reduce_dtype`; the last hop brings them back to the rank of their keys.
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

        `beside` is as in `AllGather.forward`.
        """
        from zigzag_kernels import plan

        group = resolve(self.group_name)
        agree_on_call(group, self.problem)
        # Each ring step reads and writes these float32 results in place; `beside` or the first step allocates them.
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
        # Ring steps add in float32, so that the result is rounded once, here.
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

        dk and dv are sums over all ranks, dsinks is the sum over the rows of this rank. `beside` and `into` are as in
        `AllGather.backward`.
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
            # One buffer sends the sums so far, while the other receives the sums for the next keys.
            here, there = step % 2, (step + 1) % 2
            wait(works, group)
            arguments = launch.run, problem, q, *keys, dout, rows
            part = part_of(0, step > 0, reduce_dtype)
            # dK/dV are added to the sums that the last hop brought. In the first step there are none, so they are
            # written.
            plan.backward_keys(*arguments, sequences, part=part, into=pairs[here], **strides)
            # dK/dV of these keys travel to the rank that attends to the keys next, while dQ is computed. The tag
            # separates them from K/V, which are under way at the same time.
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
    """Yield (k, v) `[T, kv_heads, head_dim]` of rank `(rank - step) % W` at each step, while the next K/V travel.

    `start` is called after the first transfer has begun.
    """
    # K and V travel in one message. This rank's own K/V are copied, because the second step overwrites the buffer.
    own, heads, steps = torch.cat((k, v), 1), k.shape[1], group.size()
    buffers = own, torch.empty_like(own)
    keys = [(x[:, :heads], x[:, heads:]) for x in buffers]
    for step in range(steps):
        here, there = step % 2, (step + 1) % 2
        # In the last step K/V are not passed on, because every rank has used them.
        works = exchange(buffers[here], buffers[there], group) if step + 1 < steps else []
        if step == 0:
            start()
        yield keys[here]
        wait(works, group)
