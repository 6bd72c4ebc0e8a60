"""The same attention in plain PyTorch, dense and differentiable: the backend of machines without a GPU.

Memory is proportional to heads * T * W * T scores. Softmax is float32 whatever the inputs are, and products are float64
rounded to float32. NaN and infinities reach only the rows and keys that see them, as in the kernels.
"""

import functools

import torch

from zigzag_kernels.checks import dtype_name
from zigzag_kernels.layout import impossible, row_position
from zigzag_kernels.problem import Problem

from .arguments import check_device, check_tensor
from .dispatch import operator
from .parallel import Local, Ring, Transport
from .parallel.collectives import all_gather, shift
from .shard import sequence_of_rows


def attention(
    transport: Transport,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    rank: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (out `[T, heads, head_dim]`, lse `[heads, T]` float32) of one rank; arguments as the kernels'.

    Between ranks K/V move as `transport` says, and autograd moves their gradients back.
    """
    problem = transport.problem
    attend = functools.partial(_attend, problem, cu_seqlens=cu_seqlens, rank=rank)
    ranks = torch.arange(problem.world_size, device=q.device)
    if isinstance(transport, Local):
        return attend(q, k, v, ranks=ranks)
    reduce_dtype = getattr(torch, problem.call.grad_reduce_dtype)
    k, v = k.to(reduce_dtype), v.to(reduce_dtype)  # their gradients move in the dtype that they do
    if isinstance(transport, Ring):
        kv, partials = torch.cat((k, v), 1), []
        queries = q.float()  # once, so that autograd sums dQ of all steps in float32
        for step in range(problem.world_size):
            peer = (rank - step) % problem.world_size
            partials.append(attend(queries, *kv.chunk(2, 1), ranks=peer))
            if step + 1 < problem.world_size:
                kv = shift(kv, 1, transport.group_name)
        out, lse = merge_partials(*(torch.stack(x) for x in zip(*partials, strict=True)))
        return out.to(q.dtype), lse
    windows = []
    for first in range(0, problem.kv_heads, problem.window):
        end = first + problem.window
        kv = torch.cat((k[:, first:end], v[:, first:end]), 1)
        kv = all_gather(kv, problem.world_size, transport.group_name)
        windows.append(attend(q[:, first * problem.group : end * problem.group], *kv.chunk(2, 1), ranks=ranks))
    outs, lses = zip(*windows, strict=True)
    return torch.cat(outs, 1), torch.cat(lses)


def _attend(
    problem: Problem,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    cu_seqlens: torch.Tensor,
    rank: torch.Tensor,
    ranks: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (out, lse) of the rows of `rank` over the keys of `ranks`; rows that see no key have out 0, lse -inf."""
    tokens, world_size = q.shape[0], problem.world_size
    sequence, offset, length = sequence_of_rows(cu_seqlens, world_size, tokens)
    q_position = row_position(offset, length, rank, world_size)
    k_position = row_position(offset, length, ranks[:, None], world_size).expand(len(ranks), tokens).reshape(-1)
    k_sequence = sequence.repeat(len(ranks))

    # A factor of the results, and of the inputs for the sake of the gradients.
    poison = torch.where(impossible(cu_seqlens, rank, world_size, tokens), float("nan"), 1.0)
    out, lse = dense(
        q.float() * poison,
        k.float() * poison,
        v.float() * poison,
        (sequence, q_position),
        (k_sequence, k_position),
        problem.call.causal,
        problem.call.softmax_scale,
    )
    return (out * poison).to(q.dtype), lse * poison


def varlen_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    causal: bool,
    softmax_scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (out `[rows, heads, head_dim]`, lse `[heads, rows]` float32) of sequences with keys in position order.

    The causal mask is aligned to the last row and the last key of each sequence, as in FlashAttention-2.
    """
    q_sequence, q_position, q_length = sequence_of_rows(cu_seqlens_q, 1, q.shape[0])
    k_sequence, k_position, _ = sequence_of_rows(cu_seqlens_k, 1, k.shape[0])
    k_length = cu_seqlens_k.diff()[q_sequence.clamp(min=0)] if len(cu_seqlens_k) > 1 else 0
    out, lse = dense(
        q.float(),
        k.float(),
        v.float(),
        (q_sequence, q_position + k_length - q_length),
        (k_sequence, k_position),
        causal,
        softmax_scale,
    )
    return out.to(q.dtype), lse


def dense(q, k, v, rows, keys, causal, softmax_scale) -> tuple[torch.Tensor, torch.Tensor]:
    """Float32 (out, lse) where `rows` and `keys` are (sequence, position) of each; sequence -1 is padding.

    Rows that see no key have out 0 and lse -inf.
    """
    (q_sequence, q_position), (k_sequence, k_position) = rows, keys
    visible = (q_sequence[:, None] == k_sequence[None, :]) & (k_sequence >= 0)[None, :]
    if causal:
        # Not in place: under vmap one of the two may have a batch dimension that the other lacks.
        visible = visible & (q_position[:, None] >= k_position[None, :])
    return dense_forward(q, k, v, visible, softmax_scale)


@operator("zigzag::dense_forward")
def dense_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, visible: torch.Tensor, softmax_scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return float32 (out, lse) of rows over the keys that `visible [rows, keys]` lets them see."""
    probabilities, lse = _probabilities(q, k, visible, softmax_scale)
    return _mix_keys(probabilities, visible, v, signed=False).reshape(q.shape), lse.reshape(q.shape[1], len(q))


@operator("zigzag::dense_backward")
def dense_backward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    visible: torch.Tensor,
    softmax_scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return float32 (dq, dk, dv) of `dense_forward`."""
    probabilities, _ = _probabilities(q, k, visible, softmax_scale)
    of_row = -(dout * out).sum(-1).T
    if dlse is not None:
        of_row = of_row + dlse
    dprobabilities = _product("tkgd,skd->kgts", _grouped(dout, k), v)
    dscores = probabilities * (dprobabilities + of_row.reshape(probabilities.shape[:3])[..., None])
    dscores = dscores.masked_fill(~visible, 0.0)
    dq = _mix_keys(dscores, visible, k, signed=True) * softmax_scale
    dk = _mix_rows(dscores, visible, _grouped(q, k), signed=True) * softmax_scale
    return dq.reshape(q.shape), dk, _mix_rows(probabilities, visible, _grouped(dout, k), signed=False)


@dense_forward.register_fake
def _(q, k, v, visible, softmax_scale):
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]))


@dense_backward.register_fake
def _(q, k, v, *others):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx, inputs, output) -> None:
    q, k, v, visible, ctx.softmax_scale = inputs
    ctx.save_for_backward(q, k, v, output[0], visible)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, dout, dlse) -> tuple:
    q, k, v, out, visible = ctx.saved_tensors
    dout = torch.zeros_like(out) if dout is None else dout
    return *dense_backward(q, k, v, out, dout, dlse, visible, ctx.softmax_scale), None, None


dense_forward.register_autograd(_differentiate, setup_context=_save)
dense_backward.refuse_gradient()


def _grouped(x: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """Return `x [rows, heads, head_dim]` as `[rows, kv_heads, group, head_dim]`."""
    return x.unflatten(1, (k.shape[1], -1))


def _probabilities(
    q: torch.Tensor, k: torch.Tensor, visible: torch.Tensor, softmax_scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (probabilities `[kv_heads, group, rows, keys]`, lse `[kv_heads, group, rows]`), 0 for unseen keys."""
    scores = _product("tkgd,skd->kgts", _grouped(q, k), k) * softmax_scale
    scores = scores.masked_fill(~visible, float("-inf"))
    alone = ~visible.any(1)
    maximum = scores.amax(-1) if len(k) else scores.new_zeros(scores.shape[:3])
    maximum = maximum.masked_fill(alone, 0.0)
    # Divided by their sum, the weights add up to 1 whatever the size of the scores: lse would round large ones.
    weights = torch.exp(scores - maximum[..., None])
    total = weights.sum(-1).masked_fill(alone, 1.0)
    probabilities = (weights / total[..., None]).masked_fill(~visible, 0.0)
    return probabilities, (maximum + torch.log(total)).masked_fill(alone, float("-inf"))


def _product(equation: str, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return the float32 `torch.einsum` of float32 tensors, multiplied in float64.

    Autocast and the settings for TF32 and bfloat16 products would change float32 products, and not those of float64.
    """
    if a.device.type == "mps":  # has no float64
        return torch.einsum(equation, a, b)
    return torch.einsum(equation, a.double(), b.double()).float()


def _mix_keys(weights: torch.Tensor, visible: torch.Tensor, x: torch.Tensor, signed: bool) -> torch.Tensor:
    """Return the sums `[rows, kv_heads, group, head_dim]` of the keys' `x [keys, kv_heads, head_dim]`."""
    foul = _foul("ts,skd->tkd", visible, x, signed)
    mixed = _product("kgts,skd->tkgd", weights, _without_foul(x, foul))
    return mixed if foul is None else mixed + foul[:, :, None]


def _mix_rows(weights: torch.Tensor, visible: torch.Tensor, x: torch.Tensor, signed: bool) -> torch.Tensor:
    """Return the sums `[keys, kv_heads, head_dim]` of the rows' `x [rows, kv_heads, group, head_dim]`."""
    foul = _foul("ts,tkgd->skd", visible, x, signed)
    mixed = _product("kgts,tkgd->skd", weights, _without_foul(x, foul))
    return mixed if foul is None else mixed + foul


def _without_foul(x: torch.Tensor, foul: torch.Tensor | None) -> torch.Tensor:
    return x if foul is None else x.masked_fill(~x.isfinite(), 0.0)


def _foul(equation: str, visible: torch.Tensor, x: torch.Tensor, signed: bool) -> torch.Tensor | None:
    """Return what the NaN and infinite elements of `x` add to the visible sums, None if `x` is known to have none.

    In a dense product they would reach all sums: zero times NaN is NaN. Weights are positive unless `signed`, where any
    such element makes NaN.
    """
    if x.device.type == "cpu" and x.isfinite().all():  # elsewhere the host would wait for the answer
        return None
    up, down = x.isnan() | x.isposinf(), x.isnan() | x.isneginf()
    if signed:
        up = down = up | down
    up, down = (torch.einsum(equation, visible.float(), kind.float()) > 0 for kind in (up, down))
    zero = torch.zeros((), dtype=x.dtype, device=x.device)
    return zero.masked_fill(up, float("inf")) + zero.masked_fill(down, float("-inf"))


def merge_partials(out: torch.Tensor, lse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge attention to `n` disjoint parts of the keys into attention to all of them; differentiable.

    `out [n, T, heads, head_dim]`, `lse [n, heads, T]` (natural logarithm) -> out `[T, heads, head_dim]` in the dtype of
    the parts, lse `[heads, T]` float32. A row that sees no key in a part has lse -inf there, and any out. Raises
    `ValueError` for other shapes.
    """
    for name, x in (("out", out), ("lse", lse)):
        check_tensor(name, x)
        if not x.is_floating_point():
            raise ValueError(f"{name}: expected a floating-point type, got {dtype_name(x)}")
    if out.ndim != 4 or lse.shape != (out.shape[0], out.shape[2], out.shape[1]):
        raise ValueError(
            f"lse: expected [n, heads, T] for out [n, T, heads, head_dim], got shapes {tuple(lse.shape)} and "
            f"{tuple(out.shape)}"
        )
    check_device("lse", lse, "out", out)
    lse = lse.float()
    unseen = torch.isneginf(lse)
    blind = unseen.all(0)
    maximum = lse.detach().amax(0).masked_fill(blind, 0.0)
    # The gradient of log(0) would be NaN. Elementwise products: settings for matrix products must not matter.
    weights = torch.exp(lse.masked_fill(unseen & blind, 0.0) - maximum).masked_fill(unseen, 0.0)
    total = weights.sum(0).masked_fill(blind, 1.0)
    out32 = out.float().masked_fill(unseen.transpose(1, 2)[..., None], 0.0)
    merged = ((weights / total).transpose(1, 2)[..., None] * out32).sum(0)
    return merged.to(out.dtype), (maximum + torch.log(total)).masked_fill(blind, float("-inf"))
