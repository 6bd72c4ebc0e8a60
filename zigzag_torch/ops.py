"""The kernels as `torch.library` operators with fake kernels and autograd, so that `torch.compile` traces them."""

import functools
from collections.abc import Callable

import torch

from zigzag_kernels.problem import CONTIGUOUS, GATHERED, PEER, Problem, make_problem, segment_table_shapes

from . import launch


def describe(x: torch.Tensor) -> tuple[tuple[int, ...], str, tuple[int, int]]:
    """(shape, dtype name, (token, head) strides): what `make_problem` takes."""
    strides = x.stride()
    return tuple(x.shape), str(x.dtype).removeprefix("torch."), (strides[0], strides[1]) if x.ndim == 3 else (0, 0)


_known_problem = functools.lru_cache(maxsize=1024, typed=True)(make_problem)  # typed, as True is 1.0, and refused


def problem_of(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **facts) -> Problem:
    """`make_problem` of tensors; the layers and steps of a model ask for the same one again and again."""
    arrays = describe(q), describe(k), describe(v)
    if torch.compiler.is_compiling():  # traces it, and warns of caches
        return make_problem(*arrays, **facts)
    try:
        return _known_problem(*arrays, **facts)
    except TypeError:  # what is not even hashable is refused in words
        return make_problem(*arrays, **facts)


def _problem(
    q, k, v, sequences, world_size, causal, softmax_scale, backend, kv_layout, deterministic, *others
) -> Problem:
    """Of a call whose kernels read `others` too."""
    return problem_of(
        q,
        k,
        v,
        sequences=sequences.shape[0] - 1,
        world_size=world_size,
        causal=causal,
        softmax_scale=softmax_scale,
        target=launch.target(backend, q.device),
        gluon=launch.can_launch_gluon(backend, k, v, *others),
        kv_layout=kv_layout,
        kv_rows=k.shape[0] if kv_layout == CONTIGUOUS else None,
        deterministic=deterministic,
    )


@torch.library.custom_op("zigzag::segment_tables", mutates_args=())
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
    steps = world_size if kv_layout == PEER else 1
    segments, sequences = segment_table_shapes(cu_seqlens.shape[0] - 1, steps)
    return cu_seqlens.new_empty(segments), cu_seqlens.new_empty(sequences)


@torch.library.custom_op("zigzag::attention_forward", mutates_args=())
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
    kv_layout: str = GATHERED,
    deterministic: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out `[T, heads, head_dim]`, lse `[heads, T]` float32); `deterministic` is for the backward pass."""
    from zigzag_kernels import plan

    problem = _problem(q, k, v, sequences, world_size, causal, softmax_scale, backend, kv_layout, deterministic)
    return plan.forward(launch.run, problem, q, k, v, segments)


@attention_forward.register_fake
def _(q, k, v, segments, sequences, *constants):
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)


@torch.library.custom_op("zigzag::attention_backward", mutates_args=())
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
    kv_layout: str = GATHERED,
    deterministic: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dq, dk, dv) in the layouts and the dtype of q, k, v."""
    from zigzag_kernels import plan

    dout = last_dim_contiguous(dout)
    problem = _problem(
        q, k, v, sequences, world_size, causal, softmax_scale, backend, kv_layout, deterministic, q, dout
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


def differentiable(operator, differentiate: Callable) -> Callable:
    """`operator(q, k, v, segments, sequences, *constants) -> (out, lse)` with its gradient,
    `differentiate(ctx, dout, dlse)`.

    It is registered, for `torch.compile` and `vmap`. Eager calls go around what is registered, which reads the schema
    anew in every call: a third of the host's time.
    """

    def save(ctx, inputs, output) -> None:
        q, k, v, segments, sequences, *ctx.constants = inputs
        ctx.save_for_backward(q, k, v, *output, segments, sequences)
        ctx.set_materialize_grads(False)

    def forward(ctx, *inputs) -> tuple[torch.Tensor, torch.Tensor]:
        output = operator(*inputs)
        save(ctx, inputs, output)
        return output

    operator.register_autograd(differentiate, setup_context=save)
    methods = {"forward": staticmethod(forward), "backward": staticmethod(differentiate)}
    eager = type("ZigzagAttention", (torch.autograd.Function,), methods)

    def call(*inputs) -> tuple[torch.Tensor, torch.Tensor]:
        transformed = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
        if transformed or not torch.is_grad_enabled() or not any(x.requires_grad for x in inputs[:3]):
            return operator(*inputs)
        return eager.apply(*inputs)

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
