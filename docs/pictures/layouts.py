"""Pictures of the layouts: which tokens of a packed batch each of four ranks holds, and how much work they make."""

from collections.abc import Iterator
from itertools import accumulate

from matplotlib.figure import Figure

from zigzag_kernels.cost.counts import Mask, causal_scores, visible_scores
from zigzag_kernels.documents.packed import PackedBatch
from zigzag_kernels.documents.places import Piece, Places
from zigzag_kernels.documents.plan import DocumentPlan
from zigzag_kernels.documents.planner import plan_documents
from zigzag_kernels.layout import chunk_length, padded_length
from zigzag_kernels.modes import Layout

from .style import FAINT, INK, ON_COLOUR, RANKS, SMALL, blank, box, new_figure

W = len(RANKS)
TOKENS = 32  # of a rank
TOTAL = W * TOKENS
LETTERS = "ABCDEFGHIJ"
DOCUMENTS = PackedBatch((64, 40, 24), W, TOKENS, 3, Layout.DOCUMENT)
LEFT, SCALE = 17, 2.75  # of the strips of ranks, in tokens of the batch


def draw_document_layout() -> Figure:
    """Draw three documents, each cut into eight chunks."""
    batch = DOCUMENTS
    quarters = [
        sum(causal_scores(rank * length // W, length // W) for length in batch.lengths) for rank in range(W)
    ]  # of ranks that hold one contiguous piece of each document
    first, *rest, last = (f"{share:.0f}" for share in _percent(quarters))
    note = f"One contiguous quarter of each document per rank: {first}, {', '.join(rest)} and {last} %."
    return _draw(batch, "Document layout: each document is cut into 8 chunks", note)


def draw_row_layout() -> Figure:
    """Draw a packed row that is cut into eight chunks, wherever its documents lie."""
    batch = PackedBatch((21, 72, 35), W, TOKENS, 3, Layout.ROW)
    return _draw(
        batch, "Row layout: the packed row is cut into 8 chunks", "Documents have any lengths and cross chunks."
    )


def draw_two_parts() -> Figure:
    """Draw one long document that is split over all ranks, and others that stay whole."""
    plan = plan_documents((72, 14, 13, 9, 8, 6, 5), W, tokens=TOKENS)
    return _draw(
        plan,
        "Two parts: A is split, the others stay whole",
        "Only keys and values of A move between ranks. Grey: a row of padding.",
    )


def work(batch: Places) -> list[float]:
    """Return the share of all causal scores, in percent, that each rank computes."""
    pieces = [[(x, batch.lengths[x.document]) for x in batch.pieces(rank)] for rank in range(batch.world_size)]
    return _percent([sum(visible_scores(x.position, x.tokens, n, Mask()) for x, n in rank) for rank in pieces])


def _percent(parts: list[int]) -> list[float]:
    return [100 * part / sum(parts) for part in parts]


def _is_whole(batch: Places, piece: Piece) -> bool:
    return isinstance(batch, DocumentPlan) and piece.document not in batch.split


def _chunks(batch: Places) -> Iterator[tuple[float, int]]:
    """Yield (middle in the batch, number) of every chunk."""
    if isinstance(batch, PackedBatch) and batch.layout is Layout.ROW:
        cut = [(0, TOTAL)]
    else:
        split = batch.split if isinstance(batch, DocumentPlan) else range(len(batch.lengths))
        starts = [*accumulate(batch.lengths, initial=0)]
        cut = [(starts[i], padded_length(batch.lengths[i], W)) for i in split]
    for start, length in cut:
        for number in range(2 * W):
            yield start + (number + 0.5) * chunk_length(length, W), number


def name_of(batch: Places, piece: Piece) -> str:
    """Return the letter of the document, with the number of the chunk where a document is cut."""
    letter, length = LETTERS[piece.document], batch.lengths[piece.document]
    if _is_whole(batch, piece) or (isinstance(batch, PackedBatch) and batch.layout is Layout.ROW):
        return letter
    return f"{letter}{piece.position // chunk_length(padded_length(length, W), W)}"


def _draw(batch: Places, title: str, note: str) -> Figure:
    figure = new_figure(262)
    axes = figure.subplots()
    starts = [*accumulate(batch.lengths, initial=0)]
    for rank, colour in enumerate(RANKS):
        top = 2.35 + rank
        axes.text(LEFT - 2, top + 0.4, f"rank {rank}", ha="right", va="center")
        box(axes, (LEFT, top, TOKENS * SCALE, 0.8), colour=FAINT)  # padding, where no row is drawn over it
        for piece in batch.pieces(rank):
            box(axes, (starts[piece.document] + piece.position, 0.55, piece.tokens, 0.8), colour=colour)
            place = (LEFT + piece.row * SCALE, top, piece.tokens * SCALE, 0.8)
            box(axes, place, name_of(batch, piece), colour)
    for middle, number in _chunks(batch):
        axes.text(middle, 0.95, f"{number}", ha="center", va="center", color=ON_COLOUR, fontsize=SMALL)
    for document, (start, length) in enumerate(zip(starts, batch.lengths, strict=False)):
        box(axes, (start, 0.55, length, 0.8), colour="none", edgecolor=INK, linewidth=1.5)
        axes.text(start + length / 2, 0.4, LETTERS[document], ha="center", va="bottom")
    for rank, share in enumerate(work(batch)):
        axes.text(TOTAL, 2.75 + rank, f"{share:.0f} %", ha="right", va="center")
    axes.text(LEFT, 2.2, "rows of each rank", ha="left", va="bottom", fontsize=SMALL)
    axes.text(TOTAL, 2.2, "work", ha="right", va="bottom", fontsize=SMALL)
    axes.text(0, 6.9, note, ha="left", va="center", fontsize=SMALL)
    axes.set_title(title)
    blank(axes, (-0.5, TOTAL + 0.5), (7.15, -0.25))
    return figure
