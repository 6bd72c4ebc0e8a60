"""`Places`: the interface that says which token of a batch each row of each rank holds."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

from ..layout import chunk_length, padded_length


class Piece(NamedTuple):
    """A run of consecutive tokens of one document in consecutive rows of a rank."""

    row: int  # first local row
    document: int  # number of the document in the batch
    position: int  # position of the first token in the document
    tokens: int  # number of tokens


@dataclass(frozen=True)
class Places(ABC):
    """The places of the tokens of a batch in the rows of ranks.

    Attributes:
        lengths: tokens of each document of the batch.
        world_size: number of ranks.
        tokens: rows of each rank.
    """

    lengths: tuple[int, ...]
    world_size: int
    tokens: int

    @abstractmethod
    def pieces(self, rank: int) -> Iterator[Piece]:
        """Yield the pieces of documents that `rank` holds, in the order of its rows."""

    def rows(self, rank: int) -> list[int]:
        """Return the number of the token in the concatenated batch that each row of `rank` holds; -1 for padding."""
        starts, result = self._starts, [-1] * self.tokens
        for row, document, position, tokens in self.pieces(rank):
            first = starts[document] + position
            result[row : row + tokens] = range(first, first + tokens)
        return result

    def label_rows(self, rank: int) -> list[int]:
        """Return the number of the token in the concatenated batch that each row of `rank` has to predict.

        A row predicts the next token of its document. The last token of a document, and padding, have -1.
        """
        starts, result = self._starts, [-1] * self.tokens
        for row, document, position, tokens in self.pieces(rank):
            first = starts[document] + position + 1
            result[row : row + tokens] = range(first, first + tokens)
            if position + tokens == self.lengths[document]:
                result[row + tokens - 1] = -1
        return result

    def positions(self, rank: int) -> list[int]:
        """Return the position of each row of `rank` in its document; 0 for padding."""
        result = [0] * self.tokens
        for row, _document, position, tokens in self.pieces(rank):
            result[row : row + tokens] = range(position, position + tokens)
        return result

    @property
    @abstractmethod
    def key(self) -> bytes:
        """Bytes that differ between different plans for the same documents."""

    @cached_property
    def _starts(self) -> list[int]:
        return [*accumulate(self.lengths, initial=0)]


def split_pieces(
    lengths: Sequence[int], documents: Iterable[int], row: int, rank: int, world_size: int
) -> Iterator[Piece]:
    """Yield the pieces that `rank` holds of the split `documents`, in local rows from `row` on."""
    for document in documents:
        length = lengths[document]
        chunk = chunk_length(padded_length(length, world_size), world_size)
        for number in chunks_of(rank, world_size):
            real = min(chunk, length - number * chunk)
            if real > 0:
                yield Piece(row, document, number * chunk, real)
            row += chunk


def chunks_of(rank: int, world_size: int) -> tuple[int, ...]:
    """Return the numbers of the chunks of a sequence that `rank` holds."""
    return (0,) if world_size == 1 else (rank, 2 * world_size - 1 - rank)


def filled(lengths: list[int], entries: int) -> list[int]:
    """Return `lengths` followed by zeros, `entries` numbers in all."""
    return lengths + [0] * (entries - len(lengths))
