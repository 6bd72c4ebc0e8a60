"""The launches that copy rows of K/V into the buffer of halos, and add their gradients to dK and dV."""

from ..checks import check_target
from ..halo import HaloSlot
from ..launch import Launch, Output
from ..modes import Backend
from ..portable.halo import add_halo_rows, copy_halo_rows
from ..problem import Problem
from ..tiles.config import block_d
from .planner import Planned

BLOCK = 32
"""Rows that a program copies, or adds."""


def make_copy(problem: Problem) -> Planned:
    """Return the launch of the copy: see `steps.halo_rows`."""
    check_target(problem.target)
    rows = problem.call.halo_rows
    launch = Launch(
        kernel=copy_halo_rows,
        target=problem.target,
        grid=(*_grid(problem)[:2], 2),
        inputs=("k", "v", "segments"),
        scalars={
            "n_segments": problem.table_entries[0],
            "T": problem.tokens,
            "first_row": problem.first_row,
            "slot_rows": rows,
        },
        outputs=(Output("rows", (len(HaloSlot) * rows, 2 * problem.kv_heads, problem.head_dim), problem.dtype),),
        constexprs={
            "KV_HEADS": problem.kv_heads,
            "HEAD_DIM": problem.head_dim,
            "STRIDE_KT": problem.k_strides[0],
            "STRIDE_KH": problem.k_strides[1],
            "STRIDE_VT": problem.v_strides[0],
            "STRIDE_VH": problem.v_strides[1],
            "BLOCK": BLOCK,
            "BLOCK_D": block_d(problem.head_dim),
        }
        | {slot.name: slot.value for slot in _COPIED},
    )
    return Planned(None, (launch,))


_COPIED = HaloSlot.EARLY_ROWS, HaloSlot.LATE_ROWS, HaloSlot.EARLY_SENT, HaloSlot.LATE_SENT


def make_addition(problem: Problem, slots: tuple[int, int]) -> Planned:
    """Return the launch of the sums: see `steps.add_halo_rows`."""
    check_target(problem.target)
    shape, dtype = (problem.kv_array_rows, problem.kv_heads, problem.head_dim), problem.call.grad_reduce_dtype
    launch = Launch(
        kernel=add_halo_rows,
        target=problem.target,
        grid=_grid(problem),
        inputs=("dk_rows", "dv_rows", "segments", "into_dk", "into_dv"),
        scalars={
            "n_segments": problem.table_entries[0],
            "T": problem.tokens,
            "first_row": problem.first_row,
            "slot_rows": problem.call.halo_rows,
        },
        outputs=(Output("dk", shape, dtype), Output("dv", shape, dtype)),
        constexprs={
            "EARLY_SLOT": slots[0],
            "LATE_SLOT": slots[1],
            "KV_HEADS": problem.kv_heads,
            "HEAD_DIM": problem.head_dim,
            "BLOCK": BLOCK,
            "BLOCK_D": block_d(problem.head_dim),
            "INTERPRET": problem.target == Backend.INTERPRET,
        },
        in_place={"dk": "into_dk", "dv": "into_dv"},
    )
    return Planned(None, (launch,))


def _grid(problem: Problem) -> tuple[int, int, int]:
    """Return (tiles, KV heads, 1), where the tiles are an upper bound for the rows of two slots."""
    return 2 * problem.call.halo_rows // BLOCK + problem.table_entries[0], problem.kv_heads, 1
