"""The report of the benchmark: a table of its rows, lines that sum it up, and pictures.

A row is a dict with case, implementation, direction ("forward", "backward") and status ("ok", or why there is no time).
A row that is ok also has ms (median of the rounds), low_ms and high_ms (their quartiles), graph_ms (the same median by
CUDA graphs, None without them) and host_ms. Its other fields are tflops, of_matmul (share of the measured matrix
product) and peak_mib (memory of one call beyond its inputs, None if unknown).
"""

import statistics
from pathlib import Path

from matplotlib.figure import Figure

from examples.figures import FAINT, INK

DIRECTIONS = "forward", "backward"
OK = "ok"
BASELINE = "unfused"
# The four shapes whose ratios are the point of the library, and the two of uneven or short documents.
HEADLINES = {
    "rectangle-d128": "long rectangle",
    "short-d128": "T=2048",
    "packed16-d128": "16x512",
    "packed64-d128": "64x128",
}
SMALL = {"packed64-d128": "64x128", "documents-d128": "real lengths"}
LONG = "rectangle-d128"
# The comparison with FlashAttention-4: (direction, our implementations, theirs); the first that serves counts.
COMPARED = {
    "forward": ("forward", ("torch-hopper", "torch"), "flash4-torch"),
    "backward, deterministic": ("backward", ("torch-hopper", "torch"), "flash4-deterministic"),
    "backward": ("backward", ("torch-fused", "torch-hopper", "torch"), "flash4-torch"),
}
# One for each implementation, this library's first: Okabe and Ito's colours, and more.
COLOURS = (
    "#D55E00", "#0072B2", "#E69F00", "#56B4E9", "#999999", "#CC79A7", "#009E73", "#F0E442", "#222222", "#8A5A44",
    "#7B3FA0", "#A8D08D", "#B22222", "#4682B4",
)  # fmt: skip


def summarise(times):
    """Return the times of a row from the times of its rounds, at least two."""
    low, median, high = statistics.quantiles(times, n=4, method="inclusive")
    return {"ms": median, "low_ms": low, "high_ms": high}


def unique(rows, field):
    """The values of `field` in the order of their first row."""
    return list(dict.fromkeys(row[field] for row in rows))


def find(rows, case, implementation):
    """Return {direction: row} of an implementation for a case, without rows that were not timed."""
    return {
        row["direction"]: row
        for row in rows
        if (row["case"], row["implementation"], row["status"]) == (case, implementation, OK)
    }


def step(rows, case, implementation, field="ms"):
    """Forward and backward added up, or None unless both were timed."""
    found = find(rows, case, implementation)
    return sum(found[direction][field] for direction in DIRECTIONS) if len(found) == len(DIRECTIONS) else None


def table(rows):
    """Markdown: a line for each case and implementation that was timed."""
    columns = ["ms", "spread", "graph ms", "TFLOP/s", "of matmul", "host ms", "peak MiB"]
    header = ["case", "implementation", *(f"{direction} {x}" for direction in DIRECTIONS for x in columns)]
    lines = [header, ["---"] * len(header)]
    for case in unique(rows, "case"):
        for implementation in unique(rows, "implementation"):
            if found := find(rows, case, implementation):
                cells = [cell for direction in DIRECTIONS for cell in _cells(found[direction])]
                lines.append([case, implementation, *cells])
    return ["| " + " | ".join(line) + " |" for line in lines]


def missing(rows):
    """A line for each implementation and reason for which cases were not timed."""
    cases = {}
    for row in rows:
        if row["status"] != OK:
            cases.setdefault((row["implementation"], row["status"]), {})[row["case"]] = None
    total = len(unique(rows, "case"))
    which = {key: "all cases" if len(x) == total else ", ".join(x) for key, x in cases.items()}
    return [f"{implementation}: {status} ({which[implementation, status]})" for implementation, status in cases]


def _cells(row):
    spread = 100 * (row["high_ms"] - row["low_ms"]) / row["ms"]
    peak = "–" if row["peak_mib"] is None else f"{row['peak_mib']:,.0f}"
    share = f"{100 * row['of_matmul']:.0f} %"
    graph = "–" if row["graph_ms"] is None else f"{row['graph_ms']:.3f}"
    return [f"{row['ms']:.3f}", f"{spread:.1f} %", graph, f"{row['tflops']:.0f}", share, f"{row['host_ms']:.3f}", peak]


def headlines(rows, implementations):
    """Return two lines for each of `implementations` that was timed.

    They give its gain over the unfused path, and its loss on short or uneven documents.
    """
    lines, timed = [], {row["implementation"] for row in rows if row["status"] == OK}
    for name in implementations:
        if name not in timed:
            continue
        gains = [
            f"{label} {_ratio(step(rows, x, BASELINE), step(rows, x, name), 'x')}" for x, label in HEADLINES.items()
        ]
        long = _per_flop(rows, LONG, name)
        costs = [f"{label} {_ratio(_per_flop(rows, x, name), long)}" for x, label in SMALL.items()]
        lines.append(f"{name}: forward + backward against the unfused path: {', '.join(gains)}")
        lines.append(f"{name}: time per useful FLOP relative to the long rectangle: {', '.join(costs)}")
    return lines


