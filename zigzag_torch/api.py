"""The public calls: `zigzag_attention`, `zigzag_attention_gathered`, and `prepare_batch` for what layers share."""

from dataclasses import dataclass

import torch

from zigzag_kernels.problem import batch_shape, make_problem

from . import ops, reference
from .launch import choose_backend, target
from .shard import as_rank, check_batch, check_tensor


@dataclass(frozen=True)
class Batch:
    """What all layers of a step share: made by `prepare_batch`, accepted wherever `cu_seqlens` is."""

    cu_seqlens: torch.Tensor
    rank: torch.Tensor
    world_size: int
    segments: torch.Tensor | None
    sequences: torch.Tensor | None


def prepare_batch(
    cu_seqlens: torch.Tensor, rank: int | torch.Tensor = 0, world_size: int = 1, *, backend: str | None = None
) -> Batch:
    """Build the device tables of a batch once, for all layers and directions.

    `cu_seqlens [N + 1]` int32, global; `rank` an int or one integer on the same device. Raises as
    `zigzag_attention_gathered`. Nothing is copied to the host.
    """
    check_batch(cu_seqlens, rank, world_size)
    backend = choose_backend(backend, cu_seqlens.device)
    rank = as_rank(rank, cu_seqlens.device)
    tables = (None, None)
    if backend != "reference":
        tables = ops.segment_tables(cu_seqlens.contiguous(), rank, world_size, backend)
    return Batch(cu_seqlens, rank, world_size, *tables)


def zigzag_attention_gathered(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor | Batch,
    rank: int | torch.Tensor,
    world_size: int,
    *,
    causal: bool = True,
    softmax_scale: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """The work of one zigzag rank on K/V that are already gathered; differentiable, also through `lse`.

    Args:
        q: `[T, heads, head_dim]`, the zigzag rows of `rank`. float16, bfloat16 or float32; head_dim a multiple of 8
            from 16 to 256. Strided views are read in place; only the last dimension is made contiguous if it is not.
        k, v: `[world_size * T, kv_heads, head_dim]`, rank-major; heads is a multiple of kv_heads.
        cu_seqlens: `[N + 1]` int32 on the device of q, global; lengths are multiples of `2 * world_size` (any length
            if `world_size` is 1). Rows behind the last sequence are padding: output 0, lse -inf. Or the result of
            `prepare_batch` for the same rank and world_size.
        rank: an int, or one integer on the device of q.
        softmax_scale: positive; `1 / sqrt(head_dim)` if None.
        backend: "triton" (default on a GPU), "interpret", or "reference" (default elsewhere).

    Returns:
        out `[T, heads, head_dim]`; with `return_lse`, (out, lse `[heads, T]` float32, natural logarithm).
        Gradients of k and v are this rank's contribution, in their layout. Lengths or a rank that cannot be, where
        they are device data, give NaN everywhere: `validate` says what is wrong.

    Raises:
        ValueError: shapes, types, devices or numbers that do not fit, before anything is launched.
        RuntimeError: a GPU below compute capability 8.0, or a backend that this process cannot run.
    """
    for name, x in {"q": q, "k": k, "v": v}.items():
        check_tensor(name, x)
        if x.device != q.device:
            raise ValueError(f"{name}: expected the device of q, {q.device}, got {x.device}")
    backend = choose_backend(backend, q.device)
    if isinstance(cu_seqlens, Batch):
        batch = cu_seqlens
        if batch.world_size != world_size:
            raise ValueError(f"world_size: expected that of the prepared batch, {batch.world_size}, got {world_size}")
    else:
        check_batch(cu_seqlens, rank, world_size)
        batch = Batch(cu_seqlens, as_rank(rank, cu_seqlens.device), world_size, None, None)
    if batch.cu_seqlens.device != q.device:
        raise ValueError(f"cu_seqlens: expected the device of q, {q.device}, got {batch.cu_seqlens.device}")
    problem = make_problem(
        ops.describe(q),
        ops.describe(k),
        ops.describe(v),
        sequences=batch.cu_seqlens.shape[0] - 1,
        world_size=world_size,
        causal=causal,
        softmax_scale=softmax_scale,
        target=target(backend, q.device),
    )
    if backend == "reference":
        out, lse = reference.attention(
            q, k, v, batch.cu_seqlens, batch.rank, world_size, problem.causal, problem.softmax_scale
        )
    else:
        segments, sequences = batch.segments, batch.sequences
        if segments is None or sequences is None:
            segments, sequences = ops.segment_tables(batch.cu_seqlens.contiguous(), batch.rank, world_size, backend)
        q, k, v = (ops.last_dim_contiguous(x) for x in (q, k, v))
        out, lse = ops.attention_forward(
            q, k, v, segments, sequences, world_size, problem.causal, problem.softmax_scale, backend
        )
    return (out, lse) if return_lse else out


def zigzag_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor | Batch | None = None,
    *,
    group=None,
    causal: bool = True,
    softmax_scale: float | None = None,
    method: str = "allgather",
    heads_k_stride: int | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention over a packed batch on one device.

    Args:
        q, k, v: `[T, heads, head_dim]` with `cu_seqlens [N + 1]` int32 (one sequence if None), or
            `[batch, T, heads, head_dim]` with `cu_seqlens=None` for sequences of equal length.
        group: only None (one device) so far: `NotImplementedError` otherwise, as for a `method` other than
            "allgather" and any `heads_k_stride`, which have a meaning between ranks alone.

    Returns and raises as `zigzag_attention_gathered`; with `[batch, T, ...]` inputs, out has their shape and lse is
    `[batch, heads, T]`.
    """
    if group is not None:
        raise NotImplementedError("group: only None, one device, is supported so far")
    if method != "allgather" or heads_k_stride is not None:
        raise NotImplementedError("method, heads_k_stride: these need a group, which is not supported so far")
    for name, x in {"q": q, "k": k, "v": v}.items():
        check_tensor(name, x)
    batched = batch_shape(tuple(q.shape), tuple(k.shape), tuple(v.shape), cu_seqlens is not None)
    if batched:
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    size, length = batched or (1, q.shape[0])
    if cu_seqlens is None:
        cu_seqlens = torch.arange(size + 1, dtype=torch.int32, device=q.device) * length
    out, lse = zigzag_attention_gathered(
        q, k, v, cu_seqlens, 0, 1, causal=causal, softmax_scale=softmax_scale, return_lse=True, backend=backend
    )
    if batched:
        out = out.unflatten(0, (size, length))
        lse = lse.unflatten(1, (size, length)).transpose(0, 1)
    return (out, lse) if return_lse else out
