"""Transports, which bring K/V to the rank whose queries attend to them, and return dK/dV.

A transport is a frozen object with the `Problem` of its launches and two functions, `forward` and `backward`. Under
`torch.compile` each function is one operator, so that the compiler keeps its order of launches and transfers.
"""

import dataclasses
import functools

import torch

from zigzag_kernels.callspec import CallSpec
from zigzag_kernels.checks import MAX_ROWS, check_strides
from zigzag_kernels.heuristics import choose_heads_k_stride
from zigzag_kernels.modes import KVLayout, Method
from zigzag_kernels.problem import Problem, make_problem, parts_of

from .. import launch
from .allgather import AllGather
from .halo import Halo
from .local import Local
from .ring import Ring
from .transport import Packing, Residuals, Tables
from .two_part import TwoPart

__all__ = [
    "AllGather",
    "Halo",
    "Local",
    "Moving",
    "Packing",
    "Residuals",
    "Ring",
    "Tables",
    "Transport",
    "TwoPart",
    "choose_transport",
    "transport_of",
]

Moving = AllGather | Halo | Ring | TwoPart
Transport = Local | Moving


def transport_of(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    call: CallSpec,
    sequences: int,
    world_size: int,
    kv_layout: KVLayout,
    group_name: str | None,
) -> Transport:
    """Return the transport of a call on these tensors, cached for all layers and steps with equal arguments.

    `kv_layout` is the layout of k and v as the caller passed them. Raises `ValueError` for tensors and options that do
    not fit each other.
    """
    arrays = (q.shape, q.dtype, q.stride()), (k.shape, k.dtype, k.stride()), (v.shape, v.dtype, v.stride())
    target = launch.target(call.backend, q.device)
    if not torch.compiler.is_compiling():  # torch.compile would trace the cache too, and warn about it
        try:
            return _known_transport(arrays, target, call, sequences, world_size, kv_layout, group_name)
        except TypeError:  # other tracers have symbolic sizes, which are not hashable
            pass
    return _make_transport(arrays, target, call, sequences, world_size, kv_layout, group_name)


def _make_transport(arrays, target, call, sequences, world_size, kv_layout, group_name) -> Transport:
    _, (k_shape, *_), _ = arrays
    q, k, v = (launch.make_array_spec(*x) for x in arrays)
    problem = make_problem(
        q,
        k,
        v,
        call,
        sequences=sequences,
        world_size=world_size,
        target=target,
        kv_layout=kv_layout,
        kv_rows=k_shape[0] if kv_layout == KVLayout.CONTIGUOUS else None,
        gluon=launch.can_launch_gluon(call.backend),
    )
    return choose_transport(problem, group_name)


# The cache is typed, because True equals 1 and would find its transport, but is an invalid world_size.
_known_transport = functools.lru_cache(maxsize=1024, typed=True)(_make_transport)


def choose_transport(problem: Problem, group_name: str | None) -> Transport:
    """Return the transport that `problem.call` asks for; `ValueError` for options out of range.

    `problem` describes this rank's own q, k and v. `group_name` is the name of the group whose ranks hold the other
    keys, or None if k and v have all keys.
    """
    if group_name is None or problem.world_size == 1:
        choose_heads_k_stride(problem.call.heads_k_stride, problem)
        return Local(problem)
    if not problem.call.whole_tokens:
        return _choose_moving(problem, group_name)
    whole, split = parts_of(problem)
    return TwoPart(problem, whole, _choose_moving(split, group_name) if split.rows else None, group_name)


def _choose_moving(problem: Problem, group_name: str) -> AllGather | Halo | Ring:
    if problem.call.method == Method.HALO:
        return _make_halo(problem, group_name)
    stride = choose_heads_k_stride(problem.call.heads_k_stride, problem)
    is_ring = problem.call.method == Method.RING
    window = problem.kv_heads if is_ring else stride
    strides = 2 * window * problem.head_dim, problem.head_dim  # each row of a buffer has the heads of K, then of V
    check_strides("k", strides, 1)
    problem = dataclasses.replace(problem, window=window, k_strides=strides, v_strides=strides)
    if is_ring:
        return Ring(problem, group_name)
    problem = dataclasses.replace(problem, kv_layout=KVLayout.GATHERED)
    if problem.kv_tokens > MAX_ROWS:
        raise ValueError(
            f"q: expected at most {MAX_ROWS} rows of keys and of queries, got {problem.kv_tokens} and {problem.tokens}"
        )
    return AllGather(problem, group_name)


def _make_halo(problem: Problem, group_name: str) -> Halo:
    """Return the transport of halos; each row of its buffer has the heads of K, then the heads of V."""
    strides = 2 * problem.kv_heads * problem.head_dim, problem.head_dim
    check_strides("k", strides, 1)
    buffer = {"kv_layout": KVLayout.HALO, "slot_rows": problem.call.halo_rows}
    of_halo = dataclasses.replace(problem, **buffer, k_strides=strides, v_strides=strides)
    if of_halo.kv_tokens > MAX_ROWS:
        raise ValueError(f"q: expected at most {MAX_ROWS} rows of keys in halos, got {of_halo.kv_tokens}")
    return Halo(problem, of_halo, group_name)
