"""From a `Problem` to the launches that solve it, framework-free: kernels, grids, arguments, outputs and their order.

A front end supplies `run(launch, *arrays) -> tuple of arrays`, its only launch site, and calls `forward`, `backward`
and `segment_tables` here, so that both frameworks launch the same kernels with the same constants in the same order.
"""

import functools
import inspect
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import triton

from .backend import INTERPRET
from .backward import backward_delta, backward_dkdv, backward_dq
from .config import block_d, choose_config
from .forward import attention_forward
from .problem import Problem, check_strides, check_target, segment_table_shapes
from .segments import build_segments

Run = Callable[..., tuple]
# Triton's interpreter keeps global state, and JAX's host devices call it from several threads.
INTERPRETER = threading.Lock()
_DELTA_ROWS = 64
_TABLE_BLOCK = 64
_CACHED = 1024  # batches of changing size make new problems without end


@dataclass(frozen=True)
class Output:
    """An array that a launch writes completely."""

    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Launch:
    """One kernel launch. Kernel arguments in order: `inputs` (arrays), `scalars`, `outputs`, then `constexprs`."""

    kernel: Any
    target: str
    grid: tuple[int, int, int]
    inputs: tuple[str, ...]
    scalars: dict[str, int]
    outputs: tuple[Output, ...]
    constexprs: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 1

    def __post_init__(self):
        # jax-triton takes a misspelt name for one more constant, and a wrong order for another array.
        expected = list(inspect.signature(self.kernel.fn).parameters)
        given = [f"{name}_ptr" for name in self.inputs] + list(self.scalars)
        given += [f"{output.name}_ptr" for output in self.outputs]
        if given != expected[: len(given)] or set(expected[len(given) :]) != set(self.constexprs):
            raise TypeError(
                f"{self.kernel.fn.__name__}: expected arguments {expected}, got {given} and {sorted(self.constexprs)}"
            )


def interpreting() -> bool:
    """Whether triton was imported with TRITON_INTERPRET=1: a process interprets or compiles, never both."""
    return not isinstance(attention_forward, triton.JITFunction)


