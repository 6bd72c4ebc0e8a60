"""The transport of method "ring", which passes K/V from rank to rank."""

from dataclasses import dataclass

import jax
from jax.lax import optimization_barrier

from zigzag_kernels.problem import Problem

from .. import launch
from ..axes import AxisName
from .transport import Beside, Inputs, Residuals, Tables, behind, move_again, rows_of_backward


@dataclass(frozen=True)
class Ring:
    """Passes K/V of all heads to the next rank, while kernels compute attention to them.

    At ring step `s` a rank holds the K/V of rank `(rank - s) % world_size` and uses table `s`. Each step merges its
    results into the float32 results so far. dK/dV travel one hop behind their K/V, in `problem.call.grad_reduce_dtype`,
    while dQ is computed; after `world_size` hops they are back on the rank of their keys.

    Compile time does not depend on `world_size`, because the steps are a loop. The first step is before the loop,
    because there are no earlier results, and the last step is behind the loop, because it sends no K/V.
    """

    problem: Problem
    axis_name: AxisName

    def forward(self, inputs: Inputs, tables: Tables, beside: Beside | None = None) -> tuple[jax.Array, jax.Array]:
        """Return (out, statistics) as `Local.forward`; k and v are this rank's `[T, kv_heads, head_dim]`.

        `beside` is as in `AllGather.forward`.
        """
        from zigzag_kernels import plan

        q, k, v, sinks = inputs

        def step(k, v, segments, results):
            part = plan.Part(accumulate=results is not None, dtype="float32")
            # Ring steps add to the results in place; `beside` or the first step allocates them.
            into = results or ((None, None) if beside is None else beside("float32"))
            return plan.forward(launch.run, self.problem, q, k, v, segments, sinks=sinks, part=part, into=into)

        out, statistics = self._around(step, k, v, tables.segments)
        return out.astype(q.dtype), statistics

    def backward(
        self,
        residuals: Residuals,
        dout: jax.Array,
        dlse: jax.Array | None,
        tables: Tables,
        beside: Beside | None = None,
    ) -> Inputs:
        """Return gradients as `Local.backward`; dk and dv of this rank's rows are summed over the ranks.

        `beside` is as in `AllGather.backward`.
        """
        from zigzag_kernels import plan

        problem, strides = self.problem, {"dout_strides": self.problem.q_strides}
        q, k, v, _ = residuals.inputs
        k, v, dout = move_again(k, v, dout)
        rows, dsinks = rows_of_backward(problem, residuals, dout, dlse)

        into, *of_whole = (None,) if beside is None else beside("float32")

        def step(k, v, tables, gradients):
            dq, dk, dv = gradients or (into, None, None)
            arguments = launch.run, problem, q, k, v, dout, rows
            part = plan.Part(accumulate=gradients is not None, dtype=problem.call.grad_reduce_dtype)
            dk, dv = plan.backward_keys(*arguments, tables.sequences, part=part, into=(dk, dv), **strides)
            # dK/dV travel to the next rank while dQ of this step is computed.
            dk, dv = self.pass_on(dk, dv)
            part = plan.Part(accumulate=gradients is not None, dtype="float32")
            return plan.backward_queries(*arguments, tables.segments, part=part, into=dq, **strides), dk, dv

        dq, dk, dv = self._around(step, k, v, tables)
        dk, dv = behind(of_whole, (dk.astype(k.dtype), dv.astype(v.dtype)))
        return Inputs(dq.astype(q.dtype), dk, dv, dsinks)

    def _around(self, step, k, v, tables):
        """Call `step(k, v, table, result) -> result` for the K/V of each rank, and return the last result.

        The first result is None. `tables` is a pytree of arrays with one entry per step.
        """

        def hop(carry, table, last=False):
            k, v, result = optimization_barrier(carry)  # K/V are not sent before the results of the last step exist
            coming = (k, v) if last else self.pass_on(k, v)
            return (*coming, step(k, v, table, result)), None

        def select(steps):
            return jax.tree.map(lambda table: table[steps], tables)

        carry, _ = hop((k, v, None), select(0))
        # K/V alternate between two buffers. Each trip of the loop has two hops, so that it ends with K/V in the buffer
        # in which it began; otherwise XLA would copy K/V.
        carry, _ = jax.lax.scan(hop, carry, select(slice(1, -1)), unroll=2)
        (_, _, result), _ = hop(carry, select(-1), last=True)
        return result

    def pass_on(self, *arrays: jax.Array) -> tuple[jax.Array, ...]:
        """Send `arrays` to the next rank, and return the arrays of the previous rank."""
        world_size = self.problem.world_size
        following = [(rank, (rank + 1) % world_size) for rank in range(world_size)]
        return jax.lax.ppermute(arrays, self.axis_name, following)
