"""`make_operation`: chooses family and tiles for one operation of a problem, and makes its launches."""

from dataclasses import replace
from typing import Any, NamedTuple

from ..checks import check_target
from ..families import choose_family, choose_tiles
from ..family import Draft
from ..launch import Output
from ..modes import Operation
from ..problem import Problem
from ..tiles.config import TileConfig, block_d
from .grid import count_heads_together, count_tiles, make_grid, order_tiles
from .planner import NOTHING, Planned


class Part(NamedTuple):
    """The part of an attention that a call computes, and the way in which it writes its results."""

    first_kv_head: int = 0  # first KV head of the window that k and v hold
    accumulate: bool = False  # merge with, or add to, the results that are already in memory
    dtype: str | None = None  # dtype of the results; None is the dtype of q


WHOLE = Part()


def make_operation(
    problem: Problem, operation: Operation, part: Part, dout_strides: tuple[int, int] | None = None
) -> Planned:
    """Return the launches of `operation`.

    `dout_strides` are the (token, head) strides of dO in elements, None for FORWARD. The result is NOTHING for a
    FUSED_BACKWARD that is expected to be slower than DKDV and DQ.
    """
    check_target(problem.target)
    family = choose_family(problem, operation, dout_strides)
    if family is None:
        return NOTHING
    kernel = family.choose_kernel(problem, operation)
    config = choose_tiles(kernel, problem.head_dim, problem.dtype, problem.target)
    config = family.fit_tiles(problem, operation, config)
    tiles = count_tiles(problem, operation, config)
    config = order_tiles(problem, operation, config, tiles)
    heads_together = count_heads_together(problem, config, tiles)
    outputs = _outputs(problem, operation, part)
    in_place = {output.name: f"into_{output.name}" for output in outputs}
    segments, sequences = problem.table_entries
    entries = {"n_sequences": sequences} if operation.owns_keys else {"n_segments": segments}
    draft = Draft(
        problem=problem,
        kernel=kernel,
        config=config,
        heads_together=heads_together,
        grid=make_grid(config, tiles, problem.window // heads_together),
        inputs=(*_inputs(operation), *in_place.values()),
        scalars=entries | _scalars(problem, part),
        outputs=outputs,
        in_place=in_place,
        constexprs=_constexprs(problem, operation, part, config, dout_strides),
    )
    return Planned(kernel, family.make_launches(draft))


def make_fused_window(problem: Problem, part: Part, dout_strides: tuple[int, int]) -> Planned:
    """Return the launches of FUSED_BACKWARD for one of several windows between ranks, or NOTHING for DKDV and DQ.

    dK and dV of a window travel while the next window is computed, instead of beside its own dQ. Nothing hides the
    transfer of the last window. Its time grows with the keys, and the time of a kernel with the keys and the rows: so
    families gain more than it costs where they find walks long. Between ranks gradients are always deterministic.
    """
    # The last launch writes all rows of dQ, also the rows of another part of the batch.
    alone = problem.rows == problem.tokens
    if problem.window < problem.kv_heads and alone:
        repeating = replace(problem, call=replace(problem.call, deterministic=True))
        return make_operation(repeating, Operation.FUSED_BACKWARD, part, dout_strides)
    return NOTHING


def _inputs(operation: Operation) -> tuple[str, ...]:
    table = "sequences" if operation.owns_keys else "segments"
    rows = ("sinks",) if operation is Operation.FORWARD else ("dout", "delta", "lse2")
    return "q", "k", "v", *rows, table


def _outputs(problem: Problem, operation: Operation, part: Part) -> tuple[Output, ...]:
    dtype = part.dtype or problem.dtype
    q_shape = problem.tokens, problem.heads, problem.head_dim
    kv_shape = problem.kv_array_rows, problem.window, problem.head_dim
    if operation is Operation.FORWARD:
        statistics = (2,) if problem.call.return_max_logits else ()
        return Output("out", q_shape, dtype), Output("lse", (*statistics, problem.heads, problem.tokens), "float32")
    if operation is Operation.DQ:
        return (Output("dq", q_shape, dtype),)
    sums = (Output("sums", q_shape, "float32"),) if operation is Operation.FUSED_BACKWARD else ()
    return Output("dk", kv_shape, dtype), Output("dv", kv_shape, dtype), *sums


def _scalars(problem: Problem, part: Part) -> dict[str, int]:
    return {"T": problem.tokens, "slot_rows": problem.slot_rows, "first_kv_head": part.first_kv_head}


def _constexprs(
    problem: Problem, operation: Operation, part: Part, config: TileConfig, dout_strides: tuple[int, int] | None
) -> dict[str, Any]:
    call = problem.call
    constexprs = {
        "SLOTS": problem.slots,
        "KV_HEADS": problem.window,
        "GROUP": problem.group,
        "HEAD_DIM": problem.head_dim,
        "CAUSAL": call.causal,
        "SOFTMAX_SCALE": call.softmax_scale,
        "RANGED": problem.ranged,
        "LEFT": call.window_size[0],
        "RIGHT": call.window_size[1],
        "CHUNK": call.attention_chunk,
        "SOFTCAP": call.softcap,
        "STRIDE_QT": problem.q_strides[0],
        "STRIDE_QH": problem.q_strides[1],
        "STRIDE_KT": problem.k_strides[0],
        "STRIDE_KH": problem.k_strides[1],
        "STRIDE_VT": problem.v_strides[0],
        "STRIDE_VH": problem.v_strides[1],
        "BLOCK_M": config.BLOCK_M,
        "BLOCK_N": config.BLOCK_N,
        "BLOCK_D": block_d(problem.head_dim),
        "TILES_TOGETHER": config.tiles_together,
        "ACCUMULATE": part.accumulate,
    }
    if operation is Operation.FORWARD:
        constexprs |= {"HAS_SINKS": call.has_sinks and not part.accumulate, "HAS_MAX": call.return_max_logits}
    if not operation.owns_keys:  # the results of the others have the heads of the window alone
        constexprs["HEADS"] = problem.heads
    if dout_strides is not None:
        constexprs |= name_dout_strides(dout_strides)
    return constexprs


def name_dout_strides(dout_strides: tuple[int, int]) -> dict[str, int]:
    """Return the (token, head) strides of dO as constants of the backward kernels."""
    return {"STRIDE_DOT": dout_strides[0], "STRIDE_DOH": dout_strides[1]}
