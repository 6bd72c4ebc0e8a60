"""Attention as PyTorch operators with gradients, and the operator that builds the device tables of a batch.

An eager call that nothing else observes bypasses the operators, to save host time (`dispatch`). All other calls go
through the operators, for example when `torch.compile` traces them. The schemas of operators have no dataclasses, so
operators take the options of a call as one string, `CallSpec.key`.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch

from zigzag_kernels.callspec import CallSpec
from zigzag_kernels.modes import KVLayout, Layout
from zigzag_kernels.problem import count_sequences, segment_table_shapes, table_shapes

from . import launch
from .dispatch import goes_straight, operator, records
from .parallel import Local, Moving, Residuals, Tables, Transport, transport_of
from .parallel.agreement import agree_on_call, resolve


@operator("zigzag::segment_tables")
def segment_tables(  # noqa: PLR0917  (schemas of operators are flat)
    cu_seqlens: torch.Tensor,
    rank: torch.Tensor,
    world_size: int,
    kv_layout: str,
    backend: str,
    lengths: torch.Tensor | None = None,
    layout: str = "document",
    row_length: int = 0,
    rows: int = 1,
    whole_cu_seqlens: torch.Tensor | None = None,
    whole_tokens: int = 0,
    tokens: int = 0,
    halo: int = 0,
    longest: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the device tables (segments, sequences) of one batch: see `zigzag_kernels.plan.segment_tables`.

    In a batch of two parts, the tables of the whole documents come first. The tables of the split documents follow, if
    there are rows for split documents. All entries are then in one table of two dimensions.
    """
    from zigzag_kernels import plan

    target = launch.target(backend, cu_seqlens.device)
    parts = []
    if whole_cu_seqlens is not None:
        sizes: Any = {"sequences": whole_cu_seqlens.shape[0] - 1, "world_size": 1, "target": target}
        whole = plan.segment_tables(launch.run, whole_cu_seqlens, rank.clamp(max=0), end_row=whole_tokens, **sizes)
        if tokens == whole_tokens:
            return whole
        parts.append(whole)
    split = plan.segment_tables(
        launch.run,
        cu_seqlens,
        rank,
        lengths,
        sequences=cu_seqlens.shape[0] - 1,
        world_size=world_size,
        target=target,
        kv_layout=kv_layout,
        layout=layout,
        row_length=row_length,
        rows=rows,
        first_row=whole_tokens,
        end_row=tokens,
        halo=halo,
        longest=longest,
    )
    if not parts:
        return split
    parts.append([table.flatten(0, -2) for table in split])
    segments, sequences = (torch.cat(tables) for tables in zip(*parts, strict=True))
    return segments, sequences


@segment_tables.register_fake
def _(  # noqa: PLR0917  (schemas of operators are flat)
    cu_seqlens, rank, world_size, kv_layout, backend, lengths=None, layout="document", row_length=0, rows=1,
    whole_cu_seqlens=None, whole_tokens=0, tokens=0, *limits,
):  # fmt: skip
    in_rows = layout == Layout.ROW and world_size > 1
    shapes = table_shapes(KVLayout(kv_layout), cu_seqlens.shape[0] - 1, world_size, in_rows)
    if whole_cu_seqlens is not None:
        whole = segment_table_shapes(whole_cu_seqlens.shape[0] - 1)
        further = tokens > whole_tokens
        both = zip(whole, shapes, strict=True)
        shapes = tuple((entries + further * math.prod(shape[:-1]), fields) for (entries, fields), shape in both)
    segments, sequences = shapes
    return cu_seqlens.new_empty(segments), cu_seqlens.new_empty(sequences)


