"""One packed attention call with its gradients, by PyTorch's own FlashAttention-2 on a GPU, else by `reference`.

FlashAttention-2 (Dao, 2023) serves 16-bit tensors. Its causal mask is aligned to the last row and the last key of each
sequence, and so is the mask of `reference.varlen_attention`.
"""

import contextlib
from typing import NamedTuple

import torch

from .. import reference
from ..parallel import Residuals


class Lengths(NamedTuple):
    """Lengths of a packed call: `cu_seqlens [N + 1]` int32 of rows and of keys, and upper bounds of the lengths."""

    cu_seqlens_q: torch.Tensor
    cu_seqlens_k: torch.Tensor
    max_seqlen_q: int
    max_seqlen_k: int


def is_flash(q: torch.Tensor) -> bool:
    """Return whether FlashAttention-2 serves `q`."""
    return q.is_cuda and q.dtype in (torch.float16, torch.bfloat16)


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: Lengths, causal: bool, softmax_scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (out `[rows, heads, head_dim]`, lse `[heads, rows]` float32); `k, v [keys, kv_heads, head_dim]`."""
    if not is_flash(q):
        return reference.varlen_attention(q, k, v, *lengths[:2], reference.Mask(causal), softmax_scale)
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, *_bounded(lengths), 0.0, causal, False, scale=softmax_scale
    )
    return out, lse


def backward(
    residuals: Residuals,
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    lengths: Lengths,
    causal: bool,
    softmax_scale: float,
    deterministic: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (dq, dk, dv) for the gradients of the results of `forward`; `dlse` None means zeros."""
    q, k, v, _, lse = residuals
    if not is_flash(q):
        mask = reference.Mask(causal)
        dq, dk, dv = reference.varlen_gradients((q, k, v), (dout, dlse), *lengths[:2], mask, softmax_scale)
        return dq, dk, dv
    with deterministic_algorithms(deterministic):
        dq, dk, dv = _flash_backward(residuals, dout, lengths, causal, softmax_scale)
        if dlse is None:
            return dq, dk, dv
        # The operator has no gradient of lse = log(sum(exp(scale * q k^T))). The gradient of q is scale * (mean key).
        # That of k is the gradient of the values in an attention with the keys as values, whose dout is scale * q.
        weights = softmax_scale * dlse.T[..., None]
        mean_key, _ = forward(q, k, k, lengths, causal, softmax_scale)
        dout = (weights * q).to(q.dtype)
        _, _, dk_of_lse = _flash_backward(Residuals(q, k, k, mean_key, lse), dout, lengths, causal, softmax_scale)
        return (dq + weights * mean_key).to(q.dtype), dk + dk_of_lse, dv


def _flash_backward(residuals: Residuals, dout, lengths: Lengths, causal: bool, softmax_scale: float):
    random_state = torch.empty(2, dtype=torch.uint64, device=dout.device)  # of dropout, which there is not
    unused = torch.empty(0, device=dout.device)
    return torch.ops.aten._flash_attention_backward(
        dout, *residuals, *_bounded(lengths), 0.0, causal, random_state, unused, scale=softmax_scale
    )


def _bounded(lengths: Lengths) -> Lengths:
    """Return `lengths` with a bound of two rows at least: for a bound of one, the operator expects exactly one."""
    return lengths._replace(max_seqlen_q=max(lengths.max_seqlen_q, 2))


@contextlib.contextmanager
def deterministic_algorithms(wanted: bool):
    """Make all of PyTorch deterministic, if `wanted`: only then its FlashAttention-2 sums dQ in a fixed order."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    if wanted:
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
