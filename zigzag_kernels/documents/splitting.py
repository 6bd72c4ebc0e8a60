"""The choice of the documents to split: as few as possible, so that all fit and ranks have equal work."""

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from ..cost.counts import Mask, visible_scores
from ..layout import padded_length
from .placing import PLACING, Document, Effort, Limits, Placement
from .plan import split_share

# Limits for the work of the slowest rank, relative to the mean. Quick searches use the first two limits, long searches
# all but the first.
BALANCES = 1.04, 1.05, 1.1, float("inf")
COUNTS = 24  # numbers of split documents that a long search tries
SEARCHES = 8  # the best of these candidates, whose placements a long search improves
STEPS = 400_000  # steps of `Effort` for the long searches of one limit
PADDING_WEIGHTS = 0, 5, 10, 20  # tokens of length that one token of padding outweighs in the order of splitting


@dataclass(frozen=True)
class Candidate:
    """A choice of documents to split, and the other documents, with the rows and the work left for them."""

    split: list[Document]
    others: list[Document]  # longest first
    rows: int  # rows of a rank for whole documents
    share: int  # work of a rank for split documents
    missing: list[tuple[int, int]]  # (rank, work) by which ranks with padding have less than `share`
    work: int  # work of the whole batch
    world_size: int
    max_documents: int | None

    def placement(self, balance: float, by_sum: bool = False, gives_up: bool = False) -> Placement:
        """Place the other documents, where the slowest rank may have `balance` times the mean work."""
        allowed = max(balance * self.work / self.world_size - self.share, 1)
        documents = len(self.others) if self.max_documents is None else self.max_documents
        # `allowed` is the limit without the work of split documents, which is `share` on every rank. Ranks with padding
        # have less than `share`: they begin below 0 and may get more whole documents.
        work = [0] * self.world_size
        for rank, missing in self.missing:
            work[rank] -= missing
        return Placement(self.others, work, Limits(self.rows, allowed, documents), by_sum, gives_up)


