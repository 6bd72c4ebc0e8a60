"""The ranks of a group agree on a call before any data moves.

A collective hangs, or mixes up data, if its ranks make different calls. Therefore ranks compare the facts of a call
that their hosts know (shapes, dtypes, options), and either all continue or all raise the same error:

- when a rank makes a call with new facts, through the group's store (`rendezvous`);
- with gloo, before every later call too, by messages of 16 bytes: the host waits for transfers of gloo anyway. If the
  messages differ, ranks compare the facts in the store, for the text of the error;
- with NCCL, whose transfers the host does not wait for, a later call with known facts only looks them up in a set,
  unless ZIGZAG_AGREE_IN_EVERY_CALL is 1.

This module does not count calls. So an error that a program catches does not put the ranks out of step.
"""

import enum
import functools
import math
import os
import time
import weakref
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import torch
import torch.distributed as dist

from zigzag_kernels.heuristics import choose_heads_k_stride
from zigzag_kernels.problem import Problem

from . import rendezvous

if dist.is_available():
    # The module must be imported before there is a group. If torch._dynamo imports it later, its functions keep the
    # group as their default argument; the threads of gloo then run until the process ends, and sometimes abort it.
    import torch.distributed.nn  # noqa: F401

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Facts = tuple[tuple[str, Any], ...]
"""Pairs of a name and a hashable value."""

FORWARD, BACKWARD = "zigzag_attention", "backward pass of zigzag_attention"
TIMEOUT_VARIABLE, EVERY_CALL_VARIABLE = "ZIGZAG_AGREEMENT_TIMEOUT", "ZIGZAG_AGREE_IN_EVERY_CALL"
# Ranks reach their first call at different times, because they compile and read data.
TIMEOUT_SECONDS = 120.0
# A rank that has found a fault waits no longer than this: its report stays in the store for ranks that come later.
REFUSAL_SECONDS = 10.0
# When connections have ended, the remaining ranks meet to find out which ranks are missing. They wait for each other
# for a second, or for a share of the timeout if that is longer, because they may have begun to wait at different times.
_ROLL_CALL_SECONDS, _ROLL_CALL_SHARE = 1.0, 0.05
_LONGEST_SECONDS = 1e8  # gloo adds the timeout to a clock in nanoseconds, which must not overflow
_MESSAGE_TAG = 0x7A67  # the tag of the messages with which ranks compare facts; no other code receives it
_KNOWN_FACTS = 1 << 16


class Place(NamedTuple):
    """The rank of this process, and the name and size of its group, if there is one."""

    group_name: str | None
    rank: int
    world_size: int


ALONE = Place(None, 0, 1)


class Reach(enum.Enum):
    """The means by which ranks of a group can agree; the group of a dry run has no other ranks."""

    MESSAGES = "gloo"
    STORE = "any other"
    NOBODY = "fake"


@dataclass
class _History:
    """The digests of the facts that a group has agreed on, unless it forgets them, and how its ranks agree."""

    reach: Reach
    remembers: bool
    seen: dict[int, None] = field(default_factory=dict)
    has_agreed: bool = False


_histories: "weakref.WeakKeyDictionary[ProcessGroup, _History]" = weakref.WeakKeyDictionary()
_inherited: "weakref.WeakSet[ProcessGroup]" = weakref.WeakSet()
_is_forked = False


def _inherit_groups() -> None:
    """Remember the groups of the parent process, whose connections a forked child must not use."""
    global _is_forked
    if dist.is_available() and dist.is_initialized():
        _is_forked = True
        _inherited.update(dist.distributed_c10d._world.pg_map)  # pyright: ignore[reportPrivateUsage]


if hasattr(os, "register_at_fork"):  # Windows does not fork
    os.register_at_fork(after_in_child=_inherit_groups)


