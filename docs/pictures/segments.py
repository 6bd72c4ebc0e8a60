"""Pictures of the work of one rank: its segments of each document, and its tiles from light to heavy."""

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Polygon

from zigzag_kernels.layout import row_position

from .layouts import DOCUMENTS, LETTERS, name_of
from .style import FAINT, RANKS, SMALL, blank, new_figure

RANK = 1
GAP = 21  # between documents, in tokens
CHUNK, TILE = 256, 32  # tokens of a chunk, and of a tile


def draw_segments() -> Figure:
    """Draw the keys that the rows of one rank see under a causal mask: a band for each segment."""
    figure = new_figure(262)
    axes = figure.subplots()
    lefts = np.cumsum([0, *(length + GAP for length in DOCUMENTS.lengths)])
    for left, length, letter in zip(lefts, DOCUMENTS.lengths, LETTERS, strict=False):
        axes.add_patch(Polygon([(left, 0), (left, length), (left + length, length)], color=FAINT, linewidth=0))
        axes.text(left + length / 2, -2, f"document {letter}", ha="center", va="bottom")
    for piece in DOCUMENTS.pieces(RANK):
        left, top, bottom = lefts[piece.document], piece.position, piece.position + piece.tokens
        corners = [(left, top), (left, bottom), (left + bottom, bottom), (left + top, top)]
        axes.add_patch(Polygon(corners, color=RANKS[RANK], linewidth=0))
        label = f"{name_of(DOCUMENTS, piece)}: rows {piece.row} to {piece.row + piece.tokens - 1}"
        axes.text(left + bottom + 1, (top + bottom) / 2, label, va="center", fontsize=SMALL)
    blank(axes, (-1, lefts[-1] - 2), (max(DOCUMENTS.lengths) + 1, -9))
    axes.set(aspect="equal", xlabel="keys", ylabel="queries")
    axes.set_title(f"The segments of rank {RANK}, and what their rows see")
    return figure


def draw_tiles() -> Figure:
    """Draw the keys that the tiles of each rank see: from opposite ends of its two chunks, sums are equal."""
    ranks = len(RANKS)
    figure = new_figure(260)
    for rank, (axes, colour) in enumerate(zip(figure.subplots(1, ranks, sharey=True), RANKS, strict=True)):
        last_rows = np.arange(TILE - 1, 2 * CHUNK, TILE)
        seen = np.array([row_position(int(row), 2 * ranks * CHUNK, rank, ranks) + 1 for row in last_rows])
        early, late = np.split(seen, 2)
        pairs = np.arange(CHUNK // TILE)
        axes.bar(pairs, late[::-1], color=colour, width=0.85)
        axes.bar(pairs, early, bottom=late[::-1], color=FAINT, width=0.85)
        axes.set(title=f"rank {rank}", xticks=[], facecolor="none")
    figure.axes[0].set_ylabel("keys seen by a pair of tiles")
    figure.supxlabel("colour: a tile of the late chunk; grey: the tile of the early chunk beside it", fontsize=SMALL)
    return figure
