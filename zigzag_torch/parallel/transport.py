"""The arguments of all transports: the packing, the device tables, and the tensors kept for the backward pass."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from zigzag_kernels.modes import Layout
from zigzag_kernels.problem import Problem

from .. import launch

if TYPE_CHECKING:
    from zigzag_kernels.plan import Part


class Packing(NamedTuple):
    """The packing of documents and their distribution over ranks, which decide what a rank's rows are.

    The tensors are on the device: `cu_seqlens [N + 1]`, `rank [1]` and the real `lengths [N]`, or None, all int32. Only
    the row layout uses `row_length`, the tokens of one packed row over all ranks, and `rows`, the number of packed
    rows. In a batch of two parts, `whole` is the packing of the whole documents, in the first rows of each rank.
    `halo` is (rows of a halo, longest real length of a document); 0 means no limit.
    """

    cu_seqlens: torch.Tensor
    rank: torch.Tensor
    lengths: torch.Tensor | None
    world_size: int
    layout: str
    row_length: int
    rows: int
    whole: "Packing | None" = None
    halo: tuple[int, int] = (0, 0)

    @property
    def is_in_rows(self) -> bool:
        """True if packed rows are cut into chunks, not documents; a single rank cuts neither."""
        return self.layout == Layout.ROW and self.world_size > 1


class Tables(NamedTuple):
    """The device tables of a batch, in which kernels look up rows and keys.

    `zigzag_kernels.plan.segment_tables` makes them. For a ring, the first dimension is the ring step; for halos,
    `zigzag_kernels.problem.halo_table_shapes` describes the first dimension.
    """

    segments: torch.Tensor
    sequences: torch.Tensor


class Residuals(NamedTuple):
    """The arguments and results of a forward pass that its backward pass needs."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    out: torch.Tensor
    lse: torch.Tensor


Beside = Callable[[str | None], Any]
"""A function that launches the other part of a batch, and returns the arrays of results of both parts.

A transport calls it once, after its first transfer has begun. The argument is the dtype of the results; None means the
dtype of q.
"""

Gradients = tuple[torch.Tensor, Sequence[torch.Tensor] | torch.Tensor, torch.Tensor | None]
"""(dq, dk and dv, dsinks); dk and dv are two tensors, or one `[2, T, kv_heads, head_dim]`; dsinks may be None."""


class Cotangents(NamedTuple):
    """The gradients of out and lse; `dlse` None means zeros."""

    dout: torch.Tensor
    dlse: torch.Tensor | None

    @property
    def strides(self) -> dict[str, Any]:
        """The strides of `dout` as an argument of functions of `zigzag_kernels.plan`."""
        return {"dout_strides": row_strides(self.dout)}


def readable(residuals: Residuals, dout: torch.Tensor, dlse: torch.Tensor | None) -> tuple[Residuals, Cotangents]:
    """Return the tensors of a backward pass with strides that kernels can read.

    Gradients may have any strides, and hooks that save tensors may return them transposed.
    """
    q, k, v, out, lse = residuals
    q, k, v = launch.last_dim_contiguous(q), launch.last_dim_contiguous(k), launch.last_dim_contiguous(v)
    cotangents = Cotangents(launch.last_dim_contiguous(dout), None if dlse is None else dlse.contiguous())
    return Residuals(q, k, v, out.contiguous(), lse.contiguous()), cotangents


def problem_of_backward(
    problem: Problem, q: torch.Tensor, dout: torch.Tensor, keys: tuple[torch.Tensor, ...] = ()
) -> Problem:
    """Return `problem` adapted to the strides and addresses of q, dout and `keys`, which are (k, v).

    Without `keys`, kernels read K/V in buffers of this package, which are aligned and have the strides of `problem`.
    """
    strides = [row_strides(x) for x in keys] or [problem.k_strides, problem.v_strides]
    return launch.without_gluon_if_misaligned(_with_strides(problem, row_strides(q), *strides), *keys, q, dout)


def rows_of_backward(
    problem: Problem, residuals: Residuals, cotangents: Cotangents, sinks: torch.Tensor | None
) -> tuple[Any, torch.Tensor | None]:
    """Return ((delta, lse2) of all rows, the gradient of `sinks` or None)."""
    from zigzag_kernels import plan

    rows = plan.backward_rows(launch.run, problem, residuals.out, residuals.lse, *cotangents, **cotangents.strides)
    return rows, None if sinks is None else plan.backward_sinks(launch.run, problem, rows, sinks)


def row_strides(x: torch.Tensor) -> tuple[int, int]:
    """Return the (token, head) strides of `x [T, heads, head_dim]`, in elements."""
    token, head, _ = x.stride()
    return token, head


def _with_strides(problem: Problem, q: tuple[int, int], k: tuple[int, int], v: tuple[int, int]) -> Problem:
    """Return `problem` with these (token, head) strides, which may differ from the strides in the forward pass."""
    if q == problem.q_strides and k == problem.k_strides and v == problem.v_strides:
        return problem
    return dataclasses.replace(problem, q_strides=q, k_strides=k, v_strides=v)


@functools.lru_cache(maxsize=1024)
def part_of(first_kv_head: int = 0, accumulate: bool = False, dtype: str | None = None) -> "Part":
    """Return the `Part` with these fields; equal arguments give the same object."""
    from zigzag_kernels.plan import Part

    return Part(first_kv_head, accumulate, dtype)
