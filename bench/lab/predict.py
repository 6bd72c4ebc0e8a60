"""Predicts the efficiency of both methods up to 1024 ranks, and the memory that they need.

    python -m bench.lab.predict

Prints the tables of docs/reference/cost.md and draws docs/efficiency.png. `zigzag_kernels.cost.Machine` says on which
speeds the numbers rest, and which of those are assumptions.
"""

from bisect import bisect_right
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from examples.figures import FAINT, INK, JAX_COLOUR, TORCH_COLOUR
from zigzag_kernels.cost import Machine, Step, extra_memory, predict

ROOT = Path(__file__).parents[2]
RANKS = [2**i for i in range(1, 11)]
TOKENS = (2048, 8192, 65536)  # of a rank, of one sequence
HEADS = {"heads": 32, "kv_heads": 8, "head_dim": 128}
DOCUMENTS = (65536, 16384, 4096, 1024)  # tokens of each
STRIDES = (1, 2, 4, 8)
# H100 machines have NVLink in nodes of eight: a larger domain is imagined, to tell the links apart.
LINKS = {"NVLink": Machine(node=RANKS[-1]), "nodes of 8": Machine(), "InfiniBand": Machine(node=1)}
METHODS = {"all-gather": "allgather", "ring": "ring"}
COLOURS = dict(zip(METHODS, (JAX_COLOUR, TORCH_COLOUR), strict=True))
LINES = dict(zip(LINKS, ("-", "--", ":"), strict=True))
MEMORY_AXIS = 2e7, 1e12  # bytes


def layer(tokens: int, ranks: int, method: str, heads_k_stride: int | None = None) -> Step:
    lengths = (tokens * ranks,)
    return Step(lengths=lengths, world_size=ranks, method=METHODS[method], heads_k_stride=heads_k_stride, **HEADS)


def percent(tokens: int, ranks: int, method: str, link: str) -> float:
    return 100 * predict(layer(tokens, ranks, method), LINKS[link]).efficiency


def gigabytes(step: Step) -> float:
    return sum(extra_memory(step).values()) / 1e9


def most_ranks(tokens: int, heads_k_stride: int) -> int:
    """Ranks up to which the all-gather fits into the memory of one GPU, were there nothing else in it."""
    limit = Machine().memory / 1e9
    return bisect_right(range(1, 2**20), limit, key=lambda w: gigabytes(layer(tokens, w, "all-gather", heads_k_stride)))


def efficiency_table() -> list[str]:
    """Markdown: a row for each number of ranks, both methods in each cell."""
    columns = [(tokens, link) for tokens in TOKENS for link in LINKS]
    lines = ["| ranks | " + " | ".join(f"{tokens:,}, {link}" for tokens, link in columns) + " |"]
    lines.append("| --- " * (1 + len(columns)) + "|")
    for ranks in RANKS:
        cells = [" / ".join(f"{percent(tokens, ranks, x, link):.1f}" for x in METHODS) for tokens, link in columns]
        lines.append(f"| {ranks} | " + " | ".join(cells) + " |")
    return lines


