"""The arguments of all transports: the packing, the device tables, and the arrays kept for the backward pass."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.lax import optimization_barrier

from zigzag_kernels.modes import Layout
from zigzag_kernels.problem import Problem

from .. import launch


class Packing(NamedTuple):
    """The packing of documents and their distribution over ranks, which decide what a rank's rows are.

    The arrays are on the device, and `cu_seqlens [N + 1]`, the rank `[1]` and the real `lengths [N]`, or None, are
    int32. `row_length`, the tokens of one packed row on all ranks, and `rows`, their number, matter in the row layout.
    `halo` is (rows of a halo, longest real length of a document); 0 means no limit.
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
        """Tokens of a packed row if packed rows are cut into chunks, otherwise None; a single rank cuts nothing."""
        return self.row_length if self.layout == Layout.ROW and self.world_size > 1 else None


class Tables(NamedTuple):
    """The device tables of a batch, in which kernels look up rows and keys.

    `zigzag_jax.autograd.segment_tables` makes them. For a ring, the first dimension is the ring step. A transport that
    passes parts of a table to kernels has a tuple of these parts as table, because XLA would copy them in each call:
    see `halo_tables`, and `TwoPart`, whose tables are (of whole documents, of split documents).
    """

    segments: Any
    sequences: Any


def halo_tables(segments: jax.Array, sequences: jax.Array) -> Tables:
    """Return the parts of the tables of `zigzag_kernels.problem.halo_table_shapes` that `Halo` passes to kernels.

    The parts of `segments` are the tables 0, 1 and 2. The parts of `sequences` are the entries of table 0 that are
    filled, and table 1.
    """
    return Tables(tuple(segments), (sequences[0, sequences.shape[1] // 2 :], sequences[1]))


class Inputs(NamedTuple):
    """The arrays of one rank that have gradients; `sinks [heads]` is float32, or None."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    sinks: jax.Array | None


class Residuals(NamedTuple):
    """The arguments and results of a forward pass that its backward pass needs."""

    inputs: Inputs
    out: jax.Array
    lse: jax.Array


Beside = Callable[[str | None], Any]
"""A function that launches the other part of a batch, and returns the arrays of results of both parts.

A transport calls it with the dtype of these results, where None means the dtype of q, and writes its own results into
these arrays.
"""


def behind(of_whole: Sequence[jax.Array], of_split: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Return `of_whole` with (dk, dv) `of_split` in its last rows, or `of_split` if `of_whole` is empty."""
    if not of_whole:
        return of_split
    # Without the barrier XLA of JAX 0.11.2 takes the update for a part of the kernel before it, and fails to compile.
    (dk, dv), (dk_split, dv_split) = optimization_barrier(tuple(of_whole)), of_split
    first = len(dk) - len(dk_split)
    update = jax.lax.dynamic_update_slice_in_dim
    return update(dk, dk_split, first, 0), update(dv, dv_split, first, 0)


def rows_of_backward(
    problem: Problem, residuals: Residuals, dout: jax.Array, dlse: jax.Array | None
) -> tuple[Any, jax.Array | None]:
    """Return ((delta, lse2) of all rows, the gradient of the sinks or None)."""
    from zigzag_kernels import plan

    sinks, strides = residuals.inputs.sinks, problem.q_strides
    rows = plan.backward_rows(launch.run, problem, residuals.out, residuals.lse, dout, dlse, dout_strides=strides)
    return rows, None if sinks is None else plan.backward_sinks(launch.run, problem, rows, sinks)


def move_again(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Return `arrays` behind a barrier, so that the backward pass moves K/V a second time.

    Without the barrier XLA merges the collectives of both passes, and keeps the K/V of other ranks in between.
    """
    return optimization_barrier(arrays)
