"""Pictures of what was measured: the numbers are read from the tables of docs/log/bench.md."""

import re
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from .style import BLUE, FAINT, INK, ON_COLOUR, ORANGE, PAPER, RANKS, SMALL, TEXT, WHITE, new_figure

LOG = Path(__file__).parents[1] / "log" / "bench.md"


def read_table(heading: str, number: int = 0) -> list[dict[str, str]]:
    """Return the rows of table `number` below a `heading` of the log, each as cells by column."""
    section = re.split(r"^## ", LOG.read_text(encoding="utf-8"), flags=re.MULTILINE)
    (text,) = (part for part in section if part.startswith(f"{heading}\n"))
    lines = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)[number].splitlines()
    header, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    return [dict(zip(header, row, strict=True)) for row in rows]


FRAMEWORKS, METHODS = ("PyTorch", "JAX"), ("all-gather", "ring")


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
    rows = [read_table("One run", number) for number in (0, 1)]
    times = {own["case"]: own | others for own, others in zip(*rows, strict=True)}
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


def efficiencies() -> dict[str, dict[str, str]]:
    """Return the efficiency of a step between two GPUs, by tokens of a GPU and way: "PyTorch, ring" and the like."""
    result: dict[str, dict[str, str]] = {}
    for row in read_table("Between two GPUs"):
        bars = result.setdefault(row["tokens of a GPU"], {})
        for framework in FRAMEWORKS:
            for method in METHODS:
                if row["way"] == method or (row["way"].startswith(method) and row["way"].endswith("(default)")):
                    bars[f"{framework}, {method}"] = row[f"{framework} step"]
    return result


BARS = {"PyTorch, all-gather": BLUE, "PyTorch, ring": RANKS[0], "JAX, all-gather": ORANGE, "JAX, ring": RANKS[1]}


def draw_efficiency() -> Figure:
    """Draw the share of time that two GPUs compute as fast as one alone."""
    figure = new_figure(400)
    axes = figure.subplots()
    groups = efficiencies()
    y, middles = 0.0, []
    for group in groups.values():
        cells = {name: cell for name, cell in group.items() if cell}
        middles.append(y + (len(cells) - 1) / 2)
        for name, cell in cells.items():
            percent = float(cell.removesuffix(" %"))
            ink = ON_COLOUR if BARS[name] in RANKS else WHITE
            axes.barh(y, percent, 0.86, color=BARS[name])
            axes.text(percent - 1, y, cell, ha="right", va="center", color=ink, fontsize=SMALL)
            y += 1
        y += 0.7
    axes.set_yticks(middles, [name.replace(", ", " tokens\n") for name in groups], fontsize=TEXT)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(y - 0.9, -0.6)
    axes.set_xlim(0, 101)
    axes.set_facecolor("none")
    axes.set_title("A step between two H100, compared with one GPU's share")
    axes.set_xlabel("efficiency, %")
    figure.legend(
        handles=[Rectangle((0, 0), 1, 1, facecolor=colour, label=name) for name, colour in BARS.items()],
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
    rows = {row["case"].strip("`"): row for row in read_table("Masks beside FlashAttention-4")}
    for direction, colour, marker in (("forward", BLUE, "o"), ("backward", ORANGE, "s")):
        cells = [rows[case][direction] for case in MASKS]  # "milliseconds (ratio)"
        _dots(axes, [float(cell.split("(")[1].rstrip(")")) for cell in cells], (direction, colour, marker))
    _compare(axes, list(MASKS.values()), (0.75, 1, 1.5, 2))
    axes.set_title("Time of FlashAttention-4 on an H200")
    figure.legend(loc="outside lower center", ncols=2, handletextpad=0.3)
    return figure
