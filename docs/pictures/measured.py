"""Pictures of what was measured: the numbers are read from the tables of docs/log/bench.md."""

import re
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from .style import BLUE, FAINT, INK, ORANGE, PAPER, RANKS, SMALL, WHITE, new_figure

LOG = Path(__file__).parents[1] / "log" / "bench.md"


def read_table(heading: str, number: int = 0) -> list[list[str]]:
    """Return the cells of table `number` below a `heading` of the log, row by row; the first row has the columns."""
    section = re.split(r"^## ", LOG.read_text(encoding="utf-8"), flags=re.MULTILINE)
    (text,) = (part for part in section if part.startswith(f"{heading}\n"))
    lines = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)[number].splitlines()
    header, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    return [header, *rows]


def read_rows(heading: str, number: int = 0) -> dict[str, dict[str, str]]:
    """Return the rows of a table whose columns have different names: cells by first cell and column."""
    header, *rows = read_table(heading, number)
    return {row[0].strip("`"): dict(zip(header, row, strict=True)) for row in rows}


class Peer(NamedTuple):
    """Another implementation of attention, and how its results are drawn."""

    column: str
    label: str
    colour: str
    marker: str


OWN = "torch-hopper"
PEERS = (
    Peer("jax-hopper", "Zigzag Attention, JAX", BLUE, "o"),
    Peer("flash3-jax", "FlashAttention-3", ORANGE, "s"),
    Peer("flash2-torch", "FlashAttention-2", RANKS[1], "^"),
    Peer("flex-torch", "FlexAttention", RANKS[2], "D"),
    Peer("unfused", "unfused zigzag", RANKS[3], "v"),
)
CASES = {
    "rectangle-d128": "8,192 rows of 65,536",
    "rectangle-d64": "the same, head_dim 64",
    "short-d128": "2,048 rows of 16,384",
    "packed16-d128": "16 documents of 512",
    "packed64-d128": "64 documents of 128",
    "documents-d128": "documents, uneven",
}


def step_ms(cell: str) -> float:
    """Return the milliseconds of a step from a cell "forward + backward"."""
    return sum(float(part) for part in cell.split("+"))


def relative_times() -> dict[str, dict[str, float]]:
    """Return for each case and implementation the time of a step over this library's time in PyTorch."""
    own, others = read_rows("One run", 0), read_rows("One run", 1)
    times = {case: own[case] | others[case] for case in own}
    return {
        case: {peer.column: step_ms(cells[peer.column]) / step_ms(cells[OWN]) for peer in PEERS}
        for case, cells in times.items()
    }


def draw_speed() -> Figure:
    """Draw the time of a step of other implementations, beside this library's on the same H200."""
    figure = new_figure(410)
    axes = figure.subplots()
    times = relative_times()
    for i, peer in enumerate(PEERS):
        ratios = [times[case][peer.column] for case in CASES]
        _dots(axes, ratios, (peer.label, peer.colour, peer.marker), 0.13 * (i - len(PEERS) / 2))
    _compare(axes, list(CASES.values()), (0.5, 1, 2, 4, 8, 16))
    axes.set_title("Time of a step, forward + backward, on an H200")
    figure.legend(loc="outside lower center", ncols=2, handletextpad=0.3)
    return figure


def _dots(axes: Axes, ratios: list[float], style: tuple[str, str, str], shift: float = 0) -> None:
    """Draw one dot for each of `ratios`, from top to bottom; `style` is (label, colour, marker)."""
    label, colour, marker = style
    lines = [y + shift for y in range(len(ratios))]
    axes.plot(ratios, lines, marker, color=colour, label=label, markersize=10, markeredgecolor=PAPER)


def _compare(axes: Axes, names: list[str], ticks: tuple[float, ...]) -> None:
    """Give dots a line for each of `names`, and an axis of ratios."""
    for y in range(len(names)):
        axes.axhline(y, color=FAINT, linewidth=1, zorder=0)
    axes.axvline(1, color=INK, linewidth=1.5, zorder=0)
    note = {"xytext": (5, 0), "textcoords": "offset points", "va": "center", "fontsize": SMALL}
    axes.annotate("Zigzag Attention is faster →", (1, -0.6), **note)
    axes.set_yticks(range(len(names)), names, fontsize=SMALL)
    axes.set_ylim(len(names) - 0.5, -0.9)
    axes.tick_params(axis="y", length=0)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g} ×"))
    axes.set_xlabel("times as long as Zigzag Attention, PyTorch")
    axes.spines["left"].set_visible(False)
    axes.set_facecolor("none")


