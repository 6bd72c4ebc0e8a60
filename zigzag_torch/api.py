"""The public calls: `zigzag_attention`, `zigzag_attention_gathered`, and `prepare_batch` for what layers share."""

from dataclasses import dataclass, replace

import torch

from zigzag_kernels.checks import METHODS, batch_shape, check_method, check_rank
from zigzag_kernels.heuristics import choose_heads_k_stride
from zigzag_kernels.problem import Problem

from . import ops, parallel, reference
from .agreement import describe_group, refuse, resolve
from .collectives import common_rank
from .launch import choose_backend
from .shard import as_rank, check_batch, check_device, check_tensor


@dataclass(frozen=True)
class Batch:
    """What all layers of a step share: made by `prepare_batch`, accepted wherever `cu_seqlens` is.

    `segments` and `sequences` are the tables for `method`, or None for the backend "reference". `group_name` is None
    unless the ranks of that group have compared their `cu_seqlens`.
    """

    cu_seqlens: torch.Tensor
    rank: torch.Tensor
    world_size: int
    segments: torch.Tensor | None
    sequences: torch.Tensor | None
    method: str = METHODS[0]
    group_name: str | None = None


def prepare_batch(
    cu_seqlens: torch.Tensor,
    rank: int | torch.Tensor | None = None,
    world_size: int | None = None,
    *,
    method: str = "allgather",
    group=None,
    backend: str | None = None,
) -> Batch:
    """Build the device tables of a batch once, for all layers and directions.

    Args:
        cu_seqlens: `[N + 1]` int32, global.
        rank, world_size: an int or one integer on the device of `cu_seqlens`, and an int; 0 and 1 if None, or those of
            the `group`.
        method: of the attention calls that the batch is for.
        group: of those calls. With it every rank of the group makes this call, and they compare their `cu_seqlens`, on
            the device: where they are not the same, attention becomes NaN on all ranks, and `validate` says why.

    Raises as `zigzag_attention`. The host does not wait for the device.
    """
    if group is None:
        rank, world_size = 0 if rank is None else rank, 1 if world_size is None else world_size
        check_method(method)
        check_batch(cu_seqlens, rank, world_size)
        backend = choose_backend(backend, cu_seqlens.device)
        rank = as_rank(rank, cu_seqlens.device)
        return _with_tables(Batch(cu_seqlens, rank, world_size, None, None, method), backend)
    name, group_rank, group_size = describe_group(group)
    try:
        check_method(method)
        check_batch(cu_seqlens, rank, group_size)
        if rank is not None and (isinstance(rank, torch.Tensor) or rank != group_rank):
            raise ValueError(f"rank: expected None or that in the group, {group_rank}, got {rank}")
        if world_size not in (None, group_size):
            raise ValueError(f"world_size: expected None or the size of the group, {group_size}, got {world_size}")
        backend = choose_backend(backend, cu_seqlens.device)
    except (ValueError, RuntimeError) as error:
        _refuse(name, error)
        raise
    common = common_rank(cu_seqlens, as_rank(group_rank, cu_seqlens.device), name)
    return _with_tables(Batch(cu_seqlens, common, group_size, None, None, method, name), backend)


def _with_tables(batch: Batch, backend: str) -> Batch:
    """`batch` with its tables, if `backend` needs any and they are not there yet."""
    if backend == "reference" or batch.segments is not None:
        return batch
    layout, cu_seqlens = parallel.KV_LAYOUT[batch.method], batch.cu_seqlens.contiguous()
    segments, sequences = ops.segment_tables(cu_seqlens, batch.rank, batch.world_size, layout, backend)
    return replace(batch, segments=segments, sequences=sequences)


