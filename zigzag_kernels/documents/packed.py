"""`PackedBatch`: the documents of a batch in one of the two layouts, padded to fixed shapes."""

import hashlib
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

from ..batch_checks import check_document_lengths
from ..checks import MAX_ROWS, check_int, check_layout, check_rank, check_world_size
from ..layout import MAX_OFFSET, padded_length
from ..modes import Layout
from .places import Piece, Places, chunks_of, filled, split_pieces


@dataclass(frozen=True)
class PackedBatch(Places):
    """The places of the tokens of a batch in one of the two layouts, with padding behind the last document.

    Attributes:
        max_documents: number of entries of `real_lengths`.
        layout: the unit that is cut into `2 * W` chunks: every document, or all documents as one packed row.
    """

    max_documents: int
    layout: Layout

    @property
    def row_length(self) -> int | None:
        """Tokens of the packed row over all ranks, to be passed to `prepare_batch`; None in the document layout."""
        return self.world_size * self.tokens if self.layout is Layout.ROW else None

    @property
    def real_lengths(self) -> list[int]:
        """The lengths of all documents, with zeros up to `max_documents` entries."""
        return filled([*self.lengths], self.max_documents)

    @property
    def cu_seqlens(self) -> list[int]:
        """Offsets of the documents over all ranks; in the document layout every document has its own padding."""
        if self.layout is Layout.ROW:
            return [*accumulate(self.real_lengths, initial=0)]
        return [*accumulate((padded_length(length, self.world_size) for length in self.real_lengths), initial=0)]

    @property
    def key(self) -> bytes:
        return repr((self.layout.value, self.tokens)).encode()

    def pieces(self, rank: int) -> Iterator[Piece]:
        rank = check_rank(rank, self.world_size, False)
        if self.layout is Layout.DOCUMENT:
            yield from split_pieces(self.lengths, range(len(self.lengths)), 0, rank, self.world_size)
            return
        chunk, row = self.tokens // len(chunks_of(rank, self.world_size)), 0
        for number in chunks_of(rank, self.world_size):
            first, end = number * chunk, (number + 1) * chunk
            document = bisect_right(self._starts, first) - 1
            while document < len(self.lengths) and self._starts[document] < end:
                start = max(self._starts[document], first)
                tokens = min(self._starts[document + 1], end) - start
                if tokens > 0:
                    yield Piece(row + start - first, document, start - self._starts[document], tokens)
                document += 1
            row += chunk


def pack_documents(
    lengths: Sequence[int],
    world_size: int,
    *,
    tokens: int | None = None,
    max_documents: int | None = None,
    layout: str = "document",
) -> PackedBatch:
    """Return the places of documents of these `lengths` in `tokens` rows of each rank.

    None for `tokens` or `max_documents` means as few as the batch needs. Raises `ValueError` for a batch that does not
    fit; the error says how many tokens are too many.
    """
    world_size, layout = check_world_size(world_size), check_layout(layout)
    lengths = check_document_lengths("documents", lengths)
    step = padded_length(1, world_size)
    padded = [padded_length(length, world_size) for length in lengths]
    needed = sum(padded) if layout is Layout.DOCUMENT else padded_length(sum(lengths), world_size)
    if tokens is None:
        tokens = needed // world_size
    tokens = check_int("tokens", tokens, 0, MAX_ROWS, f"an int from 0 to {MAX_ROWS}")
    if layout is Layout.ROW and world_size > 1 and tokens % 2:
        raise ValueError(f"tokens: expected an even number of rows with layout 'row', got {tokens}")
    if world_size * tokens > MAX_OFFSET:
        raise ValueError(f"tokens: expected at most {MAX_OFFSET} rows on all ranks, got {tokens} on {world_size} ranks")
    if needed > world_size * tokens:
        what = f", each padded to a multiple of {step}," if layout is Layout.DOCUMENT and world_size > 1 else ""
        raise ValueError(
            f"tokens: expected rows for documents of {sum(lengths)} tokens{what} on {world_size} ranks, got {tokens} "
            f"rows a rank, {needed - world_size * tokens} tokens too many"
        )
    entries = len(lengths) if max_documents is None else check_entries(max_documents, len(lengths))
    return PackedBatch(lengths, world_size, tokens, entries, layout)


def check_entries(max_documents: int, documents: int) -> int:
    """Return `max_documents` as an int; `ValueError` if it is less than the number of `documents` of the batch."""
    entries = check_int("max_documents", max_documents, 0, MAX_ROWS, f"an int from 0 to {MAX_ROWS}")
    if documents > entries:
        raise ValueError(f"max_documents: expected at least the {documents} documents of the batch, got {entries}")
    return entries


def check_labels(lengths: Sequence[int], label_lengths: Sequence[int]) -> None:
    """Raise `ValueError` unless every document has as many labels as tokens."""
    if len(label_lengths) != len(lengths):
        raise ValueError(f"labels: expected those of {len(lengths)} documents, got {len(label_lengths)}")
    for i, (length, labels) in enumerate(zip(lengths, label_lengths, strict=True)):
        if labels != length:
            raise ValueError(f"labels: expected one for each of {length} tokens, got {labels} (document {i})")


def check_not_shifted(own_place: bool, next_token: bool) -> None:
    """Raise `ValueError` for labels that the caller has already shifted to the next token.

    `own_place` says that every label equals the token in its own place, `next_token` that every label equals the next
    token of the document.
    """
    if next_token and not own_place:
        raise ValueError(
            "labels: expected the label of every token in its own place, as in input_ids, got the next token in each "
            "place: labels are shifted here, within each document"
        )


def fingerprint(lengths: Sequence[int], arrays: Iterable[bytes]) -> int:
    """Return a 64-bit hash, as a signed int, of the `lengths` of documents and the bytes of `arrays`."""
    digest = hashlib.blake2b(repr([*lengths]).encode(), digest_size=8)
    for values in arrays:
        digest.update(len(values).to_bytes(8, "little"))
        digest.update(values)
    return int.from_bytes(digest.digest(), "little", signed=True)
