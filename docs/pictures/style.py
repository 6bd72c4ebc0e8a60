"""Colours and type of all pictures, and the file format: SVG with text as text, for light and dark pages."""

from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

# Okabe and Ito's colours, which the colour-blind tell apart. They read on both backgrounds.
RANKS = ("#56B4E9", "#E69F00", "#009E73", "#CC79A7")
BLUE, ORANGE = "#0072B2", "#D55E00"
PAPER, INK, FAINT = "#FFFFFF", "#222222", "#D9D9D9"
ON_COLOUR, WHITE = "#111111", "#FAFAFA"  # text on a light and on a dark colour: the same on every page
# A browser with a dark page draws these colours in place of the others; other programs show the light picture.
DARK = {PAPER: "#1E1E1E", INK: "#E6E6E6", FAINT: "#4A4A4A"}

WIDTH = 600  # of every picture, in the units of its type: a page 800 pixels wide shows 14 as 19 pixels
TEXT, SMALL = 14, 12.5
_SETTINGS = {
    "svg.fonttype": "none",
    "svg.hashsalt": "zigzag",  # the same names inside the file each time
    "font.sans-serif": [
        "DejaVu Sans",
        "Verdana",
        "Arial",
        "sans-serif",
    ],  # of one width, mostly, for readers without it
    "font.size": TEXT,
    "axes.titlesize": TEXT,
    "axes.titlelocation": "left",
    "axes.labelsize": TEXT,
    "xtick.labelsize": SMALL,
    "ytick.labelsize": SMALL,
    "legend.fontsize": SMALL,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "hatch.linewidth": 0.8,
} | {f"{name}color": INK for name in ("text.", "axes.edge", "axes.label", "axes.title", "xtick.", "ytick.", "hatch.")}


def settings():
    """Return a context in which matplotlib draws by the settings of the pictures."""
    return rc_context(_SETTINGS)


def new_figure(height: float) -> Figure:
    """Return an empty picture `WIDTH` wide and `height` high."""
    return Figure(figsize=(WIDTH / 72, height / 72), layout="constrained", facecolor=PAPER)


def blank(axes: Axes, x: tuple[float, float], y: tuple[float, float]) -> None:
    """Take away the frame and ticks of `axes`, whose sides show the coordinates `x` and `y`."""
    axes.set(xlim=x, ylim=y, xticks=[], yticks=[], facecolor="none")
    axes.spines[:].set_visible(False)


def box(axes: Axes, place: tuple[float, float, float, float], text: str = "", colour: str = PAPER, **patch) -> None:
    """Draw a box at `place`, (left, top, width, height), with `text` in its middle."""
    left, top, width, height = place
    patch = {"edgecolor": PAPER, "linewidth": 1} | patch
    axes.add_patch(Rectangle((left, top), width, height, facecolor=colour, **patch))
    if text:
        ink = INK if colour == PAPER else ON_COLOUR
        axes.text(left + width / 2, top + height / 2, text, ha="center", va="center", color=ink, fontsize=SMALL)


def save(figure: Figure, path: Path) -> None:
    """Write the picture, without a date or a version, and with the colours of dark pages."""
    figure.savefig(path, metadata={"Date": None, "Creator": None})
    rules = "\n".join(
        f'[style*="{kind}: {light.lower()}"] {{{kind}: {dark.lower()} !important}}'
        for kind in ("fill", "stroke")
        for light, dark in DARK.items()
    )
    text = path.read_text(encoding="utf-8")
    text = text.replace("</style>", f"\n@media (prefers-color-scheme: dark) {{\n{rules}\n}}</style>", 1)
    path.write_text("\n".join(line.rstrip() for line in text.splitlines()) + "\n", encoding="utf-8")
