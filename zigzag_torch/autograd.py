"""Attention as operators of PyTorch with a gradient, and the device tables of a batch.

A call that only the kernels would notice goes around the operators (`dispatch`). All others, those that
`torch.compile` traces among them, go through operators, whose schemas are flat: they take the options as one string,
`CallSpec.key`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from zigzag_kernels.callspec import CallSpec
from zigzag_kernels.modes import KVLayout, Layout
from zigzag_kernels.problem import segment_table_shapes

from . import launch
from .dispatch import goes_straight, operator, records
from .parallel import Local, Moving, Residuals, Tables, Transport, transport_of
from .parallel.agreement import agree_on_call, resolve


@operator("zigzag::segment_tables")
def segment_tables(
    cu_seqlens: torch.Tensor,
    rank: torch.Tensor,
    world_size: int,
    kv_layout: str,
    backend: str,
    lengths: torch.Tensor | None = None,
    layout: str = "document",
    row_length: int = 0,
    rows: int = 1,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the device tables (segments, sequences) of one batch: see `zigzag_kernels.plan.segment_tables`."""
    from zigzag_kernels import plan

    if lengths is not None or layout == Layout.ROW:
        raise NotImplementedError(f"backend: real lengths and the row layout need 'reference', got {backend!r}")

    return plan.segment_tables(
        launch.run,
        cu_seqlens,
        rank,
        sequences=cu_seqlens.shape[0] - 1,
        world_size=world_size,
        target=launch.target(backend, cu_seqlens.device),
        kv_layout=kv_layout,
    )


@segment_tables.register_fake
def _(cu_seqlens, rank, world_size, kv_layout, backend, lengths=None, layout="document", row_length=0, rows=1):
    steps = world_size if kv_layout == KVLayout.PEER else 1
    segments, sequences = segment_table_shapes(cu_seqlens.shape[0] - 1, steps)
    return cu_seqlens.new_empty(segments), cu_seqlens.new_empty(sequences)


