"""The public calls: `zigzag_attention` and `zigzag_attention_gathered`."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from zigzag_kernels.callspec import CallSpec, make_call_spec
from zigzag_kernels.checks import batch_shape, check_method
from zigzag_kernels.modes import Backend, KVLayout, Method
from zigzag_kernels.problem import Problem, make_problem

from . import autograd, launch, placement, reference
from .arguments import Array, as_flag, check_array, check_unpadded, dtype_name
from .axes import AxisName, place_on
from .batch import Batch, as_batch, check_rows_vary, check_varying, compare_if_untyped, marked, tables_of
from .derivatives import reverse_mode_only
from .parallel import Local, Transport, choose_transport
from .surroundings import under_own_promotion


@under_own_promotion
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
    """Compute one rank's attention over K/V that are already gathered; differentiable, also through lse.

    Args:
        q: `[T, heads, head_dim]`, the rows of `rank` in zigzag order. float16, bfloat16 or float32; head_dim is a
            multiple of 8 from 8 to 256.
        k, v: `[world_size * T, kv_heads, head_dim]` in the dtype of q, the rows of rank 0, then those of rank 1, and so
            on; heads is a multiple of kv_heads.
        cu_seqlens: `[N + 1]` int32, offsets of the sequences in the whole batch. Lengths are multiples of
            `2 * world_size` (any length if `world_size` is 1). Repeat the last offset to keep N fixed. Rows behind the
            last sequence are padding: out 0, lse -inf. Or the result of `prepare_batch` for the same rank and
            world_size.
        rank: an int, or an array of one integer, which may be traced.
        world_size: number of ranks.
        causal: whether a token attends only to itself and to the tokens before it.
        softmax_scale: positive factor of the scores; None: `1 / sqrt(head_dim)`.
        return_lse: whether to return lse too, the log-sum-exp of each row's scores.
        backend: "triton" (default on a GPU), "interpret", or "reference" (default elsewhere).
        deterministic: whether the same inputs always give the same gradients bit for bit. False allows sums in any
            order: on a Hopper GPU with head_dim above 64, one kernel then replaces two unless sequences are short, and
            needs 4 more bytes of memory for each element of q (`docs/hopper.md` says what it gains).

    Returns:
        out `[T, heads, head_dim]`; with `return_lse`, (out, lse `[heads, T]` float32, natural logarithm). Gradients of
        k and v are this rank's contribution, in their layout. Invalid lengths or ranks produce NaN everywhere, because
        checking them would synchronise with the device: `validate` gives the reason.

    Raises:
        ValueError: shapes, dtypes or numbers that do not fit, before anything is launched.
        RuntimeError: a GPU below compute capability 8.0, or a backend that this process cannot run.
    """
    for name, x in {"q": q, "k": k, "v": v}.items():
        check_array(name, x)
    return_lse = as_flag("return_lse", return_lse)
    call = make_call_spec(
        head_dim=_head_dim(q),
        backend=launch.choose_backend(backend),
        causal=causal,
        softmax_scale=softmax_scale,
        deterministic=deterministic,
    )
    batch = as_batch(cu_seqlens, rank, world_size, Method.ALLGATHER.value)
    check_unpadded(batch.cu_seqlens, call.causal)
    problem = _make_problem(q, k, v, batch, call, KVLayout.GATHERED)
    q, k, v = (jnp.asarray(x) for x in (q, k, v))
    out, lse = _attend(Local(problem), q, k, v, batch, return_lse, by_default=backend is None)
    return (out, lse) if return_lse else out


@under_own_promotion
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
    """Compute attention over a packed batch, on one device or, inside `shard_map`, over the ranks of a mesh axis.

    Args:
        q, k, v: `[T, heads, head_dim]` and `[T, kv_heads, head_dim]`, this rank's rows in zigzag order (see `shard`),
            with `cu_seqlens`. Or `[batch, T, ...]` without: sequences of equal length, with T rows of each on every
            rank.
        cu_seqlens: `[N + 1]` int32, offsets of the sequences in the whole batch, the same on every rank: its spec is
            `P()`. None: one sequence, or those of a batch dimension. Or the result of `prepare_batch`.
        axis_name: mesh axis, or axes, over which the rows are sharded; None: one device holds them all.
        causal, softmax_scale, return_lse, backend: as in `zigzag_attention_gathered`.
        method: "allgather" gathers K/V of all ranks, `heads_k_stride` KV heads at a time; "ring" passes K/V from rank
            to rank. With one rank both are the same.
        heads_k_stride: a divisor of kv_heads; None: the smallest that fills a GPU. A ring moves all heads.
        grad_reduce_dtype: dtype in which dK and dV are summed over the ranks: float32 (None), or the dtype of q, which
            moves half as many bytes.
        deterministic: as in `zigzag_attention_gathered`; between ranks gradients are always deterministic.

    Returns:
        out in the shape of q; with `return_lse`, (out, lse `[heads, T]` or `[batch, heads, T]` float32). Gradients of k
        and v are those of this rank's rows, summed over all ranks. Invalid lengths produce NaN everywhere.

    Raises the errors of `zigzag_attention_gathered`.
    """
    for name, x in {"q": q, "k": k, "v": v}.items():
        check_array(name, x)
    return_lse = as_flag("return_lse", return_lse)
    check_method(method)
    by_default, backend = backend is None, launch.choose_backend(backend)
    rank, world_size = (0, 1) if axis_name is None else place_on(axis_name)
    batched = batch_shape(q.shape, k.shape, v.shape, cu_seqlens is not None)
    if batched:
        q, k, v = (x.reshape(x.shape[0] * x.shape[1], *x.shape[2:]) for x in (q, k, v))
    size, length = batched or (1, q.shape[0])
    given = cu_seqlens is not None
    if not given:
        if world_size > 1 and length % 2:
            raise ValueError(f"q: expected an even number of tokens of a sequence on each rank, got {length}")
        cu_seqlens = np.array([i * length * world_size for i in range(size + 1)], np.int32)
    call = make_call_spec(
        head_dim=_head_dim(q),
        backend=backend,
        causal=causal,
        softmax_scale=softmax_scale,
        method=method,
        heads_k_stride=heads_k_stride,
        grad_reduce_dtype=None if grad_reduce_dtype is None else dtype_name("grad_reduce_dtype", grad_reduce_dtype),
        deterministic=deterministic,
    )
    q, k, v = (jnp.asarray(x) for x in (q, k, v))
    if isinstance(cu_seqlens, Batch) and cu_seqlens.world_size == world_size:
        check_varying(cu_seqlens, axis_name, q, k, v)
    batch = _batch_on(cu_seqlens, rank, world_size, method, axis_name)
    check_varying(batch, axis_name, q, k, v)
    check_unpadded(batch.cu_seqlens, call.causal)
    if given:
        batch = compare_if_untyped(batch, axis_name, rank)
    kv_layout = KVLayout.PEER if world_size > 1 else KVLayout.GATHERED
    problem = _make_problem(q, k, v, batch, call, kv_layout)
    check_rows_vary(axis_name, rank, q=q, k=k, v=v)
    out, lse = _attend(choose_transport(problem, axis_name), q, k, v, batch, return_lse, by_default=by_default)
    if batched:
        out = out.reshape(size, length, *out.shape[1:])
        if return_lse:
            lse = lse.reshape(lse.shape[0], size, length).swapaxes(0, 1)
    return (out, lse) if return_lse else out


def _batch_on(cu_seqlens: Array | Batch, rank: int | Array, world_size: int, method: str, axis_name) -> Batch:
    """Return `as_batch` of the arguments; a batch that was prepared on the mesh axis has the rank of each device."""
    if isinstance(cu_seqlens, Batch) and axis_name is not None and cu_seqlens.compared_by == axis_name:
        rank = cu_seqlens.rank
    return as_batch(cu_seqlens, rank, world_size, method)


def _head_dim(q: Array) -> int:
    """Return head_dim, or 0 for a shape that `make_problem` refuses."""
    return q.shape[-1] if q.ndim else 0


def _make_problem(q: Array, k: Array, v: Array, batch: Batch, call: CallSpec, kv_layout: KVLayout) -> Problem:
    return make_problem(
        launch.describe(q),
        launch.describe(k),
        launch.describe(v),
        call,
        sequences=batch.cu_seqlens.shape[0] - 1,
        world_size=batch.world_size,
        target=launch.target(call.backend),
        gluon=launch.can_launch_gluon(call.backend),
        kv_layout=kv_layout,
    )


def _attend(transport: Transport, q, k, v, batch: Batch, return_lse: bool, *, by_default: bool) -> tuple:
    """Return (out, lse) by the backend of the call, which is `by_default` if the caller named none."""
    backend = transport.problem.call.backend
    placement.check_one_device(backend, q=q, k=k, v=v)
    batch = marked(batch, backend, by_default)
    q, k, v = reverse_mode_only((q, k, v))
    if backend == Backend.REFERENCE:
        out, lse = reference.attention(transport, q, k, v, batch.cu_seqlens, batch.rank)
        return checkpoint_name(out, "zigzag_out"), checkpoint_name(lse, "zigzag_lse")
    return autograd.attention(transport, q, k, v, tables_of(batch, backend), return_lse)
