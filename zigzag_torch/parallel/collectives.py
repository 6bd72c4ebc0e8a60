"""Collectives: operators that `torch.compile` traces and autograd differentiates, and the exchange along a ring."""

import torch
import torch.distributed as dist

from ..dispatch import operator
from .agreement import agree, resolve

# From torch 2.13 on the old names warn.
gather_into = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
reduce_into = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


def exchange(send: torch.Tensor, receive: torch.Tensor, group: dist.ProcessGroup, hops: int = 1, tag: int = 0) -> list:
    """Start to send to the rank `hops` after this one on the ring, and to receive from the rank `hops` before it.

    Returns the transfers to `wait` for, before `receive` is read and before `send` is written. Messages that are under
    way at the same time have different tags.
    """
    rank, size = group.rank(), group.size()
    return dist.batch_isend_irecv(
        [
            dist.P2POp(dist.isend, send, group=group, group_peer=(rank + hops) % size, tag=tag),
            dist.P2POp(dist.irecv, receive, group=group, group_peer=(rank - hops) % size, tag=tag),
        ]
    )


def wait(works: list) -> None:
    """Make the current stream wait for the transfers of `exchange`; without a stream, the host waits."""
    for work in works:
        work.wait()


@operator("zigzag::common_rank")
def common_rank(cu_seqlens: torch.Tensor, rank: torch.Tensor, group_name: str) -> torch.Tensor:
    """Return `rank`, or -1 on every rank if `cu_seqlens` is not the same on all of them.

    The host does not wait for the values. Rank -1 is invalid, so attention becomes NaN everywhere.
    """
    group = resolve(group_name)
    agree(group, (("call", "prepare_batch"), ("cu_seqlens", tuple(cu_seqlens.shape))))
    extremes = torch.stack((cu_seqlens, ~cu_seqlens))  # the largest of ~x is ~ of the smallest x
    dist.all_reduce(extremes, dist.ReduceOp.MAX, group=group)
    same = (extremes[0] == ~extremes[1]).all()
    return torch.where(same, rank, -1)


@common_rank.register_fake
def _(cu_seqlens, rank, group_name):
    return rank.new_empty(rank.shape)


@operator("zigzag::all_gather")
def all_gather(x: torch.Tensor, world_size: int, group_name: str) -> torch.Tensor:
    """Return `x [T, ...]` of all ranks, in their order, `[world_size * T, ...]`; differentiable."""
    gathered = x.new_empty((world_size * x.shape[0], *x.shape[1:]))
    gather_into(gathered, x.contiguous(), group=resolve(group_name))
    return gathered


@all_gather.register_fake
def _(x, world_size, group_name):
    return x.new_empty((world_size * x.shape[0], *x.shape[1:]))


@operator("zigzag::reduce_scatter")
def reduce_scatter(x: torch.Tensor, world_size: int, group_name: str) -> torch.Tensor:
    """Return this rank's part `[T, ...]` of the sum of all ranks' `x [world_size * T, ...]`."""
    scattered = x.new_empty((x.shape[0] // world_size, *x.shape[1:]))
    reduce_into(scattered, x.contiguous(), group=resolve(group_name))
    return scattered


@reduce_scatter.register_fake
def _(x, world_size, group_name):
    return x.new_empty((x.shape[0] // world_size, *x.shape[1:]))


@operator("zigzag::shift")
def shift(x: torch.Tensor, hops: int, group_name: str) -> torch.Tensor:
    """Return `x` of the rank `hops` before this one on the ring; differentiable."""
    received = x.new_empty(x.shape)
    sent = x.contiguous()
    wait(exchange(sent, received, resolve(group_name), hops))
    return received


@shift.register_fake
def _(x, hops, group_name):
    return x.new_empty(x.shape)


def _save_constants(ctx, inputs, output) -> None:
    _, *ctx.constants = inputs


def _differentiate_all_gather(ctx, gradient):
    return reduce_scatter(gradient, *ctx.constants), None, None


def _differentiate_shift(ctx, gradient):
    hops, group_name = ctx.constants
    return shift(gradient, -hops, group_name), None, None


all_gather.register_autograd(_differentiate_all_gather, setup_context=_save_constants)
shift.register_autograd(_differentiate_shift, setup_context=_save_constants)
