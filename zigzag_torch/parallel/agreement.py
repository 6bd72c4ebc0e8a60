"""The ranks of a group agree on a call before any data moves.

A collective whose ranks were called differently hangs, or mixes up numbers. Therefore ranks compare the facts of a call
that their hosts know (shapes, types, options), and go on together or raise the same error:

- the first time that a rank makes a call with new facts, through the group's store (`rendezvous`);
- with gloo, whose transfers the host waits for anyway, before every later call too, by messages of 16 bytes. Only if
  they differ do ranks meet in the store, for the words of the error;
- with NCCL, whose transfers the host does not wait for, later calls with these facts cost a look into a set.

Nothing here counts calls. After an error that a program catches, the ranks are as much in step as their programs are.
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
    # Imported once there is a group, as torch._dynamo does, its functions would keep that group as their default, and
    # the threads of gloo would run while the process ends, which aborts it at times.
    import torch.distributed.nn  # noqa: F401

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Facts = tuple[tuple[str, Any], ...]
"""Pairs of a name and a hashable value."""

FORWARD, BACKWARD = "zigzag_attention", "backward pass of zigzag_attention"
TIMEOUT_VARIABLE = "ZIGZAG_AGREEMENT_TIMEOUT"
# Ranks reach their first call at different times: they compile, read data.
TIMEOUT_SECONDS = 120.0
# A rank that has found a fault waits no longer: its report stays in the store for ranks that come later.
REFUSAL_SECONDS = 10.0
# How long ranks whose connections have ended wait for each other, to say which ranks are missing: at least a second,
# and longer where they may have begun to wait at times that are further apart.
_ROLL_CALL_SECONDS, _ROLL_CALL_SHARE = 1.0, 0.05
_LONGEST_SECONDS = 1e8  # gloo adds the timeout to a clock of nanoseconds
_MESSAGE_TAG = 0x7A67  # of messages between ranks that nothing else may receive
_KNOWN_FACTS = 1 << 16


class Place(NamedTuple):
    """A rank of a group that is known by its name, or the only rank there is."""

    group_name: str | None
    rank: int
    world_size: int


ALONE = Place(None, 0, 1)


class Reach(enum.Enum):
    """The means by which ranks of a group can agree: the group of a dry run has no other ranks."""

    MESSAGES = "gloo"
    STORE = "any other"
    NOBODY = "fake"


@dataclass
class _History:
    """The digests of the facts that a group has agreed upon, and how its ranks reach each other."""

    reach: Reach
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
    """Return the process group of this name; operators take the name, as their schemas have no type for groups."""
    from torch.distributed.distributed_c10d import _resolve_process_group  # pyright: ignore

    return _resolve_process_group(group_name)  # pyright: ignore[reportArgumentType]


def agree_on_call(group: "ProcessGroup", problem: Problem, **others) -> None:
    """Make the ranks of `group` agree on everything that decides which messages a call sends, and their meaning.

    `others` replaces facts of `problem`. Raises as `agree`.
    """
    agree(group, *_facts_of_call(problem, tuple(others.items())))


@functools.lru_cache(maxsize=1024)
def _facts_of_call(problem: Problem, others: Facts) -> tuple[Facts, int]:
    """Return the facts of a call and their digest."""
    # The number of sequences decides no message: ranks compare `cu_seqlens` on the device, see `collectives`.
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
    """Return once all ranks of `group` have called with equal `facts`, whose digest the caller may have.

    Raises the same `ValueError` on every rank, which names the difference, or the error that a rank reported instead of
    its facts; `RuntimeError` if a rank reports nothing for ZIGZAG_AGREEMENT_TIMEOUT seconds (default 120).
    """
    history = _history(group)
    digest = _digest(facts) if digest is None else digest
    # Under NCCL this is all that a call costs whose facts are known.
    if history.reach is Reach.STORE and digest in history.seen:
        return
    compare(group, dict(facts))
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
        history = _histories[group] = _History(reach_of(group))
    return history


def reach_of(group: "ProcessGroup") -> Reach:
    """Return how the ranks of `group` reach each other: of several backends, the one for the accelerator counts."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    on_host = _backend_name(group, torch.device("cpu"))
    # A group may have gloo for the CPU and NCCL for the GPU: data moves by the latter.
    backend = on_host if accelerator is None else _backend_name(group, accelerator) or on_host
    if backend == Reach.NOBODY.value:
        return Reach.NOBODY
    # The messages are on the host whatever the device of the data is.
    return Reach.MESSAGES if backend == on_host == Reach.MESSAGES.value else Reach.STORE


