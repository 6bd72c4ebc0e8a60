"""The public calls: `zigzag_attention`, `zigzag_attention_gathered`, and `prepare_batch` for what layers share."""

import dataclasses
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np

from zigzag_kernels.callspec import make_call_spec
from zigzag_kernels.checks import batch_shape, check_method
from zigzag_kernels.modes import KVLayout
from zigzag_kernels.problem import ArraySpec, Problem, make_problem

from . import launch, parallel, reference, vjp
from .parallel import AxisName
from .shard import Array, as_rank, check_array, check_batch


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Batch:
    """What all layers of a step share: made by `prepare_batch`, accepted wherever `cu_seqlens` is. A pytree."""

    cu_seqlens: jax.Array
    rank: jax.Array
    world_size: int = field(metadata={"static": True})
    method: str = field(metadata={"static": True})
    segments: jax.Array | None
    sequences: jax.Array | None


def prepare_batch(
    cu_seqlens: Array,
    rank: int | Array = 0,
    world_size: int = 1,
    *,
    axis_name: AxisName | None = None,
    method: str = "allgather",
    backend: str | None = None,
) -> Batch:
    """Build the device tables of a batch once, for all layers and directions.

    Args:
        cu_seqlens: `[N + 1]` int32, global; may be traced.
        rank: an int or an array of one integer, which may be traced.
        axis_name: of the attention calls, inside `shard_map`; it says rank and world_size. The ranks compare their
            `cu_seqlens`: where these differ, attention becomes NaN on all of them.
        method: of the attention calls.

    Raises as `zigzag_attention_gathered`.
    """
    check_method(method)
    if axis_name is not None:
        rank, world_size = parallel.place_on(axis_name)
    backend = launch.choose_backend(backend)
    batch = _as_batch(cu_seqlens, rank, world_size, method)
    _check_varying(batch, axis_name)
    if axis_name is not None:
        batch = dataclasses.replace(batch, cu_seqlens=parallel.agreed(batch.cu_seqlens, axis_name))
    if backend == "reference":
        return batch
    segments, sequences = _tables(batch, backend)
    return dataclasses.replace(batch, segments=segments, sequences=sequences)


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
    deterministic: bool = True,
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
        deterministic: the same inputs give the same gradients bit for bit. False allows other orders of summation, and
            does not promise them: on a Hopper GPU with head_dim above 64, unless sequences are short, one kernel then
            does the work of two. The backward pass of medium sequences takes 4 % less time, that of long ones as much
            as with two, and meanwhile 4 bytes more for each element of q (`docs/hopper.md`).

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
    batch = _as_batch(cu_seqlens, rank, world_size, "allgather")
    problem = _problem(q, k, v, batch, KVLayout.GATHERED, causal, softmax_scale, backend, deterministic)
    q, k, v = (jnp.asarray(x) for x in (q, k, v))
    out, lse = _attend(parallel.Local(problem), q, k, v, batch, backend, return_lse)
    return (out, lse) if return_lse else out


