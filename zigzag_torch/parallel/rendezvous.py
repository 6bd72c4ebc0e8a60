"""Ranks of a group meet in its store: each leaves a report, and all of them hear one verdict.

The store holds the number of the open round, one report for each rank, and three keys for each of the last rounds. A
rank that joins a round reads the number of the round from the store and keeps no count of its own, so that no error
can put the ranks out of step. A round ends once, with the first verdict that any rank writes: when all ranks have
reported, or when one of them has waited long enough. A rank that comes later opens the next round.

Every rank needs about ten short operations, however many ranks there are. None of them waits inside the store, whose
client serves one thread at a time. Only a rank that has to say how reports differ reads all of them.
"""

import hashlib
import json
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

Report = dict[str, str]

AGREED, DIFFERENCE, ABSENCE = "agreed", "difference", "absence"
_ROUND = "zigzag/round"
_LONGEST_PAUSE = 0.1  # seconds between two looks at the store; the first pauses are shorter
_DIFFERENT = 1 << 32  # counts the reports that differ from the first, above the count of all reports
_NAMED_RANKS, _NAMED_DIFFERENCES = 8, 3


class Verdict(NamedTuple):
    """The end of a round: its `kind`, the words for it, and the ranks concerned, None for all."""

    kind: str
    message: str
    ranks: list[int] | None


class Seat(NamedTuple):
    """The place of this rank among the `size` ranks that meet in `store`."""

    store: "Store"
    rank: int
    size: int


def meet(
    seat: Seat, report: Report, timeout: float, absence: Callable[[list[int]], str], patience: float | None = None
) -> Verdict:
    """Return the verdict of the ranks that report at the same time as this one.

    After `timeout` seconds this rank ends the round with the words `absence(ranks that have not reported)`. With a
    `patience` it does not end the round: it waits no longer than that, and leaves its report to ranks that come later.
    """
    started = time.monotonic()
    while True:
        # A round can end without this rank, by the verdict of ranks that waited longer: then it reports again, in the
        # next one.
        number = _join(seat, report, absence)
        verdict = _hear(seat, number, started, timeout, absence, patience)
        if verdict is not None:
            return verdict


def digest_of(report: Report) -> int:
    """Return 62 bits that tell `report` from others."""
    text = json.dumps(report, sort_keys=True)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 2


def _join(seat: Seat, report: Report, absence: Callable[[list[int]], str]) -> int:
    """Leave the report of this rank in the open round, and return the number of the round."""
    store, rank, size = seat
    number = store.add(_ROUND, 0)
    while rank in _reports(seat, number, [rank]):  # of an earlier call, which did not wait for the end of the round
        _end(seat, number, _judge(seat, number, absence))
        number = store.add(_ROUND, 0)
    # The report is written before it is counted: whoever counts the last one finds all of them.
    store.set(_report_key(rank), json.dumps((number, report)))
    digest = str(digest_of(report))
    # The first report of a round is the one that others are compared with, by digest: whoever finds another counts as
    # differing.
    differs = store.compare_set(_first_key(number), "", digest) != digest.encode()
    # One counter has both numbers, so that one atomic addition says whether this report was the last, and whether any
    # differed.
    differing, reported = divmod(store.add(_count_key(number), 1 + _DIFFERENT * differs), _DIFFERENT)
    if reported == size:
        _end(seat, number, _judge(seat, number, absence) if differing else Verdict(AGREED, "", None))
    return number


def _hear(
    seat: Seat,
    number: int,
    started: float,
    timeout: float,
    absence: Callable[[list[int]], str],
    patience: float | None,
) -> Verdict | None:
    """Wait for the verdict of round `number`; None if the round ended before it saw the report of this rank."""
    store, rank, size = seat
    while True:
        if store.check([_verdict_key(number)]):
            verdict = Verdict(*json.loads(store.get(_verdict_key(number))))
            return verdict if verdict.ranks is None or rank in verdict.ranks else None
        waited = time.monotonic() - started
        if patience is not None and waited >= min(patience, timeout):
            absent = [peer for peer in range(size) if peer not in _reports(seat, number, range(size))]
            return Verdict(ABSENCE, absence(absent), [rank])
        if waited >= timeout:
            # Adding 0 reads the number. A round that has moved on without a verdict that this rank can see is over for
            # it.
            if store.add(_ROUND, 0) == number:
                _end(seat, number, _judge(seat, number, absence))
            elif not store.check([_verdict_key(number)]):  # the verdict may be newer than the look for it above
                return None
        else:
            time.sleep(min(max(waited / 8, 0.001), _LONGEST_PAUSE, timeout - waited))


