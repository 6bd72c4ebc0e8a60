"""The public calls `zigzag_attention` and `zigzag_attention_gathered`."""

import dataclasses
import functools

import torch

from zigzag_kernels import halo
from zigzag_kernels.batch_checks import check_padding_unseen, check_sharded
from zigzag_kernels.callspec import NO_WINDOW, CallSpec, make_call_spec
from zigzag_kernels.checks import batch_shape, check_flag, check_layout, check_method, check_world_size
from zigzag_kernels.modes import Backend, KVLayout, Layout, Method

from . import launch, reference
from .arguments import as_rank, as_sinks, cast_for_autocast, check_device, check_tensor
from .autograd import agreed_rank, attention
from .batch import DOCUMENTS, Batch, Form, as_batch, tables_of
from .dispatch import refuse_tangents
from .halos import check_documents
from .parallel import Local, Moving, Transport, transport_of
from .parallel.agreement import Place, place_in, refuse_together
from .parallel.collectives import common_rank, largest_of_ranks

_UNPREPARED = "zigzag_attention without a batch prepared with this group"


def zigzag_attention_gathered(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor | Batch,
    rank: int | torch.Tensor,
    world_size: int,
    *,
    causal: bool = True,
    window_size: tuple[int, int] = NO_WINDOW,
    attention_chunk: int = 0,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    return_lse: bool = False,
    return_max_logits: bool = False,
    backend: str | None = None,
    deterministic: bool = True,
    layout: str = "document",
) -> torch.Tensor | tuple[torch.Tensor, ...]:
    """Compute the attention of one zigzag rank to gathered K/V; differentiable, also through `lse`.

    Args:
        q: `[T, heads, head_dim]`, the zigzag rows of `rank`, in float16, bfloat16 or float32. head_dim is a multiple of
            8 from 8 to 256. Kernels read strided views in place; q is copied only if its last dimension is not
            contiguous. Inside `torch.autocast`, q, k and v are first cast to the dtype of autocast.
        k, v: `[world_size * T, kv_heads, head_dim]`, the rows of rank 0, then of rank 1, and so on. heads is a multiple
            of kv_heads.
        cu_seqlens: `[N + 1]` int32 on the device of q, the offsets of the sequences over all ranks. Lengths are
            multiples of `2 * world_size`, or any numbers if `world_size` is 1. Rows behind the last sequence are
            padding, with output 0 and lse -inf. Instead of the offsets, pass the result of `prepare_batch` for the same
            rank and world_size.
        rank: an int, or a tensor of one integer on the device of q.
        causal: True lets a row see the keys of its sequence up to its own position, False all keys of its sequence.
        window_size: (left, right). The row at position p of its sequence sees the keys from p - left to p + right; -1
            means no limit. A window of w keys that ends with the row itself is (w - 1, 0). A causal mask ignores right.
        attention_chunk: length, in positions, of chunks of every sequence; a row sees only the keys of its own chunk. 0
            means no chunks.
        softcap: if positive, every scaled score becomes `softcap * tanh(score / softcap)`.
        sinks: `[heads]` of a floating-point type, differentiable. The softmax of each row gets one more logit, which
            has no value vector, so that the weights of the keys add up to less than 1. `lse` includes the sink. A sink
            of -inf has no effect.
        softmax_scale: positive; `1 / sqrt(head_dim)` if None.
        return_lse: also return lse, the logarithm of each row's sum of exponentials.
        return_max_logits: also return the largest score of each head, after scale and softcap, without sinks.
        backend: "triton" (default on a GPU), "interpret", or "reference" (default elsewhere).
        deterministic: True gives bit-identical gradients for the same inputs. False allows a backward kernel whose
            order of summation varies: on a Hopper GPU with head_dim 40 to 128, unless sequences or windows are short,
            one kernel replaces two. The backward pass then takes up to 12 % less time at head_dim 128 and up to 18 % at
            64, and gains least on long sequences, where one kernel computes deterministic gradients too. One kernel
            needs at least 4 more bytes for each element of q while it runs (`docs/explain/hopper-kernels.md`).
        layout: "document" cuts every sequence into `2 * world_size` chunks. "row" cuts the packed batch of
            `world_size * T` tokens as a whole, and sequences of any length lie anywhere in it. For a prepared batch,
            pass the layout that it was prepared with.

    Returns:
        out `[T, heads, head_dim]`. If lse or max_logits are requested, a tuple of out and the requested results: lse
        `[heads, T]` float32, in natural logarithm, and max_logits `[heads]` float32. max_logits cover this rank's rows,
        have no gradient, and are -inf if no row sees a key. The gradients of k, v and sinks have the layout of these
        arrays and are this rank's contribution to them. Invalid lengths or ranks on the device produce NaN everywhere,
        because checking them would synchronise with the GPU; `validate` gives the reason.

    Raises:
        ValueError: shapes, dtypes, devices or numbers that do not fit each other; nothing has been launched then.
        RuntimeError: a GPU below compute capability 8.0, or a backend that this process cannot run.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_tensor(name, x)
    backend = _choose_backend(q, k, v, backend)
    q, k, v = cast_for_autocast(q, k, v)
    form = DOCUMENTS if layout == Layout.DOCUMENT else _rows_form(cu_seqlens, layout, 1, q, world_size)
    batch = as_batch(cu_seqlens, rank, world_size, Method.ALLGATHER.value, q, form)
    if batch.whole_tokens:
        raise ValueError("cu_seqlens: expected one part, got a batch of whole and split documents: zigzag_attention")
    check_device("cu_seqlens", batch.cu_seqlens, "q", q)
    return_lse = check_flag("return_lse", return_lse)
    ranges = window_size, attention_chunk, softcap, sinks is not None, return_max_logits
    call = _call_spec(_head_dim(q), backend, batch, causal, softmax_scale, ranges, deterministic=deterministic)
    check_padding_unseen(batch.padded, call.causal, call.has_lengths)
    if batch.row_length or batch.tokens or batch.unsharded_rows:
        _check_rows(batch, q)
    q, k, v = _readable(q, k, v, backend)
    sequences = batch.cu_seqlens.shape[0] - 1
    transport = transport_of(q, k, v, call, sequences, batch.world_size, KVLayout.GATHERED, None)
    sinks = None if sinks is None else as_sinks(sinks, q)
    out, lse, max_logits = _attend(transport, q, k, v, sinks, batch)
    return _results(out, lse if return_lse else None, max_logits)


def zigzag_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor | Batch | None = None,
    *,
    group=None,
    causal: bool = True,
    window_size: tuple[int, int] = NO_WINDOW,
    attention_chunk: int = 0,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    method: str | None = None,
    heads_k_stride: int | None = None,
    return_lse: bool = False,
    return_max_logits: bool = False,
    backend: str | None = None,
    grad_reduce_dtype: torch.dtype | None = None,
    deterministic: bool = True,
    layout: str = "document",
) -> torch.Tensor | tuple[torch.Tensor, ...]:
    """Compute attention over a packed batch, on one device or over the ranks of a group, in zigzag order.

    The result is differentiable, also through `lse`. The backward pass moves K/V between ranks again, and moves dK/dV
    back to the ranks that own them.

    Args:
        q, k, v: the zigzag rows of this rank (see `shard`): q `[T, heads, head_dim]`, k and v
            `[T, kv_heads, head_dim]`. Sequences of equal length, with T rows each on every rank, may be
            `[batch, T, ...]` with `cu_seqlens=None`. In the row layout `[batch, T, ...]` are packed rows, and
            `cu_seqlens` counts the tokens of all packed rows. `[T, ...]` is there a single packed row, unless a
            prepared batch has several. Dtypes and head_dim are as in `zigzag_attention_gathered`.
        cu_seqlens: `[N + 1]` int32, the offsets of the sequences over all ranks; None means one sequence. Instead of
            the offsets, pass the result of `prepare_batch` for the same method and group. Without it, every call builds
            device tables, and ranks compare their offsets in every call.
        group: a torch.distributed process group or a 1-D DeviceMesh; every rank of it makes this call. None: single
            device; `method`, `heads_k_stride` and `grad_reduce_dtype` are ignored.
        causal, window_size, attention_chunk, softcap, sinks, softmax_scale, return_max_logits: as in
            `zigzag_attention_gathered`; every rank passes the same sinks.
        method: the way in which K/V reach the ranks. "allgather" gathers K/V of a few heads at a time while the GPU
            computes attention of the heads before them; it is fast, and holds two buffers of those heads for all ranks.
            "ring" passes K/V from rank to rank; its memory does not grow with the number of ranks. "halo" passes the
            last rows of each chunk to the rank of the next chunk, for causal windows, `attention_chunk` and documents
            of a promised length; `prepare_batch` and `docs/reference/methods.md` say when it is possible. None means
            the method of the prepared batch; a call whose rows see farther than its halos uses "allgather" instead, and
            builds its own tables. Without a prepared batch, None means "halo" if the host knows that halos suffice and
            move less, and otherwise "allgather"; the host knows it with `cu_seqlens=None` and in the row layout.
        heads_k_stride: number of KV heads that one all-gather brings, a divisor of kv_heads. None: chosen by size. The
            methods "ring" and "halo" check it too, but move all heads at once.
        return_lse, backend: as in `zigzag_attention_gathered`.
        grad_reduce_dtype: dtype in which dK/dV are summed over the ranks: float32 (also for None) or the dtype of q.
        deterministic: as in `zigzag_attention_gathered`; between ranks the kernels are always deterministic.
        layout: as in `zigzag_attention_gathered`. With `cu_seqlens=None` the call uses the document layout.

    Returns:
        out in the shape of q. If lse or max_logits are requested, a tuple of out and the requested results: lse
        `[heads, T]` or `[batch, heads, T]` float32, and max_logits `[heads]` float32 over the rows of all ranks. The
        gradients of k and v are sums over all ranks. The gradient of sinks is the sum over this rank's rows, like the
        gradient of any parameter.

    Raises:
        ValueError, RuntimeError: as `zigzag_attention_gathered`. With a group, ranks compare everything that their
            hosts know: with gloo in every call, with NCCL when they first see it. If ranks differ, or one of them finds
            a fault, every rank raises the same ValueError. If another rank does not make this call in time
            (ZIGZAG_AGREEMENT_TIMEOUT, in seconds), the error is a RuntimeError. The host does not read `cu_seqlens`: if
            ranks have different offsets, the results are NaN on every rank.
    """
    place = place_in(group)
    try:
        for name, x in (("q", q), ("k", k), ("v", v)):
            check_tensor(name, x)
        is_documents = layout == Layout.DOCUMENT or cu_seqlens is None
        batched = batch_shape(tuple(q.shape), tuple(k.shape), tuple(v.shape), cu_seqlens is not None and is_documents)
        if batched:
            q, k, v = (x.flatten(0, 1) for x in (q, k, v))
        equal_lengths = cu_seqlens is None
        if method is None:
            mask, shape = (causal, window_size, attention_chunk), batched or (1, q.shape[0] if q.ndim else 0)
            batch, form = cu_seqlens if isinstance(cu_seqlens, Batch) else None, None if equal_lengths else layout
            batch, method = halo.method_of_call(batch, mask, shape, form, place.world_size, heads_k_stride)
            cu_seqlens = cu_seqlens if batch is None else batch
        if cu_seqlens is None:
            check_layout(layout)
            cu_seqlens = _equal_lengths(q, *(batched or (1, q.shape[0])), place, method)
        check_method(method)
        backend = _choose_backend(q, k, v, backend)
        q, k, v = cast_for_autocast(q, k, v)
        rows = batched[0] if batched else 1
        form = DOCUMENTS if is_documents else _rows_form(cu_seqlens, layout, rows, q, place.world_size)
        batch = as_batch(cu_seqlens, place.rank, place.world_size, method, q, form)
        check_device("cu_seqlens", batch.cu_seqlens, "q", q)
        return_lse = check_flag("return_lse", return_lse)
        ranges = window_size, attention_chunk, softcap, sinks is not None, return_max_logits
        call = _call_spec(
            _head_dim(q), backend, batch, causal, softmax_scale, ranges, deterministic=deterministic, method=method,
            heads_k_stride=heads_k_stride, grad_reduce_dtype=grad_reduce_dtype,
        )  # fmt: skip
        check_padding_unseen(batch.padded, call.causal, call.has_lengths)
        if batch.row_length or batch.tokens or batch.unsharded_rows:
            _check_rows(batch, q)
        if batch.whole_tokens and batch.compared_by != place.group_name:
            raise ValueError("cu_seqlens: expected a batch of whole and split documents prepared with this group")
        q, k, v = _readable(q, k, v, backend)
        sequences = batch.cu_seqlens.shape[0] - 1
        if method == Method.HALO and place.world_size > 1:
            length = q.shape[0] // max(sequences, 1) * place.world_size if equal_lengths else 0
            call, batch = halo.with_halo(call, batch, q.shape[0] if q.ndim else 0, length)
            if not isinstance(cu_seqlens, Batch):
                check_documents(cu_seqlens, place.world_size, batch.row_length or None, call.halo)
        kv_layout = KVLayout.GATHERED if place.world_size == 1 else KVLayout.PEER
        transport = transport_of(q, k, v, call, sequences, place.world_size, kv_layout, place.group_name)
        sinks = None if sinks is None else as_sinks(sinks, q)
    except (ValueError, RuntimeError) as error:
        refuse_together(place, error)
        raise
    if not isinstance(transport, Local):
        batch = _compared(batch, place.rank, transport, q, k, v, equal_lengths=equal_lengths)
    out, lse, max_logits = _attend(transport, q, k, v, sinks, batch)
    if batched:
        out = out.unflatten(0, batched)
        lse = lse.unflatten(1, batched).transpose(0, 1)
    return _results(out, lse if return_lse else None, max_logits)


def _results(
    out: torch.Tensor, lse: torch.Tensor | None, max_logits: torch.Tensor | None
) -> torch.Tensor | tuple[torch.Tensor, ...]:
    """Return `out`, or a tuple of `out` and the other requested results."""
    if max_logits is None:
        return out if lse is None else (out, lse)
    return (out, max_logits) if lse is None else (out, lse, max_logits)


def _rows_form(cu_seqlens, layout: str, rows: int, q: torch.Tensor, world_size: int) -> Form:
    """Return the `Form` of a batch in the row layout; `q` holds its local tokens in `rows` packed rows."""
    layout = check_layout(layout).value
    if isinstance(cu_seqlens, Batch):
        return Form(layout)
    if check_world_size(world_size) == 1:
        return Form(layout)
    tokens = q.shape[0] // max(rows, 1) if q.ndim else 0
    if tokens % 2:
        raise ValueError(f"q: expected an even number of local rows of each packed row, got {tokens}")
    return Form(layout, world_size * tokens, rows)


def _check_rows(batch: Batch, q: torch.Tensor) -> None:
    """Raise `ValueError` unless q has as many rows as a rank has in `batch`, as far as the host knows."""
    tokens = q.shape[0] if q.ndim else 0
    check_sharded(tokens, batch.unsharded_rows, batch.world_size)
    if batch.tokens not in (0, tokens):
        raise ValueError(f"q: expected the {batch.tokens} rows that a rank has in the plan, got {tokens}")
    if batch.row_length and batch.row_length * batch.rows != batch.world_size * tokens:
        raise ValueError(
            f"q: expected {batch.row_length * batch.rows // batch.world_size} rows of each rank, as row_length and "
            f"rows of the prepared batch say, got {tokens}"
        )


def _equal_lengths(q: torch.Tensor, size: int, tokens: int, place: Place, method: str) -> Batch:
    """Return the batch of `size` sequences that have `tokens` rows each on every rank."""
    if place.world_size > 1 and tokens % 2:
        raise ValueError(f"q: expected an even number of local rows of each sequence, got {tokens}")
    cu_seqlens = torch.arange(size + 1, dtype=torch.int32, device=q.device) * (place.world_size * tokens)
    rank = as_rank(place.rank, q.device)
    return Batch(cu_seqlens, rank, place.world_size, method, compared_by=place.group_name, host_rank=place.rank)


def _choose_backend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, backend: str | None) -> str:
    """Return the backend for `q`, `k` and `v`; `ValueError` unless they are on one device."""
    check_device("k", k, "q", q)
    check_device("v", v, "q", q)
    return launch.choose_backend(backend, q.device)


def _head_dim(q: torch.Tensor) -> int:
    return q.shape[-1] if q.ndim else 0


def _readable(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, backend: str):
    """Return q, k and v with the last dimension contiguous, if kernels will read them."""
    if backend == Backend.REFERENCE:
        return q, k, v
    return launch.last_dim_contiguous(q), launch.last_dim_contiguous(k), launch.last_dim_contiguous(v)


def _call_spec(
    head_dim: int,
    backend: str,
    batch: Batch,
    causal: bool,
    softmax_scale: float | None,
    ranges: tuple,
    *,
    deterministic: bool,
    method: str = Method.ALLGATHER.value,
    heads_k_stride: int | None = None,
    grad_reduce_dtype: torch.dtype | None = None,
) -> CallSpec:
    """Return `make_call_spec` of these options, cached for all layers and steps with the same options.

    `ranges` are window_size, attention_chunk, softcap, has_sinks and return_max_logits.
    """
    reduce_name = None if grad_reduce_dtype is None else _dtype_name(grad_reduce_dtype)
    options = head_dim, backend, causal, softmax_scale, method, heads_k_stride, reduce_name, deterministic
    window_size = ranges[0]
    options = *options, *ranges, batch.layout, batch.lengths is not None, batch.whole_tokens, batch.whole_documents
    # torch.compile would trace the cache too, and warn about it.
    if type(window_size) is tuple and not torch.compiler.is_compiling():
        try:
            if window_size is NO_WINDOW:
                return _known_call_spec(*options)
            return _known_call_spec(*options, *map(type, window_size))
        except TypeError:  # an unhashable option is invalid; `_make_call_spec` raises an error that names it
            pass
    return _make_call_spec(*options)


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.") if isinstance(dtype, torch.dtype) else repr(dtype)


_OPTIONS = (
    "head_dim", "backend", "causal", "softmax_scale", "method", "heads_k_stride", "grad_reduce_dtype", "deterministic",
    "window_size", "attention_chunk", "softcap", "has_sinks", "return_max_logits", "layout", "has_lengths",
    "whole_tokens", "whole_documents",
)  # fmt: skip


def _make_call_spec(*values) -> CallSpec:
    """Return `make_call_spec` of the values of `_OPTIONS`; further values only distinguish keys of the cache."""
    return make_call_spec(**dict(zip(_OPTIONS, values, strict=False)))


# The cache is typed, because True equals 1.0 and would find its spec, but is an invalid option.
_known_call_spec = functools.lru_cache(maxsize=1024, typed=True)(_make_call_spec)


def _compared(batch: Batch, rank: int, transport: Moving, q, k, v, *, equal_lengths: bool) -> Batch:
    """Return `batch` after the ranks have compared their `cu_seqlens`, and the facts that no later step compares.

    Transports of the kernels compare the other facts of the call before they send anything; the reference does not, so
    it compares them here. The number of `equal_lengths` follows from the shape of q, so it too is compared here.
    """
    if batch.compared_by != transport.group_name:
        own_rank = as_rank(rank, q.device)
        form = Form(batch.layout, batch.row_length, batch.rows).in_words
        compared = transport.group_name, _UNPREPARED, batch.lengths, form
        own_rank = common_rank(batch.cu_seqlens, None, own_rank, *compared)
        batch = dataclasses.replace(batch, rank=own_rank, segments=None, sequences=None)
    if equal_lengths or transport.problem.call.backend == Backend.REFERENCE:
        own_rank = agreed_rank(transport, batch.rank, q, k, v, equal_lengths)
        batch = dataclasses.replace(batch, rank=own_rank, segments=None, sequences=None)
    return batch


def _attend(
    transport: Transport, q, k, v, sinks: torch.Tensor | None, batch: Batch
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Compute (out, lse, largest scores `[heads]` or None) with the backend of the call."""
    call = transport.problem.call
    if sinks is None:
        q, k, v = refuse_tangents(q, k, v)
    else:
        q, k, v, sinks = refuse_tangents(q, k, v, sinks)
    if call.backend == Backend.REFERENCE:
        out, lse, maxima = reference.attention(transport, q, k, v, batch.packing, sinks)
    else:
        out, lse = attention(transport, q, k, v, tables_of(batch, call.backend), sinks)
        maxima = lse
        if call.return_max_logits:
            lse, maxima = lse[0], lse[1]
    if not call.return_max_logits:
        return out, lse, None
    return out, lse, _largest(transport, maxima.detach())


def _largest(transport: Transport, maxima: torch.Tensor) -> torch.Tensor:
    """Return the largest of `maxima [heads, T]` for each head, over all ranks; -inf if there are no rows."""
    largest = maxima.amax(1) if maxima.shape[1] else maxima.new_full(maxima.shape[:1], float("-inf"))
    return largest if isinstance(transport, Local) else largest_of_ranks(largest, transport.group_name)
