"""From a `Problem` to the launches that solve it, framework-free: kernels, grids, arguments, outputs and their order.

A front end supplies `run(launch, *arrays) -> tuple of arrays`, its only launch site, and calls `segment_tables`,
`forward` and `backward` here, so that both frameworks launch the same kernels, with the same constants, in the same
order.

Across ranks attention comes in parts. A *window* is K/V of a few KV heads: its results are written `into` arrays of all
heads. A *ring step* has the keys of one rank: its results are folded into float32 ones. `backward` is then its three
pieces, with communication between them.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from . import heuristics
from .backward import backward_delta, backward_dkdv, backward_dq
from .checks import check_strides, check_target
from .config import Config, block_d, choose_config, sums_apart
from .forward import attention_forward
from .hopper import DESCRIPTOR_BYTES, backward_kernels, forward_kernel, takes_fused_backward
from .launch import Launch, Output
from .modes import Backend, KVLayout
from .problem import Problem, segment_table_shapes
from .segments.build import build_segments

Run = Callable[..., tuple]
_DELTA_ROWS = 64
_TABLE_BLOCK = 64
_ELEMENTS = 4096
_CACHED = 1024  # batches of changing size make new problems without end


@dataclass(frozen=True)
class Part:
    """Which part of an attention a call computes, and how it leaves its results."""

    first_kv_head: int = 0  # of the window of KV heads that k and v are
    accumulate: bool = False  # fold into, or add to, what there is
    dtype: str | None = None  # of the results; that of q if None


WHOLE = Part()


@functools.lru_cache(maxsize=_CACHED)
def _segments_launch(sequences: int, world_size: int, kv_layout: str, target: str) -> Launch:
    check_target(target)
    steps = world_size if kv_layout == KVLayout.PEER else 1
    segments_shape, sequences_shape = segment_table_shapes(sequences, steps)
    return Launch(
        kernel=build_segments,
        target=target,
        grid=(-(-segments_shape[-2] // _TABLE_BLOCK), steps, 1),
        inputs=("cu_seqlens", "rank"),
        scalars={"n_sequences": sequences},
        outputs=(
            Output("segments", segments_shape, "int32"),
            Output("sequences", sequences_shape, "int32"),
        ),
        constexprs={
            "WORLD_SIZE": world_size,
            "PEER": kv_layout == KVLayout.PEER,
            "CONTIGUOUS": kv_layout == KVLayout.CONTIGUOUS,
            "BLOCK": _TABLE_BLOCK,
        },
    )


def _scalars(problem: Problem, part: Part) -> dict[str, int]:
    return {"T": problem.tokens, "slot_rows": problem.slot_rows, "first_kv_head": part.first_kv_head}


def _constexprs(problem: Problem, config: Config, part: Part) -> dict[str, Any]:
    return {
        "SLOTS": problem.slots,
        "KV_HEADS": problem.window,
        "GROUP": problem.group,
        "HEAD_DIM": problem.head_dim,
        "CAUSAL": problem.call.causal,
        "SOFTMAX_SCALE": problem.call.softmax_scale,
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
        "INTERPRET": problem.target == Backend.INTERPRET,
    }


def _hopper(kernel: Any, constexprs: dict[str, Any], config: Config, tiles: int, descriptors: int = 2) -> dict:
    """Fields of the `Launch` of a kernel of `hopper/` for so many `tiles` of each KV head, from the constexprs of the
    portable one."""
    constexprs = constexprs | {"STAGES": config.num_stages}
    del constexprs["INTERPRET"]
    grid = _grid(config, tiles, constexprs["KV_HEADS"] // constexprs.get("HEADS_TOGETHER", 1))
    resources = {"num_warps": config.num_warps, "scratch": descriptors * DESCRIPTOR_BYTES}
    return {"kernel": kernel, "constexprs": constexprs, "grid": grid, **resources}


def _heads_together(problem: Problem, config: Config, tiles: int) -> dict[str, int]:
    """The constexpr that says how many heads a program takes: what the table says, or as many as divide the window and
    leave programs enough. The copy engine takes them for columns of one row: they have to follow each other there."""
    strides = problem.k_strides[1], problem.v_strides[1], block_d(problem.head_dim)
    heads = math.gcd(config.heads_together, problem.window) if {*strides} == {problem.head_dim} else 1
    while heads > 1 and tiles * problem.window < heads * heuristics.MANY_PROGRAMS:
        heads //= 2
    return {"HEADS_TOGETHER": heads}


def _portable(kernel: Any, constexprs: dict[str, Any], config: Config, tiles: int) -> dict[str, Any]:
    """The same fields for a portable kernel."""
    grid = _grid(config, tiles, constexprs["KV_HEADS"])
    resources = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    return {"kernel": kernel, "constexprs": constexprs, "grid": grid, **resources}


def _ordered(problem: Problem, config: Config, tiles: int) -> Config:
    """`config` with heads side by side where the tiles of one do not fill the GPU, and those of all not many times.

    Heads one after the other would have the heaviest tile of the last begin late, and end alone. Elsewhere that is less
    than it costs to read rows of all heads, which do not stay in the L2 cache. All ring steps but one have equal tiles.
    """
    few = tiles < heuristics.MULTIPROCESSORS and tiles * problem.window < heuristics.FEW_PROGRAMS
    unequal = problem.call.causal and problem.kv_layout != KVLayout.PEER
    return replace(config, tiles_together=config.tiles_together or int(few and unequal))


def _grid(config: Config, tiles: int, heads: int) -> tuple[int, int, int]:
    """Programs for all tiles of so many heads: see `tile.tile_and_head`."""
    together = config.tiles_together or 1
    return -(-tiles // together) * together * heads, 1, 1


def _tiling(problem: Problem, kernel: str, block: str, rows: int, entries: int) -> tuple[Config, int]:
    """(configuration of `kernel`, tiles of one KV head: an upper bound from static shapes alone, see `tile.locate`).

    `block` is the field that has the rows of a tile.
    """
    config = choose_config(kernel, problem.head_dim, problem.dtype, problem.target)
    tiles = rows // getattr(config, block) + entries
    return _ordered(problem, config, tiles), tiles


@functools.lru_cache(maxsize=_CACHED)
def _forward_launch(problem: Problem, part: Part) -> Launch:
    check_target(problem.target)
    (segments, _), _ = segment_table_shapes(problem.sequences)
    name = forward_kernel(problem)
    config, tiles = _tiling(problem, name, "BLOCK_M", problem.tokens * problem.group, segments)
    constexprs = _constexprs(problem, config, part) | {"HEADS": problem.heads}
    if name == "forward":
        chosen = _portable(attention_forward, constexprs, config, tiles)
    else:
        from .hopper.forward import attention_forward_hopper

        constexprs |= _heads_together(problem, config, tiles)
        chosen = _hopper(attention_forward_hopper, constexprs, config, tiles)
    return Launch(
        target=problem.target,
        inputs=("q", "k", "v", "segments", "into_out", "into_lse"),
        scalars={"n_segments": segments} | _scalars(problem, part),
        outputs=(
            Output("out", (problem.tokens, problem.heads, problem.head_dim), part.dtype or problem.dtype),
            Output("lse", (problem.heads, problem.tokens), "float32"),
        ),
        in_place={"out": "into_out", "lse": "into_lse"},
        **chosen,
    )


@functools.lru_cache(maxsize=_CACHED)
def _delta_launch(problem: Problem, dout_strides: tuple[int, int], has_dlse: bool, part: Part) -> Launch:
    check_target(problem.target)
    check_strides("dout", dout_strides, problem.group)
    rows = problem.tokens * problem.group
    return Launch(
        kernel=backward_delta,
        target=problem.target,
        grid=(max(1, -(-rows // _DELTA_ROWS)), problem.window, 1),
        inputs=("out", "dout", "lse", "dlse"),
        scalars={"T": problem.tokens, "first_kv_head": part.first_kv_head},
        outputs=(
            Output("delta", (problem.window, rows), "float32"),
            Output("lse2", (problem.window, rows), "float32"),
        ),
        constexprs={
            "HEADS": problem.heads,
            "GROUP": problem.group,
            "HEAD_DIM": problem.head_dim,
            "HAS_DLSE": has_dlse,
            "BLOCK_M": _DELTA_ROWS,
            "BLOCK_D": block_d(problem.head_dim),
        }
        | _strides(dout_strides),
    )


@functools.lru_cache(maxsize=_CACHED)
def _dkdv_launches(problem: Problem, dout_strides: tuple[int, int], part: Part) -> tuple[Launch, ...]:
    """One for both, or one for dK and one that then adds dV to its results."""
    _, (sequences, _) = segment_table_shapes(problem.sequences)
    name, _ = backward_kernels(problem, dout_strides)
    config, tiles = _tiling(problem, name, "BLOCK_N", problem.kv_tokens, sequences)
    constexprs = _constexprs(problem, config, part) | _strides(dout_strides)
    if name == "backward_dkdv":
        apart = sums_apart(problem.head_dim, problem.dtype, problem.target)
        wanted = ((True, False), (False, True)) if apart else ((True, True),)
        chosen = [
            _portable(backward_dkdv, constexprs | {"HAS_DK": dk, "HAS_DV": dv}, config, tiles) for dk, dv in wanted
        ]
    else:
        from .hopper.dkdv import backward_dkdv_hopper

        constexprs |= _heads_together(problem, config, tiles)
        chosen = [_hopper(backward_dkdv_hopper, constexprs, config, tiles)]
    shape, dtype = (problem.kv_tokens, problem.window, problem.head_dim), part.dtype or problem.dtype
    return tuple(
        Launch(
            target=problem.target,
            inputs=("q", "k", "v", "dout", "delta", "lse2", "sequences", "into_dk", "into_dv"),
            scalars={"n_sequences": sequences} | _scalars(problem, part),
            outputs=(Output("dk", shape, dtype), Output("dv", shape, dtype)),
            in_place={"dk": "into_dk", "dv": "into_dv"},
            **x,
        )
        for x in chosen
    )


@functools.lru_cache(maxsize=_CACHED)
def _dq_launch(problem: Problem, dout_strides: tuple[int, int], part: Part) -> Launch:
    (segments, _), _ = segment_table_shapes(problem.sequences)
    _, name = backward_kernels(problem, dout_strides)
    config, tiles = _tiling(problem, name, "BLOCK_M", problem.tokens * problem.group, segments)
    constexprs = _constexprs(problem, config, part) | _strides(dout_strides) | {"HEADS": problem.heads}
    if name == "backward_dq":
        chosen = _portable(backward_dq, constexprs, config, tiles)
    else:
        from .hopper.dq import backward_dq_hopper

        constexprs |= _heads_together(problem, config, tiles)
        chosen = _hopper(backward_dq_hopper, constexprs, config, tiles)
    return Launch(
        target=problem.target,
        inputs=("q", "k", "v", "dout", "delta", "lse2", "segments", "into_dq"),
        scalars={"n_segments": segments} | _scalars(problem, part),
        outputs=(Output("dq", (problem.tokens, problem.heads, problem.head_dim), part.dtype or problem.dtype),),
        in_place={"dq": "into_dq"},
        **chosen,
    )


@functools.lru_cache(maxsize=_CACHED)
def _fused_launches(problem: Problem, dout_strides: tuple[int, int]) -> tuple[Launch, Launch, Launch]:
    """The launches of the backward in one kernel: what clears float32 sums, adds to them, and makes dq of them."""
    from .hopper.fused import backward_fused_hopper, clear_sums, finish_dq

    (segments, _), (sequences, _) = segment_table_shapes(problem.sequences)
    config, tiles = _tiling(problem, "hopper_fused", "BLOCK_N", problem.kv_tokens, sequences)
    constexprs = _constexprs(problem, config, WHOLE) | _strides(dout_strides) | {"HEADS": problem.heads}
    shape, row = (problem.tokens, problem.heads, problem.head_dim), problem.heads * problem.head_dim
    kv_shape = (problem.kv_tokens, problem.window, problem.head_dim)
    elements = {
        "target": problem.target,
        "grid": (max(1, -(-problem.tokens * row // _ELEMENTS)), 1, 1),
        "num_warps": 8,
    }
    clear = Launch(
        kernel=clear_sums,
        inputs=("q",),
        scalars={"T": problem.tokens},
        outputs=(Output("sums", shape, "float32"),),
        constexprs={"ROW": row, "BLOCK": _ELEMENTS},
        **elements,
    )
    fused = Launch(
        target=problem.target,
        inputs=("q", "k", "v", "dout", "delta", "lse2", "sequences", "into_dk", "into_dv", "into_sums"),
        scalars={"n_sequences": sequences} | _scalars(problem, WHOLE),
        outputs=(
            Output("dk", kv_shape, problem.dtype),
            Output("dv", kv_shape, problem.dtype),
            Output("sums", shape, "float32"),
        ),
        in_place={"dk": "into_dk", "dv": "into_dv", "sums": "into_sums"},
        **_hopper(backward_fused_hopper, constexprs, config, tiles, descriptors=3),
    )
    finish = Launch(
        kernel=finish_dq,
        inputs=("sums", "segments"),
        scalars={"n_segments": segments, "T": problem.tokens},
        outputs=(Output("dq", shape, problem.dtype),),
        constexprs={"ROW": row, "SOFTMAX_SCALE": problem.call.softmax_scale, "BLOCK": _ELEMENTS},
        **elements,
    )
    return clear, fused, finish


def _strides(dout_strides: tuple[int, int]) -> dict[str, int]:
    return {"STRIDE_DOT": dout_strides[0], "STRIDE_DOH": dout_strides[1]}


def segment_tables(
    run: Run, cu_seqlens, rank, *, sequences: int, world_size: int, target: str, kv_layout: str = KVLayout.GATHERED
) -> tuple:
    """(segments, sequences): the device tables of one batch on one rank, for all its layers.

    Of the "peer" layout there is one table a ring step: step `s` has the keys of rank `(rank - s) % world_size`.
    """
    return run(_segments_launch(sequences, world_size, kv_layout, target), cu_seqlens, rank)


def forward(
    run: Run,
    problem: Problem,
    q,
    k,
    v,
    segments,
    *,
    part: Part = WHOLE,
    into: tuple = (None, None),
) -> tuple:
    """(out `[T, heads, head_dim]`, lse `[heads, T]` float32, natural log).

    They are new arrays, or those of `into`, in which what is not of this `part` stays as it is.
    """
    return run(_forward_launch(problem, part), q, k, v, segments, *into)


def backward_rows(
    run: Run, problem: Problem, out, lse, dout, dlse, *, dout_strides: tuple[int, int], part: Part = WHOLE
) -> tuple:
    """(delta, lse2) `[window, T * group]` float32: what both of the following need of the query rows of their `part`.

    `dlse` may be None.
    """
    launch = _delta_launch(problem, dout_strides, dlse is not None, part)
    return run(launch, out, dout, lse, lse if dlse is None else dlse)


def backward_keys(
    run: Run,
    problem: Problem,
    q,
    k,
    v,
    dout,
    rows: tuple,
    sequences,
    *,
    dout_strides: tuple[int, int],
    part: Part = WHOLE,
    into: tuple = (None, None),
) -> tuple:
    """(dk, dv) in the layout of k and v; `rows` are `backward_rows` of the same part, the rest as in `forward`."""
    for launch in _dkdv_launches(problem, dout_strides, part):
        into = run(launch, q, k, v, dout, *rows, sequences, *into)
    return into


def backward_queries(
    run: Run,
    problem: Problem,
    q,
    k,
    v,
    dout,
    rows: tuple,
    segments,
    *,
    dout_strides: tuple[int, int],
    part: Part = WHOLE,
    into=None,
):
    """dq `[T, heads, head_dim]`; arguments as in `backward_keys`."""
    (dq,) = run(_dq_launch(problem, dout_strides, part), q, k, v, dout, *rows, segments, into)
    return dq


def backward(
    run: Run,
    problem: Problem,
    q,
    k,
    v,
    out,
    lse,
    dout,
    dlse,
    segments,
    sequences,
    *,
    dout_strides: tuple[int, int],
) -> tuple:
    """(dq, dk, dv) of all heads at once, in the dtype of q. `dlse` may be None."""
    rows = backward_rows(run, problem, out, lse, dout, dlse, dout_strides=dout_strides)
    if takes_fused_backward(problem, dout_strides):
        clear, fused, finish = _fused_launches(problem, dout_strides)
        (sums,) = run(clear, q)
        dk, dv, sums = run(fused, q, k, v, dout, *rows, sequences, None, None, sums)
        (dq,) = run(finish, sums, segments)
        return dq, dk, dv
    dk, dv = backward_keys(run, problem, q, k, v, dout, rows, sequences, dout_strides=dout_strides)
    return backward_queries(run, problem, q, k, v, dout, rows, segments, dout_strides=dout_strides), dk, dv
