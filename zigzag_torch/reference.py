"""The same attention in plain PyTorch, dense and differentiable: the backend of machines without a GPU.

Memory is proportional to heads * T * W * T scores. Softmax is float32 whatever the inputs are, and products are float64
rounded to float32. NaN and infinities reach only the rows and keys that see them, as in the kernels.
"""

import functools
from typing import NamedTuple

import torch

from zigzag_kernels.callspec import NO_WINDOW
from zigzag_kernels.checks import dtype_name
from zigzag_kernels.layout import impossible
from zigzag_kernels.problem import Problem

from .arguments import check_device, check_tensor
from .dispatch import operator
from .parallel import Local, Packing, Ring, Transport, TwoPart
from .parallel.collectives import all_gather, shift
from .shard import place_of_rows, sequence_of_rows


class Mask(NamedTuple):
    """The mask: which keys of its document a row sees, by the fields of `CallSpec`."""

    causal: bool
    window_size: tuple[int, int] = NO_WINDOW
    attention_chunk: int = 0


class Places(NamedTuple):
    """The places of rows or keys, `[rows]` int64: the number of the document (-1: padding), the position in it."""

    document: torch.Tensor
    position: torch.Tensor


def attention(
    transport: Transport,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    packing: Packing,
    sinks: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (out `[T, heads, head_dim]`, lse and the largest score of each row `[heads, T]` float32) of one rank.

    Arguments are the kernels'. Between ranks K/V move as `transport` says, and autograd moves their gradients back; in
    place of halos, all K/V are gathered.
    """
    problem = transport.problem
    if isinstance(transport, TwoPart):
        return _attend_parts(transport, q, k, v, packing, sinks)
    attend = functools.partial(_attend, problem, packing)
    ranks = torch.arange(problem.world_size, device=q.device)
    if isinstance(transport, Local):
        return attend(q, k, v, sinks=sinks, ranks=ranks)
    reduce_dtype = getattr(torch, problem.call.grad_reduce_dtype)
    k, v = k.to(reduce_dtype), v.to(reduce_dtype)  # their gradients move in the dtype that they do
    if isinstance(transport, Ring):
        kv, partials = torch.cat((k, v), 1), []
        queries = q.float()  # once, so that autograd sums dQ of all steps in float32
        for step in range(problem.world_size):
            peer = (packing.rank - step) % problem.world_size
            # A sink counts once a row, and every row that sees a key sees its own, in the first step.
            partials.append(attend(queries, *kv.chunk(2, 1), sinks=None if step else sinks, ranks=peer))
            if step + 1 < problem.world_size:
                kv = shift(kv, 1, transport.group_name)
        outs, lses, maxima = (torch.stack(x) for x in zip(*partials, strict=True))
        out, lse = merge_partials(outs, lses)
        return out.to(q.dtype), lse, maxima.amax(0)
    windows = []
    for first in range(0, problem.kv_heads, problem.window):
        end = first + problem.window
        kv = torch.cat((k[:, first:end], v[:, first:end]), 1)
        kv = all_gather(kv, problem.world_size, transport.group_name)
        heads = slice(first * problem.group, end * problem.group)
        of_window = None if sinks is None else sinks[heads]
        windows.append(attend(q[:, heads], *kv.chunk(2, 1), sinks=of_window, ranks=ranks))
    outs, lses, maxima = zip(*windows, strict=True)
    return torch.cat(outs, 1), torch.cat(lses), torch.cat(maxima)


def _attend_parts(transport: TwoPart, q, k, v, packing: Packing, sinks: torch.Tensor | None):
    """Return `attention` of whole documents, then of split ones."""
    assert packing.whole is not None
    first = transport.whole.rows
    parts = [attention(Local(transport.whole), q[:first], k[:first], v[:first], packing.whole, sinks)]
    if transport.split is not None:
        parts.append(attention(transport.split, q[first:], k[first:], v[first:], packing, sinks))
    outs, lses, maxima = zip(*parts, strict=True)
    return torch.cat(outs), torch.cat(lses, 1), torch.cat(maxima, 1)


def _attend(
    problem: Problem,
    packing: Packing,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    sinks: torch.Tensor | None,
    ranks: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the results of the rows of one rank over the keys of `ranks`.

    Rows that see no key have out 0, lse -inf, and -inf as their largest score.
    """
    call, tokens = problem.call, q.shape[0]
    rows, keys = _places(packing, packing.rank, tokens), _places(packing, ranks[:, None], tokens)
    visible = see(Mask(call.causal, call.window_size, call.attention_chunk), rows, keys)

    # A factor of the results, and of the inputs for the sake of the gradients.
    row_length = packing.row_length if packing.is_in_rows else None
    fault = impossible(
        packing.cu_seqlens, packing.rank, packing.world_size, tokens, row_length, packing.lengths, packing.halo
    )
    poison = torch.where(fault, float("nan"), 1.0)
    q32, k32, v32 = (x.float() * poison for x in (q, k, v))
    sinks = None if sinks is None else sinks * poison
    out, lse, maxima = dense_forward(q32, k32, v32, visible, sinks, call.softmax_scale, call.softcap)
    return (out * poison).to(q.dtype), lse * poison, maxima * poison


def _places(packing: Packing, ranks: torch.Tensor, tokens: int) -> Places:
    """Return where the rows of `ranks` are, `[1]` or `[n, 1]`, one rank after the other."""
    row_length = packing.row_length if packing.is_in_rows else None
    places = place_of_rows(
        packing.cu_seqlens, ranks, packing.world_size, tokens, row_length=row_length, lengths=packing.lengths
    )
    return Places(*(x.reshape(-1) for x in places))


def see(mask: Mask, rows: Places, keys: Places) -> torch.Tensor:
    """Return `[rows, keys]`: whether each row sees each key."""
    row, key = rows.position[:, None], keys.position[None, :]
    # Not in place: under vmap one of two may have a batch dimension that the other lacks.
    visible = (rows.document[:, None] == keys.document[None, :]) & (keys.document >= 0)[None, :]
    if mask.causal:
        visible = visible & (key <= row)
    left, right = mask.window_size
    if left >= 0:
        visible = visible & (key >= row - left)
    if right >= 0:
        visible = visible & (key <= row + right)
    if mask.attention_chunk:
        visible = visible & (row // mask.attention_chunk == key // mask.attention_chunk)
    return visible


def varlen_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    mask: Mask,
    softmax_scale: float,
    keys_behind: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (out `[rows, heads, head_dim]`, lse `[heads, rows]` float32) of sequences with keys in position order.

    The mask is aligned to the last row and the last key of each sequence, as in FlashAttention-2, or to as many keys
    before the last one as `keys_behind [N]` says.
    """
    visible = _visible_keys(q, k, cu_seqlens_q, cu_seqlens_k, mask, keys_behind)
    out, lse, _ = dense_forward(q.float(), k.float(), v.float(), visible, None, softmax_scale, 0.0)
    return out.to(q.dtype), lse


def varlen_gradients(
    qkv: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    cotangents: tuple[torch.Tensor, torch.Tensor | None],
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    mask: Mask,
    softmax_scale: float,
    keys_behind: torch.Tensor | None = None,
) -> tuple[torch.Tensor, ...]:
    """Return (dq, dk, dv) of `varlen_attention` for the gradients (dout, dlse) of its results; dlse None is zeros."""
    q, k, v = (x.float() for x in qkv)
    dout, dlse = cotangents
    visible = _visible_keys(q, k, cu_seqlens_q, cu_seqlens_k, mask, keys_behind)
    out, _, _ = dense_forward(q, k, v, visible, None, softmax_scale, 0.0)
    *gradients, _ = dense_backward(q, k, v, out, dout.float(), dlse, visible, None, softmax_scale, 0.0)
    return tuple(x.to(like.dtype) for x, like in zip(gradients, qkv, strict=True))


def _visible_keys(
    q: torch.Tensor,
    k: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    mask: Mask,
    keys_behind: torch.Tensor | None,
) -> torch.Tensor:
    """Return `[rows, keys]`: whether each row of `varlen_attention` sees each key."""
    q_sequence, q_position, q_length = sequence_of_rows(cu_seqlens_q, 1, q.shape[0])
    k_sequence, k_position, _ = sequence_of_rows(cu_seqlens_k, 1, k.shape[0])
    k_length = cu_seqlens_k.diff()[q_sequence.clamp(min=0)] if len(cu_seqlens_k) > 1 else 0
    if keys_behind is not None and len(keys_behind):
        k_length = k_length - keys_behind[q_sequence.clamp(min=0)]
    rows = Places(q_sequence, q_position + k_length - q_length)
    return see(mask, rows, Places(k_sequence, k_position))


@operator("zigzag::dense_forward")
def dense_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    visible: torch.Tensor,
    sinks: torch.Tensor | None,
    softmax_scale: float,
    softcap: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return float32 (out, lse, largest score) of rows over the keys that `visible [rows, keys]` lets them see.

    The largest scores have no gradient.
    """
    scores = _scores(q, k, visible, softmax_scale, softcap)
    softmax = _softmax(scores, visible, sinks)
    out = _mix_keys(softmax.probabilities, visible, v, signed=False).reshape(q.shape)
    of_row = q.shape[1], len(q)
    maxima = scores.amax(-1) if len(k) else scores.new_full(scores.shape[:3], float("-inf"))
    maxima = maxima.masked_fill(softmax.lse.isnan(), float("nan"))  # and not infinite, as in the kernels
    return out, softmax.lse.reshape(of_row), maxima.reshape(of_row)


@operator("zigzag::dense_backward")
def dense_backward(  # noqa: PLR0917  (schemas of operators are flat)
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    visible: torch.Tensor,
    sinks: torch.Tensor | None,
    softmax_scale: float,
    softcap: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return float32 (dq, dk, dv, dsinks) of `dense_forward`; dsinks is empty without sinks."""
    scores = _scores(q, k, visible, softmax_scale, softcap)
    probabilities, _, of_sinks = _softmax(scores, visible, sinks)
    of_row = -(dout * out).sum(-1).T
    if dlse is not None:
        of_row = of_row + dlse
    of_row = of_row.reshape(probabilities.shape[:3])
    dprobabilities = _product("tkgd,skd->kgts", _grouped(dout, k), v)
    dscores = probabilities * (dprobabilities + of_row[..., None])
    if softcap:
        dscores = dscores * (1 - (scores / softcap) ** 2)
    dscores = dscores.masked_fill(~visible, 0.0)
    dq = _mix_keys(dscores, visible, k, signed=True) * softmax_scale
    dk = _mix_rows(dscores, visible, _grouped(q, k), signed=True) * softmax_scale
    dv = _mix_rows(probabilities, visible, _grouped(dout, k), signed=False)
    dsinks = q.new_zeros(0)
    if of_sinks is not None:
        dsinks = (of_sinks * of_row).masked_fill(~visible.any(1), 0.0).sum(-1).reshape(-1)
    return dq.reshape(q.shape), dk, dv, dsinks


@dense_forward.register_fake
def _(q, k, v, visible, sinks, softmax_scale, softcap):
    of_row = q.shape[1], q.shape[0]
    return q.new_empty(q.shape), q.new_empty(of_row), q.new_empty(of_row)


@dense_backward.register_fake
def _(q, k, v, out, dout, dlse, visible, sinks, softmax_scale, softcap):  # noqa: PLR0917  (schemas of operators are flat)
    dsinks = q.new_empty(0 if sinks is None else q.shape[1])
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dsinks


def _save(ctx, inputs, output) -> None:
    q, k, v, visible, sinks, *ctx.constants = inputs
    ctx.save_for_backward(q, k, v, output[0], visible, sinks)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, dout, dlse, _) -> tuple:
    q, k, v, out, visible, sinks = ctx.saved_tensors
    dout = torch.zeros_like(out) if dout is None else dout
    dq, dk, dv, dsinks = dense_backward(q, k, v, out, dout, dlse, visible, sinks, *ctx.constants)
    return dq, dk, dv, None, None if sinks is None else dsinks, None, None


dense_forward.register_autograd(_differentiate, setup_context=_save)
dense_backward.refuse_gradient()


def _grouped(x: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """Return `x [rows, heads, head_dim]` as `[rows, kv_heads, group, head_dim]`."""
    return x.unflatten(1, (k.shape[1], -1))


def _scores(
    q: torch.Tensor, k: torch.Tensor, visible: torch.Tensor, softmax_scale: float, softcap: float
) -> torch.Tensor:
    """Return the scores `[kv_heads, group, rows, keys]`, scaled and capped, -inf for keys that a row does not see."""
    scores = _product("tkgd,skd->kgts", _grouped(q, k), k) * softmax_scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    return scores.masked_fill(~visible, float("-inf"))


class _Softmax(NamedTuple):
    """The softmax of scores and sinks; the share of a row's sink is None without sinks."""

    probabilities: torch.Tensor  # [kv_heads, group, rows, keys], 0 for keys that a row does not see
    lse: torch.Tensor  # [kv_heads, group, rows]
    of_sinks: torch.Tensor | None  # [kv_heads, group, rows]


def _softmax(scores: torch.Tensor, visible: torch.Tensor, sinks: torch.Tensor | None) -> _Softmax:
    alone = ~visible.any(1)
    maximum = scores.amax(-1) if scores.shape[-1] else scores.new_zeros(scores.shape[:3])
    if sinks is not None:
        sinks = sinks.reshape(*scores.shape[:2], 1)
        maximum = torch.maximum(maximum, sinks)
    maximum = maximum.masked_fill(alone, 0.0)
    # Divided by their sum, the weights add up to 1 whatever the size of the scores: lse would round large ones.
    weights = torch.exp(scores - maximum[..., None])
    total = weights.sum(-1)
    of_sinks = None
    if sinks is not None:
        of_sinks = torch.exp(sinks - maximum)
        total = total + of_sinks
    total = total.masked_fill(alone, 1.0)
    probabilities = (weights / total[..., None]).masked_fill(~visible, 0.0)
    lse = (maximum + torch.log(total)).masked_fill(alone, float("-inf"))
    return _Softmax(probabilities, lse, None if of_sinks is None else of_sinks / total)


def _product(equation: str, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return the float32 `torch.einsum` of float32 tensors, multiplied in float64.

    Autocast and the settings for TF32 and bfloat16 products would change products of float32, and not of float64.
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
    """Return the NaN and infinities that elements of `x` add to visible sums; None if it surely has none.

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
