"""The published zigzag llama3 functions, which use the fused kernels by default: see `flags`.

Rows are zigzag rows: every sequence has 2W chunks, and rank r holds chunk r, then chunk 2W - 1 - r.
"""

import torch
import torch.distributed as dist

from zigzag_kernels.callspec import make_call_spec
from zigzag_kernels.checks import check_flag, check_int, check_lengths, check_world_size
from zigzag_kernels.heuristics import choose_heads_k_stride
from zigzag_kernels.problem import make_problem

from ..api import zigzag_attention, zigzag_attention_gathered
from ..arguments import as_rank, cast_for_autocast, check_int32, check_tensor
from ..launch import describe
from ..parallel.agreement import agree_on_call, place_in, refuse_together, resolve
from ..parallel.collectives import common_rank
from . import grouped
from .checks import check_grouped, check_list, check_n_chunks, chunks_of, mask_of
from .verify import choose_path, fused_backend


def zigzag_llama3_flash_attn_varlen_func(  # noqa: PLR0917  (a published name)
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    heads_k_stride: int,
    local_k_slice: slice,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    group: dist.ProcessGroup | None = None,
    n_chunks: int = 2,
):
    """Compute attention of this rank's zigzag rows to the keys of all ranks of `group`.

    The result is differentiable, also through lse.

    Args:
        q: `[T, heads, head_dim]` of this rank. Inside `torch.autocast`, q, k and v are first cast to its dtype.
        k, v: `[T, kv_heads, head_dim]` of this rank.
        cu_seqlens_q: `[N + 1]` int32, the offsets of the sequences in q.
        cu_seqlens_k: `[N + 1]` int32, the offsets of the sequences over all ranks: W times `cu_seqlens_q`.
        max_seqlen_q, max_seqlen_k, local_k_slice: ignored, because they follow from the other arguments.
        heads_k_stride: number of KV heads that are gathered at a time; it divides kv_heads.
        dropout_p, alibi_slopes: not supported; other values than the defaults raise.
        softmax_scale: positive; `1 / sqrt(head_dim)` if None.
        causal: True lets a row see the keys of its sequence up to its own position, False all keys of its sequence.
        window_size: (left, right), keys on each side of a row, -1 for all, as in FlashAttention.
        deterministic: repeat the backward pass bit for bit, which the fused kernels always do.
        return_attn_probs: return (out, lse, None).
        group: None means the default process group, or a single device if there is none.
        n_chunks: number of groups into which the unfused path sorts the chunks; it does not change the result.

    Returns:
        out `[T, heads, head_dim]`, or (out, lse `[heads, T]` float32, None). If `cu_seqlens_q` and `cu_seqlens_k`
        contradict each other, the fused path returns NaN, because the host does not read them; the unfused path raises.

    Raises:
        NotImplementedError: `dropout_p` or `alibi_slopes` other than the defaults.
        ValueError: as `zigzag_attention_gathered`.
    """
    group = default_group(group)
    place = place_in(group)
    world_size = place.world_size
    try:
        mask = mask_of(causal, dropout_p, window_size, alibi_slopes)
        for name, x in {"q": q, "k": k, "v": v}.items():
            check_tensor(name, x)
        q, k, v = cast_for_autocast(q, k, v)
        deterministic = check_flag("deterministic", deterministic)
        return_attn_probs = check_flag("return_attn_probs", return_attn_probs)
        check_int32("cu_seqlens_q", cu_seqlens_q)
        check_int32("cu_seqlens_k", cu_seqlens_k)
        if cu_seqlens_k.shape != cu_seqlens_q.shape:
            raise ValueError(
                f"cu_seqlens_k: expected the shape of cu_seqlens_q, {tuple(cu_seqlens_q.shape)}, "
                f"got {tuple(cu_seqlens_k.shape)}"
            )
        problem = make_problem(
            describe(q),
            describe(k),
            describe(v),
            make_call_spec(
                head_dim=q.shape[-1] if q.ndim else 0,
                backend="reference",
                causal=mask.causal,
                window_size=mask.window_size,
                softmax_scale=softmax_scale,
                heads_k_stride=heads_k_stride,
            ),
            sequences=len(cu_seqlens_q) - 1,
            world_size=1,
            target="reference",
        )
        choose_heads_k_stride(heads_k_stride, problem)
        check_n_chunks(n_chunks, world_size)
    except (ValueError, NotImplementedError) as error:
        refuse_together(place, error)
        raise

    def fused_path(q, k, v):
        out, lse = zigzag_attention(
            q,
            k,
            v,
            agreed_cu_seqlens(cu_seqlens_q, cu_seqlens_k, world_size),
            group=group,
            causal=mask.causal,
            window_size=mask.window_size,
            softmax_scale=softmax_scale,
            heads_k_stride=heads_k_stride,
            return_lse=True,
            backend=fused_backend(q.device),
        )
        return out, lse

    def unfused_path(q, k, v):
        members = None if place.group_name is None else resolve(place.group_name)
        try:
            expected = [world_size * bound for bound in cu_seqlens_q.tolist()]
            if cu_seqlens_k.tolist() != expected:
                raise ValueError(
                    f"cu_seqlens_k: expected {world_size} times cu_seqlens_q, {expected}, got {cu_seqlens_k.tolist()}"
                )
            check_lengths(expected, world_size, world_size * len(q))
        except ValueError as error:
            refuse_together(place, error)
            raise
        if members is not None:
            agree_on_call(members, problem, method="unfused", backend="unfused")
            own_rank = as_rank(members.rank(), q.device)
            if int(common_rank(cu_seqlens_k, None, own_rank, members.group_name, "comparison of cu_seqlens_k")) < 0:
                raise ValueError("cu_seqlens_k: expected the same lengths on every rank of the group, got others")
        return grouped.varlen_attention(
            q,
            k,
            v,
            cu_seqlens_q,
            members,
            heads_k_stride=heads_k_stride,
            mask=mask,
            softmax_scale=problem.call.softmax_scale,
            deterministic=deterministic,
            n_chunks=n_chunks,
        )

    out, lse = choose_path(fused_path, unfused_path, {"q": q, "k": k, "v": v}, ("out", "lse"))
    return (out, lse, None) if return_attn_probs else out