@dataclass(frozen=True)
class Batch:
    """The documents of a batch, and the limits that the caller set for a plan."""

    lengths: tuple[int, ...]
    world_size: int
    mask: Mask
    split_above: int | None
    split_tokens: int | None
    max_documents: int | None
    max_split: int | None

    @cached_property
    def documents(self) -> list[Document]:
        """The documents that have tokens, longest first."""
        scores = {length: visible_scores(0, length, length, self.mask) for length in set(self.lengths)}
        documents = [Document(i, length, scores[length]) for i, length in enumerate(self.lengths) if length]
        return sorted(documents, key=lambda document: -document.tokens)

    @property
    def enough_rows(self) -> int:
        """A number of rows with which a plan always exists: all documents are split, or all are on one rank."""
        return max(self.split_rows(self.documents), sum(self.lengths)) + (self.split_tokens or 0)

    def split_rows(self, documents: list[Document]) -> int:
        """Return the rows that `documents` take on each rank if they are split."""
        return sum(padded_length(document.tokens, self.world_size) for document in documents) // self.world_size

    def too_many(self, real: int, tokens: int | None) -> str:
        """Return the error message for a batch that does not fit into `tokens` rows of each rank."""
        named = {name: getattr(self, name) for name in ("split_tokens", "max_documents", "max_split")}
        given = ", ".join(f"{name} = {value}" for name, value in named.items() if value is not None)
        inside = f" within {given}" if given else ""
        if tokens is None:
            return f"lengths: expected documents that fit{inside}, got {len(self.documents)} of {real} tokens"
        over = real - self.world_size * tokens
        if over <= 0:
            over = min(
                (
                    candidate.placement(float("inf"), by_sum).tokens_too_many
                    for _excess, candidate, by_sum in self._closest(tokens, 0, float("inf"), Effort(STEPS))
                ),
                default=self._least_excess(tokens),
            )
            inside = f", padded to multiples of {padded_length(1, self.world_size)} where split,{inside}"
        return (
            f"tokens: expected rows for {real} tokens{inside} on {self.world_size} ranks, got {tokens} rows a rank, "
            f"{over} tokens too many"
        )

    def _least_excess(self, tokens: int) -> int:
        """Return a lower bound of the tokens that have no row, whichever documents are split."""
        least, most = self._counts
        # If the `n` longest documents are split, they take `taken[n]` tokens with padding; the others have `left[n]`.
        padded = (padded_length(document.tokens, self.world_size) for document in self.documents)
        taken = [*accumulate(padded, initial=0)]
        left = [*accumulate((-document.tokens for document in self.documents), initial=sum(self.lengths))]
        excess = []
        for count in range(least, max(most, least) + 1):
            room = taken[count] if self.split_tokens is None else self.world_size * self.split_tokens
            rows = self.world_size * tokens - room
            excess.append(max(taken[count] - room, 0) + max(left[count] - rows, 0))
        return min(excess)

    def search(self, tokens: int, hard: bool = True) -> tuple[list[Document], Placement] | None:
        """Return (split documents, placement of the others) in `tokens` rows of each rank, or None if none is found.

        The search tries few split documents before many. Only if `hard` does it continue with long searches, which
        accept unequal work in the end.
        """
        balances = BALANCES if self.split_above is None else BALANCES[-1:]
        # Quick searches come first; long searches follow if quick ones find no plan.
        for balance in balances[:2]:
            found = self._fewest(tokens, balance)
            if found:
                return found
        for balance in (balances[1:] or balances) if hard else ():
            found = self._improved(tokens, balance, Effort(STEPS))
            if found:
                return found
        return None

    def _improved(self, tokens: int, balance: float, effort: Effort) -> tuple[list[Document], Placement] | None:
        """Return the first split and placement that exchanges of documents bring within all limits, or None."""
        for weight in PADDING_WEIGHTS:
            for _excess, candidate, by_sum in self._closest(tokens, weight, balance, effort):
                placement = candidate.placement(balance, by_sum)
                placement.improve(effort)
                if placement.excess <= 1:
                    return candidate.split, placement
                if not effort.spend(0):
                    return None
        return None

    def _fewest(self, tokens: int, balance: float) -> tuple[list[Document], Placement] | None:
        """Return a split of few tokens, and a placement of the other documents that keeps all limits, or None.

        Usually the longest documents should be split, because they make the work of ranks unequal. But where documents
        have about the same length, and nearly fill the ranks, `_fewest` splits the shortest documents: the rows that
        the whole documents leave free may have room only for the chunks of short ones.
        """
        found = [x for order in self._orders if (x := self._fewest_of(order, tokens, balance))]
        return min(found, key=lambda x: self.split_rows(x[0]), default=None)

    @cached_property
    def _orders(self) -> list[list[Document]]:
        """Two orders in which documents are split: longest first, and shortest first.

        In both, documents longer than `split_above` come first, because they must be split.
        """
        must = self.documents[: self._counts[0]]
        return [self.documents, [*must, *self.documents[len(must) :][::-1]]]

    def _fewest_of(self, order: list[Document], tokens: int, balance: float) -> tuple[list[Document], Placement] | None:
        """Return the result of `_fewest` when documents are split in this `order`."""
        found: dict[int, tuple[list[Document], Placement]] = {}

        def succeeds(count: int) -> bool:
            candidate = self._candidate(order, count, tokens)
            if candidate is None:
                return False
            for by_sum in (False, True):
                placement = candidate.placement(balance, by_sum, gives_up=True)
                if placement.excess <= 1:
                    found[count] = candidate.split, placement
                    break
            return count in found

        least, most = self._counts
        if most < least:
            return None
        # The steps double until a count succeeds. A bisection follows between that count and the last one that failed.
        # A larger count may fail where a smaller one succeeds, so the result is not always the smallest.
        failed, count, step = least - 1, least, 1
        while not succeeds(count) and count < most:
            failed, count, step = count, min(count + step, most), 2 * step
        while count in found and count - failed > 1:
            middle = (failed + count) // 2
            failed, count = (failed, middle) if succeeds(middle) else (middle, count)
        return found[min(found)] if found else None

    @cached_property
    def _counts(self) -> tuple[int, int]:
        """The fewest and the most documents that may be split."""
        above = self.split_above
        least = 0 if above is None else sum(document.tokens > above for document in self.documents)
        most = len(self.documents) if self.max_split is None else min(len(self.documents), self.max_split)
        return least, least if self.world_size == 1 else most

    def _candidate(self, order: list[Document], count: int, tokens: int) -> Candidate | None:
        """Return the candidate that splits the first `count` documents of `order`; None if there are too few rows."""
        split = order[:count]
        others = order[count:] if order is self.documents else sorted(order[count:], key=lambda x: -x.tokens)
        taken = self.split_rows(split)
        room = taken if self.split_tokens is None else self.split_tokens
        rows = tokens - room
        # There are too few rows for the split documents, or for the others even if no row is wasted.
        if taken > room or rows < 0 or rows * self.world_size < sum(document.tokens for document in others):
            return None
        shares = [self._share(document.tokens) for document in split]
        share, missing = sum(share for share, _ in shares), [x for _, missing in shares for x in missing]
        return Candidate(split, others, rows, share, missing, self._work, self.world_size, self.max_documents)

    def _share(self, length: int) -> tuple[int, list[tuple[int, int]]]:
        if length not in self._shares:
            self._shares[length] = split_share(length, self.world_size, self.mask)
        return self._shares[length]

    @cached_property
    def _shares(self) -> dict[int, tuple[int, list[tuple[int, int]]]]:
        return {}

    @cached_property
    def _work(self) -> int:
        return sum(document.work for document in self.documents)

    def _closest(self, tokens: int, weight: int, balance: float, effort: Effort) -> list[tuple[float, Candidate, bool]]:
        """Return (excess, candidate, by_sum) for the candidates that come closest to fitting, the closest first.

        Documents are split in the order of their length minus `weight` times their padding, the largest first.
        """
        least, most = self._counts
        above = self.split_above
        padding = {x.number: padded_length(x.tokens, self.world_size) - x.tokens for x in self.documents}

        def first(document: Document) -> tuple[bool, int]:
            late = above is not None and document.tokens <= above
            return late, weight * padding[document.number] - document.tokens

        # A split document is padded by up to 2 * W - 1 tokens. If rows are scarce, it may be better to split a shorter
        # document that needs less padding.
        order = sorted(self.documents, key=first) if weight else self.documents
        taken = [*accumulate((padding[x.number] + x.tokens for x in order), initial=0)]
        left = [*accumulate((-x.tokens for x in order), initial=sum(x.tokens for x in order))]
        possible = []
        for count in range(least, most + 1):
            room = taken[count] if self.split_tokens is None else self.world_size * self.split_tokens
            if taken[count] <= room and self.world_size * tokens - room >= left[count]:
                possible.append(count)
        # The tried counts are evenly spread over the range, with both ends.
        if len(possible) > COUNTS:
            possible = [possible[i * (len(possible) - 1) // (COUNTS - 1)] for i in range(COUNTS)]
        tried = []
        # Many split documents come first: they leave the fewest whole documents to place, which fit most easily.
        for count in reversed(possible):
            candidate = self._candidate(order, count, tokens)
            assert candidate is not None  # every count in `possible` leaves enough rows
            for by_sum in (True, False):
                tried.append((candidate.placement(balance, by_sum).excess, candidate, by_sum))
            if not effort.spend(2 * PLACING * len(candidate.others)):
                break
        return sorted(tried, key=lambda x: x[0])[:SEARCHES]
