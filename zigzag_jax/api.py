"""The public calls: `zigzag_attention` and `zigzag_attention_gathered`."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from zigzag_kernels import halo
from zigzag_kernels.batch_checks import check_padding_unseen, check_sharded
from zigzag_kernels.callspec import CallSpec, make_call_spec
from zigzag_kernels.checks import batch_shape, check_layout, check_method, check_world_size
from zigzag_kernels.modes import Backend, KVLayout, Layout, Method
from zigzag_kernels.problem import Problem, make_problem

from . import autograd, launch, placement, reference
from .arguments import Array, as_flag, as_sinks, check_array, dtype_name
from .axes import AxisName, largest_on, place_on
from .batch import (
    DOCUMENTS,
    Batch,
    Form,
    as_batch,
    check_rows_vary,
    check_varying,
    compare_if_untyped,
    marked,
    tables_of,
)
from .derivatives import reverse_mode_only
from .halos import check_documents
from .parallel import Inputs, Local, Transport, choose_transport
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
    window_size: tuple[int | None, int | None] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    sinks: Array | None = None,
    softmax_scale: float | None = None,
    return_lse: bool = False,
    return_max_logits: bool = False,
    backend: str | None = None,
    deterministic: bool = True,
    layout: str = "document",
) -> jax.Array | tuple[jax.Array, ...]:
    """Compute one rank's attention over K/V that are already gathered; differentiable, also through lse.

    Args:
        q: `[T, heads, head_dim]`, the rows of `rank` in zigzag order, in float16, bfloat16 or float32. head_dim is a
            multiple of 8 from 8 to 256.
        k, v: `[world_size * T, kv_heads, head_dim]` in the dtype of q, the rows of rank 0, then of rank 1, and so on.
            heads is a multiple of kv_heads.
        cu_seqlens: `[N + 1]` int32, the offsets of the sequences over all ranks. Lengths are multiples of
            `2 * world_size`, or any numbers if `world_size` is 1. Repeat the last offset to keep N fixed. Rows behind
            the last sequence are padding, with out 0 and lse -inf. Instead of the offsets, pass the result of
            `prepare_batch` for the same rank and world_size.
        rank: an int, or an array of one integer, which may be traced.
        world_size: number of ranks.
        causal: True lets a token attend to itself and the tokens before it, False to all tokens of its sequence.
        window_size: (left, right). A token attends to itself, to the `left` tokens before it and to the `right` tokens
            after it; -1 or None means no limit. A window of w tokens that ends with the token itself is (w - 1, 0). A
            causal mask ignores right.
        attention_chunk: c > 0 cuts each sequence into chunks of c tokens, and a token attends only to its own chunk.
        softcap: c > 0 bounds the scaled scores: each becomes `c * tanh(score / c)`.
        sinks: `[heads]` of a floating-point type, differentiable. The softmax of each row gets one more logit, which
            has no value vector, so that the weights of the keys add up to less than 1. lse includes the sink. A sink of
            -inf has no effect.
        softmax_scale: positive factor of the scores; None: `1 / sqrt(head_dim)`.
        return_lse: whether to return lse too, the log-sum-exp of each row's scores.
        return_max_logits: whether to return the largest score of each head too, after scale and softcap, without sinks.
        backend: "triton" (default on a GPU), "interpret", or "reference" (default elsewhere).
        deterministic: True gives bit-identical gradients for the same inputs. False allows a backward kernel whose
            order of summation varies: on a Hopper GPU with head_dim 40 to 128, unless sequences or windows are short,
            one kernel replaces two. The backward pass then takes up to 12 % less time at head_dim 128 and up to 18 % at
            64, and gains least on long sequences, where one kernel computes deterministic gradients too. One kernel
            needs at least 4 more bytes for each element of q while it runs (`docs/explain/hopper-kernels.md`).
        layout: "document" cuts each sequence into `2 * world_size` chunks, and a rank holds two of them. "row" cuts the
            packed row of `world_size * T` tokens as a whole, and sequences of any length lie anywhere in it.

    Returns:
        out `[T, heads, head_dim]`. If lse or max_logits are requested, a tuple of out and the requested results: lse
        `[heads, T]` float32, in natural logarithm, and max_logits `[heads]` float32. max_logits cover this rank's rows,
        have no gradient, and are -inf if no row attends to a key. Gradients of k, v and sinks are this rank's
        contribution to them. Invalid lengths or ranks produce NaN everywhere, because checking them would synchronise
        with the device; `validate` gives the reason.

    Raises:
        ValueError: shapes, dtypes or numbers that do not fit each other; nothing has been launched then.
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
        window_size=window_size,
        attention_chunk=attention_chunk,
        softcap=softcap,
        has_sinks=sinks is not None,
        return_max_logits=return_max_logits,
        layout=layout,
        has_lengths=_has_lengths(cu_seqlens),
    )
    batch = as_batch(
        cu_seqlens,
        rank,
        world_size,
        Method.ALLGATHER.value,
        _form(call, cu_seqlens, world_size, (1, q.shape[0] if q.ndim else 0)),
        q.shape[0] if q.ndim else None,
    )
    if batch.whole_tokens:
        raise ValueError("cu_seqlens: expected one part, got a batch of whole and split documents: zigzag_attention")
    check_padding_unseen(batch.padded, call.causal, call.has_lengths)
    problem = _make_problem(q, k, v, batch, call, KVLayout.GATHERED)
    q, k, v = (jnp.asarray(x) for x in (q, k, v))
    inputs = Inputs(q, k, v, None if sinks is None else as_sinks(sinks, problem.heads))
    results = _attend(Local(problem), inputs, batch, return_lse, by_default=backend is None)
    return _asked_for(*results)


