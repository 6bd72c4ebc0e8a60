"""Pictures of masks: which keys each row sees, and which blocks of keys a kernel reads for it."""

from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from tests.support.device_code import in_numpy
from zigzag_kernels.portable.ranges import visible_key_range
from zigzag_kernels.segments.lookup import key_index
from zigzag_kernels.segments.ranges import keys_of_positions, positions_seen

from .style import BLUE, FAINT, INK, ORANGE, PAPER, RANKS, blank, new_figure

TOKENS, TILE = 24, 4  # of the document; rows of a tile, and keys of a block


class Panel(NamedTuple):
    """One mask; the fields mean what the arguments of `zigzag_attention` mean."""

    title: str
    left: int = -1
    chunk: int = 0
    sink: bool = False


PANELS = (
    Panel("causal=True"),
    Panel("window_size=(6, 0)", left=6),
    Panel("attention_chunk=8", chunk=8),
    Panel("sinks, window_size=(6, 0)", left=6, sink=True),
)


class Cells(NamedTuple):
    """Two masks over all pairs of a row and a key, `[TOKENS, TOKENS]`."""

    seen: np.ndarray
    read: np.ndarray  # the kernel multiplies the pair: its block of keys is read for the tile of the row
    masked: np.ndarray  # ... and the block needs the mask


def find_cells(panel: Panel) -> Cells:
    """Return the `Cells` of a mask by the rules of the kernels."""
    names = {"positions_seen": in_numpy(positions_seen), "key_index": in_numpy(key_index)}
    names["keys_of_positions"] = in_numpy(keys_of_positions, **names)
    find = in_numpy(visible_key_range, **names)
    document = SimpleNamespace(
        real=TOKENS, early_position=0, early_keys=TOKENS, late_position=TOKENS, n_keys=TOKENS, place=0
    )
    constants = SimpleNamespace(
        GROUP=1, BLOCK_M=TILE, BLOCK_N=TILE, SLOTS=1, CAUSAL=True, LEFT=panel.left, RIGHT=-1, CHUNK=panel.chunk
    )
    cells = Cells(*(np.zeros((TOKENS, TOKENS), bool) for _ in Cells._fields))
    keys = np.arange(TOKENS)
    for row in range(0, TOKENS, TILE):
        rows = row + np.arange(TILE)
        visible = find(SimpleNamespace(row=row, q_len=TOKENS), 0, document, rows, constants)
        begin, end = (np.broadcast_to(x, TILE)[:, None] for x in visible.by_row)
        cells.seen[rows] = (keys >= begin) & (keys < end)
        blocks = -(-visible.end // TILE) * TILE
        cells.read[rows] = (keys >= visible.begin) & (keys < blocks)
        cells.masked[rows] = cells.read[rows] & ((keys < visible.low_end) | (keys >= visible.whole_end))
    return cells


COLOURS = {
    "whole block, no mask needed": BLUE,
    "seen, in a block with a mask": RANKS[0],
    "read, but hidden by the mask": FAINT,
    "never read": PAPER,
}


def draw_ranges() -> Figure:
    """Draw what a tile of rows reads under four masks."""
    figure = new_figure(672)
    for axes, panel in zip(figure.subplots(2, 2).flat, PANELS, strict=True):
        _draw_panel(axes, panel)
    handles = [
        Rectangle((0, 0), 1, 1, facecolor=colour, edgecolor=INK, linewidth=0.6, label=name)
        for name, colour in COLOURS.items()
    ]
    handles.append(Rectangle((0, 0), 1, 1, facecolor=ORANGE, edgecolor=INK, linewidth=0.6, label="sink, no key"))
    figure.legend(handles=handles, loc="outside lower center", ncols=2, handlelength=1, handleheight=1)
    return figure


def _draw_panel(axes: Axes, panel: Panel) -> None:
    cells = find_cells(panel)
    whole, edge, hidden, _ = COLOURS.values()
    kinds = np.where(cells.seen, np.where(cells.masked, 2, 1), 3) * cells.read  # 0 is never read
    for row, line in enumerate(kinds):
        for key, cell in enumerate(line):
            if cell and (key == 0 or line[key - 1] != cell):
                run = int(np.argmax(np.append(line[key:] != cell, True)))  # cells of one kind are one box
                axes.add_patch(Rectangle((key, row), run, 1, facecolor=(PAPER, whole, edge, hidden)[cell]))
    for border in range(TOKENS + 1):
        axes.plot([0, TOKENS], [border, border], color=PAPER, linewidth=0.6)
        axes.plot([border, border], [0, TOKENS], color=PAPER, linewidth=0.6)
    for border in range(0, TOKENS + 1, TILE):
        axes.plot([0, TOKENS], [border, border], color=INK, linewidth=0.4)
        axes.plot([border, border], [0, TOKENS], color=INK, linewidth=0.4)
    if panel.sink:
        for row in range(TOKENS):
            axes.add_patch(Rectangle((-2, row), 1, 1, facecolor=ORANGE, edgecolor=PAPER, linewidth=0.6))
    blank(axes, (-2.2, TOKENS + 0.2), (TOKENS + 0.2, -0.2))
    axes.set(aspect="equal", title=panel.title, xlabel="keys", ylabel="rows")
