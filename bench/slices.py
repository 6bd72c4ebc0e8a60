"""One rank's rows as an ordinary packed batch, for attentions without a zigzag layout."""

from itertools import accumulate
from typing import NamedTuple

import torch

import zigzag_torch
from zigzag_kernels.cost import Mask, visible_scores
from zigzag_torch.compat import flash2


class Piece(NamedTuple):
    """Some successive rows of one document."""

    rows: int
    position: int  # of the first row in its document
    start: int  # of the document in the whole batch
    length: int  # of the document
    causal: bool

    @property
    def keys(self) -> int:
        """Keys of the document up to the last visible one; a window may hide the first of them."""
        return self.position + self.rows if self.causal else self.length


class Slices(NamedTuple):
    """All pieces of a rank, one after the other, with the keys of each piece."""

    rows: torch.Tensor  # of the gathered buffer, in the order in which they are copied together
    lengths: flash2.Lengths

    def spread(self, x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """Return gradients of the copied rows, summed into the layout of the gathered buffer in float32."""
        return torch.zeros_like(like, dtype=torch.float32).index_add_(0, self.rows, x.float())


def form_of(case) -> dict:
    """Return the arguments of `shard` and `prepare_batch` that say which layout `case` has."""
    return {"layout": "row", "row_length": case.total} if case.layout == "row" else {}


def tokens_of(case, rank: int) -> torch.Tensor:
    """Return the number of the token in the whole batch that each row of `rank` holds."""
    bounds = torch.tensor(case.cu_seqlens)
    return zigzag_torch.shard(torch.arange(case.total), bounds, rank, case.world_size, **form_of(case))


def pieces_of(case, rank: int) -> list[Piece]:
    """Return the runs of successive tokens of one document in the rows of `rank`, in their order.

    Without a causal mask all rows of a document are one piece, since they see the same keys.
    """
    own, starts = tokens_of(case, rank), [*accumulate(case.lengths, initial=0)][:-1]
    documents = torch.searchsorted(torch.tensor(case.cu_seqlens), own, right=True) - 1
    breaks = documents.diff() != 0
    if case.causal:
        breaks |= own.diff() != 1
    ends = [*(breaks.nonzero().flatten() + 1).tolist(), len(own)]
    firsts = [0, *ends[:-1]]
    return [
        Piece(end - first, int(own[first]) - starts[document], starts[document], case.lengths[document], case.causal)
        for first, end, document in zip(firsts, ends, documents[firsts].tolist(), strict=True)
    ]


def scores_of(case, rank: int) -> int:
    """Return the number of unmasked scores of one query head in the rows of `rank`."""
    mask = Mask(case.causal, case.window_size, case.attention_chunk)
    if not case.causal and case.window_size != (-1, -1):
        raise NotImplementedError("window_size: expected a causal mask, got none")  # a piece has no one position
    return sum(visible_scores(piece.position, piece.rows, piece.length, mask) for piece in pieces_of(case, rank))


def slices(case, rank: int, device) -> Slices:
    """Return the pieces of `rank`, and where the keys of each lie in the gathered buffer."""
    pieces = pieces_of(case, rank)
    tokens = torch.cat([tokens_of(case, x) for x in range(case.world_size)])
    places = torch.cat([torch.arange(piece.start, piece.start + piece.keys) for piece in pieces])
    queries, keys = [piece.rows for piece in pieces], [piece.keys for piece in pieces]
    offsets = (torch.tensor([*accumulate(x, initial=0)], dtype=torch.int32, device=device) for x in (queries, keys))
    return Slices(torch.argsort(tokens)[places].to(device), flash2.Lengths(*offsets, max(queries), max(keys)))
