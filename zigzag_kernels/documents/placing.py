"""Placing whole documents on ranks so that their rows fit and no rank has too much work.

Documents are dealt out longest first to the rank with the smallest load (Graham, 1969). Load is the larger of rows and
work, each as a share of its limit, or the sum of both shares: now one is better, now the other. Exchanges of documents
between the worst rank and the ranks with the smallest loads then reduce the excess.
"""

import heapq
from dataclasses import dataclass
from typing import NamedTuple

TRIED_RANKS = 16  # with the smallest loads, before a document goes where it does not fit
PARTNERS = 32  # ranks that the worst rank may exchange documents with
EXCHANGES = 300
PLACING = 6  # steps of effort for each document that is dealt out


class Document(NamedTuple):
    """A document of the planner: its number in the batch, its tokens, and its visible scores."""

    number: int
    tokens: int
    work: int


class Effort:
    """The number of steps, of less than a microsecond each, that a search may still take.

    A count, unlike a clock, ends the search at the same point on all ranks.
    """

    def __init__(self, steps: int):
        self.steps = steps

    def spend(self, steps: int) -> bool:
        """Take `steps` away; return whether any are left."""
        self.steps -= steps
        return self.steps > 0


@dataclass(frozen=True)
class Limits:
    """The rows, work and documents that one rank may have for whole documents."""

    rows: int
    work: float
    documents: int

    def excess(self, rows: int, work: int) -> float:
        """Return the larger of rows and work as a share of its limit: at most 1 where both are kept."""
        return max(rows / self.rows if self.rows else float(rows), work / self.work)

    def total(self, rows: int, work: int) -> float:
        """Return the sum of rows and work as shares of their limits."""
        return (rows / self.rows if self.rows else float(rows)) + work / self.work


class Placement:
    """The whole documents of every rank, and the rows and work of every rank."""

    def __init__(
        self,
        documents: list[Document],
        work: list[int],
        limits: Limits,
        by_sum: bool = False,
        gives_up: bool = False,
    ):
        """Deal out `documents`, longest first; a document for which no tried rank has rows exceeds the limits.

        `work` is what ranks have beforehand, below 0 where others have more. Loads are sums of shares if `by_sum`, and
        otherwise the larger share. One that `gives_up` ends with the first document beyond the limits.
        """
        load = limits.total if by_sum else limits.excess
        self.limits = limits
        self.documents: list[list[Document]] = [[] for _ in work]
        self.rows, self.work = [0] * len(work), list(work)
        self.unplaced = 0  # tokens of documents that no rank has an entry for, or of one that was given up
        heap = [(load(0, scores), rank) for rank, scores in enumerate(work)] if limits.documents else []
        heapq.heapify(heap)
        for document in documents:
            if not heap:
                self.unplaced += document.tokens
                continue
            passed = []
            # Ranks with a small load may yet have too few rows, where they have little work: they are passed over.
            while heap and len(passed) < TRIED_RANKS and self.rows[heap[0][1]] + document.tokens > limits.rows:
                passed.append(heapq.heappop(heap))
            # If no rank that was tried has rows, the document goes to the one with the smallest load, and exceeds its
            # limit.
            chosen = heapq.heappop(heap) if heap and len(passed) < TRIED_RANKS else passed.pop(0)
            for entry in passed:
                heapq.heappush(heap, entry)
            rank = chosen[1]
            self._add(rank, document)
            if gives_up and limits.excess(self.rows[rank], self.work[rank]) > 1:
                self.unplaced += document.tokens
                return
            # A rank without a free entry leaves the heap.
            if len(self.documents[rank]) < limits.documents:
                heapq.heappush(heap, (load(self.rows[rank], self.work[rank]), rank))

    @property
    def excess(self) -> float:
        """The largest `Limits.excess` of all ranks."""
        if self.unplaced:
            return float("inf")
        return max(map(self.limits.excess, self.rows, self.work))

    @property
    def tokens_too_many(self) -> int:
        """Tokens that have no row within the limits."""
        return self.unplaced + sum(max(rows - self.limits.rows, 0) for rows in self.rows)

    def improve(self, effort: Effort) -> None:
        """Exchange documents until the limits are kept, no exchange makes the worst rank better, or effort ends."""
        if self.unplaced or not self.limits.rows:
            return
        excess = [*map(self.limits.excess, self.rows, self.work)]
        ranks = range(len(excess))
        for _ in range(EXCHANGES):
            worst = max(ranks, key=excess.__getitem__)
            if excess[worst] <= 1 or not self._exchange(worst, excess, effort):
                return

    def _exchange(self, worst: int, excess: list[float], effort: Effort) -> bool:
        """Give one document of `worst` away for none, one or two of another rank; return whether any exchange helps."""
        limits, best, chosen = self.limits, excess[worst], None
        rows, work = self.rows, self.work
        # Partners are the ranks with the smallest sums: an exchange should ease rows or work, whichever is in excess.
        load = [*map(limits.total, rows, work)]
        effort.spend(2 * len(rows))
        for rank in heapq.nsmallest(PARTNERS, range(len(rows)), key=load.__getitem__):
            returns = _up_to_two(self.documents[rank]) if rank != worst else []
            if not effort.spend(len(returns) * len(self.documents[worst])):
                return False
            for given in self.documents[worst]:
                for returned, tokens, scores in returns:
                    more, heavier = given.tokens - tokens, given.work - scores
                    # An exchange that takes neither rows nor work from the worst rank cannot help it.
                    if not (more > 0 or heavier > 0):
                        continue
                    grown = rank if not returned else worst
                    if len(returned) != 1 and len(self.documents[grown]) >= limits.documents:
                        continue
                    # Both ranks count: the excess must not just move to the other one.
                    after = max(
                        limits.excess(rows[worst] - more, work[worst] - heavier),
                        limits.excess(rows[rank] + more, work[rank] + heavier),
                    )
                    if after < best:
                        best, chosen = after, (rank, given, returned)
        if chosen is None:
            return False
        rank, given, returned = chosen
        self._move(worst, rank, given)
        for document in returned:
            self._move(rank, worst, document)
        for changed in (worst, rank):
            excess[changed] = limits.excess(rows[changed], work[changed])
        return True

    def _add(self, rank: int, document: Document) -> None:
        self.documents[rank].append(document)
        self.rows[rank] += document.tokens
        self.work[rank] += document.work

    def _move(self, source: int, target: int, document: Document) -> None:
        self.documents[source].remove(document)
        self.rows[source] -= document.tokens
        self.work[source] -= document.work
        self._add(target, document)


def _up_to_two(documents: list[Document]) -> list[tuple[tuple[Document, ...], int, int]]:
    """Return (documents, tokens, work) of no document, of each one, and of each pair of the first 16."""
    result: list[tuple[tuple[Document, ...], int, int]] = [((), 0, 0)]
    result += [((x,), x.tokens, x.work) for x in documents]
    # All pairs of many documents would be too many; the first ones are mostly the longest.
    few = documents[:16]
    for i, x in enumerate(few):
        result += [((x, y), x.tokens + y.tokens, x.work + y.work) for y in few[i + 1 :]]
    return result