def zigzag_attention(
    q: Array,
    k: Array,
    v: Array,
    cu_seqlens: Array | Batch | None = None,
    *,
    axis_name: AxisName | None = None,
    causal: bool = True,
    softmax_scale: float | None = None,
    method: str = "allgather",
    heads_k_stride: int | None = None,
    return_lse: bool = False,
    backend: str | None = None,
    grad_reduce_dtype: jnp.dtype | str | None = None,
    deterministic: bool = True,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Attention over a packed batch, on one device or, inside `shard_map`, spread over those of a mesh axis.

    Args:
        q, k, v: this shard's zigzag rows, `[T, heads, head_dim]`, with `cu_seqlens [N + 1]` int32, global (one sequence
            if None), or `[batch, T, heads, head_dim]` with `cu_seqlens=None` for sequences of equal length.
        cu_seqlens: the same on every shard: its `in_specs` is `P()`. Or the result of `prepare_batch`.
        axis_name: the mesh axis, or axes, over which the sequences are spread; None: one device.
        method: "allgather" brings K/V of all ranks here, `heads_k_stride` KV heads at a time; "ring" passes K/V from
            rank to rank. With one rank there is nothing to move and both are the same.
        heads_k_stride: a divisor of kv_heads; None: the fewest that fill a GPU. The ring moves all heads.
        grad_reduce_dtype: in which dK and dV are summed over the ranks: float32 (None), or the dtype of q, which
            moves half as many bytes.
        deterministic: as in `zigzag_attention_gathered`; between ranks the deterministic kernels always serve.

    Returns and raises as `zigzag_attention_gathered`, but gradients of k and v are this shard's, summed over all ranks;
    with `[batch, T, ...]` inputs, out has their shape and lse is `[batch, heads, T]`.
    """
    for name, x in {"q": q, "k": k, "v": v}.items():
        check_array(name, x)
    check_method(method)
    backend = launch.choose_backend(backend)
    rank, world_size = (0, 1) if axis_name is None else parallel.place_on(axis_name)
    batched = batch_shape(q.shape, k.shape, v.shape, cu_seqlens is not None)
    if batched:
        q, k, v = (x.reshape(x.shape[0] * x.shape[1], *x.shape[2:]) for x in (q, k, v))
    size, length = batched or (1, q.shape[0])
    if cu_seqlens is None:
        if world_size > 1 and length % 2:
            raise ValueError(f"q: expected an even number of tokens of a sequence on each rank, got {length}")
        cu_seqlens = np.array([i * length * world_size for i in range(size + 1)], np.int32)
    batch = _as_batch(cu_seqlens, rank, world_size, method)
    q, k, v = (jnp.asarray(x) for x in (q, k, v))
    _check_varying(batch, axis_name, q, k, v)
    problem = _problem(q, k, v, batch, KVLayout.PEER, causal, softmax_scale, backend, deterministic)
    way = parallel.choose_way(problem, axis_name, method, heads_k_stride, grad_reduce_dtype)
    out, lse = _attend(way, q, k, v, batch, backend, return_lse)
    if batched:
        out = out.reshape(size, length, *out.shape[1:])
        if return_lse:
            lse = lse.reshape(lse.shape[0], size, length).swapaxes(0, 1)
    return (out, lse) if return_lse else out


def _as_batch(cu_seqlens: Array | Batch, rank: int | Array, world_size: int, method: str) -> Batch:
    """`cu_seqlens` as a batch, without tables if it is not one yet; `ValueError` if it is one for something else."""
    if not isinstance(cu_seqlens, Batch):
        check_batch(cu_seqlens, rank, world_size)
        return Batch(jnp.asarray(cu_seqlens), as_rank(rank), world_size, method, None, None)
    for name, wanted in {"world_size": world_size, "method": method}.items():
        prepared = getattr(cu_seqlens, name)
        if prepared != wanted:
            raise ValueError(f"{name}: expected that of the prepared batch, {prepared!r}, got {wanted!r}")
    check_batch(cu_seqlens.cu_seqlens, rank, world_size)
    return cu_seqlens


def _check_varying(batch: Batch, axis_name: AxisName | None, *arrays: jax.Array) -> None:
    """`ValueError` if the types of `shard_map` say that ranks differ in their lengths, or not in their number."""
    for axis in parallel.axis_names(axis_name):
        if axis in launch.varying_axes(batch.cu_seqlens):
            raise ValueError(
                f"cu_seqlens: expected the same on every rank of the mesh axis {axis!r}, got an array that varies "
                "along it; give the global one with P() in in_specs"
            )
        if axis in launch.varying_axes(*arrays) and axis not in launch.varying_axes(batch.rank):
            raise ValueError(
                f"rank: expected a batch prepared for the mesh axis {axis!r}, got the same rank everywhere along it; "
                "prepare_batch takes the axis_name"
            )


def _tables(batch: Batch, backend: str) -> tuple[jax.Array, jax.Array]:
    """(segments, sequences) of a batch; one prepared for the reference has none yet."""
    if batch.segments is not None and batch.sequences is not None:
        return batch.segments, batch.sequences
    return vjp.segment_tables(batch.cu_seqlens, batch.rank, batch.world_size, batch.method, backend)


def _problem(q, k, v, batch: Batch, kv_layout: KVLayout, causal, softmax_scale, backend: str, deterministic) -> Problem:
    return make_problem(
        _describe(q),
        _describe(k),
        _describe(v),
        make_call_spec(
            head_dim=q.shape[-1] if q.ndim else 0,
            backend=backend,
            causal=causal,
            softmax_scale=softmax_scale,
            method=batch.method,
            deterministic=deterministic,
        ),
        sequences=batch.cu_seqlens.shape[0] - 1,
        world_size=batch.world_size,
        target=launch.target(backend),
        gluon=launch.can_launch_gluon(backend),
        kv_layout=kv_layout,
    )


def _attend(way: parallel.Way, q, k, v, batch: Batch, backend: str, return_lse: bool) -> tuple:
    if backend == "reference":
        return reference.attention(way, q, k, v, batch.cu_seqlens, batch.rank)
    return vjp.attention(way, q, k, v, *_tables(batch, backend), return_lse)


def _describe(x: Array) -> ArraySpec:
    """Return what `make_problem` takes of `x`; XLA hands kernels dense rows."""
    return ArraySpec(x.shape, str(x.dtype), (x.shape[1] * x.shape[2], x.shape[2]) if x.ndim == 3 else (0, 0))
