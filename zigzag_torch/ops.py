"""The kernels as `torch.library` operators with fake kernels and autograd, so that `torch.compile` traces them."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._C._autograd import _profiler_enabled
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.autograd.function import _SingleLevelFunction as _Function  # Function, less its search for transforms

from zigzag_kernels.callspec import make_call_spec
from zigzag_kernels.modes import KVLayout
from zigzag_kernels.problem import ArraySpec, Problem, make_problem, segment_table_shapes

from . import launch

_PLAIN = {torch.Tensor, torch.nn.Parameter, bool, int, float, str, type(None)}


class Operator:
    """`function(*inputs)`, of tensors and constants, of which it changes none, as the operator `name` of PyTorch.

    A call that nothing but the function would notice goes around the operator: what the dispatcher and `torch.library`
    put around a function written in Python takes the host longer than much of what the function does.
    """

    def __init__(self, name: str, function: Callable):
        self.function = function
        self.registered = torch.library.custom_op(name, function, mutates_args=())
        self.register_fake = self.registered.register_fake
        self.register_autograd = self.registered.register_autograd

    def __call__(self, *inputs):
        tensors = [x for x in inputs if isinstance(x, torch.Tensor)]
        # Where gradients are recorded and none is registered, as in a second backward pass, the operator refuses.
        direct = _goes_straight(inputs, tensors) and not _records(tensors)
        return self.function(*inputs) if direct else self.registered(*inputs)


def operator(name: str) -> Callable[[Callable], Operator]:
    """Makes the function below it an `Operator`."""
    return functools.partial(Operator, name)


def _goes_straight(inputs: Sequence, tensors: Sequence[torch.Tensor]) -> bool:
    """Whether the dispatcher, gradients aside, would only call the function, for `tensors` among `inputs`.

    So it is if nothing is in force that is told of every operator (a transform, a mode such as checkpointing with a
    policy, a trace, a profile), and every tensor is in memory as it is (no subclass, no sign or zeros still to be
    written).
    """
    return not (
        _transformed(tensors)
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._get_tracing_state() is not None
        or _profiler_enabled()
        or not _PLAIN.issuperset(map(type, inputs))
        or any(map(torch.Tensor.is_neg, tensors))
        or any(map(torch.Tensor._is_zerotensor, tensors))
    )


def _transformed(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether `torch.compile` traces, or `torch.func` is at work or was and has left one of its own tensors."""
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or any(map(is_functorch_wrapped_tensor, tensors))
    )


