"""Transports, which bring K/V to the rank whose queries attend to them, and return dK/dV.

A transport is a static object with two functions, `forward` and `backward`, which run on each device. Collectives and
kernels alternate in them, so that XLA can overlap both. An `optimization_barrier` prevents XLA from starting operations
too early, which limits the memory.
"""

import dataclasses

from zigzag_kernels.checks import MAX_ROWS
from zigzag_kernels.heuristics import choose_heads_k_stride
from zigzag_kernels.modes import KVLayout, Method
from zigzag_kernels.problem import Problem, parts_of

from ..axes import AxisName
from .allgather import AllGather
from .halo import Halo
from .local import Local
from .ring import Ring
from .transport import Inputs, Packing, Residuals, Tables, halo_tables
from .two_part import TwoPart

__all__ = [
    "AllGather",
    "Halo",
    "Inputs",
    "Local",
    "Packing",
    "Residuals",
    "Ring",
    "Tables",
    "Transport",
    "TwoPart",
    "choose_transport",
    "halo_tables",
]

Transport = Local | AllGather | Halo | Ring | TwoPart


def choose_transport(problem: Problem, axis_name: AxisName | None) -> Transport:
    """Return the transport that `problem.call` asks for; `ValueError` for options out of range.

    `problem` describes this rank's own q, k and v.
    """
    if axis_name is None or problem.world_size == 1:
        choose_heads_k_stride(problem.call.heads_k_stride, problem)
        return Local(problem)
    if not problem.call.whole_tokens:
        return _choose_moving(problem, axis_name)
    whole, split = parts_of(problem)
    return TwoPart(problem, whole, _choose_moving(split, axis_name) if split.rows else None)


def _choose_moving(problem: Problem, axis_name: AxisName) -> AllGather | Halo | Ring:
    stride = choose_heads_k_stride(problem.call.heads_k_stride, problem)
    if problem.call.method == Method.HALO:
        return _make_halo(problem, axis_name)
    if problem.call.method == Method.RING:
        return Ring(problem, axis_name)
    strides = stride * problem.head_dim, problem.head_dim
    problem = dataclasses.replace(
        problem, window=stride, kv_layout=KVLayout.GATHERED, k_strides=strides, v_strides=strides
    )
    if problem.kv_tokens > MAX_ROWS:
        raise ValueError(f"k: expected at most {MAX_ROWS} rows on all ranks together, got {problem.kv_tokens}")
    return AllGather(problem, axis_name)


def _make_halo(problem: Problem, axis_name: AxisName) -> Halo:
    """Return the transport of halos; K and V of its buffer are contiguous arrays of all heads."""
    strides = problem.kv_heads * problem.head_dim, problem.head_dim
    buffer = {"kv_layout": KVLayout.HALO, "slot_rows": problem.call.halo_rows}
    of_halo = dataclasses.replace(problem, **buffer, k_strides=strides, v_strides=strides)
    if of_halo.kv_tokens > MAX_ROWS:
        raise ValueError(f"k: expected at most {MAX_ROWS} rows of keys in halos, got {of_halo.kv_tokens}")
    return Halo(problem, of_halo, axis_name)