def place_in(group) -> Place:
    """Return the place of this process in a process group or a 1-D DeviceMesh, or `ALONE` for None.

    Raises `ValueError` for anything else.
    """
    if group is None:
        return ALONE
    from torch.distributed.device_mesh import DeviceMesh

    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            names = group.mesh_dim_names
            slices = f"a slice of it, such as mesh[{names[-1]!r}]" if names else "a mesh of one dimension"
            raise ValueError(
                f"group: expected a 1-D DeviceMesh, got {group.ndim} dimensions, named {names}: pass {slices}"
            )
        group = group.get_group()
    if not isinstance(group, dist.ProcessGroup):
        raise ValueError(
            f"group: expected a torch.distributed process group that this process is in, or a 1-D DeviceMesh, "
            f"got {type(group).__name__} {group!r}"
        )
    if _is_forked and group in _inherited:
        raise ValueError(
            "group: expected a process group that was made in this process, got one of the process that it was forked "
            "from, whose connections it would disturb: pass rank and world_size instead, or start processes by "
            "'spawn' or 'forkserver'"
        )
    return Place(group.group_name, group.rank(), group.size())


def resolve(group_name: str) -> "ProcessGroup":
    """Return the process group with this name; operators take the name, because schemas have no type for groups."""
    from torch.distributed.distributed_c10d import _resolve_process_group  # pyright: ignore

    return _resolve_process_group(group_name)  # pyright: ignore[reportArgumentType]


def agree_on_call(group: "ProcessGroup", problem: Problem, **others) -> None:
    """Make the ranks of `group` agree on everything that decides the messages of a call, and their meaning.

    `others` replaces facts of `problem`. Raises the errors of `agree`.
    """
    agree(group, *_facts_of_call(problem, tuple(others.items())))


@functools.lru_cache(maxsize=1024)
def _facts_of_call(problem: Problem, others: Facts) -> tuple[Facts, int]:
    """Return the facts of a call and their digest."""
    # The number of sequences is not among the facts: it does not change any message, and ranks compare `cu_seqlens` on
    # the device (`collectives.common_rank`).
    call, keys = problem.call, ((problem.tokens, problem.kv_heads, problem.head_dim), problem.dtype)
    facts = {
        "call": FORWARD,
        "q": ((problem.tokens, problem.heads, problem.head_dim), problem.dtype),
        "k": keys,
        "v": keys,
        "causal": call.causal,
        "window_size": call.window_size,
        "attention_chunk": call.attention_chunk,
        "softcap": call.softcap,
        "sinks": call.has_sinks,
        "softmax_scale": call.softmax_scale,
        "method": call.method,
        "heads_k_stride": choose_heads_k_stride(call.heads_k_stride, problem),
        "grad_reduce_dtype": call.grad_reduce_dtype,
        "return_max_logits": call.return_max_logits,
        "backend": call.backend,
        "layout": call.layout.value,
        "lengths": call.has_lengths,
        "whole_tokens": call.whole_tokens,
        "halo": call.halo,
        "halo_rows": call.halo_rows,
    }
    facts = tuple((facts | dict(others)).items())
    return facts, _digest(facts)


def agree(group: "ProcessGroup", facts: Facts, digest: int | None = None) -> None:
    """Return when all ranks of `group` have called this function with equal `facts`.

    `digest` is the digest of `facts`, if the caller has it. If facts differ, every rank raises the same `ValueError`,
    which names the difference, or the error that a rank reported instead of its facts. Raises `RuntimeError` if a rank
    reports nothing for ZIGZAG_AGREEMENT_TIMEOUT seconds (default 120).
    """
    history = _history(group)
    digest = _digest(facts) if digest is None else digest
    # With NCCL, a call with known facts ends here.
    if history.reach is Reach.STORE and digest in history.seen:
        return
    compare(group, dict(facts))
    if not history.remembers:
        return
    if len(history.seen) == _KNOWN_FACTS:  # ranks add and forget facts in the same order
        del history.seen[next(iter(history.seen))]
    history.seen[digest] = None


@functools.lru_cache(maxsize=1024)
def _digest(facts: Facts) -> int:
    return rendezvous.digest_of(_in_words(dict(facts)))


def _in_words(report: dict[str, Any]) -> rendezvous.Report:
    return {name: str(value) for name, value in report.items()}