def winners(rows):
    """Markdown: a line for each case that FlashAttention-4 was timed on, its time over this library's.

    Both count by their CUDA graphs where both have one. This library counts by its kernels for Hopper where one serves,
    by the portable ones otherwise.
    """
    header = ["case", *(f"{x}, × FlashAttention-4" for x in COMPARED), "JAX over PyTorch: forward, backward", "ahead"]
    lines = []
    for case in unique(rows, "case"):
        ratios = [_times_as_fast(rows, case, *compared) for compared in COMPARED.values()]
        if all(ratio is None for ratio in ratios):
            continue
        ahead = [name for name, ratio in zip(COMPARED, ratios, strict=True) if ratio and ratio >= 1]
        whole = {len(COMPARED): "this library", 0: "FlashAttention-4"}.get(len(ahead), ", ".join(ahead))
        cells = ["" if ratio is None else f"{ratio:.2f}" for ratio in ratios]
        lines.append([case, *cells, _jax_over_torch(rows, case), whole])
    return ["| " + " | ".join(line) + " |" for line in (header, ["---"] * len(header), *lines)] if lines else []


def _first_row(rows, case, names, direction):
    """Return the row of the first of `names` that was timed, or None."""
    found = (find(rows, case, name).get(direction) for name in names)
    return next((row for row in found if row), None)


def _times_as_fast(rows, case, direction, names, theirs):
    """Return the time of `theirs` divided by the time of this library, by the first of `names` that was timed.

    The result is None if either was not timed.
    """
    own, other = _first_row(rows, case, names, direction), _first_row(rows, case, (theirs,), direction)
    if own is None or other is None:
        return None
    field = "ms" if own["graph_ms"] is None or other["graph_ms"] is None else "graph_ms"
    return other[field] / own[field]


def _jax_over_torch(rows, case):
    """Return how many percent longer JAX takes than PyTorch for the same kernels, forward and backward."""
    for suffix in ("-hopper", ""):
        jax, torch = find(rows, case, "jax" + suffix), find(rows, case, "torch" + suffix)
        if jax and torch:
            return ", ".join(f"{100 * (jax[x]['ms'] / torch[x]['ms'] - 1):+.1f} %" for x in DIRECTIONS)
    return ""


def _per_flop(rows, case, implementation):
    """Return the time of a step divided by its work; only ratios of these numbers have a meaning."""
    found = find(rows, case, implementation)
    time = step(rows, case, implementation)
    return time and time / sum(row["ms"] * row["tflops"] for row in found.values())


def _ratio(above, below, unit=""):
    """Return `above / below` in words; either may be None, if it was not measured."""
    return "not measured" if above is None or below is None else f"{above / below:.2f}{unit}"


def save_plots(folder: Path, rows, matmul_tflops):
    """throughput.png and, where there is the unfused path to compare with, speedup.png."""
    folder.mkdir(parents=True, exist_ok=True)
    bars = {direction: {} for direction in DIRECTIONS}
    for row in rows:
        if row["status"] == OK:
            bars[row["direction"]][row["case"], row["implementation"]] = row["tflops"]
    _draw(folder / "throughput.png", rows, bars, "TFLOP/s, {}", (matmul_tflops, "matrix product, same run"))
    gains = {}
    for case, name in dict.fromkeys((row["case"], row["implementation"]) for row in rows):
        ours, theirs = step(rows, case, name), step(rows, case, BASELINE)
        if ours and theirs and name != BASELINE:
            gains[case, name] = theirs / ours
    if gains:
        panels = {"forward + backward": gains}
        _draw(folder / "speedup.png", rows, panels, "times as fast as unfused, {}", (1, "unfused"))


def _draw(path, rows, panels, title, line):
    """Bars in groups, one group a case; `panels` {name: {(case, implementation): height}}."""
    cases, names = unique(rows, "case"), unique(rows, "implementation")
    timed = [name for name in names if any(name == x for bars in panels.values() for _, x in bars)]
    width = 0.84 / max(1, len(timed))
    figure = Figure(figsize=(max(8, 1.6 * len(cases)), 3.6 * len(panels)), dpi=150, layout="constrained")
    for axes, (panel, bars) in zip(figure.subplots(len(panels), 1, squeeze=False)[:, 0], panels.items(), strict=True):
        for i, name in enumerate(timed):
            heights = {cases.index(case): height for (case, x), height in bars.items() if x == name}
            at = [place + (i - (len(timed) - 1) / 2) * width for place in heights]
            colour = COLOURS[names.index(name)]
            axes.bar(at, heights.values(), width, color=colour, edgecolor=INK, linewidth=0.4, label=name)
        axes.axhline(line[0], color=INK, linestyle="--", linewidth=1, label=line[1])
        axes.set_title(title.format(panel), fontsize=11)
        axes.set_xticks(range(len(cases)), cases, rotation=20, ha="right", fontsize=9)
        axes.grid(axis="y", color=FAINT, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes.get_legend_handles_labels(), frameon=False, fontsize=9, ncols=4, loc="outside lower center")
    figure.savefig(path)