def attention(
    transport: Transport, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tables: Tables
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (out `[T, heads, head_dim]`, lse `[heads, T]` float32) by the kernels; differentiable."""
    tensors = q, k, v, *tables
    if not goes_straight(tensors):
        forward, _ = _operators_of(transport)
        return forward(*tensors, *_constants(transport))
    if records(tensors):
        return _Attention.apply(transport, *tensors)
    return transport.forward(q, k, v, tables)


_Function: Any = torch.autograd.Function if launch.fast_launch is None else launch.fast_launch.Function


class _Attention(_Function):
    """The gradient rule of calls that go around the operators."""

    _compiled_autograd_key = torch.autograd.Function._compiled_autograd_key

    @staticmethod
    def forward(ctx, transport, q, k, v, segments, sequences):
        out, lse = transport.forward(q, k, v, Tables(segments, sequences))
        ctx.transport = transport
        ctx.save_for_backward(q, k, v, out, lse, segments, sequences)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx, dout, dlse):
        saved, transport = ctx.saved_tensors, ctx.transport
        q, k, v, out, lse, *tables = saved
        if dout is None:
            dout = torch.zeros_like(out)
        tensors = (*saved, dout) if dlse is None else (*saved, dout, dlse)
        # A backward pass that is itself recorded goes through the operator, whose gradient is a refusal.
        if goes_straight(tensors) and not records(tensors):
            dq, (dk, dv) = transport.backward(Residuals(q, k, v, out, lse), dout, dlse, Tables(*tables))
        else:
            _, backward = _operators_of(transport)
            dq, dk, dv = _three(backward(q, k, v, out, lse, dout, dlse, *tables, *_constants(transport)))
        return None, dq, dk, dv, None, None


def agreed_rank(
    transport: Moving, rank: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, equal_lengths: bool
) -> torch.Tensor:
    """Return `rank` once the ranks have agreed on the call, and on the number of sequences if q has `equal_lengths`."""
    if goes_straight((rank, q, k, v)):
        _agree(transport, equal_lengths)
        return rank
    constants = transport.problem.sequences, equal_lengths, *_constants(transport)
    return agreed_rank_operator(rank, q.detach(), k.detach(), v.detach(), *constants)


def _constants(transport: Transport) -> tuple[str, int, str]:
    """Return what operators take beside tensors, for which `transport_of` gives `transport` again."""
    problem, key = transport.problem, call_key(transport.problem.call)
    if isinstance(transport, Local):
        return key, problem.world_size, problem.kv_layout.value
    return key, problem.world_size, transport.group_name


def call_key(call: CallSpec) -> str:
    """Return `call.key`; while `torch.compile` traces, its numbers become constants of the compiled code."""
    if not torch.compiler.is_compiling():
        return call.key
    from torch.fx.experimental.symbolic_shapes import guard_scalar

    def constant(x):
        if isinstance(x, tuple):
            return tuple(constant(element) for element in x)
        return guard_scalar(x) if isinstance(x, int | float) else x

    return _key_of_values(*(constant(getattr(call, name)) for name in _FIELDS))


_FIELDS = tuple(field.name for field in dataclasses.fields(CallSpec))


def _key_of_values(*values) -> str:
    return CallSpec(**dict(zip(_FIELDS, values, strict=True))).key


# As for the functions of `launch`: called while torch.compile traces, rather than traced.
_key_of_values._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]


@operator("zigzag::attention_forward")
def attention_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    segments: torch.Tensor,
    sequences: torch.Tensor,
    call: str,
    world_size: int,
    kv_layout: str = "gathered",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (out, lse) of k and v that are all here."""
    constants = CallSpec.from_key(call), sequences.shape[-2] - 1, world_size, KVLayout(kv_layout)
    return transport_of(q, k, v, *constants, None).forward(q, k, v, Tables(segments, sequences))


@operator("zigzag::attention_backward")
def attention_backward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    segments: torch.Tensor,
    sequences: torch.Tensor,
    call: str,
    world_size: int,
    kv_layout: str = "gathered",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (dq, dk, dv) of `attention_forward`."""
    constants = CallSpec.from_key(call), sequences.shape[-2] - 1, world_size, KVLayout(kv_layout)
    transport = transport_of(q, k, v, *constants, None)
    dq, (dk, dv) = transport.backward(Residuals(q, k, v, out, lse), dout, dlse, Tables(segments, sequences))
    return dq, dk, dv


@operator("zigzag::parallel_forward")
def parallel_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    segments: torch.Tensor,
    sequences: torch.Tensor,
    call: str,
    world_size: int,
    group_name: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (out, lse) of one rank of several; all tensors are its own."""
    constants = CallSpec.from_key(call), sequences.shape[-2] - 1, world_size, KVLayout.PEER
    return transport_of(q, k, v, *constants, group_name).forward(q, k, v, Tables(segments, sequences))


@operator("zigzag::parallel_backward")
def parallel_backward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    segments: torch.Tensor,
    sequences: torch.Tensor,
    call: str,
    world_size: int,
    group_name: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (dq, dk and dv in one tensor) of `parallel_forward`; an operator must not return views of a result."""
    constants = CallSpec.from_key(call), sequences.shape[-2] - 1, world_size, KVLayout.PEER
    transport = transport_of(q, k, v, *constants, group_name)
    dq, dkv = transport.backward(Residuals(q, k, v, out, lse), dout, dlse, Tables(segments, sequences))
    assert isinstance(dkv, torch.Tensor)
    return dq, dkv


@operator("zigzag::agreed_rank")
def agreed_rank_operator(
    rank: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sequences: int,
    equal_lengths: bool,
    call: str,
    world_size: int,
    group_name: str,
) -> torch.Tensor:
    """Return a copy of `rank`: see `agreed_rank`."""
    transport = transport_of(q, k, v, CallSpec.from_key(call), sequences, world_size, KVLayout.PEER, group_name)
    assert not isinstance(transport, Local)
    _agree(transport, equal_lengths)
    return rank.clone()


def _agree(transport: Moving, equal_lengths: bool) -> None:
    others = {"sequences": transport.problem.sequences} if equal_lengths else {}
    agree_on_call(resolve(transport.group_name), transport.problem, **others)


def _fake_forward(q, k, v, segments, sequences, *constants):
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)


attention_forward.register_fake(_fake_forward)
parallel_forward.register_fake(_fake_forward)
attention_backward.register_fake(
    lambda q, k, v, *others: (q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape))
)
parallel_backward.register_fake(lambda q, k, v, *others: (q.new_empty(q.shape), k.new_empty((2, *k.shape))))
agreed_rank_operator.register_fake(lambda rank, *others: rank.new_empty(rank.shape))


def _operators_of(transport: Transport) -> tuple[Callable, Callable]:
    """Return the operators of (forward, backward)."""
    if isinstance(transport, Local):
        return attention_forward, attention_backward
    return parallel_forward, parallel_backward


def _three(gradients: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (dq, dk, dv) from the results of either backward operator."""
    dq, *dkv = gradients
    dk, dv = dkv if len(dkv) == 2 else dkv[0]
    return dq, dk, dv


def _register_gradient(forward, backward) -> None:
    def save(ctx, inputs, output) -> None:
        q, k, v, segments, sequences, *ctx.constants = inputs
        ctx.save_for_backward(q, k, v, *output, segments, sequences)
        ctx.set_materialize_grads(False)

    def differentiate(ctx, dout, dlse) -> tuple:
        q, k, v, out, lse, segments, sequences = ctx.saved_tensors
        if dout is None:
            dout = torch.zeros_like(out)
        gradients = backward(q, k, v, out, lse, dout, dlse, segments, sequences, *ctx.constants)
        return *_three(gradients), *(None,) * (2 + len(ctx.constants))

    forward.register_autograd(differentiate, setup_context=save)
    backward.refuse_gradient()


_register_gradient(attention_forward, attention_backward)
_register_gradient(parallel_forward, parallel_backward)