def attention(
    transport: Transport,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    tables: Tables,
    sinks: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute (out `[T, heads, head_dim]`, statistics) with the kernels; differentiable.

    The statistics are lse `[heads, T]` float32. With `return_max_logits` they are `[2, heads, T]`: lse, and the largest
    score of each row, which has no gradient.
    """
    tensors = (q, k, v, *tables) if sinks is None else (q, k, v, *tables, sinks)
    if not goes_straight(tensors):
        forward, _ = _operators_of(transport)
        return forward(q, k, v, *tables, *_constants(transport), sinks)
    if records(tensors):
        return _Attention.apply(transport, q, k, v, *tables, sinks)
    return transport.forward(q, k, v, tables, sinks)


_Function: Any = torch.autograd.Function if launch.fast_launch is None else launch.fast_launch.Function


class _Attention(_Function):
    """The gradient rule of calls that bypass the operators."""

    _compiled_autograd_key = torch.autograd.Function._compiled_autograd_key

    @staticmethod
    def forward(ctx, transport, q, k, v, segments, sequences, sinks):
        out, statistics = transport.forward(q, k, v, Tables(segments, sequences), sinks)
        ctx.transport = transport
        of_sinks = () if sinks is None else (sinks,)
        ctx.save_for_backward(q, k, v, out, statistics, segments, sequences, *of_sinks)
        ctx.set_materialize_grads(False)
        return out, statistics

    @staticmethod
    def backward(ctx, dout, dlse):
        saved, transport = ctx.saved_tensors, ctx.transport
        q, k, v, out, lse, segments, sequences, *of_sinks = saved
        tables, sinks = (segments, sequences), of_sinks[0] if of_sinks else None
        if dout is None:
            dout = torch.zeros_like(out)
        tensors = (*saved, dout) if dlse is None else (*saved, dout, dlse)
        if transport.problem.call.return_max_logits:
            lse, dlse = _first(lse), _first(dlse)
        # If autograd records this backward pass, it must go through the operator, whose own gradient raises an error.
        if goes_straight(tensors) and not records(tensors):
            dq, (dk, dv), dsinks = transport.backward(Residuals(q, k, v, out, lse), dout, dlse, Tables(*tables), sinks)
        else:
            _, backward = _operators_of(transport)
            gradients = backward(q, k, v, out, lse, dout, dlse, *tables, *_constants(transport), sinks)
            dq, dk, dv, dsinks = _four(gradients, sinks)
        return None, dq, dk, dv, None, None, dsinks


def _first(statistics: Any) -> Any:
    """Return the lse of `statistics`, or of their gradient, which may be None."""
    return statistics if statistics is None or statistics.ndim == 2 else statistics[0]


def agreed_rank(
    transport: Moving, rank: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, equal_lengths: bool
) -> torch.Tensor:
    """Return `rank` after the ranks have agreed on the call, and with `equal_lengths` on the number of sequences."""
    if goes_straight((rank, q, k, v)):
        _agree(transport, equal_lengths)
        return rank
    constants = transport.problem.sequences, equal_lengths, *_constants(transport)
    return agreed_rank_operator(rank, q.detach(), k.detach(), v.detach(), *constants)


def _constants(transport: Transport) -> tuple[str, int, str]:
    """Return the arguments of an operator besides tensors, from which the operator makes `transport` again."""
    problem, key = transport.problem, call_key(transport.problem.call)
    if isinstance(transport, Local):
        return key, problem.world_size, problem.kv_layout.value
    return key, problem.world_size, transport.group_name


def call_key(call: CallSpec) -> str:
    """Return `call.key`; while `torch.compile` traces, the numbers in it become constants of the compiled code."""
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


# torch.compile calls this function instead of tracing it, like the functions of `launch`.
_key_of_values._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]


def _transport_of(q, k, v, sequences, call: str, world_size: int, kv_layout: str, group_name: str | None) -> Transport:
    """Return the transport of an operator, which derives the number of sequences from the size of their table."""
    spec = CallSpec.from_key(call)
    number = count_sequences(spec, sequences.shape[-2], world_size)
    return transport_of(q, k, v, spec, number, world_size, KVLayout(kv_layout), group_name)


@operator("zigzag::attention_forward")
def attention_forward(  # noqa: PLR0917  (schemas of operators are flat)
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    segments: torch.Tensor,
    sequences: torch.Tensor,
    call: str,
    world_size: int,
    kv_layout: str = "gathered",
    sinks: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (out, statistics) where k and v on this device have all keys."""
    transport = _transport_of(q, k, v, sequences, call, world_size, kv_layout, None)
    return transport.forward(q, k, v, Tables(segments, sequences), sinks)


@operator("zigzag::attention_backward")
def attention_backward(  # noqa: PLR0917  (schemas of operators are flat)
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
    sinks: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (dq, dk, dv, dsinks) of `attention_forward`; dsinks is empty without sinks."""
    transport = _transport_of(q, k, v, sequences, call, world_size, kv_layout, None)
    residuals, tables = Residuals(q, k, v, out, lse), Tables(segments, sequences)
    dq, (dk, dv), dsinks = transport.backward(residuals, dout, dlse, tables, sinks)
    return dq, dk, dv, lse.new_empty(0) if dsinks is None else dsinks


@operator("zigzag::parallel_forward")
def parallel_forward(  # noqa: PLR0917  (schemas of operators are flat)
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    segments: torch.Tensor,
    sequences: torch.Tensor,
    call: str,
    world_size: int,
    group_name: str,
    sinks: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (out, statistics) of one of several ranks; all tensors have the rows of this rank."""
    transport = _transport_of(q, k, v, sequences, call, world_size, KVLayout.PEER, group_name)
    return transport.forward(q, k, v, Tables(segments, sequences), sinks)


@operator("zigzag::parallel_backward")
def parallel_backward(  # noqa: PLR0917  (schemas of operators are flat)
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
    sinks: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (dq, dkv, dsinks) of `parallel_forward`; dkv `[2, ...]` is dk and dv, as operators return no views."""
    transport = _transport_of(q, k, v, sequences, call, world_size, KVLayout.PEER, group_name)
    residuals, tables = Residuals(q, k, v, out, lse), Tables(segments, sequences)
    dq, dkv, dsinks = transport.backward(residuals, dout, dlse, tables, sinks)
    assert isinstance(dkv, torch.Tensor)
    return dq, dkv, lse.new_empty(0) if dsinks is None else dsinks


@operator("zigzag::agreed_rank")
def agreed_rank_operator(  # noqa: PLR0917  (schemas of operators are flat)
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


def _fake_forward(q, k, v, segments, sequences, call, *others):
    both = (2,) if CallSpec.from_key(call).return_max_logits else ()
    return q.new_empty(q.shape), q.new_empty((*both, q.shape[1], q.shape[0]), dtype=torch.float32)


def _fake_sinks(lse: torch.Tensor, sinks: torch.Tensor | None = None) -> torch.Tensor:
    return lse.new_empty(0 if sinks is None else sinks.shape)


@attention_backward.register_fake
def _(q, k, v, out, lse, dout, dlse, segments, sequences, call, world_size, kv_layout="gathered", sinks=None):  # noqa: PLR0917  (schemas of operators are flat)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), _fake_sinks(lse, sinks)


@parallel_backward.register_fake
def _(q, k, v, out, lse, dout, dlse, segments, sequences, call, world_size, group_name, sinks=None):  # noqa: PLR0917  (schemas of operators are flat)
    return q.new_empty(q.shape), k.new_empty((2, *k.shape)), _fake_sinks(lse, sinks)


attention_forward.register_fake(_fake_forward)
parallel_forward.register_fake(_fake_forward)
agreed_rank_operator.register_fake(lambda rank, *others: rank.new_empty(rank.shape))


def _operators_of(transport: Transport) -> tuple[Callable, Callable]:
    """Return the operators of (forward, backward)."""
    if isinstance(transport, Local):
        return attention_forward, attention_backward
    return parallel_forward, parallel_backward


def _four(gradients: tuple[torch.Tensor, ...], sinks: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """Return (dq, dk, dv, dsinks) from the results of either backward operator; dsinks is None without sinks."""
    dq, *dkv, dsinks = gradients
    dk, dv = dkv if len(dkv) == 2 else dkv[0]
    return dq, dk, dv, None if sinks is None else dsinks


def _register_gradient(forward, backward) -> None:
    def save(ctx, inputs, output) -> None:
        q, k, v, segments, sequences, *ctx.constants, sinks = inputs
        ctx.save_for_backward(q, k, v, *output, segments, sequences, sinks)
        ctx.set_materialize_grads(False)

    def differentiate(ctx, dout, dstatistics) -> tuple:
        q, k, v, out, statistics, segments, sequences, sinks = ctx.saved_tensors
        if dout is None:
            dout = torch.zeros_like(out)
        results = out, _first(statistics), dout, _first(dstatistics)
        gradients = backward(q, k, v, *results, segments, sequences, *ctx.constants, sinks)
        dq, dk, dv, dsinks = _four(gradients, sinks)
        return dq, dk, dv, *(None,) * (2 + len(ctx.constants)), dsinks

    forward.register_autograd(differentiate, setup_context=save)
    backward.refuse_gradient()


_register_gradient(attention_forward, attention_backward)
_register_gradient(parallel_forward, parallel_backward)
