"""The launches that copy rows of K/V into messages and halos, and add their gradients to dK and dV.

PyTorch copies all rows in one launch (`make_copy`), which was faster than two (docs/log/bench.md); messages are views
of its buffer, and halos are received in place. XLA would copy such views. So JAX has an array for each message
(`make_sent`), and fills K and V of the buffer after the transfer (`make_buffer`).
"""

from ..checks import check_target
from ..halo import KEY_SLOTS, HaloSlot
from ..launch import Launch, Output
from ..modes import Backend
from ..portable.halo import add_halo_rows, copy_halo_rows, copy_sent_rows, fill_halo_buffer
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
        scalars=_rows(problem) | {"slot_rows": rows},
        outputs=(Output("rows", (len(HaloSlot) * rows, 2 * problem.kv_heads, problem.head_dim), problem.dtype),),
        constexprs=_copied(problem) | {slot.name: slot.value for slot in _COPIED},
    )
    return Planned(None, (launch,))


_COPIED = HaloSlot.EARLY_ROWS, HaloSlot.LATE_ROWS, HaloSlot.EARLY_SENT, HaloSlot.LATE_SENT


def make_sent(problem: Problem) -> Planned:
    """Return the launch that copies rows for neighbours: see `steps.sent_rows`."""
    check_target(problem.target)
    shape = problem.call.halo_rows, 2 * problem.kv_heads, problem.head_dim
    launch = Launch(
        kernel=copy_sent_rows,
        target=problem.target,
        grid=_grid(problem),
        inputs=("k", "v", "segments"),
        scalars=_rows(problem),
        outputs=(Output("early", shape, problem.dtype), Output("late", shape, problem.dtype)),
        constexprs=_copied(problem),
    )
    return Planned(None, (launch,))


def make_buffer(problem: Problem) -> Planned:
    """Return the launch that fills the buffer: see `steps.halo_buffer`."""
    check_target(problem.target)
    rows = problem.call.halo_rows
    tiles, heads, _ = _grid(problem)
    shape = KEY_SLOTS * rows, problem.kv_heads, problem.head_dim
    launch = Launch(
        kernel=fill_halo_buffer,
        target=problem.target,
        grid=(max(tiles, 2 * -(-rows // BLOCK)), heads, 2),
        inputs=("k", "v", "segments", "early", "late"),
        scalars=_rows(problem) | {"slot_rows": rows},
        outputs=(Output("k_rows", shape, problem.dtype), Output("v_rows", shape, problem.dtype)),
        constexprs=_copied(problem) | {slot.name: slot.value for slot in HaloSlot if slot < KEY_SLOTS},
    )
    return Planned(None, (launch,))


def make_addition(problem: Problem, slots: tuple[int, int], messages: bool) -> Planned:
    """Return the launch of the sums: see `steps.add_halo_rows`."""
    check_target(problem.target)
    shape, dtype = (problem.kv_array_rows, problem.kv_heads, problem.head_dim), problem.call.grad_reduce_dtype
    row = problem.kv_heads * problem.head_dim
    gradients = "early_dk", "early_dv", "late_dk", "late_dv"
    launch = Launch(
        kernel=add_halo_rows,
        target=problem.target,
        grid=_grid(problem),
        inputs=(*gradients, "segments", "into_dk", "into_dv"),
        scalars=_rows(problem) | {"slot_rows": problem.call.halo_rows},
        outputs=(Output("dk", shape, dtype), Output("dv", shape, dtype)),
        constexprs=_tile(problem)
        | {
            "EARLY_SLOT": slots[0],
            "LATE_SLOT": slots[1],
            "STRIDE_ROW": (1 + int(messages)) * row,
            "FIRST_DV": int(messages) * row,
            "INTERPRET": problem.target == Backend.INTERPRET,
        },
        in_place={"dk": "into_dk", "dv": "into_dv"},
    )
    return Planned(None, (launch,))


def _rows(problem: Problem) -> dict[str, int]:
    """Return the scalars that find the rows of a tile."""
    return {"n_segments": problem.table_entries[0], "T": problem.tokens, "first_row": problem.first_row}


def _tile(problem: Problem) -> dict[str, int]:
    return {
        "KV_HEADS": problem.kv_heads,
        "HEAD_DIM": problem.head_dim,
        "BLOCK": BLOCK,
        "BLOCK_D": block_d(problem.head_dim),
    }


def _copied(problem: Problem) -> dict[str, int]:
    """Return the constants of kernels that copy rows of k and v."""
    return _tile(problem) | {
        "STRIDE_KT": problem.k_strides[0],
        "STRIDE_KH": problem.k_strides[1],
        "STRIDE_VT": problem.v_strides[0],
        "STRIDE_VH": problem.v_strides[1],
    }


def _grid(problem: Problem) -> tuple[int, int, int]:
    """Return (tiles, KV heads, 1), where the tiles are an upper bound for the rows of two slots."""
    return 2 * problem.call.halo_rows // BLOCK + problem.table_entries[0], problem.kv_heads, 1
