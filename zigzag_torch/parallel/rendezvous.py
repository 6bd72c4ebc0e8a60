"""Meetings of the ranks of a group in its store: each leaves a report, and all get the same verdict.

The store holds the number of the open round, one report for each rank, and three keys for each of the last rounds. A
rank that joins a round reads its number from the store and does not count rounds itself, so that no error can put the
ranks out of step. A round ends with the first verdict that any rank writes: when all ranks have reported, or when one
of them has waited long enough. A rank that comes later joins the next round.

Every rank needs about ten short operations, however many ranks there are. No operation waits inside the store, because
its client serves one thread at a time. A rank reads all reports only if they differ and it has to say how.
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
_LONGEST_PAUSE = 0.1  # seconds between two reads of the store; the first pauses are shorter
_DIFFERENT = 1 << 32  # the upper bits of a counter count differing reports, the lower 32 bits count all reports
_NAMED_RANKS, _NAMED_DIFFERENCES = 8, 3


class Verdict(NamedTuple):
    """The result of a round: its `kind`, a message, and the ranks that reported, or None for all ranks."""

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

    After `timeout` seconds this rank ends the round, with the message `absence(ranks that have not reported)`. With a
    `patience`, in seconds, it does not end the round: it stops waiting after that time, and its report stays for ranks
    that come later.
    """
    started = time.monotonic()
    while True:
        # Ranks that have waited long enough may end a round before they see this rank's report. This rank then reports
        # again in the next round.
        number = _join(seat, report, absence)
        verdict = _hear(seat, number, started, timeout, absence, patience)
        if verdict is not None:
            return verdict


def digest_of(report: Report) -> int:
    """Return a 62-bit hash of `report`."""
    text = json.dumps(report, sort_keys=True)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 2


def _join(seat: Seat, report: Report, absence: Callable[[list[int]], str]) -> int:
    """Leave the report of this rank in the open round, and return the number of the round."""
    store, rank, size = seat
    number = store.add(_ROUND, 0)
    while rank in _reports(seat, number, [rank]):  # this rank reported in an earlier call, and did not wait for the end
        _end(seat, number, _judge(seat, number, absence))
        number = store.add(_ROUND, 0)
    # The report is written before it is counted, so that the rank that counts the last report finds all of them.
    store.set(_report_key(rank), json.dumps((number, report)))
    digest = str(digest_of(report))
    # Every report is compared, by digest, with the first report of the round.
    differs = store.compare_set(_first_key(number), "", digest) != digest.encode()
    # One counter has both numbers, so that one atomic addition tells this rank whether its report was the last, and
    # whether any report differs.
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
    """Wait for the verdict of round `number`; return None if the round ended without the report of this rank."""
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
            # Adding 0 reads the number of the open round. If that is a later round, and the verdict of this round has
            # been deleted, this rank has to join the later one.
            if store.add(_ROUND, 0) == number:
                _end(seat, number, _judge(seat, number, absence))
            elif not store.check([_verdict_key(number)]):  # the verdict may have been written after the check above
                return None
        else:
            time.sleep(min(max(waited / 8, 0.001), _LONGEST_PAUSE, timeout - waited))


def _end(seat: Seat, number: int, verdict: Verdict) -> None:
    """End round `number` with `verdict`, unless it has ended."""
    store = seat.store
    # `compare_set` keeps only the first verdict, so that every rank gets the same one. It also raises the number of the
    # open round only once, whichever ranks end the round.
    store.compare_set(_verdict_key(number), "", json.dumps(verdict))
    store.compare_set(_ROUND, str(number), str(number + 1))
    for key in (_first_key, _count_key, _verdict_key):  # ranks may still read the last verdict, but no older ones
        store.delete_key(key(number - 2))


def _judge(seat: Seat, number: int, absence: Callable[[list[int]], str]) -> Verdict:
    """Return the verdict on the reports of round `number` that exist now."""
    reports = _reports(seat, number, range(seat.size))
    absent = [rank for rank in range(seat.size) if rank not in reports]
    return Verdict(*_compare(reports, absent, absence), list(reports))


def _reports(seat: Seat, number: int, ranks) -> dict[int, Report]:
    """Return {rank: report} of the `ranks` that have reported in round `number`."""
    reports = {}
    for rank in ranks:
        key = _report_key(rank)
        if seat.store.check([key]):  # `get` would wait for a key that does not exist
            of_round, report = json.loads(seat.store.get(key))
            if of_round == number:
                reports[rank] = report
    return reports


def _compare(reports: dict[int, Report], absent: list[int], absence: Callable[[list[int]], str]) -> tuple[str, str]:
    """Return (kind, message) of the verdict on `reports`."""
    # An error that a rank reports takes precedence: the other reports describe calls without a fault.
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
                break  # the facts of different calls are not comparable
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
    """Return `ranks` as text, such as "ranks 0, 1", with only the first of many ranks."""
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
