"""Attention between ranks: how K/V, and in the backward pass dK/dV, move while the kernels compute.

Each direction is one operator, so that `torch.compile` keeps the order of launches and transfers that is written here.
Streams of the device wait for each other and for transfers; the host does not.

"allgather" brings a window of KV heads from all ranks at a time, into one of two buffers, while the window before it is
attended. Kernels of different windows do not depend on each other, nor that of dQ on that of dK/dV, so they take turns
on two streams: a window has few programs, and the first of the next kernel start beside the last of the one before.

"ring" passes K/V of all heads from rank to rank: at step `s` a rank holds those of rank `(rank - s) % W`. No step is
left out: under a causal mask too, the late chunk of an earlier rank sees keys of every later one, and what cannot
contribute costs programs that leave at once. A step adds to what the one before left, so they follow each other.
"""

from collections.abc import Iterator

import torch

from zigzag_kernels.callspec import make_call_spec
from zigzag_kernels.modes import Method
from zigzag_kernels.problem import ArraySpec, Problem, make_problem

from . import launch
from .agreement import agree, resolve
from .collectives import exchange, gather_into, reduce_into, wait
from .ops import describe, differentiable, last_dim_contiguous, operator
from .streams import Streams, on, streams_of

KV_LAYOUT = {method.value: method.kv_layout.value for method in Method}  # of the tables that a method needs


def _problem(q, k, sequences, world_size, method, heads_k_stride, causal, softmax_scale, backend, *others) -> Problem:
    """Of K/V as `windows` or `_ring` deliver them; the kernels read `others` too."""
    tokens, kv_heads, head_dim = k.shape
    ranks, window = (world_size, heads_k_stride) if method == "allgather" else (1, kv_heads)
    kv = ArraySpec((ranks * tokens, window, head_dim), describe(k).dtype, (2 * window * head_dim, head_dim))
    return make_problem(
        describe(q),
        kv,
        kv,
        make_call_spec(head_dim=head_dim, backend=backend, causal=causal, softmax_scale=softmax_scale, method=method),
        sequences=sequences.shape[-2] - 1,
        world_size=world_size,
        target=launch.target(backend, q.device),
        kv_layout=Method(method).kv_layout,
        kv_heads=kv_heads,
        gluon=launch.can_launch_gluon(backend, *others),  # the buffers are ours, and aligned
    )


