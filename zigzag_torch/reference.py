"""The backend "reference": the same attention in plain PyTorch, dense and differentiable, for machines without a GPU.

Memory is proportional to heads * T * W * T scores. Softmax is computed in float32, and products in float64 rounded to
float32, whatever the dtype of the inputs. NaN and infinities reach only the rows and keys that see them, as in the
kernels.
"""

import functools
from typing import NamedTuple

import torch

from zigzag_kernels.callspec import NO_WINDOW
from zigzag_kernels.checks import dtype_name
from zigzag_kernels.layout import is_invalid_batch
from zigzag_kernels.problem import Problem

from .arguments import check_device, check_tensor
from .dense import dense_backward, dense_forward
from .parallel import Local, Packing, Ring, Transport, TwoPart
from .parallel.collectives import all_gather, shift
from .shard import place_of_rows, sequence_of_rows


class Mask(NamedTuple):
    """The options that decide which keys of its document a row sees, with the meaning they have in `CallSpec`."""

    causal: bool
    window_size: tuple[int, int] = NO_WINDOW
    attention_chunk: int = 0


class Places(NamedTuple):
    """The places of rows or keys, `[rows]` int64: the document's number, or -1 for padding, and the position in it."""

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

    The arguments are as for the kernels. K/V move between ranks by the method of `transport`, except that method "halo"
    gathers all K/V; autograd moves the gradients back.
    """
    problem = transport.problem
    if isinstance(transport, TwoPart):
        return _attend_parts(transport, q, k, v, packing, sinks)
    attend = functools.partial(_attend, problem, packing)
    ranks = torch.arange(problem.world_size, device=q.device)
    if isinstance(transport, Local):
        return attend(q, k, v, sinks=sinks, ranks=ranks)
    reduce_dtype = getattr(torch, problem.call.grad_reduce_dtype)
    k, v = k.to(reduce_dtype), v.to(reduce_dtype)  # autograd moves gradients in the dtype in which k and v move
    if isinstance(transport, Ring):
        kv, partials = torch.cat((k, v), 1), []
        queries = q.float()  # one cast for all steps, so that autograd sums dQ of all steps in float32
        for step in range(problem.world_size):
            peer = (packing.rank - step) % problem.world_size
            # A sink counts once for each row: in the first step, in which every row that sees any key sees its own key.
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
    """Return `attention` of a batch of two parts: rows of whole documents, then of split documents."""
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
    """Return the results of the rows of one rank, which attend to the keys of `ranks`.

    Rows that see no key have out 0, lse -inf, and -inf as their largest score.
    """
    call, tokens = problem.call, q.shape[0]
    rows, keys = _places(packing, packing.rank, tokens), _places(packing, ranks[:, None], tokens)
    visible = see(Mask(call.causal, call.window_size, call.attention_chunk), rows, keys)

    # A factor, 1 or NaN, of the results, and of the inputs so that the gradients become NaN too.
    row_length = packing.row_length if packing.is_in_rows else None
    fault = is_invalid_batch(
        packing.cu_seqlens, packing.rank, packing.world_size, tokens, row_length, packing.lengths, packing.halo
    )
    poison = torch.where(fault, float("nan"), 1.0)
    q32, k32, v32 = (x.float() * poison for x in (q, k, v))
    sinks = None if sinks is None else sinks * poison
    out, lse, maxima = dense_forward(q32, k32, v32, visible, sinks, call.softmax_scale, call.softcap)
    return (out * poison).to(q.dtype), lse * poison, maxima * poison


def _places(packing: Packing, ranks: torch.Tensor, tokens: int) -> Places:
    """Return the `Places` of the rows of `ranks`, `[1]` or `[n, 1]`, one rank after the other."""
    row_length = packing.row_length if packing.is_in_rows else None
    places = place_of_rows(
        packing.cu_seqlens, ranks, packing.world_size, tokens, row_length=row_length, lengths=packing.lengths
    )
    return Places(*(x.reshape(-1) for x in places))


def see(mask: Mask, rows: Places, keys: Places) -> torch.Tensor:
    """Return `[rows, keys]`: whether each row sees each key."""
    row, key = rows.position[:, None], keys.position[None, :]
    # No operation is in place: under vmap, one operand may have a batch dimension that the other lacks.
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

    The mask is aligned so that the last row of each sequence has the position of the last key, as in FlashAttention-2.
    With `keys_behind [N]`, that many keys of each sequence lie behind the last row.
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


def merge_partials(out: torch.Tensor, lse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge attention to `n` disjoint parts of the keys into attention to all keys; differentiable.

    `out [n, T, heads, head_dim]` and `lse [n, heads, T]`, in natural logarithm, are the results of the parts. Returns
    out `[T, heads, head_dim]` in the dtype of the parts, and lse `[heads, T]` float32. A row that sees no key in a part
    must have lse -inf there; its out is ignored. Raises `ValueError` for other shapes or dtypes.
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
    # Zeros are masked, because the gradient of log(0) would be NaN. Products are elementwise, so that settings for
    # matrix products do not matter.
    weights = torch.exp(lse.masked_fill(unseen & blind, 0.0) - maximum).masked_fill(unseen, 0.0)
    total = weights.sum(0).masked_fill(blind, 1.0)
    out32 = out.float().masked_fill(unseen.transpose(1, 2)[..., None], 0.0)
    merged = ((weights / total).transpose(1, 2)[..., None] * out32).sum(0)
    return merged.to(out.dtype), (maximum + torch.log(total)).masked_fill(blind, float("-inf"))
