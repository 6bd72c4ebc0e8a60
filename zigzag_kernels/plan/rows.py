"""The launch that computes delta and lse2 of every query row, which the other backward kernels read."""

from ..checks import check_strides, check_target
from ..launch import Launch, Output
from ..portable.delta import backward_delta
from ..problem import Problem
from ..tiles.config import block_d
from .operation import Part, name_dout_strides
from .planner import Planned

BLOCK_M = 64
"""Query rows of a program; 32 to 256 take the same time on an H100, bound by memory (docs/log/hopper.md)."""


def make_rows(problem: Problem, dout_strides: tuple[int, int], has_dlse: bool, part: Part) -> Planned:
    """Return the launch of (delta, lse2): see `steps.backward_rows`."""
    check_target(problem.target)
    check_strides("dout", dout_strides, problem.group)
    rows = problem.rows * problem.group
    all_rows = problem.tokens * problem.group
    launch = Launch(
        kernel=backward_delta,
        target=problem.target,
        grid=(max(1, -(-rows // BLOCK_M)), problem.window, 1),
        inputs=("out", "dout", "lse", "dlse"),
        scalars={
            "T": problem.tokens,
            "first_row": problem.first_row,
            "n_rows": problem.rows,
            "first_kv_head": part.first_kv_head,
        },
        outputs=(
            Output("delta", (problem.window, all_rows), "float32"),
            Output("lse2", (problem.window, all_rows), "float32"),
        ),
        constexprs={
            "HEADS": problem.heads,
            "GROUP": problem.group,
            "HEAD_DIM": problem.head_dim,
            "HAS_DLSE": has_dlse,
            "BLOCK_M": BLOCK_M,
            "BLOCK_D": block_d(problem.head_dim),
        }
        | name_dout_strides(dout_strides),
    )
    return Planned(None, (launch,))