def _refuse(group_name: str, error: Exception) -> None:
    """Tell the other ranks of an error; not while `torch.compile` traces: then they hear nothing, and time out."""
    if not torch.compiler.is_compiling():
        refuse(resolve(group_name), error)


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
    deterministic: bool = True,
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
        deterministic: the same inputs give the same gradients bit for bit. False allows other orders of summation, and
            does not promise them: on a Hopper GPU with head_dim above 64, unless sequences are short, one kernel then
            does the work of two. The backward pass of medium sequences takes 4 % less time, that of long ones as much
            as with two, and meanwhile 4 bytes more for each element of q (`docs/hopper.md`).

    Returns:
        out `[T, heads, head_dim]`; with `return_lse`, (out, lse `[heads, T]` float32, natural logarithm).
        Gradients of k and v are this rank's contribution, in their layout. Lengths or a rank that cannot be, where
        they are device data, give NaN everywhere: `validate` says what is wrong.

    Raises:
        ValueError: shapes, types, devices or numbers that do not fit, before anything is launched.
        RuntimeError: a GPU below compute capability 8.0, or a backend that this process cannot run.
    """
    backend, batch, problem = _check(
        q, k, v, cu_seqlens, rank, world_size, METHODS[0], "gathered", causal, softmax_scale, backend, deterministic
    )
    out, lse = _on_this_rank(q, k, v, batch, problem, backend)
    return (out, lse) if return_lse else out


def _on_this_rank(q, k, v, batch: Batch, problem: Problem, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse); k and v are here."""
    constants = batch.world_size, problem.call.causal, problem.call.softmax_scale
    if backend == "reference":
        return reference.attention(q, k, v, batch.cu_seqlens, batch.rank, *constants)
    batch = _with_tables(batch, backend)
    q, k, v = (ops.last_dim_contiguous(x) for x in (q, k, v))
    options = backend, "gathered", problem.call.deterministic
    return ops.attention(q, k, v, batch.segments, batch.sequences, *constants, *options)


