"""Dense attention with a boolean mask `[rows, keys]`, as two operators in plain PyTorch, forward and backward."""

from typing import NamedTuple

import torch

from .dispatch import operator


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
    """Return float32 (out, lse, largest scores); a row sees a key where `visible [rows, keys]` is true.

    The largest scores have no gradient.
    """
    scores = _scores(q, k, visible, softmax_scale, softcap)
    softmax = _softmax(scores, visible, sinks)
    out = _mix_keys(softmax.probabilities, visible, v, signed=False).reshape(q.shape)
    of_row = q.shape[1], len(q)
    maxima = scores.amax(-1) if len(k) else scores.new_full(scores.shape[:3], float("-inf"))
    maxima = maxima.masked_fill(softmax.lse.isnan(), float("nan"))  # the kernels return NaN too, not infinity
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
    # The weights are divided by their sum, so that they add up to 1. With exp(score - lse) they might not, because lse
    # is rounded if scores are large.
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
    """Return the `torch.einsum` of float32 tensors as float32, computed in float64.

    Autocast, and the settings for TF32 and bfloat16 products, change products of float32 but not of float64.
    """
    if a.device.type == "mps":  # this device has no float64
        return torch.einsum(equation, a, b)
    return torch.einsum(equation, a.double(), b.double()).float()


def _mix_keys(weights: torch.Tensor, visible: torch.Tensor, x: torch.Tensor, signed: bool) -> torch.Tensor:
    """Return the sums `[rows, kv_heads, group, head_dim]` of the keys' `x [keys, kv_heads, head_dim]`."""
    nonfinite = _nonfinite_sums("ts,skd->tkd", visible, x, signed)
    mixed = _product("kgts,skd->tkgd", weights, _finite(x, nonfinite))
    return mixed if nonfinite is None else mixed + nonfinite[:, :, None]


def _mix_rows(weights: torch.Tensor, visible: torch.Tensor, x: torch.Tensor, signed: bool) -> torch.Tensor:
    """Return the sums `[keys, kv_heads, head_dim]` of the rows' `x [rows, kv_heads, group, head_dim]`."""
    nonfinite = _nonfinite_sums("ts,tkgd->skd", visible, x, signed)
    mixed = _product("kgts,tkgd->skd", weights, _finite(x, nonfinite))
    return mixed if nonfinite is None else mixed + nonfinite


def _finite(x: torch.Tensor, nonfinite: torch.Tensor | None) -> torch.Tensor:
    return x if nonfinite is None else x.masked_fill(~x.isfinite(), 0.0)


def _nonfinite_sums(equation: str, visible: torch.Tensor, x: torch.Tensor, signed: bool) -> torch.Tensor | None:
    """Return the NaN and infinities that elements of `x` add to visible sums; None if all are finite.

    A dense product would add them to all sums, because zero times NaN is NaN. If weights are `signed`, infinities
    become NaN too.
    """
    if x.device.type == "cpu" and x.isfinite().all():  # on other devices the host would have to wait for the result
        return None
    up, down = x.isnan() | x.isposinf(), x.isnan() | x.isneginf()
    if signed:
        up = down = up | down
    up, down = (torch.einsum(equation, visible.float(), kind.float()) > 0 for kind in (up, down))
    zero = torch.zeros((), dtype=x.dtype, device=x.device)
    return zero.masked_fill(up, float("inf")) + zero.masked_fill(down, float("-inf"))
