"""Ranks meet in a store: one verdict for all, whoever comes when, at a cost that does not grow with their number."""

import collections
import random
import threading
import time

import pytest
import torch.distributed as dist

from tests.support.steps import PLENTY
from zigzag_torch.parallel import rendezvous
from zigzag_torch.parallel.rendezvous import ABSENCE, AGREED, DIFFERENCE, Seat

REPORT = {"call": "attention", "causal": "True"}


class Counted:
    """A store that counts its operations, and fails where one would wait while other threads need its client."""

    def __init__(self, store):
        self.store, self.operations = store, collections.Counter()

    def __getattr__(self, name):
        assert name not in ("wait", "barrier"), name
        self.operations[name] += 1
        return getattr(self.store, name)

    def get(self, key):
        assert self.store.check([key]), f"waits for {key}"
        self.operations["get"] += 1
        return self.store.get(key)


def meet(seat, report=REPORT, timeout=PLENTY, patience=None):
    return rendezvous.meet(seat, report, timeout, lambda ranks: f"{rendezvous.named(ranks)} did not come", patience)


def together(*calls):
    """The results of calls that run at the same time."""
    results = [None] * len(calls)

    def run(index):
        results[index] = calls[index]()

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def behind(seat, reports=1):
    """Return when the rank of `seat` has left that many reports."""
    while seat.store.operations["set"] < reports:
        time.sleep(0.001)


@pytest.fixture(params=["hash", "tcp", "file"])
def store(request, tmp_path):
    if request.param == "hash":
        return dist.HashStore()
    if request.param == "tcp":
        return dist.TCPStore("127.0.0.1", 0, 1, True)
    return dist.FileStore(str(tmp_path / "store"), 1)


def seats(store, size):
    return [Seat(Counted(store), rank, size) for rank in range(size)]


def test_all_hear_the_same(store):
    three = seats(store, 3)
    reports = REPORT, REPORT | {"causal": "False"}, REPORT
    for _ in range(3):
        assert {verdict.kind for verdict in together(*(lambda s=s: meet(s) for s in three))} == {AGREED}
        verdicts = together(*(lambda s=s, r=r: meet(s, r) for s, r in zip(three, reports, strict=True)))
        (message,) = {verdict.message for verdict in verdicts}
        assert message.endswith("got causal: ranks 0, 2 have True, rank 1 has False")
        faulty = together(lambda: meet(three[0]), lambda: meet(three[1], {"error": "k: bad"}), lambda: meet(three[2]))
        assert {(verdict.kind, verdict.message) for verdict in faulty} == {(DIFFERENCE, "rank 1: k: bad")}


def test_a_rank_that_is_too_late_finds_a_new_round(store):
    three = seats(store, 3)
    verdicts = together(lambda: (behind(three[1]), meet(three[0], timeout=0.3))[1], lambda: meet(three[1]))
    assert {(verdict.kind, verdict.message) for verdict in verdicts} == {(ABSENCE, "rank 2 did not come")}
    late = meet(three[2], timeout=0.2)  # of the round before it hears nothing
    assert (late.kind, late.message) == (ABSENCE, "ranks 0, 1 did not come")
    assert {verdict.kind for verdict in together(*(lambda s=s: meet(s) for s in three))} == {AGREED}


class EndsMeanwhile(Counted):
    """A store in which another rank ends the round after this one has looked for a verdict, and waits no longer."""

    def __init__(self, store, end):
        super().__init__(store)
        self.end, self.looks = end, 0

    def add(self, key, amount):
        self.looks += key == "zigzag/round"
        if self.looks == 2:  # the first is on joining
            self.looks += 1
            self.end()
        return self.store.add(key, amount)


class LooksLate(Counted):
    """A store in which a rank first looks for a verdict when another rank has ended one more round."""

    def __init__(self, store, ended):
        super().__init__(store)
        self.ended = ended

    def check(self, keys):
        if "verdict" in keys[0]:
            self.ended.wait()
        return self.store.check(keys)


def test_a_rank_that_looks_late_hears_the_verdict_of_its_own_round(store):
    ended = threading.Event()
    first, late = Seat(Counted(store), 0, 2), Seat(LooksLate(store, ended), 1, 2)

    def goes_on():
        verdicts = [meet(first), meet(first, timeout=0.2)]
        ended.set()
        return verdicts

    (agreed, alone), heard = together(goes_on, lambda: meet(late))
    assert (agreed.kind, alone.kind, heard.kind) == (AGREED, ABSENCE, AGREED)


@pytest.mark.parametrize("size", [2, 3])
def test_two_ranks_that_wait_no_longer_at_the_same_time_hear_the_same(store, size):
    others = seats(store, size)
    heard = []
    store_of_first = EndsMeanwhile(store, lambda: heard.append(meet(others[1], timeout=0.0)))
    heard.append(meet(Seat(store_of_first, 0, size), timeout=0.2))
    expected = (AGREED, "") if size == 2 else (ABSENCE, "rank 2 did not come")
    assert [(verdict.kind, verdict.message) for verdict in heard] == [expected, expected]


def test_a_refusal_waits_for_those_who_come_later(store):
    three = seats(store, 3)
    alone = meet(three[1], {"error": "k: bad"}, patience=0.1)
    assert (alone.kind, alone.message) == (ABSENCE, "ranks 0, 2 did not come")
    heard = together(lambda: meet(three[0]), lambda: meet(three[2]))
    assert {verdict.message for verdict in heard} == {"rank 1: k: bad"}
    # It has not been heard when the rank goes on: that ends the round for those who are there.
    meet(three[1], {"error": "k: worse"}, patience=0.1)
    before = [seat.store.operations["set"] for seat in three]
    first, second, third = together(
        lambda: [meet(three[0]), meet(three[0])],
        lambda: (behind(three[0], before[0] + 1), meet(three[1]))[1],
        lambda: (behind(three[1], before[1] + 1), meet(three[2]))[1],
    )
    assert [verdict.message for verdict in first] == ["rank 1: k: worse", ""]
    assert second.kind == third.kind == AGREED


@pytest.mark.parametrize("size", [2, 64])
def test_what_a_meeting_costs(size):
    """Operations of each rank do not grow with the number of ranks, nor keys with that of meetings."""
    store = dist.HashStore()
    keys = []
    for _ in range(5):
        all_seats = seats(store, size)
        together(*(lambda s=s: meet(s) for s in all_seats))
        for seat in all_seats:
            once = seat.store.operations - collections.Counter(check=10**6)
            assert once.total() <= 12, once
        keys.append(store.num_keys())
    assert keys[-1] == keys[-2] <= size + 10


def test_random_programs_end_and_agree(store):
    """Each rank makes calls at times of its own, gives up, and goes on: a call succeeds on all ranks or on none."""
    size, rounds = 4, 12
    for seed in range(10):  # on a busy machine ranks may give up in every call
        heard = heard_by_random_programs(store, size, rounds, seed)
        agreed = [kinds.count(AGREED) for kinds in heard]
        assert len(set(agreed)) == 1, heard
        if 0 < agreed[0] < rounds:
            return
    raise AssertionError(f"ranks have agreed in {agreed[0]} of {rounds} calls, ten times")


def heard_by_random_programs(store, size, rounds, seed):
    heard = [[] for _ in range(size)]

    def program(seat):
        generator = random.Random(size * seed + seat.rank)
        for _ in range(rounds):
            time.sleep(generator.random() * 0.05)
            verdict = meet(seat, timeout=generator.choice((0.02, 1.0, 1.0)))
            heard[seat.rank].append(verdict.kind)

    together(*(lambda s=s: program(s) for s in seats(store, size)))
    return heard
