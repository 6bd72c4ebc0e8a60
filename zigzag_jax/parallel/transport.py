"""Arguments that all transports have in common: the device tables, and the arrays kept for the backward pass."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.lax import optimization_barrier

from zigzag_kernels.modes import Layout
from zigzag_kernels.problem import Problem

from .. import launch


class Packing(NamedTuple):
    """The packing of documents and their distribution to the ranks, which decide the contents of a rank's rows.

    The arrays are on the device, and `cu_seqlens [N + 1]`, the rank `[1]` and the real `lengths [N]`, or None, are
    int32. `row_length`, the tokens of one packed row on all ranks, and `rows`, their number, matter in the row layout.
    `halo` is (rows before a chunk that alone move to its rank, most real tokens of a document), or 0 for no such limit.
    `whole`, or None, packs the rows before `first_row`, whose documents no other rank has a part of; `end_row` is then
    the number of all rows of a rank.
    """

    cu_seqlens: jax.Array
    rank: jax.Array
    lengths: jax.Array | None
    world_size: int
    layout: str
    row_length: int
    rows: int
    halo: tuple[int, int] = (0, 0)
    whole: "Packing | None" = None
    first_row: int = 0
    end_row: int = 0

    @property
    def in_rows(self) -> int | None:
        """Tokens of a packed row, if rows are cut into chunks and not documents: one rank holds all whole."""
        return self.row_length if self.layout == Layout.ROW and self.world_size > 1 else None


class Tables(NamedTuple):
    """Device tables of a batch: what each tile of queries and each tile of keys belongs to.

    `zigzag_kernels.plan.segment_tables` makes them. A ring has one of each per step, stacked in front; for halos
    `zigzag_kernels.problem.halo_table_shapes` says which there are.
    """

    segments: jax.Array
    sequences: jax.Array


class Inputs(NamedTuple):
    """Arrays of one rank that attention is differentiated by; `sinks [heads]` float32, or None."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    sinks: jax.Array | None


class Residuals(NamedTuple):
    """Arguments and results of a forward pass, which its backward pass needs."""

    inputs: Inputs
    out: jax.Array
    lse: jax.Array


Beside = Callable[[str | None], Any]
"""Launches another part of a batch, and returns the arrays that the results of this part belong to as well.

A transport calls it with the dtype of these results, None for that of q, and begins with them in place of new arrays.
"""


def behind(of_whole: Sequence[jax.Array], of_split: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Return (dk, dv) `of_split` in the last rows of the arrays `of_whole`; as they are if there are none."""
    if not of_whole:
        return of_split
    (dk, dv), (dk_split, dv_split) = of_whole, of_split
    first = len(dk) - len(dk_split)
    update = jax.lax.dynamic_update_slice_in_dim
    return update(dk, dk_split, first, 0), update(dv, dv_split, first, 0)


def rows_of_backward(
    problem: Problem, residuals: Residuals, dout: jax.Array, dlse: jax.Array | None
) -> tuple[Any, jax.Array | None]:
    """Return (what every row contributes to its gradients, the gradient of the sinks if there are some)."""
    from zigzag_kernels import plan

    sinks, strides = residuals.inputs.sinks, problem.q_strides
    rows = plan.backward_rows(launch.run, problem, residuals.out, residuals.lse, dout, dlse, dout_strides=strides)
    return rows, None if sinks is None else plan.backward_sinks(launch.run, problem, rows, sinks)


def move_again(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Return `arrays` behind a barrier, so that the backward pass moves K/V a second time.

    Without the barrier XLA merges the collectives of both passes, and keeps the K/V of other ranks in between.
    """
    return optimization_barrier(arrays)
