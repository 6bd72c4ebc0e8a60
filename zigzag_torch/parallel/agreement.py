"""The ranks of a group agree on a call before any data moves.

A collective whose ranks were called differently hangs, or mixes up numbers. The first time that a rank makes a call on
a group with new facts that its host knows (shapes, types, options), it reports them to rank 0 through the group's
store, and all ranks go on together or raise the same error. Later calls with these facts cost a look into a set.
"""

import functools
import json
import math
import os
import weakref
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import torch
import torch.distributed as dist

from zigzag_kernels.heuristics import choose_heads_k_stride
from zigzag_kernels.problem import Problem

if dist.is_available():
    # Imported once there is a group, as torch._dynamo does, its functions would keep that group as their default, and
    # the threads of gloo would run while the process ends, which aborts it at times.
    import torch.distributed.nn

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# Ranks reach their first call at different times: they compile, read data.
TIMEOUT_SECONDS = 120.0
# A rank that has found a fault waits no longer: its report stays in the store for ranks that come later.
REFUSAL_SECONDS = 10.0
_NAMED_RANKS, _NAMED_DIFFERENCES = 8, 3


class Place(NamedTuple):
    """A rank of a group that is known by its name, or the only rank there is."""

    group_name: str | None
    rank: int
    world_size: int


ALONE = Place(None, 0, 1)


@dataclass
class _History:
    """The facts that a group has agreed upon, and the number of its exchanges."""

    seen: set = field(default_factory=set)
    exchanges: int = 0


_histories: "weakref.WeakKeyDictionary[ProcessGroup, _History]" = weakref.WeakKeyDictionary()


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
    return Place(group.group_name, group.rank(), group.size())


def resolve(group_name: str) -> "ProcessGroup":
    """Return the process group of this name; operators take the name, as their schemas have no type for groups."""
    from torch.distributed.distributed_c10d import _resolve_process_group  # pyright: ignore

    return _resolve_process_group(group_name)  # pyright: ignore[reportArgumentType]


def agree_on_call(group: "ProcessGroup", problem: Problem, **others) -> None:
    """Make the ranks of `group` agree on everything that decides which messages a call sends, and their meaning.

    `others` replaces facts of `problem`. Raises as `agree`.
    """
    agree(group, _facts(problem, tuple(others.items())))


@functools.lru_cache(maxsize=1024)
def _facts(problem: Problem, others: tuple) -> tuple[tuple[str, Any], ...]:
    call, keys = problem.call, ((problem.tokens, problem.kv_heads, problem.head_dim), problem.dtype)
    facts = {
        "call": "zigzag_attention",
        "q": ((problem.tokens, problem.heads, problem.head_dim), problem.dtype),
        "k": keys,
        "v": keys,
        "sequences": problem.sequences,
        "causal": call.causal,
        "softmax_scale": call.softmax_scale,
        "method": call.method,
        "heads_k_stride": choose_heads_k_stride(call.heads_k_stride, problem),
        "grad_reduce_dtype": call.grad_reduce_dtype,
        "backend": call.backend,
    }
    return tuple((facts | dict(others)).items())


def agree(group: "ProcessGroup", facts: tuple[tuple[str, Any], ...]) -> None:
    """Return once all ranks of `group` have called with equal `facts`: pairs of a name and a hashable value.

    Raises the same `ValueError` on every rank, which names the difference, or the error that a rank reported instead of
    its facts; `RuntimeError` if a rank reports nothing for ZIGZAG_AGREEMENT_TIMEOUT seconds (default 120).
    """
    seen = _history(group).seen
    if facts not in seen:
        compare(group, dict(facts))
        seen.add(facts)


def _history(group: "ProcessGroup") -> _History:
    history = _histories.get(group)
    if history is None:
        history = _histories[group] = _History()
    return history


def refuse_together(place: Place, error: Exception) -> None:
    """Raise `error` on all ranks, if there are several; the caller raises it if this returns.

    While `torch.compile` traces, the other ranks hear nothing, and time out.
    """
    if place.group_name is not None and not torch.compiler.is_compiling():
        refuse(resolve(place.group_name), error)


