"""Collectives as operators, which `torch.compile` traces and autograd differentiates, and exchanges between ranks."""

from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import AllgatherOptions, AllreduceOptions, ReduceScatterOptions

from ..dispatch import operator
from .agreement import BACKWARD, agree, finish, resolve, transfer_timeout

# torch 2.13 has renamed these functions, and warns about the old names.
_IS_RENAMED = hasattr(dist, "all_gather_single")
_gather_into = getattr(dist, "all_gather_single" if _IS_RENAMED else "all_gather_into_tensor")
_reduce_into = getattr(dist, "reduce_scatter_single" if _IS_RENAMED else "reduce_scatter_tensor")
_GATHER_METHOD = "all_gather_single" if _IS_RENAMED else "_allgather_base"
_REDUCE_METHOD = "reduce_scatter_single" if _IS_RENAMED else "_reduce_scatter_base"
_LARGEST = torch.iinfo(torch.int64).max
Neighbours = tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]]
"""(tensors for or from the previous rank, tensors for or from the next rank)."""
# The odd multipliers of splitmix64, as int64.
_STEP, _FIRST_FACTOR, _SECOND_FACTOR = -0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15


def gather_into(output: torch.Tensor, x: torch.Tensor, group: dist.ProcessGroup) -> None:
    """Write `x` of all ranks, one after the other, into `output`."""
    timeout = transfer_timeout(group)
    if timeout is None:
        # With NCCL the host continues. With gloo, below, the host waits up to the timeout, and then `finish` names the
        # missing ranks.
        _gather_into(output, x, group=group)
    else:
        options = _with(AllgatherOptions(), timeout)
        finish(group, [getattr(group, _GATHER_METHOD)(output, x, options)], None)


def reduce_into(output: torch.Tensor, x: torch.Tensor, group: dist.ProcessGroup) -> None:
    """Sum `x` over all ranks, and write this rank's part of the sum into `output`."""
    timeout = transfer_timeout(group)
    if timeout is None:
        _reduce_into(output, x, group=group)
    else:
        options = _with(ReduceScatterOptions(), timeout)
        finish(group, [getattr(group, _REDUCE_METHOD)(output, x, options)], None)


def maximum_in_place(x: torch.Tensor, group: dist.ProcessGroup) -> None:
    """Replace each element of `x` by the largest value that any rank has for it."""
    timeout = transfer_timeout(group)
    if timeout is None:
        dist.all_reduce(x, dist.ReduceOp.MAX, group=group)
    else:
        options = _with(AllreduceOptions(), timeout)
        options.reduceOp = dist.ReduceOp.MAX  # pyright: ignore[reportAttributeAccessIssue]
        finish(group, [group.allreduce([x], options)], None)


def _with(options, timeout: timedelta):
    """Return `options` with `timeout`, for which the functions of `torch.distributed` have no argument."""
    options.timeout = timeout
    return options


def exchange(send: torch.Tensor, receive: torch.Tensor, group: dist.ProcessGroup, hops: int = 1, tag: int = 0) -> list:
    """Start to send to the rank `hops` later on the ring, and to receive from the rank `hops` earlier.

    Returns transfers; the caller calls `wait` before it reads `receive` or writes `send`. Messages that are under way
    at the same time need different tags.
    """
    rank, size = group.rank(), group.size()
    # Both operations are in one batch: if every rank first waited for its own send, no rank would receive.
    return dist.batch_isend_irecv(
        [
            dist.P2POp(dist.isend, send, group=group, group_peer=(rank + hops) % size, tag=tag),
            dist.P2POp(dist.irecv, receive, group=group, group_peer=(rank - hops) % size, tag=tag),
        ]
    )


def exchange_with_neighbours(sends: Neighbours, receives: Neighbours, group: dist.ProcessGroup) -> list:
    """Start to send tensors to the previous and the next rank, and to receive other tensors from them.

    The first rank has no previous rank, and the last rank no next one. Returns transfers to `wait` for, like
    `exchange`.
    """
    rank, size = group.rank(), group.size()
    operations = []
    for peer, sent, received in zip((rank - 1, rank + 1), sends, receives, strict=True):
        if 0 <= peer < size:
            for tag, (x, place) in enumerate(zip(sent, received, strict=True)):
                operations += [
                    dist.P2POp(dist.isend, x, group=group, group_peer=peer, tag=tag),
                    dist.P2POp(dist.irecv, place, group=group, group_peer=peer, tag=tag),
                ]
    return dist.batch_isend_irecv(operations)


def wait(works: list, group: dist.ProcessGroup) -> None:
    """Make the current stream wait for the transfers of `exchange`; without a stream, the host waits."""
    timeout = transfer_timeout(group)
    if timeout is None:
        for work in works:
            work.wait()
    else:
        finish(group, works, timeout)


