"""Draws the picture of the demo: the layout, the work of each rank, and the loss curves of both frameworks."""

from itertools import accumulate, pairwise
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
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


def save_demo(path: Path, losses: dict[str, np.ndarray], tolerance: float) -> None:
    figure = Figure(figsize=(13, 6.8), dpi=150, layout="constrained")
    panels = figure.subplots(2, 2, width_ratios=(3, 1.4))
    draw_layout(panels[0, 0])
    draw_work(panels[0, 1])
    draw_losses(*panels[1], losses, tolerance)
    for letter, axes in zip("abcd", panels.flat, strict=True):
        axes.set_title(f"({letter}) {axes.get_title()}", fontsize=11)
    figure.savefig(path)