def windows(
    k, v, heads_k_stride, group, streams: Streams, readers: tuple[tuple, tuple] | None = None
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """(first KV head, k, v `[W * T, heads_k_stride, head_dim]`) of all ranks; the next window is then on its way.

    What this rank sends is in its own slot of the buffer that it receives into. `readers` are the streams that even and
    that odd windows are for, `current` and `side` both if None. They have waited for all that `transfers` was given
    before the window is there, and not for each other.
    """
    tokens, kv_heads, head_dim = k.shape
    first_heads = range(0, kv_heads, heads_k_stride)
    shape = group.size() * tokens, 2 * heads_k_stride, head_dim
    buffers = [k.new_empty(shape) for _ in first_heads[:2]]
    current, side, transfers = streams
    readers = readers or ((current, side), (current, side))

    def gather(index) -> None:
        # Begins when the kernels of the windows so far are done, the last of which read this buffer.
        for stream in readers[index % 2]:
            transfers.wait_stream(stream)
        heads = slice(first_heads[index], first_heads[index] + heads_k_stride)
        own = own_slot(buffers[index % 2], group)
        with on(transfers):
            torch.cat((k[:, heads], v[:, heads]), 1, out=own)
            gather_into(buffers[index % 2], own, group=group)

    side.wait_stream(current)  # before any waits for it: while a graph is captured, it is a part of that only then
    try:
        gather(0)
        for index, first_head in enumerate(first_heads):
            for stream in readers[index % 2]:
                stream.wait_stream(transfers)
            if index + 1 < len(first_heads):
                gather(index + 1)
            k_window, v_window = buffers[index % 2].split(heads_k_stride, 1)
            yield first_head, k_window, v_window
    finally:
        # What was allocated on `current` or `side` is freed after this, and can be used again there: nothing records a
        # stream. `current` is the last to wait, as it has to be for the end of a captured graph.
        side.wait_stream(current)
        for stream in (side, transfers):
            current.wait_stream(stream)


def own_slot(buffer: torch.Tensor, group) -> torch.Tensor:
    """`[T, ...]`: this rank's rows of `buffer [W * T, ...]`, rank-major."""
    return buffer.chunk(group.size())[group.rank()]


def _ring(k, v, group) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """(step, k, v `[T, kv_heads, head_dim]`) of rank `(rank - step) % W`; the next step's are then on their way."""
    here = torch.cat((k, v), 1)
    there = torch.empty_like(here)
    for step in range(group.size()):
        works = exchange(here, there, group) if step + 1 < group.size() else []
        k_peer, v_peer = here.split(k.shape[1], 1)
        yield step, k_peer, v_peer
        wait(works)
        here, there = there, here


def _forward_allgather(problem: Problem, q, k, v, segments, heads_k_stride, group) -> tuple:
    from zigzag_kernels import plan

    results, streams = (None, None), streams_of(k.device)
    readers = (streams.current,), (streams.side,)
    for index, (first_head, k_window, v_window) in enumerate(windows(k, v, heads_k_stride, group, streams, readers)):
        part = plan.Part(first_head)
        # The first allocates the results: on the stream that they are returned to.
        with on(*readers[index % 2]):
            results = plan.forward(launch.run, problem, q, k_window, v_window, segments, part=part, into=results)
    return results


def _forward_ring(problem: Problem, q, k, v, segments, group) -> tuple:
    from zigzag_kernels import plan

    out, lse = None, None
    for step, k_peer, v_peer in _ring(k, v, group):
        part = plan.Part(accumulate=step > 0, dtype="float32")
        out, lse = plan.forward(launch.run, problem, q, k_peer, v_peer, segments[step], part=part, into=(out, lse))
    assert out is not None
    return out.to(q.dtype), lse


def _backward_allgather(
    problem: Problem, q, k, v, out, lse, dout, dlse, segments, sequences, reduce_dtype, group, heads_k_stride, **strides
) -> tuple:
    """dq, and [dk and dv `[2, T, heads_k_stride, head_dim]`] of the windows, the last in `reduce_dtype`.

    All heads are put together when the buffers here are free: with what the kernels need of their rows, they are the
    most memory that a step takes beside its results.
    """
    from zigzag_kernels import plan

    tokens, kv_heads, head_dim = k.shape
    contribution = k.new_empty(
        (2, group.size() * tokens, heads_k_stride, head_dim), dtype=getattr(torch, reduce_dtype)
    )  # fmt: skip
    sums = contribution.chunk(group.size(), 1)[group.rank()]  # come to where this rank's part of them was
    dq, dkv = None, []
    rows = []  # of this window and the one before
    current, side, transfers = streams = streams_of(k.device)
    for first_head, k_window, v_window in windows(k, v, heads_k_stride, group, streams):
        part, summed = plan.Part(first_head), plan.Part(first_head, dtype=reduce_dtype)
        # What is launched on `side` may use the memory that is freed here: it has waited for dQ of two windows ago, but
        # not for that of the one before.
        del rows[:-1]
        with on(side):
            rows.append(plan.backward_rows(launch.run, problem, out, lse, dout, dlse, part=part, **strides))
        arguments = launch.run, problem, q, k_window, v_window, dout, rows[-1]
        # For the rows, and so that dQ is not before dK/dV, whose sums travel meanwhile.
        current.wait_stream(side)
        with on(side):
            plan.backward_keys(*arguments, sequences, part=summed, into=tuple(contribution), **strides)
        dq = plan.backward_queries(*arguments, segments, part=part, into=dq, **strides)
        transfers.wait_stream(side)
        with on(transfers):
            for total, x in zip(sums, contribution, strict=True):
                reduce_into(total, x, group=group)
            # Memory of `transfers`, which waits for the others before it uses that again.
            if first_head + heads_k_stride < kv_heads:
                dkv.append(sums.to(k.dtype, copy=True))
    return dq, [*dkv, sums]


def _backward_ring(
    problem: Problem, q, k, v, out, lse, dout, dlse, segments, sequences, reduce_dtype, group, **strides
) -> tuple:
    """dK/dV of a rank follow its K/V one hop behind: the last step's hop brings them home."""
    from zigzag_kernels import plan

    dkv = k.new_empty((2, *k.shape), dtype=getattr(torch, reduce_dtype))
    arriving = torch.empty_like(dkv)
    rows = plan.backward_rows(launch.run, problem, out, lse, dout, dlse, **strides)
    dq, works = None, []
    for step, k_peer, v_peer in _ring(k, v, group):
        wait(works)
        if step > 0:
            dkv, arriving = arriving, dkv
        dk, dv = dkv
        arguments = launch.run, problem, q, k_peer, v_peer, dout, rows
        part = plan.Part(accumulate=step > 0, dtype=reduce_dtype)
        plan.backward_keys(*arguments, sequences[step], part=part, into=(dk, dv), **strides)
        works = exchange(dkv, arriving, group, tag=1)
        part = plan.Part(accumulate=step > 0, dtype="float32")
        dq = plan.backward_queries(*arguments, segments[step], part=part, into=dq, **strides)
    wait(works)
    assert dq is not None
    return dq.to(q.dtype), arriving.to(k.dtype)


@operator("zigzag::parallel_forward")
def parallel_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    segments: torch.Tensor,
    sequences: torch.Tensor,
    group_name: str,
    method: str,
    heads_k_stride: int,
    causal: bool,
    softmax_scale: float,
    reduce_dtype: str,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out `[T, heads, head_dim]`, lse `[heads, T]` float32) of this rank; all arrays are local."""
    group = resolve(group_name)
    problem = _problem(q, k, sequences, group.size(), method, heads_k_stride, causal, softmax_scale, backend)
    agree_on_call(
        group, q, k, v, problem.sequences, method, heads_k_stride, causal, softmax_scale, reduce_dtype, backend
    )
    if method == "ring":
        return _forward_ring(problem, q, k, v, segments, group)
    return _forward_allgather(problem, q, k, v, segments, heads_k_stride, group)


@parallel_forward.register_fake
def _(q, k, v, segments, sequences, *constants):
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)


@operator("zigzag::parallel_backward")
def parallel_backward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    segments: torch.Tensor,
    sequences: torch.Tensor,
    group_name: str,
    method: str,
    heads_k_stride: int,
    causal: bool,
    softmax_scale: float,
    reduce_dtype: str,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(dq, dk and dv `[2, T, kv_heads, head_dim]`) of this rank's rows, summed over the queries of all ranks."""
    group = resolve(group_name)
    dout = last_dim_contiguous(dout)
    problem = _problem(
        q, k, sequences, group.size(), method, heads_k_stride, causal, softmax_scale, backend, q, dout
    )  # fmt: skip
    dlse = None if dlse is None else dlse.contiguous()
    arguments = problem, q, k, v, out, lse, dout, dlse, segments, sequences, reduce_dtype, group
    strides = {"dout_strides": (dout.stride(0), dout.stride(1))}
    if method == "ring":
        return _backward_ring(*arguments, **strides)
    dq, of_windows = _backward_allgather(*arguments, heads_k_stride, **strides)
    dkv = k.new_empty((2, *k.shape))
    for x, window in zip(dkv.split(heads_k_stride, 2), of_windows, strict=True):
        x.copy_(window)
    return dq, dkv