@under_own_promotion
def zigzag_attention(
    q: Array,
    k: Array,
    v: Array,
    cu_seqlens: Array | Batch | None = None,
    *,
    axis_name: AxisName | None = None,
    causal: bool = True,
    window_size: tuple[int | None, int | None] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    sinks: Array | None = None,
    softmax_scale: float | None = None,
    method: str | None = None,
    heads_k_stride: int | None = None,
    return_lse: bool = False,
    return_max_logits: bool = False,
    backend: str | None = None,
    grad_reduce_dtype: jnp.dtype | str | None = None,
    deterministic: bool = True,
    layout: str = "document",
) -> jax.Array | tuple[jax.Array, ...]:
    """Compute attention over a packed batch, on one device or, inside `shard_map`, over the ranks of a mesh axis.

    Args:
        q, k, v: this rank's rows in zigzag order (see `shard`): q `[T, heads, head_dim]`, k and v
            `[T, kv_heads, head_dim]`. Sequences of equal length, with T rows each on every rank, may be
            `[batch, T, ...]` without `cu_seqlens`.
        cu_seqlens: `[N + 1]` int32, the offsets of the sequences over all ranks, the same on every rank: its spec is
            `P()`. None means one sequence, or one for each entry of a batch dimension. Instead of the offsets, pass the
            result of `prepare_batch`.
        axis_name: mesh axis, or axes, over which the rows are sharded; None: a single device has all rows.
        causal, window_size, attention_chunk, softcap, sinks, softmax_scale, return_lse, return_max_logits, backend: as
            in `zigzag_attention_gathered`. Every rank passes the same `sinks`: their spec is `P()`.
        method: the way in which K/V reach the ranks. "allgather" gathers K/V of all ranks, `heads_k_stride` KV heads at
            a time. "ring" passes K/V from rank to rank. "halo" passes the last rows of each chunk to the rank of the
            next chunk, for causal windows, `attention_chunk` and documents of a promised length; `prepare_batch` and
            `docs/reference/methods.md` say when it is possible. None means the method of the prepared batch; a call
            whose rows see farther than its halos uses "allgather" instead, and builds its own tables. Without a
            prepared batch, None means "halo" if the host knows that halos suffice and move less, and otherwise
            "allgather"; the host knows it without `cu_seqlens` and in the row layout. With one rank all methods are the
            same.
        heads_k_stride: number of KV heads that one all-gather brings, a divisor of kv_heads. None: chosen by size. The
            methods "ring" and "halo" check it too, but move all heads at once.
        grad_reduce_dtype: dtype in which dK and dV are summed over the ranks: float32 (None), or the dtype of q, which
            moves half as many bytes.
        deterministic: as in `zigzag_attention_gathered`; between ranks gradients are always deterministic.
        layout: as in `zigzag_attention_gathered`; for a prepared batch, the layout that it was prepared with. In the
            layout "row" q, k and v may be `[batch, T, ...]`: `cu_seqlens` then counts the tokens of `batch` packed
            rows, one after the other, and no sequence crosses the end of a row. `[T, ...]` is a single packed row,
            unless a prepared batch has several.

    Returns:
        out in the shape of q. If lse or max_logits are requested, a tuple of out and the requested results: lse
        `[heads, T]` or `[batch, heads, T]` float32, and max_logits `[heads]` float32 over the rows of all ranks,
        without gradient. Gradients of k and v are sums over all ranks. The gradient of sinks, like the gradient of any
        parameter that ranks share, is the sum over the ranks if the whole `shard_map` is differentiated, or inside it
        with `check_vma=True`; inside it with `check_vma=False` it is the gradient of this rank's rows. Invalid lengths
        produce NaN everywhere.

    Raises the errors of `zigzag_attention_gathered`.
    """
    for name, x in {"q": q, "k": k, "v": v}.items():
        check_array(name, x)
    return_lse = as_flag("return_lse", return_lse)
    check_layout(layout)
    by_default, backend = backend is None, launch.choose_backend(backend)
    place = _Place(axis_name, *((0, 1) if axis_name is None else place_on(axis_name)))
    equal_lengths = cu_seqlens is None
    batched = batch_shape(q.shape, k.shape, v.shape, not equal_lengths and layout != Layout.ROW)
    if batched:
        q, k, v = (x.reshape(x.shape[0] * x.shape[1], *x.shape[2:]) for x in (q, k, v))
    shape = batched or (1, q.shape[0])
    if method is None:
        mask, form = (causal, window_size, attention_chunk), None if equal_lengths else layout
        batch = cu_seqlens if isinstance(cu_seqlens, Batch) else None
        batch, method = halo.method_of_call(batch, mask, shape, form, place.world_size, heads_k_stride)
        cu_seqlens = cu_seqlens if batch is None else batch
    check_method(method)
    if cu_seqlens is None:
        layout, cu_seqlens = Layout.DOCUMENT, _equal_lengths(shape, place.world_size)
    call = make_call_spec(
        head_dim=_head_dim(q),
        backend=backend,
        causal=causal,
        softmax_scale=softmax_scale,
        method=method,
        heads_k_stride=heads_k_stride,
        grad_reduce_dtype=None if grad_reduce_dtype is None else dtype_name("grad_reduce_dtype", grad_reduce_dtype),
        deterministic=deterministic,
        window_size=window_size,
        attention_chunk=attention_chunk,
        softcap=softcap,
        has_sinks=sinks is not None,
        return_max_logits=return_max_logits,
        layout=layout,
        has_lengths=_has_lengths(cu_seqlens),
        whole_tokens=cu_seqlens.whole_tokens if isinstance(cu_seqlens, Batch) else 0,
        whole_documents=cu_seqlens.whole_documents if isinstance(cu_seqlens, Batch) else 0,
    )
    q, k, v = (jnp.asarray(x) for x in (q, k, v))
    call, batch = _batch_of_call(cu_seqlens, call, place, shape, (q, k, v), equal_lengths=equal_lengths)
    kv_layout = KVLayout.PEER if place.world_size > 1 else KVLayout.GATHERED
    problem = _make_problem(q, k, v, batch, call, kv_layout, packed_rows=batched[0] if batched else None)
    inputs = Inputs(q, k, v, None if sinks is None else as_sinks(sinks, problem.heads))
    check_rows_vary(axis_name, place.rank, q=q, k=k, v=v)
    transport = choose_transport(problem, axis_name)
    out, lse, largest = _attend(transport, inputs, batch, return_lse, by_default=by_default)
    if batched:
        out = out.reshape(*batched, *out.shape[1:])
        if lse is not None:
            lse = lse.reshape(lse.shape[0], *batched).swapaxes(0, 1)
    if largest is not None and axis_name is not None:
        largest = largest_on(axis_name, largest)
    return _asked_for(out, lse, largest)