def _history(group: "ProcessGroup") -> _History:
    history = _histories.get(group)
    if history is None:
        text = os.environ.get(EVERY_CALL_VARIABLE, "0")
        if text not in ("0", "1"):
            raise ValueError(f"{EVERY_CALL_VARIABLE}: expected 0 or 1, got {text!r}")
        history = _histories[group] = _History(reach_of(group), remembers=text == "0")
    return history


def reach_of(group: "ProcessGroup") -> Reach:
    """Return how the ranks of `group` reach each other; if it has several backends, the accelerator's counts."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    on_host = _backend_name(group, torch.device("cpu"))
    # A group may have gloo for the CPU and NCCL for the GPU; the data of attention then moves through NCCL.
    backend = on_host if accelerator is None else _backend_name(group, accelerator) or on_host
    if backend == Reach.NOBODY.value:
        return Reach.NOBODY
    # Messages are tensors on the CPU, whatever the device of the data, so gloo must be the backend for the CPU too.
    return Reach.MESSAGES if backend == on_host == Reach.MESSAGES.value else Reach.STORE


def _backend_name(group: "ProcessGroup", device: torch.device) -> str | None:
    try:
        return group._get_backend(device).name()
    except RuntimeError:  # the group has none for this device
        return None


def refuse_together(place: Place, error: Exception) -> None:
    """Raise `error` on all ranks, if there are several ranks; if this function returns, the caller raises it.

    While `torch.compile` traces, the other ranks cannot be notified, and time out.
    """
    if place.group_name is not None and not torch.compiler.is_compiling():
        refuse(resolve(place.group_name), error)


def refuse(group: "ProcessGroup", error: Exception, timeout: float | None = None) -> NoReturn:
    """Raise `error`, which this rank has found, here and on the ranks that wait in `agree`."""
    try:
        compare(group, {"error": str(error)}, REFUSAL_SECONDS, timeout)
    except ValueError as joint:
        if isinstance(error, ValueError):
            # Raise the joint error, so that all ranks have the same message.
            raise joint from None
    except RuntimeError as alone:
        error.add_note(f"The other ranks could not be told: {alone}")
    raise error


def timeout_seconds() -> float:
    """Return the seconds that a rank waits for others; `ValueError` if ZIGZAG_AGREEMENT_TIMEOUT is invalid."""
    text = os.environ.get(TIMEOUT_VARIABLE)
    if text is None:
        return TIMEOUT_SECONDS
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise ValueError(f"{TIMEOUT_VARIABLE}: expected a positive, finite number of seconds, got {text!r}")
    return min(max(seconds, 0.001), _LONGEST_SECONDS)  # a timeout of 0 milliseconds would mean no timeout


def compare(
    group: "ProcessGroup", report: dict[str, Any], patience: float | None = None, timeout: float | None = None
) -> None:
    """Return if all ranks of `group` have the same `report`; otherwise raise the errors of `agree`.

    A rank with a `patience`, in seconds, stops waiting after that time, and its report stays in the store. `timeout`
    None means the timeout of the environment.
    """
    history = _history(group)
    if history.reach is Reach.NOBODY or group.size() == 1:
        return
    if timeout is None:
        try:
            timeout = timeout_seconds()
        except ValueError as error:
            refuse(group, error, TIMEOUT_SECONDS)
    # The first call of a group uses the store even with gloo: the store shows which ranks are missing, and a timeout
    # closes no connection.
    words = _in_words(report)
    if history.has_agreed and history.reach is Reach.MESSAGES:
        started = time.monotonic()
        try:
            if _same_everywhere(group, rendezvous.digest_of(words), timeout):
                return
        except RuntimeError as error:
            _raise_lost(group, error, started, timeout)
    verdict = _meet(group, words, timeout, functools.partial(_did_not_come, timeout=timeout), patience)
    if verdict.kind == rendezvous.DIFFERENCE:
        raise ValueError(verdict.message)
    if verdict.kind == rendezvous.ABSENCE:
        raise RuntimeError(verdict.message)
    history.has_agreed = True


def _meet(
    group: "ProcessGroup", report: rendezvous.Report, timeout: float, absence, patience: float | None = None
) -> rendezvous.Verdict:
    seat = rendezvous.Seat(group.get_group_store(), group.rank(), group.size())
    try:
        return rendezvous.meet(seat, report, timeout, absence, patience)
    except RuntimeError as error:
        raise RuntimeError(
            f"the store of the process group, in which ranks agree on a call, does not answer; the process that "
            f"serves it may have ended: {error}"
        ) from error


def _same_everywhere(group: "ProcessGroup", digest: int, timeout: float) -> bool:
    """Return whether all W ranks call this function with the same `digest`; each sends about log2(W) messages."""
    rank, size, deadline = group.rank(), group.size(), time.monotonic() + timeout
    extremes = torch.tensor((digest, ~digest), device="cpu")  # the largest of ~x is ~ of the smallest x
    hops = 1
    while hops < size:  # this rank knows the extremes of `hops` ranks
        received = torch.empty_like(extremes)
        # Each round doubles the number of ranks whose extremes this rank knows. A rank may count twice, which does not
        # change the maximum.
        to, source = (rank + hops) % size, (rank - hops) % size
        works = (
            dist.isend(extremes, group=group, group_dst=to, tag=_MESSAGE_TAG),
            dist.irecv(received, group=group, group_src=source, tag=_MESSAGE_TAG),
        )
        for work in works:
            assert work is not None
            work.wait(timedelta(seconds=max(deadline - time.monotonic(), 0.001)))
        extremes = torch.maximum(extremes, received)
        hops *= 2
    largest, largest_inverse = extremes.tolist()
    return largest == ~largest_inverse


def _did_not_come(ranks: list[int], timeout: float) -> str:
    return (
        f"{rendezvous.named(ranks)} did not make this call within {timeout:g} s ({TIMEOUT_VARIABLE}): it failed "
        f"elsewhere, is still busy, or made another call, one that all ranks agreed upon before, and waits for data"
    )


def transfer_timeout(group: "ProcessGroup") -> timedelta | None:
    """Return how long the host waits for a transfer of `group`, or None if it does not wait."""
    return timedelta(seconds=timeout_seconds()) if _history(group).reach is Reach.MESSAGES else None


def finish(group: "ProcessGroup", works: list, timeout: timedelta | None) -> None:
    """Make the host wait for transfers; `RuntimeError` names the ranks that took no part in time.

    A `timeout` of None means that the transfers have their own timeout.
    """
    started = time.monotonic()
    try:
        for work in works:
            work.wait() if timeout is None else work.wait(timeout)
    except RuntimeError as error:
        _raise_lost(group, error, started, timeout_seconds())


def _raise_lost(group: "ProcessGroup", error: Exception, started: float, timeout: float) -> NoReturn:
    """Raise a `RuntimeError` that names the missing ranks, after gloo has closed the connections of `group`."""
    in_time = time.monotonic() - started < 0.9 * timeout

    def absence(ranks: list[int]) -> str:
        if not in_time:
            return (
                f"{rendezvous.named(ranks)} did not make this call within {timeout:g} s ({TIMEOUT_VARIABLE}): it "
                f"failed elsewhere, is still busy, or came later and still waits"
            )
        return (
            f"this call is over on {rendezvous.named(ranks)}: it failed there, the process ended, or it waited "
            f"{timeout:g} s ({TIMEOUT_VARIABLE}) for another rank"
        )

    apart = f"ranks made this call, or one before, more than {timeout:g} s ({TIMEOUT_VARIABLE}) apart, or failed in it"
    try:
        # The remaining ranks meet once more in the store; the ranks that do not come are the missing ones.
        roll_call = max(_ROLL_CALL_SECONDS, _ROLL_CALL_SHARE * timeout)
        message = _meet(group, {"call": "roll call"}, roll_call, absence).message
    except RuntimeError as of_store:
        message = str(of_store)
    raise RuntimeError(
        f"{message or apart}. The connections of this group are closed, so that it serves no "
        f"other call: make a new one. Gloo says: {error}"
    ) from error