@operator("zigzag::common_rank")
def common_rank(
    cu_seqlens: torch.Tensor,
    unsharded: torch.Tensor | None,
    rank: torch.Tensor,
    group_name: str,
    call: str,
    lengths: torch.Tensor | None = None,
    layout: str = "document",
    fault: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return `rank`, or -1 on every rank if ranks have different tensors, or one of them has a `fault`.

    The host does not wait for the values. Rank -1 is invalid, so that attention returns NaN everywhere. Ranks compare
    fingerprints, so that the size of the message does not depend on the number of sequences. Before that, their hosts
    agree on the `layout`, a text.
    """
    group = resolve(group_name)
    facts: dict = {"call": call, "layout": layout}
    for name, x in {"unsharded": unsharded, "lengths": lengths}.items():
        facts[name] = "nothing" if x is None else "a tensor"
    agree(group, tuple(facts.items()))
    own = fingerprint(cu_seqlens)
    for x in (unsharded, lengths):
        if x is not None:
            own = own * _STEP + fingerprint(x)
    extremes = torch.stack((own, ~own))  # the largest of ~x is ~ of the smallest x
    if fault is not None:
        extremes = extremes.masked_fill(fault, _LARGEST)  # two equal values, so that the comparison below fails
    maximum_in_place(extremes, group)
    largest, largest_inverse = extremes
    return torch.where(largest == ~largest_inverse, rank, -1)


def fingerprint(x: torch.Tensor) -> torch.Tensor:
    """Return a 64-bit hash of the elements of `x` and their order, as one int64 on the device of `x`."""
    elements = x.detach().contiguous().view(-1)
    if elements.is_floating_point() or elements.is_complex():
        elements = elements.view(torch.uint8)
    # Every element is mixed with its place, so that the sum over elements depends on their order.
    mixed = torch.arange(1, len(elements) + 1, device=x.device).mul_(_STEP).add_(elements)
    mixed = mixed.bitwise_xor_(mixed >> 30).mul_(_FIRST_FACTOR)
    mixed = mixed.bitwise_xor_(mixed >> 27).mul_(_SECOND_FACTOR)
    return mixed.bitwise_xor_(mixed >> 31).sum()


@common_rank.register_fake
def _(cu_seqlens, unsharded, rank, group_name, call, lengths=None, layout="document", fault=None):
    return rank.new_empty(rank.shape)


@operator("zigzag::largest_of_ranks")
def largest_of_ranks(x: torch.Tensor, group_name: str) -> torch.Tensor:
    """Return the largest value of each element of `x` over the ranks, or NaN if any has NaN.

    The result has no gradient.
    """
    is_nan = x.isnan()  # the maximum of NaN and a number is the number in some collectives
    both = torch.stack((x.masked_fill(is_nan, float("-inf")), is_nan.to(x.dtype)))
    maximum_in_place(both, resolve(group_name))
    largest, any_nan = both
    return largest.masked_fill(any_nan > 0, float("nan"))


@largest_of_ranks.register_fake
def _(x, group_name):
    return x.new_empty(x.shape)


@operator("zigzag::all_gather")
def all_gather(x: torch.Tensor, world_size: int, group_name: str) -> torch.Tensor:
    """Return `x [T, ...]` of all ranks, in their order, `[world_size * T, ...]`; differentiable."""
    gathered = x.new_empty((world_size * x.shape[0], *x.shape[1:]))
    gather_into(gathered, x.contiguous(), resolve(group_name))
    return gathered


@all_gather.register_fake
def _(x, world_size, group_name):
    return x.new_empty((world_size * x.shape[0], *x.shape[1:]))


@operator("zigzag::reduce_scatter")
def reduce_scatter(x: torch.Tensor, world_size: int, group_name: str) -> torch.Tensor:
    """Return this rank's part `[T, ...]` of the sum of `x [world_size * T, ...]` over all ranks."""
    group = resolve(group_name)
    agree(group, _facts_of_backward(x))
    scattered = x.new_empty((x.shape[0] // world_size, *x.shape[1:]))
    reduce_into(scattered, x.contiguous(), group)
    return scattered


@reduce_scatter.register_fake
def _(x, world_size, group_name):
    return x.new_empty((x.shape[0] // world_size, *x.shape[1:]))


@operator("zigzag::shift")
def shift(x: torch.Tensor, hops: int, group_name: str) -> torch.Tensor:
    """Return `x` of the rank that is `hops` earlier on the ring; differentiable.

    In the backward pass `hops` is negative.
    """
    group = resolve(group_name)
    if hops < 0:
        agree(group, _facts_of_backward(x))
    received = x.new_empty(x.shape)
    sent = x.contiguous()
    wait(exchange(sent, received, group, hops), group)
    return received


@shift.register_fake
def _(x, hops, group_name):
    return x.new_empty(x.shape)


def _facts_of_backward(x: torch.Tensor) -> tuple:
    return ("call", BACKWARD), ("gradients", (tuple(x.shape), str(x.dtype)))


def _save_constants(ctx, inputs, output) -> None:
    _, *ctx.constants = inputs


def _differentiate_all_gather(ctx, gradient):
    return reduce_scatter(gradient, *ctx.constants), None, None


def _differentiate_shift(ctx, gradient):
    hops, group_name = ctx.constants
    return shift(gradient, -hops, group_name), None, None


all_gather.register_autograd(_differentiate_all_gather, setup_context=_save_constants)
shift.register_autograd(_differentiate_shift, setup_context=_save_constants)