def _asked_for(out: jax.Array, *others: jax.Array | None) -> jax.Array | tuple[jax.Array, ...]:
    """Return `out`, or a tuple of `out` and the other results that are not None."""
    results = out, *(x for x in others if x is not None)
    return results if len(results) > 1 else out


def _form(call: CallSpec, cu_seqlens: Array | Batch, world_size: int, shape: tuple[int, int]) -> Form:
    """Return the `Form` of a batch; `shape` is (packed rows, tokens of each on every rank)."""
    if call.layout != Layout.ROW:
        return DOCUMENTS
    if isinstance(cu_seqlens, Batch) or check_world_size(world_size) == 1:
        return Form(call.layout.value)
    rows, tokens = shape
    if tokens % 2:
        raise ValueError(f"q: expected an even number of local rows of each packed row, got {tokens}")
    return Form(call.layout.value, world_size * tokens, rows)


def _has_lengths(cu_seqlens: Array | Batch) -> bool:
    return isinstance(cu_seqlens, Batch) and cu_seqlens.lengths is not None


class _Place(NamedTuple):
    """The mesh axis of a call, the rank of the device on it, and the number of ranks."""

    axis_name: AxisName | None
    rank: int | jax.Array
    world_size: int


def _equal_lengths(shape: tuple[int, int], world_size: int) -> np.ndarray:
    """Return the offsets of sequences of equal length; `shape` is (sequences, rows of each on every rank)."""
    size, length = shape
    if world_size > 1 and length % 2:
        raise ValueError(f"q: expected an even number of tokens of a sequence on each rank, got {length}")
    return np.array([i * length * world_size for i in range(size + 1)], np.int32)