def default_group(group):
    """Return `group`, the default process group if it is None, or None if there is neither."""
    if group is None and dist.is_available() and dist.is_initialized():
        return dist.group.WORLD
    return group


def agreed_cu_seqlens(cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor, world_size: int) -> torch.Tensor:
    """Return `cu_seqlens_k`, with all offsets -1, which gives NaN, unless they are W times `cu_seqlens_q`."""
    return torch.where((cu_seqlens_q * world_size == cu_seqlens_k).all(), cu_seqlens_k, -1)


def zigzag_llama3_flash_attn_varlen_kvpacked_func(  # noqa: PLR0917  (a published name)
    q: torch.Tensor,
    kv: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    heads_k_stride: int,
    local_k_slice: slice,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    group: dist.ProcessGroup | None = None,
    n_chunks: int = 2,
):
    """Call `zigzag_llama3_flash_attn_varlen_func` with k and v in one tensor `kv [T, 2, kv_heads, head_dim]`.

    All other arguments are the same: `q`, `cu_seqlens_q`, `cu_seqlens_k`, `max_seqlen_q`, `max_seqlen_k`,
    `heads_k_stride`, `local_k_slice`, `dropout_p`, `softmax_scale`, `causal`, `window_size`, `alibi_slopes`,
    `deterministic`, `return_attn_probs`, `group` and `n_chunks`. Results and errors are the same too.
    """
    k, v = _unpacked("kv", kv, 2)
    return zigzag_llama3_flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        heads_k_stride,
        local_k_slice,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        alibi_slopes,
        deterministic,
        return_attn_probs,
        group,
        n_chunks,
    )


def zigzag_llama3_flash_attn_varlen_qkvpacked_func(  # noqa: PLR0917  (a published name)
    qkv: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    heads_k_stride: int,
    local_k_slice: slice,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    group: dist.ProcessGroup | None = None,
    n_chunks: int = 2,
):
    """Call `zigzag_llama3_flash_attn_varlen_func` with q, k and v in one tensor `qkv [T, 3, heads, head_dim]`.

    All other arguments are the same: `cu_seqlens_q`, `cu_seqlens_k`, `max_seqlen_q`, `max_seqlen_k`,
    `heads_k_stride`, `local_k_slice`, `dropout_p`, `softmax_scale`, `causal`, `window_size`, `alibi_slopes`,
    `deterministic`, `return_attn_probs`, `group` and `n_chunks`. Results and errors are the same too.
    """
    q, k, v = _unpacked("qkv", qkv, 3)
    return zigzag_llama3_flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        heads_k_stride,
        local_k_slice,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        alibi_slopes,
        deterministic,
        return_attn_probs,
        group,
        n_chunks,
    )


def _unpacked(name: str, x: torch.Tensor, parts: int) -> tuple[torch.Tensor, ...]:
    """Return the parts of `x [T, parts, heads, head_dim]`, or raise `ValueError`."""
    check_tensor(name, x)
    if x.ndim != 4 or x.shape[1] != parts:
        raise ValueError(f"{name}: expected [T, {parts}, heads, head_dim], got shape {tuple(x.shape)}")
    return x.unbind(1)