def _records(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether autograd has to record a call with `tensors`."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def describe(x: torch.Tensor) -> ArraySpec:
    """Return what `make_problem` takes of `x`."""
    return _in_plain_values(x.shape, x.dtype, x.stride())


def _in_plain_values(shape, dtype, strides) -> ArraySpec:
    return ArraySpec(tuple(shape), str(dtype).removeprefix("torch."), strides[:2] if len(shape) == 3 else (0, 0))


def problem_of(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, table: torch.Tensor, world_size, causal, softmax_scale, backend,
    kv_layout, deterministic, gluon=False,
) -> Problem:  # fmt: skip
    """`make_problem` of tensors, `table` with a row more than there are sequences; the layers and steps of a model ask
    for the same one again and again."""
    given = (
        (q.shape, q.dtype, q.stride()),
        (k.shape, k.dtype, k.stride()),
        (v.shape, v.dtype, v.stride()),
        table.shape[0] - 1,
        world_size,
        causal,
        softmax_scale,
        backend,
        launch.target(backend, q.device),
        kv_layout,
        deterministic,
        gluon,
    )
    if not torch.compiler.is_compiling():  # traces it, and warns of caches
        try:
            return _known_problem(*given)
        except TypeError:  # what is not even hashable is refused in words
            pass
    return _make_problem(*given)


def _make_problem(
    q, k, v, sequences, world_size, causal, softmax_scale, backend, target, kv_layout, deterministic, gluon
):
    call = make_call_spec(
        head_dim=q[0][-1] if q[0] else 0,
        backend=backend,
        causal=causal,
        softmax_scale=softmax_scale,
        deterministic=deterministic,
    )
    return make_problem(
        _in_plain_values(*q),
        _in_plain_values(*k),
        _in_plain_values(*v),
        call,
        sequences=sequences,
        world_size=world_size,
        target=target,
        kv_layout=kv_layout,
        kv_rows=k[0][0] if kv_layout == KVLayout.CONTIGUOUS else None,
        gluon=gluon,
    )


_known_problem = functools.lru_cache(maxsize=1024, typed=True)(_make_problem)  # typed, as True is 1.0, and refused


@operator("zigzag::segment_tables")
def segment_tables(
    cu_seqlens: torch.Tensor, rank: torch.Tensor, world_size: int, kv_layout: str, backend: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """The device tables of one batch: see `zigzag_kernels.plan.segment_tables`."""
    from zigzag_kernels import plan

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
def _(cu_seqlens, rank, world_size, kv_layout, backend):
    steps = world_size if kv_layout == KVLayout.PEER else 1
    segments, sequences = segment_table_shapes(cu_seqlens.shape[0] - 1, steps)
    return cu_seqlens.new_empty(segments), cu_seqlens.new_empty(sequences)


@operator("zigzag::attention_forward")
def attention_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    segments: torch.Tensor,
    sequences: torch.Tensor,
    world_size: int,
    causal: bool,
    softmax_scale: float,
    backend: str,
    kv_layout: str = KVLayout.GATHERED.value,
    deterministic: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out `[T, heads, head_dim]`, lse `[heads, T]` float32); `deterministic` is for the backward pass."""
    from zigzag_kernels import plan

    gluon = launch.can_launch_gluon(backend, k, v)
    problem = problem_of(
        q, k, v, sequences, world_size, causal, softmax_scale, backend, kv_layout, deterministic, gluon
    )  # fmt: skip
    return plan.forward(launch.run, problem, q, k, v, segments)


@attention_forward.register_fake
def _(q, k, v, segments, sequences, *constants):
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)


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
    world_size: int,
    causal: bool,
    softmax_scale: float,
    backend: str,
    kv_layout: str = KVLayout.GATHERED.value,
    deterministic: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dq, dk, dv) in the layouts and the dtype of q, k, v."""
    from zigzag_kernels import plan

    dout = last_dim_contiguous(dout)
    gluon = launch.can_launch_gluon(backend, k, v, q, dout)
    problem = problem_of(
        q, k, v, sequences, world_size, causal, softmax_scale, backend, kv_layout, deterministic, gluon
    )  # fmt: skip
    return plan.backward(
        launch.run,
        problem,
        q,
        k,
        v,
        out,
        lse,
        dout,
        None if dlse is None else dlse.contiguous(),
        segments,
        sequences,
        dout_strides=(dout.stride(0), dout.stride(1)),
    )


@attention_backward.register_fake
def _(q, k, v, out, lse, dout, dlse, segments, sequences, *_):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def differentiable(operator: Operator, differentiate: Callable) -> Callable:
    """`operator(q, k, v, segments, sequences, *constants) -> (out, lse)` with its gradient,
    `differentiate(ctx, dout, dlse)`.

    It is registered, for `torch.compile` and `vmap`. Eager calls go around what is registered, which reads the schema
    anew in every call: a third of the host's time.
    """

    def save(ctx, inputs, output) -> None:
        q, k, v, segments, sequences, *ctx.constants = inputs
        ctx.save_for_backward(q, k, v, *output, segments, sequences)
        ctx.set_materialize_grads(False)

    def forward(ctx, function, constants, *tensors) -> tuple[torch.Tensor, torch.Tensor]:
        inputs = *tensors, *constants
        output = function(*inputs)
        save(ctx, inputs, output)
        return output

    def backward(ctx, *gradients) -> tuple:
        return None, None, *differentiate(ctx, *gradients)[:5]

    operator.register_autograd(differentiate, setup_context=save)
    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    eager: Any = type("ZigzagAttention", (_Function,), methods)

    def call(*inputs) -> tuple[torch.Tensor, torch.Tensor]:
        tensors, constants = inputs[:5], inputs[5:]
        straight = _goes_straight(inputs, tensors)
        function = operator.function if straight else operator.registered
        if not _records(tensors) or (not straight and _transformed(tensors)):
            return function(*inputs)
        return eager.apply(function, constants, *tensors)

    return call


def _differentiate(ctx, dout, dlse):
    q, k, v, out, lse, segments, sequences = ctx.saved_tensors
    if dout is None:
        dout = torch.zeros_like(out)
    gradients = attention_backward(q, k, v, out, lse, dout, dlse, segments, sequences, *ctx.constants)
    return *gradients, *(None,) * (2 + len(ctx.constants))


attention = differentiable(attention_forward, _differentiate)


def last_dim_contiguous(x: torch.Tensor) -> torch.Tensor:
    """`x`, copied only if its last dimension is not contiguous: the kernels take any other stride as it is."""
    return x if x.stride(-1) == 1 else x.contiguous()