def _batch_of_call(
    cu_seqlens: Array | Batch,
    call: CallSpec,
    place: _Place,
    shape: tuple[int, int],
    qkv: tuple[jax.Array, ...],
    *,
    equal_lengths: bool,
) -> tuple[CallSpec, Batch]:
    """Return `call` with its halo, and the batch of a rank; `ValueError` unless both fit the rows `qkv`.

    `shape` is (sequences or packed rows, rows of each on this rank). `equal_lengths` says that the offsets follow from
    `shape`, so that ranks need not compare them.
    """
    axis_name, rank, world_size = place
    if isinstance(cu_seqlens, Batch) and cu_seqlens.world_size == world_size:
        check_varying(cu_seqlens, axis_name, *qkv)
    own_rank = rank
    if isinstance(cu_seqlens, Batch) and axis_name is not None and cu_seqlens.compared_by == axis_name:
        own_rank = cu_seqlens.rank  # a batch that was prepared on the mesh axis has the rank of the device
    form, tokens = _form(call, cu_seqlens, world_size, shape), math.prod(shape)
    batch = as_batch(cu_seqlens, own_rank, world_size, call.method.value, form, tokens)
    check_varying(batch, axis_name, *qkv)
    check_padding_unseen(batch.padded, call.causal, call.has_lengths)
    if call.method == Method.HALO and world_size > 1:
        call, batch = halo.with_halo(call, batch, tokens, world_size * shape[1] if equal_lengths else 0)
        if not (equal_lengths or isinstance(cu_seqlens, Batch)):
            check_documents(cu_seqlens, world_size, batch.row_length or None, call.halo)
    return call, batch if equal_lengths else compare_if_untyped(batch, axis_name, rank)


def _head_dim(q: Array) -> int:
    """Return head_dim, or 0 for a shape for which `make_problem` raises an error."""
    return q.shape[-1] if q.ndim else 0


def _make_problem(
    q: Array, k: Array, v: Array, batch: Batch, call: CallSpec, kv_layout: KVLayout, packed_rows: int | None = None
) -> Problem:
    """Return the problem of checked arrays; `packed_rows` is their batch dimension, None if they have none."""
    problem = make_problem(
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
    check_sharded(problem.tokens, batch.unsharded_rows, batch.world_size)
    if batch.tokens not in (0, problem.tokens):
        raise ValueError(f"q: expected the {batch.tokens} rows that a rank has in the plan, got {problem.tokens}")
    fits = problem.tokens * batch.world_size == batch.row_length * batch.rows and packed_rows in (None, batch.rows)
    if problem.row_layout and not fits:
        raise ValueError(
            f"q: expected {batch.row_length * batch.rows // batch.world_size} rows of each rank, as row_length and "
            f"rows of the prepared batch say, got {problem.tokens}"
            + (f" in {packed_rows} packed rows" if packed_rows else "")
        )
    return problem


def _attend(
    transport: Transport, inputs: Inputs, batch: Batch, return_lse: bool, *, by_default: bool
) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
    """Compute (out, lse, largest logits) with the backend of the call.

    `by_default` says that the caller named no backend. Results that the caller did not request are None.
    """
    backend = transport.problem.call.backend
    placement.check_one_device(backend, **inputs._asdict())
    batch = marked(batch, backend, by_default)
    given = reverse_mode_only(tuple(x for x in inputs if x is not None))
    q, k, v, sinks = given if len(given) > 3 else (*given, None)
    inputs = Inputs(q, k, v, sinks)
    if backend != Backend.REFERENCE:
        return autograd.attention(transport, inputs, tables_of(batch, backend), return_lse)
    out, lse, largest = reference.attention(transport, inputs, batch.packing)
    out, lse = checkpoint_name(out, "zigzag_out"), checkpoint_name(lse, "zigzag_lse")
    if largest is not None:
        largest = checkpoint_name(largest, "zigzag_max_logits")
    return out, lse if return_lse else None, largest
