"""The two launches that compute the gradient of the sinks from delta and lse2 of all query rows."""

from ..checks import check_target
from ..launch import Launch, Output
from ..portable.sinks import sum_sink_parts, sum_sink_rows
from ..problem import Problem
from .operation import Part
from .planner import Planned

ROWS = 4096  # query rows that one program of the first kernel sums
PARTS = 64  # partial sums that one program of the second kernel reads at a time


def make_sinks(problem: Problem, part: Part) -> Planned:
    """Return the launches of dsinks: see `steps.backward_sinks`."""
    check_target(problem.target)
    heads = 1 << (problem.group - 1).bit_length()
    tokens = max(1, ROWS // heads)
    parts = max(1, -(-problem.rows // tokens))
    first = Launch(
        kernel=sum_sink_rows,
        target=problem.target,
        grid=(parts, problem.window, 1),
        inputs=("delta", "lse2", "sinks"),
        scalars={
            "T": problem.tokens,
            "first_row": problem.first_row,
            "n_rows": problem.rows,
            "first_kv_head": part.first_kv_head,
            "n_parts": parts,
        },
        outputs=(Output("parts", (problem.window * problem.group, parts), "float32"),),
        constexprs={"GROUP": problem.group, "HEADS_PADDED": heads, "BLOCK_T": tokens},
    )
    second = Launch(
        kernel=sum_sink_parts,
        target=problem.target,
        grid=(problem.window * problem.group, 1, 1),
        inputs=("parts", "into_dsinks"),
        scalars={"first_kv_head": part.first_kv_head, "n_parts": parts},
        outputs=(Output("dsinks", (problem.heads,), "float32"),),
        constexprs={"GROUP": problem.group, "BLOCK": PARTS},
        in_place={"dsinks": "into_dsinks"},
    )
    return Planned(None, (first, second))
