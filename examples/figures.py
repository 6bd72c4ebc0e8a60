"""Draws the pictures of docs/; the demo adds its loss curves to the first two panels."""

from itertools import accumulate, pairwise
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Polygon, Rectangle
from matplotlib.ticker import MaxNLocator

from zigzag_kernels.cost import causal_scores, unmasked_scores
from zigzag_kernels.layout import chunk_length, row_position

# Okabe and Ito's colours, which the colour-blind tell apart; ranks take the first four.
RANK_COLOURS = ("#56B4E9", "#E69F00", "#009E73", "#CC79A7")
TORCH_COLOUR, JAX_COLOUR, INK, FAINT = "#D55E00", "#0072B2", "#222222", "#D8D8D8"
WORLD_SIZE = len(RANK_COLOURS)
LENGTHS = (64, 40, 24)  # tokens of the sequences that are drawn


def chunks(rank: int) -> list[tuple[int, int, int, int]]:
    """(chunk, row in the packed batch, local row, tokens) of what `rank` holds, in its local order."""
    result, local_row = [], 0
    for start, end in pairwise(accumulate(LENGTHS, initial=0)):
        tokens = chunk_length(end - start, WORLD_SIZE)
        for offset in (0, tokens):
            position = row_position(offset, end - start, rank, WORLD_SIZE)
            result.append((position // tokens, start + position, local_row, tokens))
            local_row += tokens
    return result


def draw_layout(axes: Axes) -> None:
    """Draw the chunks of each sequence that a rank holds (left), and the rows of its local tensors (right)."""
    total = sum(LENGTHS)
    local, local_left = total // WORLD_SIZE, total + 14
    for rank, colour in enumerate(RANK_COLOURS):
        for chunk, row, local_row, tokens in chunks(rank):
            for left in (row, local_left + local_row):
                axes.add_patch(Rectangle((left, rank - 0.36), tokens, 0.72, facecolor=colour, edgecolor="white"))
                axes.text(left + tokens / 2, rank, str(chunk), ha="center", va="center", fontsize=9, color=INK)
        axes.text(-2, rank, f"rank {rank}", ha="right", va="center", color=INK)
    for i, (start, end) in enumerate(pairwise(accumulate(LENGTHS, initial=0))):
        tokens = chunk_length(end - start, WORLD_SIZE)
        axes.add_patch(Rectangle((start, -0.5), end - start, WORLD_SIZE, fill=False, edgecolor=INK, linewidth=1))
        for row in range(start + tokens, end, tokens):
            axes.plot([row, row], [-0.5, WORLD_SIZE - 0.5], color=FAINT, linewidth=0.8, zorder=0)
        axes.text((start + end) / 2, -0.62, f"sequence {i}\n{end - start} tokens", ha="center", va="bottom", color=INK)
    axes.text(local_left + local / 2, -0.62, f"local rows\nT = {local}", ha="center", va="bottom", color=INK)
    axes.annotate(
        "", (local_left - 2, WORLD_SIZE / 2 - 0.5), (total + 2, WORLD_SIZE / 2 - 0.5),
        arrowprops={"arrowstyle": "-|>", "color": INK},
    )  # fmt: skip
    axes.set(xlim=(-14, local_left + local + 1), ylim=(WORLD_SIZE - 0.4, -1.45), xticks=[], yticks=[])
    axes.set_title(f"Zigzag: each sequence in {2 * WORLD_SIZE} chunks, rank r holds chunk r and its mirror image")
    axes.spines[:].set_visible(False)


def draw_work(axes: Axes) -> None:
    """Unmasked scores of every rank as a share of all: zigzag, and sequences cut into one piece a rank."""
    work = {"one contiguous piece a rank": [], "zigzag": []}
    for rank in range(WORLD_SIZE):
        pieces = [length // WORLD_SIZE for length in LENGTHS]
        work["one contiguous piece a rank"].append(sum(causal_scores(rank * rows, rows) for rows in pieces))
        work["zigzag"].append(unmasked_scores(LENGTHS, rank, WORLD_SIZE))
    everything = sum(length * (length + 1) / 2 for length in LENGTHS)
    ranks = np.arange(WORLD_SIZE)
    styles = ({"color": "white", "edgecolor": INK, "hatch": "////"}, {"color": RANK_COLOURS, "edgecolor": INK})
    for shift, (label, scores), style in zip((-0.2, 0.2), work.items(), styles, strict=True):
        share = 100 * np.array(scores) / everything
        bars = axes.bar(ranks + shift, share, 0.38, label=label, linewidth=0.8, **style)
        axes.bar_label(bars, fmt="%.0f", fontsize=9, padding=1, color=INK)
    axes.set_title("Causal work per rank, % of all scores")
    axes.set_xticks(ranks, [f"rank {rank}" for rank in ranks])
    axes.set_ylim(0, 56)
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.legend(frameon=False, loc="upper left", fontsize=9)
    axes.get_legend().legend_handles[1].set_facecolor(FAINT)  # zigzag's bars have a colour each
    axes.spines[["top", "right"]].set_visible(False)


def draw_segments(axes: Axes, rank: int) -> None:
    """Draw the keys that the rows of `rank` see under a causal mask: a band for each segment."""
    left, ticks = 0, []
    for start, end in pairwise(accumulate(LENGTHS, initial=0)):
        length = end - start
        axes.add_patch(Polygon([(left, 0), (left, length), (left + length, length)], color=FAINT, linewidth=0))
        axes.add_patch(Rectangle((left, 0), length, length, fill=False, edgecolor=INK, linewidth=0.8))
        for chunk, row, local_row, tokens in chunks(rank):
            position = row - start
            if not 0 <= position < length:
                continue
            seen = [(left, position), (left, position + tokens), (left + position + tokens, position + tokens)]
            axes.add_patch(Polygon([*seen, (left + position, position)], color=RANK_COLOURS[rank], linewidth=0))
            label = f"chunk {chunk}: local rows {local_row} to {local_row + tokens - 1}"
            axes.text(left + length + 1, position + tokens / 2, label, va="center", fontsize=8, color=INK)
        axes.text(left + length / 2, -2, f"sequence {len(ticks)}", ha="center", va="bottom", color=INK)
        ticks.append((left, length))
        left += length + 38
    axes.set(xlim=(-5, left - 2), ylim=(max(LENGTHS) + 6, -9), xticks=[], yticks=[], aspect="equal")
    axes.set_xlabel("keys in position order, for each sequence")
    axes.set_ylabel("queries")
    axes.set_title(f"The segments of rank {rank}: what its rows see of all that is causal (grey)")
    axes.spines[:].set_visible(False)


def draw_tiles(axes: Axes, rank: int, tokens: int = 256, tile: int = 32) -> None:
    """Draw the keys that tiles of the early and late chunk see, paired from opposite ends to equal sums."""
    first, last = np.arange(0, tokens, tile), np.arange(tile, tokens + 1, tile)  # rows of each tile, as positions
    early, late = rank * tokens + last, (2 * WORLD_SIZE - 1 - rank) * tokens + last[::-1]
    pairs = np.arange(len(first))
    colour = RANK_COLOURS[rank]
    axes.bar(pairs, late, 0.8, color=colour, edgecolor=INK, linewidth=0.6, label="late chunk, from its end")
    axes.bar(pairs, early, 0.8, late, color="white", edgecolor=INK, linewidth=0.6, hatch="///", label="early chunk")
    axes.set_xticks(pairs, [f"{i}" for i in pairs])
    axes.set_ylim(0, 2.75 * WORLD_SIZE * tokens)
    axes.set_xlabel("pair of tiles")
    axes.set_title(f"rank {rank}: {late[0] + early[0]} keys a pair")
    axes.legend(frameon=False, fontsize=8, loc="upper center")
    axes.spines[["top", "right"]].set_visible(False)


def draw_losses(loss_axes: Axes, difference_axes: Axes, losses: dict[str, np.ndarray], tolerance: float) -> None:
    """`losses` of PyTorch and JAX by step, and how far apart they are."""
    steps = np.arange(1, len(losses["PyTorch"]) + 1)
    loss_axes.plot(steps, losses["PyTorch"], color=TORCH_COLOUR, linewidth=3.5, alpha=0.55, label="PyTorch")
    loss_axes.plot(steps, losses["JAX"], color=JAX_COLOUR, linewidth=1.2, label="JAX")
    loss_axes.set_title("The same small model, weights and text in both frameworks")
    loss_axes.set_ylabel("loss (nats a byte)")
    loss_axes.legend(frameon=False)
    difference = np.abs(losses["PyTorch"] - losses["JAX"])
    difference_axes.plot(steps, difference, ".", color=INK, markersize=4)
    difference_axes.set_yscale("symlog", linthresh=1e-7)  # many steps agree to the last bit, and 0 has no logarithm
    difference_axes.axhline(tolerance, color=INK, linestyle="--", linewidth=1)
    difference_axes.text(1, 0.8 * tolerance, f"tolerance {tolerance:g}", va="top", fontsize=9, color=INK)
    difference_axes.set_ylim(-1e-8, 5 * tolerance)
    difference_axes.set_title("|PyTorch − JAX|, every step")
    for axes in (loss_axes, difference_axes):
        axes.set_xlabel("step")
        axes.grid(color=FAINT, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)


def save_layout(path: Path) -> None:
    figure = Figure(figsize=(13, 3.2), dpi=150, layout="constrained")
    layout_axes, work_axes = figure.subplots(1, 2, width_ratios=(3, 1.1))
    draw_layout(layout_axes)
    draw_work(work_axes)
    figure.savefig(path)


def save_segments(path: Path) -> None:
    figure = Figure(figsize=(13, 4.4), dpi=150, layout="constrained")
    draw_segments(figure.subplots(), rank=1)
    figure.savefig(path)


def save_tiles(path: Path) -> None:
    figure = Figure(figsize=(13, 2.8), dpi=150, layout="constrained")
    panels = figure.subplots(1, WORLD_SIZE, sharey=True)
    for rank, axes in enumerate(panels):
        draw_tiles(axes, rank)
    panels[0].set_ylabel("keys seen")
    figure.savefig(path)


def save_demo(path: Path, losses: dict[str, np.ndarray], tolerance: float) -> None:
    figure = Figure(figsize=(13, 6.8), dpi=150, layout="constrained")
    panels = figure.subplots(2, 2, width_ratios=(3, 1.4))
    draw_layout(panels[0, 0])
    draw_work(panels[0, 1])
    draw_losses(*panels[1], losses, tolerance)
    for letter, axes in zip("abcd", panels.flat, strict=True):
        axes.set_title(f"({letter}) {axes.get_title()}", fontsize=11)
    figure.savefig(path)


if __name__ == "__main__":
    docs = Path(__file__).parents[1] / "docs"
    save_layout(docs / "layout.png")
    save_segments(docs / "segments.png")
    save_tiles(docs / "tiles.png")
