"""How K/V reach the rank whose queries attend to them, forward and backward: three ways with the same two functions.

Each way is static, has `forward` and `backward`, and is called per shard: collectives and kernels alternate so that XLA
can overlap them. `optimization_barrier` says what else must not start before what, which bounds the memory.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.lax import optimization_barrier

from zigzag_kernels.checks import MAX_ROWS
from zigzag_kernels.heuristics import choose_heads_k_stride
from zigzag_kernels.modes import KVLayout
from zigzag_kernels.problem import Problem

from . import launch

AxisName = str | tuple[str, ...]


def place_on(axis_name: AxisName) -> tuple[jax.Array, int]:
    """(rank, world_size) of this shard; `ValueError` outside of a `shard_map` over that axis."""
    try:
        return jax.lax.axis_index(axis_name), jax.lax.axis_size(axis_name)
    except NameError:
        raise ValueError(f"axis_name: expected a mesh axis of the shard_map around this, got {axis_name!r}") from None


def axis_names(axis_name: AxisName | None) -> tuple[str, ...]:
    return () if axis_name is None else (axis_name,) if isinstance(axis_name, str) else tuple(axis_name)


def agreed(cu_seqlens: jax.Array, axis_name: AxisName) -> jax.Array:
    """`cu_seqlens` if it is the same on all ranks, else -1 everywhere, which is impossible and gives NaN."""
    # The types of shard_map can promise it, but between processes or without check_vma nothing keeps the promise.
    same = jax.lax.pmax(cu_seqlens, axis_name) == jax.lax.pmin(cu_seqlens, axis_name)
    return jnp.where(same.all(), cu_seqlens, -1)


@dataclass(frozen=True)
class Local:
    """All keys are here."""

    problem: Problem

    def forward(self, q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(out `[T, heads, head_dim]`, lse `[heads, T]` float32)."""
        from zigzag_kernels import plan

        return plan.forward(launch.run, self.problem, q, k, v, segments)

    def backward(self, q, k, v, out, lse, dout, dlse, segments, sequences) -> tuple[jax.Array, jax.Array, jax.Array]:
        """(dq, dk, dv) of the arguments and results of `forward`."""
        from zigzag_kernels import plan

        strides = _dout_strides(self.problem)
        return plan.backward(
            launch.run, self.problem, q, k, v, out, lse, dout, dlse, segments, sequences, dout_strides=strides
        )


@dataclass(frozen=True)
class AllGather:
    """All-gathers of K/V, `problem.window` KV heads at a time, each in flight while the window before is computed.

    The results of a window are written in place into those of all heads. There are never more than two windows: the
    next is sent for when the last but one is done with. The backward gathers again and sums dK/dV over the ranks in
    `reduce_dtype`, each window while dQ of the same window is computed.
    """

    problem: Problem
    axis_name: AxisName
    reduce_dtype: str

    def forward(self, q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array) -> tuple[jax.Array, jax.Array]:
        """As `Local.forward`; k and v are this rank's `[T, kv_heads, head_dim]`."""
        from zigzag_kernels import plan

        results: tuple = None, None
        coming = self.gather(k, v, 0)
        for head in self.first_heads:
            here = coming
            if head + self.problem.window < self.problem.kv_heads:
                k, v, here, results = optimization_barrier((k, v, here, results))
                coming = self.gather(k, v, head + self.problem.window)
            part = plan.Part(first_kv_head=head)
            results = plan.forward(launch.run, self.problem, q, *here, segments, part=part, into=results)
        return results

    def backward(self, q, k, v, out, lse, dout, dlse, segments, sequences) -> tuple[jax.Array, jax.Array, jax.Array]:
        """As `Local.backward`; dk and dv are those of this rank's k and v, summed over the ranks."""
        from zigzag_kernels import plan

        k, v, dout = _again(k, v, dout)
        problem, strides = self.problem, {"dout_strides": _dout_strides(self.problem)}
        dq: Any = None
        dk, dv = jnp.zeros_like(k), jnp.zeros_like(v)
        coming = self.gather(k, v, 0)
        for head in self.first_heads:
            here = coming
            if head + problem.window < problem.kv_heads:
                k, v, here, dq = optimization_barrier((k, v, here, dq))
                coming = self.gather(k, v, head + problem.window)
            # The sums and dQ of the window before are complete, so that one buffer serves all contributions, and one
            # each delta and lse. Nothing of this window but its transfer starts earlier: all of it reads this dout.
            dout, dq, dk, dv = optimization_barrier((dout, dq, dk, dv))
            part, summed = plan.Part(head), plan.Part(head, dtype=self.reduce_dtype)
            rows = plan.backward_rows(launch.run, problem, out, lse, dout, dlse, part=part, **strides)
            arguments = launch.run, problem, q, here[0], here[1], dout, rows
            contributions = plan.backward_keys(*arguments, sequences, part=summed, **strides)
            dk, dv = (self._add_window(x, head, of_all) for x, of_all in zip((dk, dv), contributions, strict=True))
            dq = plan.backward_queries(*arguments, segments, part=part, into=dq, **strides)
        return dq, dk, dv

    def _add_window(self, gradient: jax.Array, head: int, contribution: jax.Array) -> jax.Array:
        """`gradient` with the heads from `head` on replaced by the sum of all ranks' `contribution`s to these rows."""
        window = jax.lax.psum_scatter(contribution, self.axis_name, tiled=True).astype(gradient.dtype)
        return jax.lax.dynamic_update_slice_in_dim(gradient, window, head, axis=1)

    @property
    def first_heads(self) -> range:
        return range(0, self.problem.kv_heads, self.problem.window)

    def gather(self, k: jax.Array, v: jax.Array, head: int) -> tuple[jax.Array, jax.Array]:
        """K/V of the window from KV head `head` on, `[world_size * T, window, head_dim]`, rank-major."""

        def window(x):
            x = jax.lax.slice_in_dim(x, head, head + self.problem.window, axis=1)
            return jax.lax.all_gather(x, self.axis_name, tiled=True)

        return window(k), window(v)