def refuse(group: "ProcessGroup", error: Exception) -> NoReturn:
    """Raise `error`, which this rank's call has, on the ranks that wait in `agree` too."""
    try:
        compare(group, {"error": str(error)}, REFUSAL_SECONDS)
    except ValueError as joint:
        if isinstance(error, ValueError):
            raise joint from None
    except RuntimeError as alone:
        error.add_note(f"The other ranks could not be told: {alone}")
    raise error


def compare(group: "ProcessGroup", report: dict[str, Any], patience: float = math.inf) -> None:
    """Exchange the `report` of every rank: rank 0 compares them, and all ranks hear its verdict. Raises as `agree`.

    A rank waits for the others no longer than `patience` seconds.
    """
    history = _history(group)
    store, rank, size = group.get_group_store(), group.rank(), group.size()
    prefix = f"zigzag/{history.exchanges}"
    history.exchanges += 1
    timeout = float(os.environ.get("ZIGZAG_AGREEMENT_TIMEOUT", TIMEOUT_SECONDS))
    timeout = min(timeout, patience)
    report_keys = [f"{prefix}/{peer}" for peer in range(size)]
    verdict_key, readers_key = f"{prefix}/verdict", f"{prefix}/readers"
    store.set(report_keys[rank], json.dumps({name: str(value) for name, value in report.items()}))
    if rank == 0:
        absent = _absent(store, report_keys, timeout)
        reports = {peer: json.loads(store.get(report_keys[peer])) for peer in range(size) if peer not in absent}
        store.set(verdict_key, json.dumps(_verdict(reports, absent, timeout)))
    elif _absent(store, [verdict_key], timeout + 1):
        absent = _absent(store, report_keys, 0.01)
        raise RuntimeError(_absence(absent or [0], timeout))
    kind, message = json.loads(store.get(verdict_key))
    if store.add(readers_key, 1) == size:  # a group made later may have the same store
        for key in (*report_keys, verdict_key, readers_key):
            store.delete_key(key)
    if message:
        raise {"difference": ValueError, "absence": RuntimeError}[kind](message)


def _absent(store, keys: list[str], timeout: float) -> list[int]:
    """Return the indices of the keys that do not appear in time."""
    try:
        store.wait(keys, timedelta(seconds=timeout))
    except RuntimeError:
        return [index for index, key in enumerate(keys) if not store.check([key])]
    return []


def _absence(ranks: list[int], timeout: float) -> str:
    return (
        f"{_ranks(ranks)} did not make this call within {timeout:g} s (ZIGZAG_AGREEMENT_TIMEOUT): it failed elsewhere, "
        f"is still busy, or made another call, one that all ranks agreed upon before, and waits for data"
    )


def _verdict(reports: dict[int, dict[str, str]], absent: list[int], timeout: float) -> tuple[str, str]:
    """Return ("difference" or "absence", a message): the message is empty if all `reports` are there and equal."""
    errors = _ranks_by({rank: report.get("error") for rank, report in reports.items()})
    if list(errors) != [None]:
        if len(errors) == 1 and not absent:
            return "difference", next(iter(errors))
        return "difference", "; ".join(f"{_ranks(ranks)}: {error}" for error, ranks in errors.items() if error)
    if absent:
        return "absence", _absence(absent, timeout)
    differences = []
    for name in dict.fromkeys(name for report in reports.values() for name in report):
        values = _ranks_by({rank: report.get(name, "nothing") for rank, report in reports.items()})
        if len(values) > 1:
            held = (f"{_ranks(ranks)} {'has' if len(ranks) == 1 else 'have'} {x}" for x, ranks in values.items())
            differences.append(f"{name}: {', '.join(held)}")
            if name == "call" or len(differences) == _NAMED_DIFFERENCES:
                break  # another call has other facts
    message = f"expected the same call on every rank of the group, got {'; '.join(differences)}"
    return "difference", message if differences else ""


def _ranks_by(values: dict[int, Any]) -> dict[Any, list[int]]:
    """Return {value: ranks that have it}."""
    result = {}
    for rank, value in values.items():
        result.setdefault(value, []).append(rank)
    return result


def _ranks(ranks: list[int]) -> str:
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    more = f" and {len(ranks) - _NAMED_RANKS} more" if len(ranks) > _NAMED_RANKS else ""
    return f"ranks {', '.join(map(str, ranks[:_NAMED_RANKS]))}{more}"