WAYS = {
    "one sequence": {"all-gather": "2 KV heads", "ring": "ring"},
    "window of 1,024": {
        "all-gather": "window of 1,024, all-gather, 2 KV heads",
        "halo": "window of 1,024, halo",
    },
    "documents": {
        "all-gather": "documents, all-gather, 8 KV heads",
        "ring": "documents, ring",
        "plan": "documents, plan",
    },
}
FRAMEWORKS = {"PyTorch, CUDA graph": (3, BLUE), "JAX": (6, ORANGE)}  # column of forward + backward, and colour


def efficiencies() -> dict[tuple[str, str, str], float]:
    """Return the percents of efficiency of a step between two H200, by (batch, way, framework)."""
    rows = {row[0]: row for row in read_table("Predictions beside measurements")[1:]}
    return {
        (batch, way, framework): float(rows[name][column])
        for batch, ways in WAYS.items()
        for way, name in ways.items()
        for framework, (column, _) in FRAMEWORKS.items()
    }


def draw_efficiency() -> Figure:
    """Draw how fast two GPUs compute a step, compared with one GPU that computes its share alone."""
    figure = new_figure(490)
    axes = figure.subplots()
    y, places = 0.0, {}
    for (batch, way, framework), percent in efficiencies().items():
        if (batch, way) not in places:
            y += 0.35 if batch in {b for b, _ in places} else 1.5
            places[batch, way] = y + 0.5
        axes.barh(y, percent, 0.92, color=FRAMEWORKS[framework][1])
        axes.text(percent - 1, y, f"{percent:.1f} %", ha="right", va="center", color=WHITE, fontsize=SMALL)
        y += 1
    names = [way for _, way in places]
    axes.set_yticks(list(places.values()), names, fontsize=SMALL)
    for batch in WAYS:
        first = min(place for (b, _), place in places.items() if b == batch)
        axes.text(0, first - 1.45, batch, va="center")
    axes.axvline(100, color=INK, linewidth=1.5, linestyle="--", zorder=0)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(y - 0.3, 0)
    axes.set_facecolor("none")
    axes.set_title("Efficiency of a step between two H200, 8,192 tokens on each")
    axes.set_xlabel("% of the speed of one GPU's share")
    figure.legend(
        handles=[Rectangle((0, 0), 1, 1, facecolor=colour, label=name) for name, (_, colour) in FRAMEWORKS.items()],
        loc="outside lower center", ncols=2, handlelength=1.2,
    )  # fmt: skip
    return figure


MASKS = {
    "full-d128": "causal",
    "softcap-d128": "softcap",
    "window4096-d128": "window of 4,096",
    "window1024-d128": "window of 1,024",
    "full-d64": "causal, head_dim 64",
    "sinks-d64": "sinks, head_dim 64",
    "window128-d64": "window of 128, head_dim 64",
    "eighth-full-d128": "rank 3 of 8, causal",
    "eighth-window1024-d128": "rank 3 of 8, window of 1,024",
    "eighth-documents-d128": "rank 3 of 8, documents",
}


def draw_masks() -> Figure:
    """Draw the time of FlashAttention-4 under masks, beside this library's on the same H200."""
    figure = new_figure(440)
    axes = figure.subplots()
    rows = read_rows("Masks beside FlashAttention-4")
    for direction, colour, marker in (("forward", BLUE, "o"), ("backward", ORANGE, "s")):
        cells = [rows[case][direction] for case in MASKS]  # "milliseconds (ratio)"
        _dots(axes, [float(cell.split("(")[1].rstrip(")")) for cell in cells], (direction, colour, marker))
    _compare(axes, list(MASKS.values()), (0.75, 1, 1.5, 2))
    axes.set_title("Time of FlashAttention-4 on an H200")
    figure.legend(loc="outside lower center", ncols=2, handletextpad=0.3)
    return figure