@functools.lru_cache(maxsize=_CACHED)
def _segments_launch(sequences: int, world_size: int, target: str) -> Launch:
    check_target(target)
    segments_shape, sequences_shape = segment_table_shapes(sequences)
    return Launch(
        kernel=build_segments,
        target=target,
        grid=(-(-segments_shape[0] // _TABLE_BLOCK), 1, 1),
        inputs=("cu_seqlens", "rank"),
        scalars={"n_sequences": sequences},
        outputs=(
            Output("segments", segments_shape, "int32"),
            Output("sequences", sequences_shape, "int32"),
        ),
        constexprs={"WORLD_SIZE": world_size, "BLOCK": _TABLE_BLOCK},
    )


def _common(problem: Problem) -> dict[str, Any]:
    return {
        "WORLD_SIZE": problem.world_size,
        "GROUP": problem.group,
        "HEAD_DIM": problem.head_dim,
        "CAUSAL": problem.causal,
        "SOFTMAX_SCALE": problem.softmax_scale,
        "STRIDE_QT": problem.q_strides[0],
        "STRIDE_QH": problem.q_strides[1],
        "STRIDE_KT": problem.k_strides[0],
        "STRIDE_KH": problem.k_strides[1],
        "STRIDE_VT": problem.v_strides[0],
        "STRIDE_VH": problem.v_strides[1],
        "BLOCK_D": block_d(problem.head_dim),
        "INTERPRET": problem.target == INTERPRET,
    }


def _query_tiles(problem: Problem, block_m: int) -> tuple[int, int, int]:
    """Upper bound of the query tiles from static shapes alone: see `tile.locate`."""
    segments, _ = segment_table_shapes(problem.sequences)
    return problem.tokens * problem.group // block_m + segments[0], problem.kv_heads, 1


@functools.lru_cache(maxsize=_CACHED)
def _forward_launch(problem: Problem) -> Launch:
    check_target(problem.target)
    (segments, _), _ = segment_table_shapes(problem.sequences)
    config = choose_config("forward", problem.head_dim, problem.dtype, problem.target)
    return Launch(
        kernel=attention_forward,
        target=problem.target,
        grid=_query_tiles(problem, config.BLOCK_M),
        inputs=("q", "k", "v", "segments"),
        scalars={"n_segments": segments, "T": problem.tokens},
        outputs=(
            Output("out", (problem.tokens, problem.heads, problem.head_dim), problem.dtype),
            Output("lse", (problem.heads, problem.tokens), "float32"),
        ),
        constexprs=_common(problem) | {"BLOCK_M": config.BLOCK_M, "BLOCK_N": config.BLOCK_N},
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


@functools.lru_cache(maxsize=_CACHED)
def _backward_launches(
    problem: Problem, dout_strides: tuple[int, int], has_dlse: bool, kv_dtype: str
) -> tuple[Launch, Launch, Launch]:
    check_target(problem.target)
    check_strides("dout", dout_strides, problem.group)
    (segments, _), (sequences, _) = segment_table_shapes(problem.sequences)
    rows = problem.tokens * problem.group
    dout = {"STRIDE_DOT": dout_strides[0], "STRIDE_DOH": dout_strides[1]}
    delta = Launch(
        kernel=backward_delta,
        target=problem.target,
        grid=(max(1, -(-rows // _DELTA_ROWS)), problem.kv_heads, 1),
        inputs=("out", "dout", "lse", "dlse"),
        scalars={"T": problem.tokens},
        outputs=(
            Output("delta", (problem.kv_heads, rows), "float32"),
            Output("lse2", (problem.kv_heads, rows), "float32"),
        ),
        constexprs=dout
        | {
            "GROUP": problem.group,
            "HEAD_DIM": problem.head_dim,
            "HAS_DLSE": has_dlse,
            "BLOCK_M": _DELTA_ROWS,
            "BLOCK_D": block_d(problem.head_dim),
        },
    )
    config = choose_config("backward_dkdv", problem.head_dim, problem.dtype, problem.target)
    kv_shape = (problem.kv_tokens, problem.kv_heads, problem.head_dim)
    dkdv = Launch(
        kernel=backward_dkdv,
        target=problem.target,
        grid=(problem.kv_tokens // config.BLOCK_N + sequences, problem.kv_heads, 1),
        inputs=("q", "k", "v", "dout", "delta", "lse2", "sequences"),
        scalars={"n_sequences": sequences, "T": problem.tokens},
        outputs=(Output("dk", kv_shape, kv_dtype), Output("dv", kv_shape, kv_dtype)),
        constexprs=_common(problem) | dout | {"BLOCK_M": config.BLOCK_M, "BLOCK_N": config.BLOCK_N},
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    config = choose_config("backward_dq", problem.head_dim, problem.dtype, problem.target)
    dq = Launch(
        kernel=backward_dq,
        target=problem.target,
        grid=_query_tiles(problem, config.BLOCK_M),
        inputs=("q", "k", "v", "dout", "delta", "lse2", "segments"),
        scalars={"n_segments": segments, "T": problem.tokens},
        outputs=(Output("dq", (problem.tokens, problem.heads, problem.head_dim), problem.dtype),),
        constexprs=_common(problem) | dout | {"BLOCK_M": config.BLOCK_M, "BLOCK_N": config.BLOCK_N},
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return delta, dkdv, dq


def segment_tables(run: Run, cu_seqlens, rank, *, sequences: int, world_size: int, target: str) -> tuple:
    """(segments, sequences): the device tables of one batch on one rank, for all its layers."""
    return run(_segments_launch(sequences, world_size, target), cu_seqlens, rank)


def forward(run: Run, problem: Problem, q, k, v, segments) -> tuple:
    """(out `[T, heads, head_dim]`, lse `[heads, T]` float32, natural log)."""
    return run(_forward_launch(problem), q, k, v, segments)


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
    kv_dtype: str,
) -> tuple:
    """(dq, dk, dv); dk and dv in the layout of k and v, as `kv_dtype`. `dlse` may be None."""
    delta_launch, dkdv_launch, dq_launch = _backward_launches(problem, dout_strides, dlse is not None, kv_dtype)
    delta, lse2 = run(delta_launch, out, dout, lse, lse if dlse is None else dlse)
    dk, dv = run(dkdv_launch, q, k, v, dout, delta, lse2, sequences)
    (dq,) = run(dq_launch, q, k, v, dout, delta, lse2, segments)
    return dq, dk, dv
