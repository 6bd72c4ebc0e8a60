"""The transport of method "allgather", which gathers K/V from all ranks, one window of KV heads at a time."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from zigzag_kernels.problem import Problem

from .. import launch
from .agreement import BACKWARD, agree_on_call, resolve
from .collectives import gather_into, reduce_into
from .streams import Streams, on, streams_of
from .transport import Beside, Cotangents, Gradients, Residuals, Tables, part_of, problem_of_backward, readable

if TYPE_CHECKING:
    from zigzag_kernels.plan import Part


@dataclass(frozen=True)
class AllGather:
    """Gathers the next window of KV heads into one of two buffers, while kernels compute the window before it.

    A window has `problem.window` KV heads, and its kernels have few programs. Two streams take turns, so that the first
    programs of a kernel run beside the last programs of the kernel before it. This is possible because kernels of
    different windows do not depend on each other, nor does dQ depend on dK/dV of the same window. The backward pass
    gathers K/V again, and sums dK/dV over the ranks in `problem.call.grad_reduce_dtype`. The sums travel while dQ of
    the same window is computed or, where one kernel computes all gradients of a window, during the next window.
    Streams of the device wait for each other and for transfers; the host does not wait.
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

        In a batch of two parts, `beside` computes the other part. The results are then the arrays that `beside`
        returns, and k and v have only the rows of this part.
        """
        from zigzag_kernels import plan

        group = resolve(self.group_name)
        agree_on_call(group, self.problem)
        streams = streams_of(k.device)
        results: Any = (None, None)
        # Kernels of even windows run on the caller's stream, of odd windows on the side stream: the last programs of
        # one window run beside the first programs of the next.
        readers: Any = ((streams.current,), (streams.side,))
        if beside is not None:  # it launches on the caller's stream, so the first window uses the side stream
            readers = readers[::-1]

        def start() -> None:
            nonlocal results
            if beside is not None:
                results = beside(None)

        gathered = windows(k, v, self.problem.window, group, streams, readers, start)
        for index, (first_head, k_window, v_window) in enumerate(gathered):
            part = part_of(first_head)
            # The first launch, of `beside` or of the first window, allocates the results.
            with on(*readers[index % 2]):
                arguments = launch.run, self.problem, q, k_window, v_window, tables.segments
                results = plan.forward(*arguments, sinks=sinks, part=part, into=results)
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

        dk and dv are sums over all ranks, dsinks is the sum over the rows of this rank. In a batch of two parts,
        `beside` computes the other part. dq is then the array that `beside` returns, k and v have only the rows of this
        part, and dk and dv of these rows are written to `into`.
        """
        agree_on_call(resolve(self.group_name), self.problem, call=BACKWARD)
        # The gradients of all windows are put into one array only after the buffers are freed. This keeps the peak of
        # memory low: apart from the results, buffers and delta and lse of two windows take most of the memory.
        # `dsinks` is allocated here, on the stream of the caller, who gets it.
        dsinks = None if sinks is None else sinks.new_empty(sinks.shape)
        of_sinks = None if sinks is None or dsinks is None else (sinks, dsinks)
        dq, of_windows = self._window_gradients(residuals, dout, dlse, tables, of_sinks, beside)
        dkv = residuals.k.new_empty((2, *residuals.k.shape)) if into is None else into
        for x, window in zip(dkv.split(self.problem.window, 2), of_windows, strict=True):
            x.copy_(window)
        return dq, dkv, dsinks

    def _window_gradients(
        self,
        residuals: Residuals,
        dout: torch.Tensor,
        dlse: torch.Tensor | None,
        tables: Tables,
        of_sinks: tuple[torch.Tensor, torch.Tensor] | None,
        beside: Beside | None,
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Return (dq, [dk and dv `[2, T, window, head_dim]` of each window]).

        The gradients of the last window have the dtype of the sums. `of_sinks` is (the sinks, the tensor for their
        gradient), or None without sinks.
        """
        residuals, cotangents = readable(residuals, dout, dlse)
        problem = problem_of_backward(self.problem, residuals.q, cotangents.dout)
        given = _Given(problem, residuals, cotangents, tables, of_sinks)
        return self._fused_windows(given) if given.fuses else self._windows_in_pairs(given, beside)

    def _windows_in_pairs(self, given: "_Given", beside: Beside | None) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Return the results of `_window_gradients`, where two kernels compute dK/dV and dQ of a window."""
        from zigzag_kernels import plan

        (q, k, v, *_), problem, strides = given.residuals, given.problem, given.cotangents.strides
        group, tables = resolve(self.group_name), given.tables
        contribution, dkv = given.new_contribution(), []
        dq: Any = None

        def start() -> None:
            nonlocal dq
            if beside is not None:
                dq = beside(None)

        rows = []  # delta and lse2 of this window and of the window before it
        current, side, transfers = streams = streams_of(k.device)
        for first_head, k_window, v_window in windows(k, v, problem.window, group, streams, start=start):
            # A launch on `side` may use the memory that is freed here: `side` has waited for dQ of the window before
            # the last, but not for dQ of the last one.
            del rows[:-1]
            with on(side):
                rows.append(given.rows_of(first_head))
            arguments = launch.run, problem, q, k_window, v_window, given.cotangents.dout, rows[-1]
            # dQ needs `rows`. And dQ must not start before dK/dV, because the sums of dK/dV travel during dQ.
            current.wait_stream(side)
            with on(side):
                part, into = given.summed(first_head), contribution.unbind()
                plan.backward_keys(*arguments, tables.sequences, part=part, into=into, **strides)
            part = part_of(first_head)
            dq = plan.backward_queries(*arguments, tables.segments, part=part, into=dq, **strides)
            # The sum over ranks waits for dK/dV of this window, and runs while dQ is computed on the caller's stream.
            transfers.wait_stream(side)
            with on(transfers):
                dkv.append(given.sum_over(group, contribution, first_head))
        assert dq is not None
        return dq, dkv

    def _fused_windows(self, given: "_Given") -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Return the results of `_window_gradients`, where one kernel computes all gradients of a window.

        Transfers are in the same order as in `_windows_in_pairs`, because another rank may run that method: Hopper
        kernels cannot read every dO.
        """
        from zigzag_kernels import plan

        (q, k, v, *_), problem, strides = given.residuals, given.problem, given.cotangents.strides
        group, window = resolve(self.group_name), problem.window
        contributions = given.new_contribution(), given.new_contribution()
        # Both streams write dQ. Its memory belongs to `current`, for which `side` waits before it writes.
        dq, dkv = q.new_empty(q.shape), []
        current, side, transfers = streams = streams_of(k.device)
        # As in the forward pass, the last programs of one window run beside the first programs of the next. All
        # kernels of a window are on one stream, which allocates and frees what they need.
        readers = (current,), (side,)

        def send(first_head: int) -> None:
            """Start the sum of dK/dV over the ranks of the window from `first_head` on."""
            index = first_head // window % 2
            transfers.wait_stream(*readers[index])
            with on(transfers):
                dkv.append(given.sum_over(group, contributions[index], first_head))

        def between(first_head: int) -> None:
            # This window's kernels do not wait for the sum of the window before, which travels beside them.
            if first_head:
                send(first_head - window)

        last = problem.kv_heads - window
        for first_head, k_window, v_window in windows(k, v, window, group, streams, readers, between=between):
            index = first_head // window % 2
            with on(*readers[index]):
                rows = given.rows_of(first_head)
                arguments = launch.run, problem, q, k_window, v_window, given.cotangents.dout, rows, given.tables
                into = dq, *contributions[index].unbind()
                plan.backward_window(*arguments, part=given.summed(first_head), into=into, **strides)
            if first_head == last:
                send(first_head)
        return dq, dkv


class _Given(NamedTuple):
    """The arguments of the backward pass of all windows: see `AllGather._window_gradients`."""

    problem: Problem
    residuals: Residuals
    cotangents: Cotangents
    tables: Tables
    of_sinks: tuple[torch.Tensor, torch.Tensor] | None

    @property
    def fuses(self) -> bool:
        """True if one kernel computes all gradients of each window."""
        from zigzag_kernels import plan

        several = self.problem.window < self.problem.kv_heads  # otherwise no plan is looked up
        return several and plan.fuses_windows(self.problem, self.summed(0), **self.cotangents.strides)

    def summed(self, first_head: int) -> "Part":
        """Return the part whose dK/dV are summed over the ranks: the window from KV head `first_head` on."""
        return part_of(first_head, False, self.problem.call.grad_reduce_dtype)

    def new_contribution(self) -> torch.Tensor:
        """Return memory for dK/dV `[2, W * T, window, head_dim]` of one window on this rank, for all ranks."""
        problem, k = self.problem, self.residuals.k
        shape = 2, problem.kv_tokens, problem.window, problem.head_dim
        return k.new_empty(shape, dtype=getattr(torch, problem.call.grad_reduce_dtype))

    def rows_of(self, first_head: int) -> tuple:
        """Launch the kernels of the window from `first_head` on that precede all others; return (delta, lse2)."""
        from zigzag_kernels import plan

        problem, part, (dout, dlse) = self.problem, part_of(first_head), self.cotangents
        out, lse = self.residuals.out, self.residuals.lse
        rows = plan.backward_rows(launch.run, problem, out, lse, dout, dlse, part=part, **self.cotangents.strides)
        if self.of_sinks is not None:
            sinks, into = self.of_sinks
            plan.backward_sinks(launch.run, problem, rows, sinks, part=part, into=into)
        return rows

    def sum_over(self, group, contribution: torch.Tensor, first_head: int) -> torch.Tensor:
        """Return dK/dV `[2, T, window, head_dim]` of this rank's rows, summed over the ranks.

        The sums overwrite this rank's own part of `contribution`. They are copied out in the dtype of k, except in the
        last window.
        """
        sums = contribution.chunk(group.size(), 1)[group.rank()]
        for total, x in zip(sums, contribution, strict=True):
            reduce_into(total, x, group)
        # The memory of the copy belongs to `transfers`, which waits for the other streams before it reuses the memory.
        last = first_head + self.problem.window == self.problem.kv_heads
        return sums if last else sums.to(self.residuals.k.dtype, copy=True)


def windows(
    k,
    v,
    heads_k_stride,
    group,
    streams: Streams,
    readers: tuple[tuple, tuple] | None = None,
    start: Callable[[], None] = lambda: None,
    between: Callable[[int], None] = lambda first_head: None,
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """Yield (first KV head, k, v `[W * T, heads_k_stride, head_dim]`) of all ranks, while the next window travels.

    This rank sends from its own slot of the buffer that it receives into. `readers` are (the streams that read even
    windows, the streams that read odd windows); None means `current` and `side` for both. When a window is yielded, its
    readers wait for all earlier operations on `transfers`, but not for each other. `start` is called after the first
    transfer has begun. `between(first_head)` is called when the readers of a window have waited, before the next
    transfer begins.
    """
    tokens, kv_heads, head_dim = k.shape
    first_heads = range(0, kv_heads, heads_k_stride)
    shape = group.size() * tokens, 2 * heads_k_stride, head_dim
    # Kernels read a window in one buffer while the next window arrives in the other. A single window needs one buffer.
    buffers = [k.new_empty(shape) for _ in first_heads[:2]]
    current, side, transfers = streams
    readers = readers or ((current, side), (current, side))

    def gather(index) -> None:
        # The transfer begins when the kernels that read this buffer are complete.
        for stream in readers[index % 2]:
            transfers.wait_stream(stream)
        heads = slice(first_heads[index], first_heads[index] + heads_k_stride)
        own = own_slot(buffers[index % 2], group)
        with on(transfers):
            # This rank's rows are copied directly into their slot, from which the collective sends them.
            torch.cat((k[:, heads], v[:, heads]), 1, out=own)
            gather_into(buffers[index % 2], own, group)

    side.wait_stream(current)  # first, because this makes `side` a part of a CUDA graph that is being captured
    try:
        gather(0)
        start()
        for index, first_head in enumerate(first_heads):
            for stream in readers[index % 2]:
                stream.wait_stream(transfers)
            between(first_head)
            if index + 1 < len(first_heads):
                gather(index + 1)
            k_window, v_window = buffers[index % 2].split(heads_k_stride, 1)
            yield first_head, k_window, v_window
    finally:
        # After these waits, memory from `current` or `side` can be freed and reused there, without `record_stream`.
        # `current` waits last, which the end of a captured graph requires.
        side.wait_stream(current)
        for stream in (side, transfers):
            current.wait_stream(stream)


def own_slot(buffer: torch.Tensor, group) -> torch.Tensor:
    """Return this rank's rows `[T, ...]` of the gathered `buffer [W * T, ...]`."""
    return buffer.chunk(group.size())[group.rank()]
