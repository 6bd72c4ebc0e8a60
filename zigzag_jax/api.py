"""The public calls: `zigzag_attention`, `zigzag_attention_gathered`, and `prepare_batch` for what layers share."""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np

from zigzag_kernels.problem import batch_shape, make_problem

from . import launch, reference, vjp
from .shard import Array, as_rank, check_array, check_batch


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Batch:
    """What all layers of a step share: made by `prepare_batch`, accepted wherever `cu_seqlens` is. A pytree."""

    cu_seqlens: jax.Array
    rank: jax.Array
    world_size: int = field(metadata={"static": True})
    segments: jax.Array | None
    sequences: jax.Array | None


def prepare_batch(
    cu_seqlens: Array, rank: int | Array = 0, world_size: int = 1, *, backend: str | None = None
) -> Batch:
    """Build the device tables of a batch once, for all layers and directions.

    `cu_seqlens [N + 1]` int32, global; `rank` an int or an array of one, say `jax.lax.axis_index(...)` in `shard_map`.
    Both may be traced. Raises as `zigzag_attention_gathered`.
    """
    check_batch(cu_seqlens, rank, world_size)
    backend = launch.choose_backend(backend)
    cu_seqlens, rank = jnp.asarray(cu_seqlens), as_rank(rank)
    tables = (None, None) if backend == "reference" else vjp.segment_tables(cu_seqlens, rank, world_size, backend)
    return Batch(cu_seqlens, rank, world_size, *tables)


def zigzag_attention_gathered(
    q: Array,
    k: Array,
    v: Array,
    cu_seqlens: Array | Batch,
    rank: int | Array,
    world_size: int,
    *,
    causal: bool = True,
    softmax_scale: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """The work of one zigzag rank on K/V that are already gathered; differentiable, also through `lse`.

    Args:
        q: `[T, heads, head_dim]`, the zigzag rows of `rank`. float16, bfloat16 or float32; head_dim a multiple of 8
            from 16 to 256.
        k, v: `[world_size * T, kv_heads, head_dim]`, rank-major; heads is a multiple of kv_heads.
        cu_seqlens: `[N + 1]` int32, global; lengths are multiples of `2 * world_size` (any length if `world_size` is
            1). Repeat the last value to reach a fixed N. Rows behind the last sequence are padding: output 0, lse -inf.
            Or the result of `prepare_batch` for the same rank and world_size.
        rank: an int, or an array of one integer, which may be traced.
        softmax_scale: positive; `1 / sqrt(head_dim)` if None.
        backend: "triton" (default on a GPU), "interpret", or "reference" (default elsewhere).

    Returns:
        out `[T, heads, head_dim]`; with `return_lse`, (out, lse `[heads, T]` float32, natural logarithm).
        Gradients of k and v are this rank's contribution, in their layout. Lengths or a rank that cannot be, where
        they are device data, give NaN everywhere: `validate` says what is wrong.

    Raises:
        ValueError: shapes, types or numbers that do not fit, before anything is launched.
        RuntimeError: a GPU below compute capability 8.0, or a backend that this process cannot run.
    """
    for name, x in {"q": q, "k": k, "v": v}.items():
        check_array(name, x)
    backend = launch.choose_backend(backend)
    if isinstance(cu_seqlens, Batch):
        batch = cu_seqlens
        if batch.world_size != world_size:
            raise ValueError(f"world_size: expected that of the prepared batch, {batch.world_size}, got {world_size}")
    else:
        check_batch(cu_seqlens, rank, world_size)
        batch = Batch(jnp.asarray(cu_seqlens), as_rank(rank), world_size, None, None)
    problem = make_problem(
        _describe(q),
        _describe(k),
        _describe(v),
        sequences=batch.cu_seqlens.shape[0] - 1,
        world_size=world_size,
        causal=causal,
        softmax_scale=softmax_scale,
        target=launch.target(backend),
    )
    q, k, v = (jnp.asarray(x) for x in (q, k, v))
    if backend == "reference":
        out, lse = reference.attention(
            q, k, v, batch.cu_seqlens, batch.rank, world_size, problem.causal, problem.softmax_scale
        )
    else:
        segments, sequences = batch.segments, batch.sequences
        if segments is None or sequences is None:
            segments, sequences = vjp.segment_tables(batch.cu_seqlens, batch.rank, world_size, backend)
        out, lse = vjp.attention(problem, q, k, v, segments, sequences)
    return (out, lse) if return_lse else out


def zigzag_attention(
    q: Array,
    k: Array,
    v: Array,
    cu_seqlens: Array | Batch | None = None,
    *,
    axis_name: str | None = None,
    causal: bool = True,
    softmax_scale: float | None = None,
    method: str = "allgather",
    heads_k_stride: int | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Attention over a packed batch on one device.

    Args:
        q, k, v: `[T, heads, head_dim]` with `cu_seqlens [N + 1]` int32 (one sequence if None), or
            `[batch, T, heads, head_dim]` with `cu_seqlens=None` for sequences of equal length.
        axis_name: only None (one device) so far: `NotImplementedError` otherwise, as for a `method` other than
            "allgather" and any `heads_k_stride`, which have a meaning between ranks alone.

    Returns and raises as `zigzag_attention_gathered`; with `[batch, T, ...]` inputs, out has their shape and lse is
    `[batch, heads, T]`.
    """
    if axis_name is not None:
        raise NotImplementedError("axis_name: only None, one device, is supported so far")
    if method != "allgather" or heads_k_stride is not None:
        raise NotImplementedError("method, heads_k_stride: these need an axis_name, which is not supported so far")
    for name, x in {"q": q, "k": k, "v": v}.items():
        check_array(name, x)
    batched = batch_shape(q.shape, k.shape, v.shape, cu_seqlens is not None)
    if batched:
        q, k, v = (x.reshape(x.shape[0] * x.shape[1], *x.shape[2:]) for x in (q, k, v))
    size, length = batched or (1, q.shape[0])
    if cu_seqlens is None:
        cu_seqlens = np.array([i * length for i in range(size + 1)], np.int32)
    out, lse = zigzag_attention_gathered(
        q, k, v, cu_seqlens, 0, 1, causal=causal, softmax_scale=softmax_scale, return_lse=True, backend=backend
    )
    if batched:
        out = out.reshape(size, length, *out.shape[1:])
        lse = lse.reshape(lse.shape[0], size, length).swapaxes(0, 1)
    return (out, lse) if return_lse else out


def _describe(x: Array) -> tuple[tuple[int, ...], str, tuple[int, int]]:
    """(shape, dtype name, (token, head) strides): what `make_problem` takes; XLA hands kernels dense rows."""
    return x.shape, str(x.dtype), (x.shape[1] * x.shape[2], x.shape[2]) if x.ndim == 3 else (0, 0)