def _end(seat: Seat, number: int, verdict: Verdict) -> None:
    """End round `number` with `verdict`, unless it has ended."""
    store = seat.store
    # Only the first verdict is kept, so that every rank hears the same one. The number of the round is raised once,
    # whoever ends it.
    store.compare_set(_verdict_key(number), "", json.dumps(verdict))
    store.compare_set(_ROUND, str(number), str(number + 1))
    for key in (_first_key, _count_key, _verdict_key):  # ranks may still have to read the last verdict, not older ones
        store.delete_key(key(number - 2))


def _judge(seat: Seat, number: int, absence: Callable[[list[int]], str]) -> Verdict:
    """Return the verdict on the reports that are there."""
    reports = _reports(seat, number, range(seat.size))
    absent = [rank for rank in range(seat.size) if rank not in reports]
    return Verdict(*_compare(reports, absent, absence), list(reports))


def _reports(seat: Seat, number: int, ranks) -> dict[int, Report]:
    """Return {rank: report} of the `ranks` that have reported in round `number`."""
    reports = {}
    for rank in ranks:
        key = _report_key(rank)
        if seat.store.check([key]):  # the store would wait for a key that is not there
            of_round, report = json.loads(seat.store.get(key))
            if of_round == number:
                reports[rank] = report
    return reports


def _compare(reports: dict[int, Report], absent: list[int], absence: Callable[[list[int]], str]) -> tuple[str, str]:
    """Return (kind, message) of the verdict on `reports`."""
    # A fault that a rank reports outweighs everything else: the other reports are then of calls that were right.
    errors = _ranks_by({rank: report.get("error") for rank, report in reports.items()})
    if list(errors) != [None]:
        if len(errors) == 1 and not absent:
            return DIFFERENCE, next(iter(errors))
        return DIFFERENCE, "; ".join(f"{named(ranks)}: {error}" for error, ranks in errors.items() if error)
    if absent:
        return ABSENCE, absence(absent)
    differences = []
    for name in dict.fromkeys(name for report in reports.values() for name in report):
        values = _ranks_by({rank: report.get(name, "nothing") for rank, report in reports.items()})
        if len(values) > 1:
            held = (f"{named(ranks)} {'has' if len(ranks) == 1 else 'have'} {x}" for x, ranks in values.items())
            differences.append(f"{name}: {', '.join(held)}")
            if name == "call" or len(differences) == _NAMED_DIFFERENCES:
                break  # another call has other facts
    if not differences:
        return AGREED, ""
    return DIFFERENCE, f"expected the same call on every rank of the group, got {'; '.join(differences)}"


def _ranks_by(values: dict) -> dict:
    """Return {value: ranks that have it}."""
    result = {}
    for rank, value in values.items():
        result.setdefault(value, []).append(rank)
    return result


def named(ranks: list[int]) -> str:
    """Return `ranks` in words, the first of them if there are many."""
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    more = f" and {len(ranks) - _NAMED_RANKS} more" if len(ranks) > _NAMED_RANKS else ""
    return f"ranks {', '.join(map(str, ranks[:_NAMED_RANKS]))}{more}"


def _report_key(rank: int) -> str:
    return f"zigzag/report/{rank}"


def _first_key(number: int) -> str:
    return f"zigzag/{number}/first"


def _count_key(number: int) -> str:
    return f"zigzag/{number}/count"


def _verdict_key(number: int) -> str:
    return f"zigzag/{number}/verdict"
