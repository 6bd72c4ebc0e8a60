"""The transport of method "allgather", which gathers K/V from all ranks, one window of KV heads at a time."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.lax import optimization_barrier

from zigzag_kernels.problem import Problem

from .. import launch
from ..axes import AxisName
from .transport import Beside, Inputs, Residuals, Tables, move_again


@dataclass(frozen=True)
class AllGather:
    """Gathers the next window of KV heads while kernels compute the window before it.

    A window has `problem.window` KV heads, and its results are written in place into the arrays of all heads. At most
    two windows are in memory: the transfer of the next window starts when the previous window is no longer needed. The
    backward pass gathers K/V again, and sums dK/dV over the ranks in `problem.call.grad_reduce_dtype` while it computes
    dQ of the same window or, where one kernel computes all gradients of a window, while it computes the next window.
    """

    problem: Problem
    axis_name: AxisName

    def forward(self, inputs: Inputs, tables: Tables, beside: Beside | None = None) -> tuple[jax.Array, jax.Array]:
        """Return (out, statistics) as `Local.forward`; k and v are this rank's `[T, kv_heads, head_dim]`.

        In a batch of two parts, `beside` computes the other part. The results are then the arrays that `beside`
        returns, and k and v have only the rows of this part.
        """
        from zigzag_kernels import plan

        q, k, v, sinks = inputs
        results: Any = None
        # No kernel of this part can run during the first transfer, but the kernels for whole documents can.
        coming = self.gather(k, v, 0)
        start = (None, None) if beside is None else beside(None)  # the second gather does not wait for `beside`
        for head in self.first_heads:
            # The barrier makes the next gather wait for the window before this one: otherwise XLA could start all
            # gathers immediately, and keep all windows in memory.
            here = coming
            if head + self.problem.window < self.problem.kv_heads:
                k, v, here, results = optimization_barrier((k, v, here, results))
                coming = self.gather(k, v, head + self.problem.window)
            part = plan.Part(first_kv_head=head)
            # Each window writes its own heads into the same arrays.
            results = plan.forward(
                launch.run, self.problem, q, *here, tables.segments, sinks=sinks, part=part, into=results or start
            )
        return results

    def backward(
        self,
        residuals: Residuals,
        dout: jax.Array,
        dlse: jax.Array | None,
        tables: Tables,
        beside: Beside | None = None,
    ) -> Inputs:
        """Return gradients as `Local.backward`; dk and dv of this rank's rows are summed over the ranks.

        In a batch of two parts, `beside` computes the other part. dq, dk and dv are then the arrays that `beside`
        returns, and k and v have only the rows of this part.
        """
        from zigzag_kernels import plan

        problem, strides = self.problem, {"dout_strides": self.problem.q_strides}
        (q, k, v, sinks), out, lse = residuals
        k, v, dout = move_again(k, v, dout)
        dq: Any = None
        dsinks: Any = None
        coming = self.gather(k, v, 0)
        start, dk, dv = (None, jnp.zeros_like(k), jnp.zeros_like(v)) if beside is None else beside(None)
        fuses = plan.fuses_windows(problem, plan.Part(dtype=problem.call.grad_reduce_dtype), **strides)
        unsent: Any = None  # (first KV head, dK and dV) of the window before this one, if no transfer has begun
        for head in self.first_heads:
            here = coming
            if head + problem.window < problem.kv_heads:
                k, v, here, dq = optimization_barrier((k, v, here, dq))
                coming = self.gather(k, v, head + problem.window)
            # The barrier waits for dQ of the previous window and for the sums that it began, so that windows can use
            # the same memory for contributions, delta and lse. Everything in this window except transfers reads this
            # dout, and so starts behind the barrier.
            dout, dq, dk, dv = optimization_barrier((dout, dq, dk, dv))
            part, summed = plan.Part(head), plan.Part(head, dtype=problem.call.grad_reduce_dtype)
            rows = plan.backward_rows(launch.run, problem, out, lse, dout, dlse, part=part, **strides)
            arguments = launch.run, problem, q, here[0], here[1], dout, rows
            if sinks is not None:
                dsinks = plan.backward_sinks(launch.run, problem, rows, sinks, part=part, into=dsinks)
            if fuses:
                if unsent:  # the sums of the window before this one travel beside this window's kernel
                    dk, dv = self._add_windows(dk, dv, *unsent)
                dq, *contributions = plan.backward_window(
                    *arguments, tables, part=summed, into=(dq, None, None), **strides
                )
                unsent = head, contributions
                continue
            contributions = plan.backward_keys(*arguments, tables.sequences, part=summed, **strides)
            dk, dv = self._add_windows(dk, dv, head, contributions)
            into = start if dq is None else dq
            dq = plan.backward_queries(*arguments, tables.segments, part=part, into=into, **strides)
        if unsent:
            dk, dv = self._add_windows(dk, dv, *unsent)
        return Inputs(dq, dk, dv, dsinks)

    def _add_windows(
        self, dk: jax.Array, dv: jax.Array, head: int, contributions: Sequence[jax.Array]
    ) -> tuple[jax.Array, jax.Array]:
        """Return dk and dv with the sums of both `contributions`: see `_add_window`."""
        of_dk, of_dv = contributions
        return self._add_window(dk, head, of_dk), self._add_window(dv, head, of_dv)

    def _add_window(self, gradient: jax.Array, head: int, contribution: jax.Array) -> jax.Array:
        """Return `gradient` with the sum of `contribution` over all ranks in the window that begins at `head`."""
        if not contribution.shape[0]:  # XLA has no collectives of arrays without rows
            return gradient
        # Each rank gets the rows of its own slot.
        window = jax.lax.psum_scatter(contribution, self.axis_name, tiled=True).astype(gradient.dtype)
        first_row = gradient.shape[0] - window.shape[0]  # earlier rows belong to the other part of the batch
        return jax.lax.dynamic_update_slice(gradient, window, (first_row, head, 0))

    @property
    def first_heads(self) -> range:
        """First KV head of each window."""
        return range(0, self.problem.kv_heads, self.problem.window)

    def gather(self, k: jax.Array, v: jax.Array, head: int) -> tuple[jax.Array, jax.Array]:
        """Return K/V `[world_size * T, window, head_dim]` of all ranks, for the window from KV head `head` on."""

        def window(x):
            x = jax.lax.slice_in_dim(x, head, head + self.problem.window, axis=1)
            return jax.lax.all_gather(x, self.axis_name, tiled=True) if x.shape[0] else x

        return window(k), window(v)
