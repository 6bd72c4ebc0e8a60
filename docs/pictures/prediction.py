"""Pictures of what the cost model predicts: efficiency and memory by number of ranks."""

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from bench.lab.predict import LINKS, METHODS, RANKS, TOKENS, gigabytes, layer, percent
from zigzag_kernels.cost import Machine

from .style import BLUE, FAINT, INK, ORANGE, SMALL, TEXT, new_figure

COLOURS = dict(zip(METHODS, (BLUE, ORANGE), strict=True))
LINES = dict(zip(LINKS, ("-", "--", ":"), strict=True))
MEANINGS = {"NVLink": "NVLink between all", "nodes of 8": "nodes of 8, InfiniBand", "InfiniBand": "InfiniBand alone"}


def draw_prediction() -> Figure:
    """Draw the predicted efficiency of both methods, a panel for each number of local tokens but the largest.

    With that one all transfers are hidden, and all lines are at the top.
    """
    figure = new_figure(500)
    panels = figure.subplots(len(TOKENS) - 1, 1, sharex=True)
    for axes, tokens in zip(panels, TOKENS[:-1], strict=True):
        for method, colour in COLOURS.items():
            for link, line in LINES.items():
                heights = [percent(tokens, ranks, method, link) for ranks in RANKS]
                axes.plot(RANKS, heights, line, color=colour, linewidth=2.5, clip_on=False)
        axes.set(ylim=(0, 104), title=f"{tokens:,} tokens of one sequence on each rank")
        _ranks_axis(axes)
    figure.supylabel("predicted efficiency of a step, %", fontsize=TEXT)
    panels[-1].set_xlabel("ranks")
    handles = [Line2D([], [], color=colour, linewidth=2.5, label=method) for method, colour in COLOURS.items()]
    handles.append(Line2D([], [], color="none", label=""))
    handles += [Line2D([], [], color=INK, linestyle=LINES[link], label=text) for link, text in MEANINGS.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=2)
    return figure


def draw_memory() -> Figure:
    """Draw the extra memory of a rank: the all-gather's grows with the sequence, the ring's does not."""
    figure = new_figure(400)
    axes = figure.subplots()
    for method, colour in COLOURS.items():
        for tokens in TOKENS:
            stride = 1 if method == "all-gather" else None
            heights = [gigabytes(layer(tokens, ranks, method, stride)) for ranks in RANKS]
            axes.plot(RANKS, heights, color=colour, linewidth=2.5, label=method if tokens == TOKENS[0] else None)
            axes.text(RANKS[-1] * 1.15, heights[-1], f"{tokens:,}", va="center", fontsize=SMALL)
    limit = Machine().memory / 1e9
    axes.axhline(limit, color=INK, linestyle="--", linewidth=1.5)
    axes.text(RANKS[0] * 1.1, limit * 1.2, "80 GB, one H100", fontsize=SMALL)
    axes.set_yscale("log")
    axes.set_ylim(0.02, 1000)
    axes.set_yticks([0.1, 1, 10, 100], ["0.1 GB", "1 GB", "10 GB", "100 GB"])
    axes.minorticks_off()
    axes.set(xlabel="ranks", title="Extra memory of a rank, by tokens of each rank (one KV head at a time)")
    _ranks_axis(axes)
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def _ranks_axis(axes: Axes) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(RANKS[::3], [f"{ranks:,}" for ranks in RANKS[::3]])
    axes.set_xlim(RANKS[0], RANKS[-1])
    axes.grid(color=FAINT, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_facecolor("none")