def document_table() -> list[str]:
    """Markdown: efficiency of eight ranks of one node when their 8,192 tokens are of documents of several lengths."""
    ranks, total = 8, 8 * 8192
    lines = ["| method | " + " | ".join(f"{total // n} × {n:,}" for n in DOCUMENTS) + " |"]
    lines.append("| --- " * (1 + len(DOCUMENTS)) + "|")
    for name, method in METHODS.items():
        steps = [Step(lengths=(n,) * (total // n), world_size=ranks, method=method, **HEADS) for n in DOCUMENTS]
        lines.append(f"| {name} | " + " | ".join(f"{100 * predict(x, Machine()).efficiency:.0f}" for x in steps) + " |")
    return lines


def memory_table() -> list[str]:
    """Markdown: a row for each number of local tokens, the ranks up to which each stride fits."""
    lines = ["| local tokens | " + " | ".join(f"stride {stride}" for stride in STRIDES) + " | default | ring needs |"]
    lines.append("| --- " * (3 + len(STRIDES)) + "|")
    for tokens in TOKENS:
        cells = [f"{most_ranks(tokens, stride):,}" for stride in STRIDES]
        default = layer(tokens, 2, "all-gather").window
        needs = gigabytes(layer(tokens, 2, "ring"))
        lines.append(f"| {tokens:,} | " + " | ".join(cells) + f" | stride {default} | {needs:.2f} GB |")
    return lines


def prepare(axes: Axes, title: str) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(RANKS[::3], [str(ranks) for ranks in RANKS[::3]])
    axes.set_xlim(RANKS[0], RANKS[-1])
    axes.set_xlabel("ranks")
    axes.set_title(title, fontsize=11)
    axes.grid(color=FAINT, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def draw_efficiency(axes: Axes, tokens: int) -> None:
    """Efficiency by ranks, a line for each method and link."""
    for method, colour in COLOURS.items():
        for link, line in LINES.items():
            heights = [percent(tokens, ranks, method, link) for ranks in RANKS]
            axes.plot(RANKS, heights, line, color=colour, linewidth=2, clip_on=False)
    prepare(axes, f"{tokens:,} local tokens")
    axes.set_ylim(0, 104)


def label_lines(axes: Axes, tokens: int) -> None:
    """Names at the lines of `tokens`, where they are far enough from each other."""
    above, below = {"va": "bottom"}, {"va": "top"}
    for method, link, text, place in (
        ("ring", "NVLink", "ring, NVLink", below),
        ("all-gather", "NVLink", "all-gather, NVLink\nor nodes of 8", below),
        ("ring", "InfiniBand", "ring between nodes", above),
        ("all-gather", "InfiniBand", "all-gather, InfiniBand", below),
    ):
        gap = 1.5 if place is above else -1.5
        y = percent(tokens, RANKS[-1], method, link) + gap
        axes.text(RANKS[-1], y, text, color=COLOURS[method], ha="right", fontsize=9, **place)


def explain_lines(axes: Axes) -> None:
    meanings = {
        "NVLink": "NVLink between all",
        "nodes of 8": "nodes of 8 on InfiniBand",
        "InfiniBand": "InfiniBand, a rank a node",
    }
    handles = [Line2D([], [], color=colour, linewidth=2, label=method) for method, colour in COLOURS.items()]
    handles += [Line2D([], [], color=INK, linestyle=LINES[link], label=text) for link, text in meanings.items()]
    axes.legend(handles=handles, frameon=False, fontsize=10, loc="center")


def draw_memory(axes: Axes) -> None:
    """Extra memory of a rank by ranks: the all-gather's grows with the sequence, the ring's does not."""
    for method, colour in COLOURS.items():
        for tokens in TOKENS:
            stride = 1 if method == "all-gather" else None
            heights = [1e9 * gigabytes(layer(tokens, ranks, method, stride)) for ranks in RANKS]
            axes.plot(RANKS, heights, color=colour, linewidth=2)
            axes.text(RANKS[-1] * 1.15, heights[-1], f"{tokens // 1024}k", va="center", fontsize=9, color=colour)
    limit = Machine().memory
    axes.axhline(limit, color=INK, linestyle="--", linewidth=1)
    axes.text(RANKS[0] * 1.1, limit * 1.15, "80 GB, one H100", fontsize=9, color=INK)
    prepare(axes, "extra memory of a rank (stride 1)")
    axes.set_yscale("log")
    axes.set_ylim(*MEMORY_AXIS)
    axes.set_yticks([1e8, 1e9, 1e10, 1e11], ["0.1 GB", "1 GB", "10 GB", "100 GB"])


def save(path: Path) -> None:
    figure = Figure(figsize=(14, 4.4), dpi=150, layout="constrained")
    *panels, memory_axes = figure.subplots(1, len(TOKENS) + 1, width_ratios=(*(1,) * len(TOKENS), 1.15))
    for axes, tokens in zip(panels, TOKENS, strict=True):
        draw_efficiency(axes, tokens)
    panels[0].set_ylabel("predicted efficiency, forward + backward, %")
    label_lines(panels[0], TOKENS[0])
    explain_lines(panels[-1])
    draw_memory(memory_axes)
    figure.savefig(path)


if __name__ == "__main__":
    save(ROOT / "docs" / "efficiency.png")
    print("\n".join([*efficiency_table(), "", *document_table(), "", *memory_table()]))
