"""Arguments that all transports have in common: the device tables, and the tensors kept for the backward pass."""

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
    """The packing of documents and their distribution to the ranks, which decide the contents of a rank's rows.

    The tensors are on the device, and `cu_seqlens [N + 1]`, the rank `[1]` and the real `lengths [N]`, or None, are
    int32. `row_length`, the tokens of one packed row on all ranks, and `rows`, their number, matter in the row layout.
    `whole`, or None, packs the first rows of each rank, whose documents no other rank has a part of.
    `halo` is (rows before a chunk that alone move to its rank, most real tokens of a document), or 0 for no such limit.
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
        """True if packed rows are cut into chunks, not documents; one rank holds them whole in both layouts."""
        return self.layout == Layout.ROW and self.world_size > 1


class Tables(NamedTuple):
    """Device tables of a batch: the runs of rows that tiles of queries and tiles of keys belong to.

    `zigzag_kernels.plan.segment_tables` makes them. A ring has one of each per step, stacked in front; for halos
    `zigzag_kernels.problem.halo_table_shapes` says which there are.
    """

    segments: torch.Tensor
    sequences: torch.Tensor


class Residuals(NamedTuple):
    """Arguments and results of a forward pass, which its backward pass needs."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    out: torch.Tensor
    lse: torch.Tensor


Beside = Callable[[str | None], Any]
"""Launches another part of a batch, and returns the arrays that the results of this part belong to as well.

A transport calls it once, with the dtype of these results (None: that of q), when its first transfer is under way.
"""

Gradients = tuple[torch.Tensor, Sequence[torch.Tensor] | torch.Tensor, torch.Tensor | None]
"""(dq, dk and dv, dsinks): dk and dv are two tensors, or one `[2, T, kv_heads, head_dim]`; no sinks: None."""


class Cotangents(NamedTuple):
    """Gradients of out and lse; `dlse` None means zeros."""

    dout: torch.Tensor
    dlse: torch.Tensor | None

    @property
    def strides(self) -> dict[str, Any]:
        """The argument of the functions of `zigzag_kernels.plan` that read `dout`."""
        return {"dout_strides": row_strides(self.dout)}


def readable(residuals: Residuals, dout: torch.Tensor, dlse: torch.Tensor | None) -> tuple[Residuals, Cotangents]:
    """Return what a backward pass is given as kernels can read it.

    Hooks that keep tensors elsewhere may return them transposed, and gradients may have any strides.
    """
    q, k, v, out, lse = residuals
    q, k, v = launch.last_dim_contiguous(q), launch.last_dim_contiguous(k), launch.last_dim_contiguous(v)
    cotangents = Cotangents(launch.last_dim_contiguous(dout), None if dlse is None else dlse.contiguous())
    return Residuals(q, k, v, out.contiguous(), lse.contiguous()), cotangents


def problem_of_backward(
    problem: Problem, q: torch.Tensor, dout: torch.Tensor, keys: tuple[torch.Tensor, ...] = ()
) -> Problem:
    """Return `problem` for the strides and addresses of q, dout and of `keys`, which are k and v.

    Without `keys` kernels read K/V in buffers that this package has allocated, aligned and with the strides of
    `problem`.
    """
    strides = [row_strides(x) for x in keys] or [problem.k_strides, problem.v_strides]
    return launch.without_gluon_if_misaligned(_with_strides(problem, row_strides(q), *strides), *keys, q, dout)


def rows_of_backward(
    problem: Problem, residuals: Residuals, cotangents: Cotangents, sinks: torch.Tensor | None
) -> tuple[Any, torch.Tensor | None]:
    """Return (what every row contributes to its gradients, the gradient of `sinks` if there are some)."""
    from zigzag_kernels import plan

    rows = plan.backward_rows(launch.run, problem, residuals.out, residuals.lse, *cotangents, **cotangents.strides)
    return rows, None if sinks is None else plan.backward_sinks(launch.run, problem, rows, sinks)


def row_strides(x: torch.Tensor) -> tuple[int, int]:
    """Return the (token, head) strides of `x [T, heads, head_dim]`, in elements."""
    token, head, _ = x.stride()
    return token, head


def _with_strides(problem: Problem, q: tuple[int, int], k: tuple[int, int], v: tuple[int, int]) -> Problem:
    """Return `problem` with these (token, head) strides, which may have changed since the forward pass as well."""
    if q == problem.q_strides and k == problem.k_strides and v == problem.v_strides:
        return problem
    return dataclasses.replace(problem, q_strides=q, k_strides=k, v_strides=v)


@functools.lru_cache(maxsize=1024)
def part_of(first_kv_head: int = 0, accumulate: bool = False, dtype: str | None = None) -> "Part":
    """Return the `Part` of these fields: one object for all calls."""
    from zigzag_kernels.plan import Part

    return Part(first_kv_head, accumulate, dtype)
