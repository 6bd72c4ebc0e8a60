"""The ranks of a group, and how they agree on a call before any data moves.

A collective whose ranks were called differently hangs, or mixes up numbers. So the first time that a rank sees a
combination of what its host knows (shapes, types, options) on a group, it reports it to rank 0 through the group's
store, and all ranks go on together or raise the same error. After that the combination costs a look into a set.
"""

import json
import math
import os
import weakref
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NoReturn

import torch.distributed as dist

if dist.is_available():
    # Imported once there is a group, as torch._dynamo does, its functions would keep that group as their default, and
    # the threads of gloo would run while the process ends, which aborts it at times.
    import torch.distributed.nn  # noqa: F401

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# Ranks reach their first call at different times: they compile, read data.
TIMEOUT_SECONDS = 120.0
# For a rank that has found a fault: what it reported stays there for those who come later.
REFUSAL_SECONDS = 10.0
_NAMED_RANKS, _NAMED_DIFFERENCES = 8, 3


@dataclass
class _History:
    """What a group has agreed upon, and how many times it was asked."""

    seen: set = field(default_factory=set)
    exchanges: int = 0


_histories: "weakref.WeakKeyDictionary[ProcessGroup, _History]" = weakref.WeakKeyDictionary()


def describe_group(group) -> tuple[str, int, int]:
    """(name, rank, size) of a process group or a 1-D DeviceMesh; `ValueError` for anything else."""
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
    return group.group_name, group.rank(), group.size()


def resolve(group_name: str) -> "ProcessGroup":
    """The process group of a name: what operators are given, as `torch.compile` has no type for groups."""
    from torch.distributed.distributed_c10d import _resolve_process_group  # pyright: ignore

    return _resolve_process_group(group_name)  # pyright: ignore[reportArgumentType]


def agree(group: "ProcessGroup", **facts) -> None:
    """Return if all ranks of `group` call with equal `facts` (hashable), or did so before.

    `ValueError`, the same on every rank, names what differs, or the error that a rank reported in place of its facts.
    `RuntimeError` if some rank reports nothing for ZIGZAG_AGREEMENT_TIMEOUT seconds (default 120).
    """
    history = _histories.setdefault(group, _History())
    key = tuple(facts.items())
    if key not in history.seen:
        compare(group, facts)
        history.seen.add(key)


def refuse(group: "ProcessGroup", error: Exception) -> NoReturn:
    """Raise what is wrong with this rank's call, on the ranks that wait in `agree` too."""
    try:
        compare(group, {"error": str(error)}, REFUSAL_SECONDS)
    except ValueError as joint:
        if isinstance(error, ValueError):
            raise joint from None
    except RuntimeError as alone:
        error.add_note(f"The other ranks could not be told: {alone}")
    raise error


def compare(group: "ProcessGroup", report: dict[str, Any], patience: float = math.inf) -> None:
    """`agree` that always asks: every rank reports, rank 0 compares, and all hear its verdict.

    A rank waits for the others no longer than `patience` seconds.
    """
    history = _histories.setdefault(group, _History())
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
    """Indices of the keys that do not appear in time."""
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
    """("difference" or "absence", what is wrong with the reports by rank): an empty text if all are there and equal."""
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
    """{value: ranks that have it}"""
    result = {}
    for rank, value in values.items():
        result.setdefault(value, []).append(rank)
    return result


def _ranks(ranks: list[int]) -> str:
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    more = f" and {len(ranks) - _NAMED_RANKS} more" if len(ranks) > _NAMED_RANKS else ""
    return f"ranks {', '.join(map(str, ranks[:_NAMED_RANKS]))}{more}"