def replace_grouped_attention_with_fused_triton_v2(  # noqa: PLR0917  (a published name)
    chunk_q_list: list[torch.Tensor],
    chunk_cu_seqlens_q_list: list[torch.Tensor],
    chunk_indices_list: list[torch.Tensor],
    kv_buffer: torch.Tensor,
    kv_slices: list[grouped.KVSlice],
    nheads: int,
    head_dim: int,
    softmax_scale: float | None,
    dropout_p: float,
    causal: bool,
    window_size: tuple[int, int],
    alibi_slopes: torch.Tensor | None,
    deterministic: bool,
    world_size: int,
    cu_seqlens_k: torch.Tensor,
    chunk_idx_0: int | None = None,
    chunk_idx_1: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, dict]:
    """Compute `execute_grouped_attention` in one launch that reads `kv_buffer` in place.

    Args:
        chunk_q_list, chunk_cu_seqlens_q_list, chunk_indices_list, kv_buffer, kv_slices, nheads, head_dim: the same.
        softmax_scale, dropout_p, causal, window_size, alibi_slopes, deterministic, world_size, cu_seqlens_k: the same.
        chunk_idx_0, chunk_idx_1: the chunks of the rank, r and 2W - 1 - r. None derives them from `kv_slices`, for code
            that replaces `execute_grouped_attention` by this function.

    Returns:
        As `execute_grouped_attention`.

    Raises:
        ValueError: chunks that no rank has, and as `zigzag_attention_gathered`.
        NotImplementedError: `dropout_p` or `alibi_slopes` other than 0 and None.
    """
    mask = mask_of(causal, dropout_p, window_size, alibi_slopes)
    world_size = check_world_size(world_size)
    if chunk_idx_0 is None or chunk_idx_1 is None:
        chunk_idx_0, chunk_idx_1 = chunks_of(kv_slices, world_size)
    chunk_idx_0 = check_int(
        "chunk_idx_0", chunk_idx_0, 0, world_size - 1, f"a rank's early chunk, 0 to {world_size - 1}"
    )
    late = 2 * world_size - 1 - chunk_idx_0
    check_int("chunk_idx_1", chunk_idx_1, late, late, f"2 * world_size - 1 - chunk_idx_0 = {late}")
    deterministic = check_flag("deterministic", deterministic)
    check_grouped(chunk_q_list, chunk_indices_list, kv_buffer, nheads, head_dim, world_size)
    check_list("chunk_cu_seqlens_q_list", chunk_cu_seqlens_q_list, len(chunk_q_list))
    check_list("kv_slices", kv_slices, len(chunk_q_list))
    check_int32("cu_seqlens_k", cu_seqlens_k)
    kv_buffer, *chunk_q_list = cast_for_autocast(kv_buffer, *chunk_q_list)

    def fused_path(kv_buffer, *chunk_q):
        k, v = kv_buffer
        rows = sum(map(len, chunk_q))
        out, lse = zigzag_attention_gathered(
            _InLocalOrder.apply(kv_buffer.shape[1] // world_size, chunk_indices_list, *chunk_q),
            k,
            v,
            cu_seqlens_k * world_size,
            chunk_idx_0,
            world_size,
            causal=mask.causal,
            window_size=mask.window_size,
            softmax_scale=softmax_scale,
            return_lse=True,
            backend=fused_backend(kv_buffer.device),
        )
        return out[:rows], lse[:, :rows]

    def unfused_path(kv_buffer, *chunk_q):
        out, lse, _ = grouped.execute_grouped_attention(
            list(chunk_q),
            chunk_cu_seqlens_q_list,
            chunk_indices_list,
            kv_buffer,
            kv_slices,
            nheads,
            head_dim,
            softmax_scale,
            dropout_p,
            causal,
            window_size,
            alibi_slopes,
            deterministic,
            world_size,
            cu_seqlens_k,
        )
        return out, lse

    inputs = {"kv_buffer": kv_buffer} | {f"chunk_q_list[{i}]": q for i, q in enumerate(chunk_q_list)}
    out, lse = choose_path(fused_path, unfused_path, inputs, ("out", "lse"))
    return out, lse, grouped.chunk_info(chunk_indices_list, chunk_cu_seqlens_q_list, kv_slices)


class _InLocalOrder(torch.autograd.Function):
    """Puts the rows of all groups `[rows, nheads, head_dim]` into local order, `[tokens, nheads, head_dim]`.

    The forward pass writes each row once, and the backward pass reads each row once. Rows that are in no group are
    padding, and zero.
    """

    @staticmethod
    def forward(tokens: int, indices: list[torch.Tensor], *groups: torch.Tensor) -> torch.Tensor:
        shape = tokens, *groups[0].shape[1:]
        local = groups[0].new_empty(shape) if sum(map(len, groups)) == tokens else groups[0].new_zeros(shape)
        for rows, group in zip(indices, groups, strict=True):
            local.index_copy_(0, rows, group)
        return local

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.indices = inputs[1]

    @staticmethod
    def backward(ctx, *gradients: torch.Tensor):
        (gradient,) = gradients
        return None, None, *(gradient.index_select(0, rows) for rows in ctx.indices)
