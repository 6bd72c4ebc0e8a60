"""The transport of method "halo", which receives the halos of this rank's chunks from its neighbours."""

import itertools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.lax import optimization_barrier

from zigzag_kernels.halo import KEY_SLOTS, HaloSlot
from zigzag_kernels.problem import Problem

from .. import launch
from ..axes import AxisName
from .transport import Beside, Inputs, Residuals, Tables, behind, move_again, rows_of_backward


@dataclass(frozen=True)
class Halo:
    """Sends the last rows of each chunk to the next chunk's rank, while kernels compute rows without a halo.

    Rows that need no halo read the rank's own K/V in place. The first rows of each chunk read a buffer, which has the
    halo and, behind it, a copy of the K/V of these rows; so no row is computed in two parts. The backward pass moves
    halos again, because keeping them would take memory in every layer. It sends dK/dV of the halos back in
    `problem.call.grad_reduce_dtype`. Their owner first adds the gradients of the copies, and then the gradients that it
    receives, always in this order.

    `problem` describes the rank's own K/V, and `of_halo` the buffer.
    """

    problem: Problem
    of_halo: Problem
    axis_name: AxisName

    def forward(self, inputs: Inputs, tables: Tables, beside: Beside | None = None) -> tuple[jax.Array, jax.Array]:
        """Return (out, statistics) as `Local.forward`; k and v are this rank's `[T, kv_heads, head_dim]`.

        `beside` is as in `AllGather.forward`.
        """
        from zigzag_kernels import plan

        q, k, v, sinks = inputs
        # XLA can overlap this transfer with the rows that need no halo, because neither reads results of the other.
        halos = self._bring(k, v, tables)
        start = (None, None) if beside is None else beside(None)
        of_own, of_first, _ = tables.segments
        results = plan.forward(launch.run, self.problem, q, k, v, of_own, sinks=sinks, into=start)
        # One table has the rows that need no halo, the other the first rows of each chunk. Together they write every
        # row once.
        k_near, v_near = plan.halo_buffer(launch.run, self.problem, k, v, of_first, halos)
        return plan.forward(launch.run, self.of_halo, q, k_near, v_near, of_first, sinks=sinks, into=results)

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

        problem = self.problem
        strides: Any = {"dout_strides": problem.q_strides}
        q, k, v, _ = residuals.inputs
        k, v, dout = move_again(k, v, dout)
        halos = self._bring(k, v, tables)
        start, *of_whole = (None,) if beside is None else beside(None)
        rows, dsinks = rows_of_backward(problem, residuals, dout, dlse)
        (of_own, of_first, of_sent), (keys_of_own, keys_of_halos) = tables
        own = launch.run, problem, q, k, v, dout, rows
        part = plan.Part(dtype=problem.call.grad_reduce_dtype)
        sums = plan.backward_keys(*own, keys_of_own, part=part, **strides)
        # XLA's scheduler does not know how long kernels take. Without the barrier it would compute dK/dV of the buffer
        # first, and so wait for the halos.
        sums, halos = optimization_barrier((sums, halos))
        k_near, v_near = plan.halo_buffer(launch.run, problem, k, v, of_first, halos)
        apart = launch.run, self.of_halo, q, k_near, v_near, dout, rows
        in_slots = plan.backward_keys(*apart, keys_of_halos, part=part, **strides)
        early, late = self._send_home(*in_slots)
        dq = plan.backward_queries(*own, of_own, into=start, **strides)
        dq = plan.backward_queries(*apart, of_first, into=dq, **strides)
        # The order of additions is fixed, so that the same inputs give the same bits: first the gradients of own
        # copies, then the gradients from neighbours.
        slots = HaloSlot.EARLY_ROWS.value, HaloSlot.LATE_ROWS.value
        sums = plan.add_halo_rows(launch.run, problem, in_slots, in_slots, of_first, sums, slots=slots)
        dk, dv = plan.add_halo_rows(launch.run, problem, (early, early), (late, late), of_sent, sums)
        dk, dv = behind(of_whole, (dk.astype(k.dtype), dv.astype(v.dtype)))
        return Inputs(dq, dk, dv, dsinks)

    def _bring(self, k: jax.Array, v: jax.Array, tables: Tables) -> tuple[jax.Array, jax.Array]:
        """Return the halos (early, late) `[halo_rows, 2 * kv_heads, head_dim]`: K, then V."""
        from zigzag_kernels import plan

        return self._exchange(*plan.sent_rows(launch.run, self.problem, k, v, tables.segments[2]))

    def _send_home(self, dk: jax.Array, dv: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return the gradients of the rows that this rank sent, (early, late), laid out like halos: dK, then dV."""
        rows = jnp.concatenate((dk, dv), 1)  # one transfer has both, as for K and V
        slots = rows.reshape(KEY_SLOTS, self.problem.call.halo_rows, *rows.shape[1:])
        # The gradient of the early halo goes back to the previous rank, and of the late halo to the next rank.
        late, early = self._exchange(slots[HaloSlot.LATE_HALO], slots[HaloSlot.EARLY_HALO])
        return early, late

    def _exchange(self, to_next: jax.Array, to_previous: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return the arrays from the previous and from the next rank; zeros if there is no such rank."""
        # Nothing moves from the last rank to the first: the last rank's early chunk precedes its own late chunk.
        onward = [*itertools.pairwise(range(self.problem.world_size))]
        of_previous = jax.lax.ppermute(to_next, self.axis_name, onward)
        return of_previous, jax.lax.ppermute(to_previous, self.axis_name, [(to, source) for source, to in onward])
