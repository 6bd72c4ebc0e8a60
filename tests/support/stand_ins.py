"""Modules that ring_flash_attn imports besides torch, replaced by dense computation on a CPU or by nothing."""

import sys
import types
from itertools import pairwise

import torch

from zigzag_torch import reference


def _flash_attn_varlen_forward(  # noqa: PLR0917  (stands in for a published name)
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
    window_size=(-1, -1), alibi_slopes=None, return_softmax=False,
):  # fmt: skip
    assert dropout_p == 0
    return (
        *reference.varlen_attention(q, k, v, cu_seqlens_q, cu_seqlens_k, reference.Mask(causal), softmax_scale),
        None,
        None,
    )


def _flash_attn_varlen_backward(  # noqa: PLR0917  (stands in for a published name)
    dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p,
    softmax_scale, causal, window_size=(-1, -1), alibi_slopes=None, deterministic=False,
):  # fmt: skip
    """Compute gradients from the given `out` and `softmax_lse`, which belong to all keys, not to these alone."""
    groups = q.shape[1] // k.shape[1]
    for q_range, k_range in zip(_ranges(cu_seqlens_q), _ranges(cu_seqlens_k), strict=True):
        qs, ks, vs = q[q_range].float(), *(x[k_range].float().repeat_interleave(groups, 1) for x in (k, v))
        mask = torch.ones(len(qs), len(ks), dtype=torch.bool).tril(len(ks) - len(qs)) if causal else torch.tensor(True)
        scores = torch.einsum("qhd,khd->hqk", qs, ks) * softmax_scale
        p = torch.where(mask, torch.exp(scores - softmax_lse[:, q_range, None]), 0)
        douts = dout[q_range].float()
        delta = (douts * out[q_range].float()).sum(-1).T
        ds = p * (torch.einsum("qhd,khd->hqk", douts, vs) - delta[..., None]) * softmax_scale
        dq[q_range] = torch.einsum("hqk,khd->qhd", ds, ks).to(dq.dtype)
        for into, x in ((dk, torch.einsum("hqk,qhd->khd", ds, qs)), (dv, torch.einsum("hqk,qhd->khd", p, douts))):
            into[k_range] = x.unflatten(1, (-1, groups)).sum(2).to(into.dtype)


def _ranges(cu_seqlens):
    return [slice(start, end) for start, end in pairwise(cu_seqlens.tolist())]


def _lengths(x):
    return torch.arange(x.shape[0] + 1, dtype=torch.int32) * x.shape[1]


def _flash_attn_forward(  # noqa: PLR0917  (stands in for a published name)
    q, k, v, dropout_p, softmax_scale, causal, window_size=(-1, -1), alibi_slopes=None, return_softmax=False
):  # fmt: skip
    packed = (x.flatten(0, 1) for x in (q, k, v))
    out, lse, *_ = _flash_attn_varlen_forward(
        *packed, _lengths(q), _lengths(k), q.shape[1], k.shape[1], dropout_p, softmax_scale, causal
    )
    return out.view_as(q), lse.unflatten(1, q.shape[:2]).transpose(0, 1), None, None


def _flash_attn_backward(  # noqa: PLR0917  (stands in for a published name)
    dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal, window_size=(-1, -1),
    alibi_slopes=None, deterministic=False,
):  # fmt: skip
    into = [torch.empty_like(x) for x in (q, k, v)]
    _flash_attn_varlen_backward(
        *(x.flatten(0, 1) for x in (dout, q, k, v, out)), softmax_lse.transpose(0, 1).flatten(1),
        *(x.flatten(0, 1) for x in into), _lengths(q), _lengths(k), q.shape[1], k.shape[1], dropout_p, softmax_scale,
        causal,
    )  # fmt: skip
    for given, x in zip((dq, dk, dv), into, strict=True):
        given.copy_(x)


def install():
    """Put them where `import` finds them, in this process."""
    interface = types.ModuleType("flash_attn.flash_attn_interface")
    functions = (
        _flash_attn_forward, _flash_attn_backward, _flash_attn_varlen_forward, _flash_attn_varlen_backward,
    )  # fmt: skip
    for function in functions:
        setattr(interface, function.__name__, function)
    utils = types.ModuleType("transformers.modeling_flash_attention_utils")
    utils.is_flash_attn_greater_or_equal_2_10 = lambda: True
    models = types.ModuleType("transformers.modeling_utils")
    models.ALL_ATTENTION_FUNCTIONS = {}
    modules = interface, utils, models
    for module in modules:
        package, _, name = module.__name__.partition(".")
        parent = sys.modules.setdefault(package, types.ModuleType(package))
        setattr(parent, name, module)
        sys.modules[module.__name__] = module