@dataclass(frozen=True)
class Ring:
    """K/V travel from rank to rank, in flight while those that are here are attended to.

    At step `s` a rank has the keys of rank `(rank - s) % world_size`, for which it uses table `s`. Results are folded
    into float32 ones. dK/dV travel behind their keys in `reduce_dtype`, each step while its dQ is computed, and are
    home after `world_size` hops. Compile time does not depend on `world_size`: the steps are a loop, without the first,
    which has no results to fold into, and the last, which sends no keys.
    """

    problem: Problem
    axis_name: AxisName
    reduce_dtype: str

    def forward(self, q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array) -> tuple[jax.Array, jax.Array]:
        """As `Local.forward`; k and v are this rank's `[T, kv_heads, head_dim]`, `segments [world_size, ...]`."""
        from zigzag_kernels import plan

        def step(k, v, segments, results):
            part = plan.Part(accumulate=results is not None, dtype="float32")
            into = results or (None, None)
            return plan.forward(launch.run, self.problem, q, k, v, segments, part=part, into=into)

        out, lse = self._around(step, k, v, segments)
        return out.astype(q.dtype), lse

    def backward(self, q, k, v, out, lse, dout, dlse, segments, sequences) -> tuple[jax.Array, jax.Array, jax.Array]:
        """As `Local.backward`; dk and dv are those of this rank's k and v, summed over the ranks."""
        from zigzag_kernels import plan

        k, v, dout = _again(k, v, dout)
        strides = {"dout_strides": _dout_strides(self.problem)}
        rows = plan.backward_rows(launch.run, self.problem, out, lse, dout, dlse, part=plan.WHOLE, **strides)

        def step(k, v, tables, gradients):
            segments, sequences = tables
            dq, dk, dv = gradients or (None, None, None)
            arguments = launch.run, self.problem, q, k, v, dout, rows
            part = plan.Part(accumulate=gradients is not None, dtype=self.reduce_dtype)
            dk, dv = plan.backward_keys(*arguments, sequences, part=part, into=(dk, dv), **strides)
            dk, dv = self.pass_on(dk, dv)
            part = plan.Part(accumulate=gradients is not None, dtype="float32")
            return plan.backward_queries(*arguments, segments, part=part, into=dq, **strides), dk, dv

        dq, dk, dv = self._around(step, k, v, (segments, sequences))
        return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype)

    def _around(self, step, k, v, tables):
        """What `step(k, v, table, result) -> result` makes of the keys of all ranks, beginning with `result=None`."""

        def hop(carry, table, last=False):
            k, v, result = optimization_barrier(carry)  # keys are sent no earlier than they are attended to
            coming = (k, v) if last else self.pass_on(k, v)
            return (*coming, step(k, v, table, result)), None

        def select(steps):
            return jax.tree.map(lambda table: table[steps], tables)

        carry, _ = hop((k, v, None), select(0))
        # Keys alternate between two buffers. XLA copies them back to where a trip begins: so only every other hop.
        carry, _ = jax.lax.scan(hop, carry, select(slice(1, -1)), unroll=2)
        (_, _, result), _ = hop(carry, select(-1), last=True)
        return result

    def pass_on(self, *arrays: jax.Array) -> tuple[jax.Array, ...]:
        """What the rank before this one gave to the same call."""
        world_size = self.problem.world_size
        following = [(rank, (rank + 1) % world_size) for rank in range(world_size)]
        return jax.lax.ppermute(arrays, self.axis_name, following)


def _again(k: jax.Array, v: jax.Array, dout: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The same, but XLA must not merge the collectives of the backward into those of the forward: it would keep what
    they brought all the while."""
    return optimization_barrier((k, v, dout))


def _dout_strides(problem: Problem) -> tuple[int, int]:
    return problem.heads * problem.head_dim, problem.head_dim


def choose_way(
    problem: Problem,
    axis_name: AxisName | None,
    method: str,
    heads_k_stride: int | None,
    grad_reduce_dtype: jnp.dtype | str | None,
) -> "Way":
    """How the keys of other ranks get here; `problem` is of this rank's own. `ValueError` for options out of range."""
    stride = choose_heads_k_stride(heads_k_stride, problem)
    reduce_dtype = "float32" if grad_reduce_dtype is None else jnp.dtype(grad_reduce_dtype).name
    if reduce_dtype not in ("float32", problem.dtype):
        raise ValueError(
            f"grad_reduce_dtype: expected None, float32 or the dtype of q, {problem.dtype}, got {reduce_dtype}"
        )
    if axis_name is None or problem.world_size == 1:
        return Local(problem)
    if method == "ring":
        return Ring(problem, axis_name, reduce_dtype)
    strides = stride * problem.head_dim, problem.head_dim
    problem = dataclasses.replace(
        problem, window=stride, kv_layout=KVLayout.GATHERED, k_strides=strides, v_strides=strides
    )
    if problem.kv_tokens > MAX_ROWS:
        raise ValueError(f"k: expected at most {MAX_ROWS} rows on all ranks together, got {problem.kv_tokens}")
    return AllGather(problem, axis_name, reduce_dtype)


Way = Local | AllGather | Ring
