"""`DocumentPlan`: the place of every token of a batch whose long documents are split, while all others stay whole."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, chain, pairwise
from typing import Any, NamedTuple

from ..batch_checks import check_document_lengths, check_parts
from ..checks import DTYPE_BYTES, MAX_ROWS, check_dtype, check_int, check_rank, check_world_size
from ..cost.counts import Mask, Step, visible_scores
from ..layout import chunk_length, padded_length
from ..modes import Layout
from .places import Piece, Places, filled, split_pieces


class Undivided(NamedTuple):
    """The rows and transfers that a rank would have if every document were split, as in the document layout."""

    tokens: int  # rows of a rank
    moved_rows: int  # rows whose K/V a rank receives, for each layer and pass


@dataclass(frozen=True)
class DocumentPlan(Places):
    """A plan says which tokens of a batch each rank holds, in which order, and what that costs.

    `plan_documents` makes a plan. The rows of a rank are, in this order: its whole documents, padding up to
    `whole_tokens` rows, its two chunks of every split document, padding up to `tokens` rows. Both kinds of documents
    keep the order of the batch.

    Attributes:
        lengths: tokens of each document of the batch.
        world_size: number of ranks.
        tokens: rows of each rank.
        split_tokens: rows of each rank for chunks of split documents; they follow the `whole_tokens` rows.
        whole: for each rank, the numbers of its whole documents.
        split: numbers of the documents that are split over all ranks.
        max_documents: number of entries of `whole_lengths`: the most whole documents that a rank may have.
        max_split: number of entries of `split_lengths`: the most split documents.
        mask: the mask for which `work` is predicted.
    """

    split_tokens: int
    whole: tuple[tuple[int, ...], ...]
    split: tuple[int, ...]
    max_documents: int
    max_split: int
    mask: Mask

    @property
    def whole_tokens(self) -> int:
        """Rows of each rank that belong to whole documents and their padding."""
        return self.tokens - self.split_tokens

    @property
    def key(self) -> bytes:
        return repr((self.tokens, self.split_tokens, self.whole, self.split)).encode()

    def pieces(self, rank: int) -> Iterator[Piece]:
        rank, row = check_rank(rank, self.world_size, False), 0
        for document in self.whole[rank]:
            yield Piece(row, document, 0, self.lengths[document])
            row += self.lengths[document]
        row = self.whole_tokens
        yield from split_pieces(self.lengths, self.split, row, rank, self.world_size)

    def whole_lengths(self, rank: int) -> list[int]:
        """Return the lengths of the whole documents of `rank`, with zeros up to `max_documents` entries."""
        documents = self.whole[check_rank(rank, self.world_size, False)]
        return filled([self.lengths[document] for document in documents], self.max_documents)

    def whole_cu_seqlens(self, rank: int) -> list[int]:
        """Return the `max_documents + 1` offsets of the whole documents in the rows of `rank`."""
        return [*accumulate(self.whole_lengths(rank), initial=0)]

    @property
    def split_lengths(self) -> list[int]:
        """The real lengths of the split documents, with zeros up to `max_split` entries."""
        return filled([self.lengths[document] for document in self.split], self.max_split)

    @property
    def split_cu_seqlens(self) -> list[int]:
        """The `max_split + 1` offsets of the split documents over all ranks, each padded to a multiple of `2 * W`.

        They are the `cu_seqlens` of a batch in the document layout, whose local rows begin at row `whole_tokens`.
        """
        return [*accumulate((padded_length(length, self.world_size) for length in self.split_lengths), initial=0)]

    @cached_property
    def serves(self) -> bool:
        """True; `ValueError` unless every document with tokens is whole or split once, in rows that there are.

        `plan_documents` makes no other plans; a plan that was changed by hand may be one.
        """
        check_document_lengths("lengths", self.lengths)
        tokens = check_int("tokens", self.tokens, 0, MAX_ROWS, "a number of rows")
        check_int("split_tokens", self.split_tokens, 0, tokens, f"a number of the {tokens} rows")
        groups = {"max_split": (self.split,), "max_documents": self.whole}
        for name, documents in groups.items():
            if not all(isinstance(numbers, tuple | list) for numbers in (documents, *documents)):
                raise ValueError(f"plan: expected numbers of documents, got whole {self.whole!r}, split {self.split!r}")
            check_int(name, getattr(self, name), max(map(len, documents), default=0))
        if len(self.whole) != self.world_size:
            raise ValueError(f"whole: expected the documents of {self.world_size} ranks, got {len(self.whole)}")
        held = [*chain(*self.whole, self.split)]
        for number in held:
            check_int("plan", number, 0, len(self.lengths) - 1, f"numbers of its {len(self.lengths)} documents")
        times = Counter(held)
        for number, length in enumerate(self.lengths):
            if times[number] > 1 or (length and not times[number]):
                raise ValueError(f"plan: expected document {number} once, whole or split, got {times[number]} times")
        fullest = max(range(self.world_size), key=lambda rank: sum(self.lengths[i] for i in self.whole[rank]))
        split = self.split_cu_seqlens, self.split_lengths
        check_parts(self.whole_cu_seqlens(fullest), *split, self.world_size, self.whole_tokens, tokens)
        return True

    @cached_property
    def work(self) -> tuple[int, ...]:
        """Predicted work of each rank: the number of unmasked scores of one query head in its rows."""
        work = [sum(self._scores(document) for document in documents) for documents in self.whole]
        for length in (self.lengths[document] for document in self.split):
            for rank, scores in enumerate(split_work(length, self.world_size, self.mask)):
                work[rank] += scores
        return tuple(work)

    @property
    def balance(self) -> float:
        """Predicted work of the slowest rank, divided by the mean of all ranks; 1 if there is no work."""
        total = sum(self.work)
        return max(self.work) * self.world_size / total if total else 1.0

    @cached_property
    def real_rows(self) -> tuple[int, ...]:
        """Number of rows of each rank that are not padding."""
        return tuple(sum(piece.tokens for piece in self.pieces(rank)) for rank in range(self.world_size))

    @property
    def moved_rows(self) -> int:
        """Rows whose K/V a rank receives from other ranks, for each layer and pass; only split documents move."""
        return (self.world_size - 1) * self.split_tokens

    @property
    def undivided(self) -> Undivided:
        """The rows and transfers that a rank would have if every document were split."""
        rows = sum(padded_length(length, self.world_size) for length in self.lengths) // self.world_size
        return Undivided(rows, (self.world_size - 1) * rows)

    def moved_bytes(self, kv_heads: int, head_dim: int, dtype: str = "bfloat16") -> int:
        """Return the bytes of K and V that each rank receives in one layer forward.

        K and V have `kv_heads` heads of `head_dim` elements of `dtype`: "float16", "bfloat16" or "float32".
        """
        dtype = check_dtype("dtype", dtype)
        kv_heads, head_dim = check_int("kv_heads", kv_heads, 1), check_int("head_dim", head_dim, 1)
        return 2 * self.moved_rows * kv_heads * head_dim * DTYPE_BYTES[dtype]

    def step(self, *, heads: int, kv_heads: int, head_dim: int, **options) -> Step:
        """Return the attention of this batch for the cost model.

        `heads`, `kv_heads`, `head_dim` and `options` are arguments of `cost.Step`; the plan fills in the others.
        """
        offsets = self.split_cu_seqlens
        shares: dict[str, Any] = self.mask._asdict()
        if self.whole_tokens:
            shares |= {"whole": tuple(tuple(self.whole_lengths(rank)) for rank in range(self.world_size))}
        return Step(
            lengths=tuple(end - start for start, end in pairwise(offsets)),
            real_lengths=tuple(self.split_lengths),
            padding=self.split_tokens - offsets[-1] // self.world_size,
            whole_tokens=self.whole_tokens,
            world_size=self.world_size,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            **shares | options,
        )

    def _scores(self, document: int) -> int:
        length = self.lengths[document]
        return visible_scores(0, length, length, self.mask)


def check_plan(
    plan: DocumentPlan,
    world_size: int,
    *,
    layout: str = Layout.DOCUMENT,
    row_length: int | None = None,
    lengths=None,
    total: int | None = None,
) -> DocumentPlan:
    """Return `plan`; `ValueError` unless it is for `world_size` ranks and the other options have their defaults.

    The plan itself decides the layout, `row_length`, `lengths` and `total`.
    """
    if check_world_size(world_size) != plan.world_size:
        raise ValueError(f"world_size: expected that of the plan, {plan.world_size}, got {world_size}")
    check_no_options(layout=layout, row_length=row_length, lengths=lengths, total=total)
    assert plan.serves
    return plan


def check_no_options(*, layout: str, row_length: int | None, lengths, total: int | None) -> None:
    """Raise `ValueError` unless options that a plan decides have their defaults."""
    if layout != Layout.DOCUMENT:
        raise ValueError(f"layout: expected {Layout.DOCUMENT} with a plan, got {str(layout)!r}")
    for name, given in (("row_length", row_length), ("lengths", lengths), ("total", total)):
        if given is not None:
            raise ValueError(f"{name}: expected None with a plan, got {given!r}")


def split_work(length: int, world_size: int, mask: Mask) -> list[int]:
    """Return each rank's number of unmasked scores of one split document of `length` tokens."""
    if world_size == 1:
        return [visible_scores(0, length, length, mask)]
    if mask == Mask():
        share, missing = split_share(length, world_size, mask)
        work = [share] * world_size
        for rank, scores in missing:
            work[rank] -= scores
        return work
    chunk, last = chunk_length(padded_length(length, world_size), world_size), 2 * world_size - 1
    scores = [visible_scores(number * chunk, chunk, length, mask) for number in range(last + 1)]
    return [scores[rank] + scores[last - rank] for rank in range(world_size)]


def split_share(length: int, world_size: int, mask: Mask) -> tuple[int, list[tuple[int, int]]]:
    """Return a rank's number of scores of a split document, and the (rank, scores) that ranks with padding lack.

    The numbers are exact under a plain causal mask. Under other masks, ranks that hold the beginning have fewer scores.
    """
    chunk, last = chunk_length(padded_length(length, world_size), world_size), 2 * world_size - 1
    if world_size == 1 or not chunk:
        return visible_scores(0, length, length, mask), []
    padded = (last + 1) * chunk
    # The last rank's two chunks are neighbours; under a causal mask every rank has as many scores as the last one.
    share = visible_scores((world_size - 1) * chunk, 2 * chunk, padded, mask)
    missing = []
    for number in range(length // chunk, last + 1):
        lost = visible_scores(number * chunk, chunk, padded, mask) - visible_scores(number * chunk, chunk, length, mask)
        missing.append((min(number, last - number), lost))
    return share, missing