def _check(
    q, k, v, cu_seqlens, rank, world_size: int, method: str, kv_layout: str, causal, softmax_scale, backend,
    deterministic,
) -> tuple[str, Batch, Problem]:  # fmt: skip
    """(backend, batch, problem) of a call, if there is nothing to say against it; a new batch has no tables yet."""
    for name, x in {"q": q, "k": k, "v": v}.items():
        check_tensor(name, x)
        check_device(name, x, "q", q)
    backend = choose_backend(backend, q.device)
    if isinstance(cu_seqlens, Batch):
        batch = cu_seqlens
        if batch.world_size != world_size:
            raise ValueError(f"world_size: expected that of the prepared batch, {batch.world_size}, got {world_size}")
        if batch.method != method and world_size > 1:
            raise ValueError(f"method: expected that of the prepared batch, {batch.method!r}, got {method!r}")
        check_rank(rank, world_size, isinstance(rank, torch.Tensor))
    else:
        check_batch(cu_seqlens, rank, world_size)
        batch = Batch(cu_seqlens, as_rank(rank, cu_seqlens.device), world_size, None, None, method)
    check_device("cu_seqlens", batch.cu_seqlens, "q", q)
    problem = ops.problem_of(
        q, k, v, batch.cu_seqlens, world_size, causal, softmax_scale, backend, kv_layout, deterministic
    )  # fmt: skip
    return backend, batch, problem


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
    grad_reduce_dtype: torch.dtype | None = None,
    deterministic: bool = True,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention over a packed batch, on one device or dealt out to the ranks of a group in zigzag order.

    Args:
        q, k, v: `[T, heads, head_dim]`, `[T, kv_heads, head_dim]`: the zigzag rows of this rank (see `shard`), with
            `cu_seqlens [N + 1]` int32, global (one sequence if None); or `[batch, T, ...]` with `cu_seqlens=None` for
            sequences of equal length, of which each rank has T rows. Types and head_dim as in
            `zigzag_attention_gathered`.
        cu_seqlens: or the result of `prepare_batch`, for the same method. Best prepared with the same group: what was
            not is compared between the ranks, and gets its tables, in every call.
        group: a torch.distributed process group or a 1-D DeviceMesh; every rank of it makes this call. None: one
            device that holds everything, to which method, heads_k_stride and grad_reduce_dtype mean nothing.
        method: "allgather" gathers K/V of a few heads at a time while the heads before them are attended: fast, and it
            holds two buffers of those heads for all ranks. "ring" passes K/V from rank to rank: memory does not grow
            with the number of ranks. The backward pass moves K/V again, and dK/dV the other way.
        heads_k_stride: KV heads that one all-gather brings, a divisor of theirs; chosen by size if None.
        grad_reduce_dtype: type in which dK/dV are summed over the ranks: float32 (None) or that of q.
        deterministic: as in `zigzag_attention_gathered`; between ranks the deterministic kernels always serve.

    Returns:
        out in the shape of q; with `return_lse`, (out, lse `[heads, T]` or `[batch, heads, T]` float32). Gradients of
        k and v are sums over all ranks.

    Raises:
        ValueError, RuntimeError: as `zigzag_attention_gathered`. With a group, ranks agree on all that the host knows
            the first time that they see it: if they differ, or one of them finds a fault, every rank raises the same
            ValueError. `RuntimeError` if another rank makes no such call in time (ZIGZAG_AGREEMENT_TIMEOUT, seconds).
            Values of `cu_seqlens` that differ, which the host does not look at, give NaN on every rank.
    """
    name, rank, world_size = (None, 0, 1) if group is None else describe_group(group)
    try:
        for argument, x in {"q": q, "k": k, "v": v}.items():
            check_tensor(argument, x)
        batched = batch_shape(tuple(q.shape), tuple(k.shape), tuple(v.shape), cu_seqlens is not None)
        if batched:
            q, k, v = (x.flatten(0, 1) for x in (q, k, v))
        size, tokens = batched or (1, q.shape[0])
        if cu_seqlens is None:
            if world_size > 1 and tokens % 2:
                raise ValueError(f"q: expected an even number of local rows of each sequence, got {tokens}")
            cu_seqlens = torch.arange(size + 1, dtype=torch.int32, device=q.device) * (world_size * tokens)
            cu_seqlens = Batch(cu_seqlens, as_rank(rank, q.device), world_size, None, None, method, name)
        check_method(method)
        backend, batch, problem = _check(
            q, k, v, cu_seqlens, rank, world_size, method, "peer", causal, softmax_scale, backend, deterministic
        )
        stride = choose_heads_k_stride(heads_k_stride, problem)
        reduce_dtype = torch.float32 if grad_reduce_dtype is None else grad_reduce_dtype
        if reduce_dtype not in (torch.float32, q.dtype):
            raise ValueError(
                f"grad_reduce_dtype: expected None, float32 or the dtype of q, {problem.dtype}, "
                f"got {grad_reduce_dtype!r}"
            )
    except (ValueError, RuntimeError) as error:
        if name is not None:
            _refuse(name, error)
        raise
    if name is None or world_size == 1:
        out, lse = _on_this_rank(q, k, v, batch, problem, backend)
    else:
        out, lse = _between_ranks(q, k, v, batch, problem, name, rank, method, stride, reduce_dtype, backend)
    if batched:
        out = out.unflatten(0, batched)
        lse = lse.unflatten(1, batched).transpose(0, 1)
    return (out, lse) if return_lse else out


def _between_ranks(q, k, v, batch: Batch, problem: Problem, name, rank: int, method, stride, reduce_dtype, backend):
    """(out, lse) of one rank of several, in the group called `name`."""
    reduce_name = str(reduce_dtype).removeprefix("torch.")
    constants = name, method, stride, problem.call.causal, problem.call.softmax_scale, reduce_name
    compared = batch.group_name == name
    if backend == "reference" or not compared:
        own_rank = batch.rank if compared else as_rank(rank, q.device)
        detached = (x.detach() for x in (q, k, v))
        own_rank = parallel.agreed_rank(own_rank, *detached, problem.sequences, *constants, backend)
        if not compared:
            own_rank = common_rank(batch.cu_seqlens, own_rank, name)
        batch = replace(batch, rank=own_rank, segments=None, sequences=None)
    if backend == "reference":
        return reference.parallel_attention(
            q, k, v, batch.cu_seqlens, batch.rank, batch.world_size, *constants[:-1], reduce_dtype
        )
    batch = _with_tables(batch, backend)
    q, k, v = (ops.last_dim_contiguous(x) for x in (q, k, v))
    return parallel.attention(q, k, v, batch.segments, batch.sequences, *constants, backend)
