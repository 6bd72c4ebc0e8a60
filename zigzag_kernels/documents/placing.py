"""The placement of whole documents on ranks, so that their rows fit and no rank has too much work.

Each document, longest first, goes to the rank with the smallest load (Graham, 1969). The rows and the work of a rank
are each expressed as a share of its limit. Its load is the larger of the two shares, or their sum: neither definition
is always better, so callers try both. Then the worst rank exchanges documents with the ranks that have the smallest
loads.
"""

import heapq
from dataclasses import dataclass
from typing import NamedTuple

TRIED_RANKS = 16  # ranks without enough rows that are passed over before a document is placed where it does not fit
PARTNERS = 32  # ranks that the worst rank may exchange documents with
EXCHANGES = 300  # most exchanges of one placement
PLACING = 6  # steps of effort that placing one document costs


class Document(NamedTuple):
    """A document of the planner: its number in the batch, its tokens, and its work in unmasked scores."""

    number: int
    tokens: int
    work: int


class Effort:
    """The number of steps that a search may still take; a step takes less than a microsecond.

    Unlike a time limit, a number of steps ends the search at the same point on all ranks.
    """

    def __init__(self, steps: int):
        self.steps = steps

    def spend(self, steps: int) -> bool:
        """Take `steps` away; return whether any are left."""
        self.steps -= steps
        return self.steps > 0


@dataclass(frozen=True)
class Limits:
    """The most rows, work and documents that one rank may have for whole documents."""

    rows: int
    work: float
    documents: int

    def excess(self, rows: int, work: int) -> float:
        """Return the larger of the shares of rows and work; it is at most 1 if both limits are kept."""
        return max(rows / self.rows if self.rows else float(rows), work / self.work)

    def total(self, rows: int, work: int) -> float:
        """Return the sum of the shares of rows and work."""
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
        """Place `documents`, longest first; a document that no tried rank has rows for is placed beyond the limits.

        `work` is the work that each rank has beforehand, relative to the limit; it may be negative. The load of a rank
        is the sum of its shares if `by_sum`, otherwise the larger share. With `gives_up`, placing ends with the first
        document that exceeds the limits.
        """
        load = limits.total if by_sum else limits.excess
        self.limits = limits
        self.documents: list[list[Document]] = [[] for _ in work]
        self.rows, self.work = [0] * len(work), list(work)
        self.unplaced = 0  # tokens of documents that no rank has an entry for, or of the document that was given up
        heap = [(load(0, scores), rank) for rank, scores in enumerate(work)] if limits.documents else []
        heapq.heapify(heap)
        for document in documents:
            if not heap:
                self.unplaced += document.tokens
                continue
            passed = []
            # A rank with little work has a small load even if its rows are nearly full; such ranks are passed over.
            while heap and len(passed) < TRIED_RANKS and self.rows[heap[0][1]] + document.tokens > limits.rows:
                passed.append(heapq.heappop(heap))
            # If no tried rank has enough rows, the document goes to the rank with the smallest load and exceeds its
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
        """Number of tokens for which there is no row within the limits."""
        return self.unplaced + sum(max(rows - self.limits.rows, 0) for rows in self.rows)

    def improve(self, effort: Effort) -> None:
        """Exchange documents until the limits are kept, no exchange helps the worst rank, or the effort is used up."""
        if self.unplaced or not self.limits.rows:
            return
        excess = [*map(self.limits.excess, self.rows, self.work)]
        ranks = range(len(excess))
        for _ in range(EXCHANGES):
            worst = max(ranks, key=excess.__getitem__)
            if excess[worst] <= 1 or not self._exchange(worst, excess, effort):
                return

    def _exchange(self, worst: int, excess: list[float], effort: Effort) -> bool:
        """Make the best exchange of one document of `worst` for none, one or two of another rank.

        Return whether any exchange helps.
        """
        limits, best, chosen = self.limits, excess[worst], None
        rows, work = self.rows, self.work
        # Partners are the ranks with the smallest sums of shares, which have both rows and work to spare.
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
                    # The excess of both ranks counts, so that it does not just move from one to the other.
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
    # There are too many pairs of many documents; the first documents are mostly the longest.
    few = documents[:16]
    for i, x in enumerate(few):
        result += [((x, y), x.tokens + y.tokens, x.work + y.work) for y in few[i + 1 :]]
    return result