def _backend_name(group: "ProcessGroup", device: torch.device) -> str | None:
    try:
        return group._get_backend(device).name()
    except RuntimeError:  # the group has none for this device
        return None


def refuse_together(place: Place, error: Exception) -> None:
    """Raise `error` on all ranks, if there are several; the caller raises it if this returns.

    While `torch.compile` traces, the other ranks hear nothing, and time out.
    """
    if place.group_name is not None and not torch.compiler.is_compiling():
        refuse(resolve(place.group_name), error)


def refuse(group: "ProcessGroup", error: Exception, timeout: float | None = None) -> NoReturn:
    """Raise `error`, which this rank's call has, on the ranks that wait in `agree` too."""
    try:
        compare(group, {"error": str(error)}, REFUSAL_SECONDS, timeout)
    except ValueError as joint:
        if isinstance(error, ValueError):
            # All ranks raise one error, in the same words.
            raise joint from None
    except RuntimeError as alone:
        error.add_note(f"The other ranks could not be told: {alone}")
    raise error


def timeout_seconds() -> float:
    """Return how long a rank waits for the others; `ValueError` if ZIGZAG_AGREEMENT_TIMEOUT is no such time."""
    text = os.environ.get(TIMEOUT_VARIABLE)
    if text is None:
        return TIMEOUT_SECONDS
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise ValueError(f"{TIMEOUT_VARIABLE}: expected a positive, finite number of seconds, got {text!r}")
    return min(max(seconds, 0.001), _LONGEST_SECONDS)  # 0 milliseconds would mean for ever


def compare(
    group: "ProcessGroup", report: dict[str, Any], patience: float | None = None, timeout: float | None = None
) -> None:
    """Return if the `report` of every rank of `group` is the same. Raises as `agree`.

    A rank with a `patience` leaves its report in the store after that time. `timeout` None is the timeout of the
    environment.
    """
    history = _history(group)
    if history.reach is Reach.NOBODY or group.size() == 1:
        return
    if timeout is None:
        try:
            timeout = timeout_seconds()
        except ValueError as error:
            refuse(group, error, TIMEOUT_SECONDS)
    # The first call of a group meets in the store even with gloo: a rank that does not come is named there, and no
    # connection has to be closed for it.
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
    """Return whether all ranks call this with the same `digest`, after as many messages as W has binary digits."""
    rank, size, deadline = group.rank(), group.size(), time.monotonic() + timeout
    extremes = torch.tensor((digest, ~digest), device="cpu")  # the largest of ~x is ~ of the smallest x
    hops = 1
    while hops < size:  # the extremes of `hops` ranks are here
        received = torch.empty_like(extremes)
        # After each round a rank knows the extremes of twice as many ranks before it; the maximum does not mind ranks
        # that it hears of twice.
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
    """Wait for transfers that the host waits for; `RuntimeError` that names the ranks that took no part in time.

    `timeout` None: the transfers have one of their own.
    """
    started = time.monotonic()
    try:
        for work in works:
            work.wait() if timeout is None else work.wait(timeout)
    except RuntimeError as error:
        _raise_lost(group, error, started, timeout_seconds())


def _raise_lost(group: "ProcessGroup", error: Exception, started: float, timeout: float) -> NoReturn:
    """Raise `RuntimeError` that names the ranks that are missing after gloo has closed the connections of `group`."""
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
        # The ranks that lost their connections meet once more in the store: the ones that do not come are missing.
        roll_call = max(_ROLL_CALL_SECONDS, _ROLL_CALL_SHARE * timeout)
        message = _meet(group, {"call": "roll call"}, roll_call, absence).message
    except RuntimeError as of_store:
        message = str(of_store)
    raise RuntimeError(
        f"{message or apart}. The connections of this group are closed, so that it serves no "
        f"other call: make a new one. Gloo says: {error}"
    ) from error
