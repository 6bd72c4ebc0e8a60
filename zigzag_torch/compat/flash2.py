"""One packed attention call with its gradients, by PyTorch's FlashAttention-2 on a GPU, elsewhere by `reference`.

FlashAttention-2 (Dao, 2023) takes 16-bit tensors. Its causal mask is aligned so that the last row of each sequence sees
the last key; the mask of `reference.varlen_attention` is aligned in the same way.
"""

import contextlib
from typing import NamedTuple

import torch

from zigzag_kernels.callspec import NO_WINDOW

from .. import reference
from ..parallel import Residuals
from ..reference import Mask


class Lengths(NamedTuple):
    """Lengths of a packed call: `cu_seqlens [N + 1]` int32 of rows and of keys, and upper bounds of the lengths.

    `keys_behind [N]` is the number of keys of each sequence behind the position of its last row; None means 0.
    """

    cu_seqlens_q: torch.Tensor
    cu_seqlens_k: torch.Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    keys_behind: torch.Tensor | None = None


def is_flash(q: torch.Tensor, mask: Mask) -> bool:
    """Return whether FlashAttention-2 can compute this call: it has no window that ends behind the row itself."""
    return q.is_cuda and q.dtype in (torch.float16, torch.bfloat16) and (mask.causal or mask.window_size == NO_WINDOW)


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: Lengths, mask: Mask, softmax_scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (out `[rows, heads, head_dim]`, lse `[heads, rows]` float32); `k, v [keys, kv_heads, head_dim]`."""
    if not is_flash(q, mask):
        return reference.varlen_attention(q, k, v, *lengths[:2], mask, softmax_scale, lengths.keys_behind)
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, *_bounded(lengths), 0.0, mask.causal, False, scale=softmax_scale, **_window(mask)
    )
    return out, lse


def backward(
    residuals: Residuals,
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    lengths: Lengths,
    mask: Mask,
    softmax_scale: float,
    deterministic: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (dq, dk, dv) for the gradients of the results of `forward`; `dlse` None means zeros."""
    q, k, v, _, lse = residuals
    if not is_flash(q, mask):
        options = *lengths[:2], mask, softmax_scale, lengths.keys_behind
        dq, dk, dv = reference.varlen_gradients((q, k, v), (dout, dlse), *options)
        return dq, dk, dv
    with deterministic_algorithms(deterministic):
        dq, dk, dv = _flash_backward(residuals, dout, lengths, mask, softmax_scale)
        if dlse is None:
            return dq, dk, dv
        # The operator has no gradient of lse = log(sum(exp(scale * q k^T))). The derivative of lse by q is scale times
        # the mean key: attention with the keys as values. The derivative by k is the gradient of the values in that
        # attention, for a dout of scale * q.
        weights = softmax_scale * dlse.T[..., None]
        mean_key, _ = forward(q, k, k, lengths, mask, softmax_scale)
        dout = (weights * q).to(q.dtype)
        _, _, dk_of_lse = _flash_backward(Residuals(q, k, k, mean_key, lse), dout, lengths, mask, softmax_scale)
        return (dq + weights * mean_key).to(q.dtype), dk + dk_of_lse, dv


def _flash_backward(residuals: Residuals, dout, lengths: Lengths, mask: Mask, softmax_scale: float):
    random_state = torch.empty(2, dtype=torch.uint64, device=dout.device)  # unused, because there is no dropout
    unused = torch.empty(0, device=dout.device)
    return torch.ops.aten._flash_attention_backward(
        dout,
        *residuals,
        *_bounded(lengths),
        0.0,
        mask.causal,
        random_state,
        unused,
        scale=softmax_scale,
        **_window(mask),
    )


def _bounded(lengths: Lengths) -> tuple:
    """Return offsets and bounds, with at least 2 rows: the operator takes a bound of 1 as exactly one row."""
    return *lengths[:2], max(lengths.max_seqlen_q, 2), lengths.max_seqlen_k


def _window(mask: Mask) -> dict[str, int]:
    """Return the arguments of the operator for the window of the causal `mask`, if it has one."""
    left, _ = mask.window_size
    return {"window_size_left": left, "window_size_right": 0} if left >= 0 else {}


@contextlib.contextmanager
def deterministic_algorithms(wanted: bool):
    """Make PyTorch deterministic in this context, if `wanted`: its FlashAttention-2 then sums dQ in a fixed order."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    if wanted:
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