@parallel_backward.register_fake
def _(q, k, v, *others):
    return q.new_empty(q.shape), k.new_empty((2, *k.shape))


def _differentiate(ctx, dout, dlse):
    q, k, v, out, lse, segments, sequences = ctx.saved_tensors
    if dout is None:
        dout = torch.zeros_like(out)
    dq, dkv = parallel_backward(q, k, v, out, lse, dout, dlse, segments, sequences, *ctx.constants)
    return dq, *dkv, *(None,) * 9


attention = differentiable(parallel_forward, _differentiate)


@operator("zigzag::agreed_rank")
def agreed_rank(
    rank: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sequences: int,
    group_name: str,
    method: str,
    heads_k_stride: int,
    causal: bool,
    softmax_scale: float,
    reduce_dtype: str,
    backend: str,
) -> torch.Tensor:
    """`rank`, once the ranks have agreed: for calls that move other data before `parallel_forward`, or without it."""
    constants = method, heads_k_stride, causal, softmax_scale, reduce_dtype, backend
    agree_on_call(resolve(group_name), q, k, v, sequences, *constants)
    return rank.clone()


@agreed_rank.register_fake
def _(rank, *others):
    return rank.new_empty(rank.shape)


def agree_on_call(
    group, q, k, v, sequences, method, heads_k_stride, causal, softmax_scale, reduce_dtype, backend
) -> None:
    """`agree` on everything that decides which messages a call sends, and what they mean."""
    agree(
        group,
        call="zigzag_attention",
        q=describe(q)[:2],
        k=describe(k)[:2],
        v=describe(v)[:2],
        sequences=sequences,
        causal=causal,
        softmax_scale=softmax_scale,
        method=method,
        heads_k_stride=heads_k_stride,
        grad_reduce_dtype=reduce_dtype,
        backend=backend,
    )
