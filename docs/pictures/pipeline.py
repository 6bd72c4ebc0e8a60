"""Picture of the pipeline of the forward kernel for Hopper: who waits for whom, while blocks of keys stream past."""

from dataclasses import dataclass, field
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from zigzag_kernels.modes import Operation
from zigzag_kernels.tiles.config import KernelId
from zigzag_kernels.tiles.sm_90 import SM_90

from .style import BLUE, FAINT, INK, ORANGE, RANKS, SMALL, blank, box, new_figure

TILE = SM_90.tiles_of(KernelId("hopper", Operation.FORWARD), 128, "bfloat16")
STAGES, CONSUMERS = TILE.num_stages, TILE.BLOCK_M // 64
BLOCKS = STAGES + 2  # of keys: the stage of block 1 is used again
LOAD, PRODUCT, SOFTMAX = 1.0, 1.0, 1.7  # durations for a clear picture, not measured ones
COLOURS = {
    "load of K or V": RANKS[1],
    "full buffer": FAINT,
    "scores, Q Kᵀ": RANKS[0],
    "P V": RANKS[2],
    "softmax": RANKS[3],
}
LOADED, FULL, SCORES, VALUES, EXPONENTIALS = COLOURS.values()


class Span(NamedTuple):
    """One piece of work on a block of keys, or the time for which a buffer holds it."""

    lane: str
    begin: float
    end: float
    text: str  # the number of the block, behind the kind of block in the lane of the producer
    colour: str


@dataclass
class Schedule:
    """The times at which producer and consumers work, by the waits of `hopper.keys` and `hopper.forward`."""

    spans: list[Span] = field(default_factory=list)
    full: dict[tuple[str, int], float] = field(default_factory=dict)  # by ("K" or "V", block)
    left: dict[tuple[int, int], float] = field(default_factory=dict)  # by (consumer, block)
    producer_free: float = 0.0
    tensor_cores_free: float = 0.0

    def load(self, kind: str, block: int) -> None:
        """Load K or V of `block` as soon as the producer is free."""
        begin = self.producer_free
        self.producer_free = self.full[kind, block] = begin + LOAD
        self.spans.append(Span("producer", begin, begin + LOAD, f"{kind}{block}", LOADED))

    def wait_until_empty(self, block: int) -> None:
        """Let the producer wait until all consumers have left block `block - STAGES`."""
        left = [self.left.get((consumer, block - STAGES), 0.0) for consumer in range(CONSUMERS)]
        self.producer_free = max(self.producer_free, *left)

    def multiply(self, consumer: int, ready: float, block: int, colour: str) -> float:
        """Give the tensor cores, which all consumers share, a product: return when it is complete."""
        kind = "K" if colour == SCORES else "V"
        begin = max(ready, self.full[kind, block], self.tensor_cores_free)
        self.tensor_cores_free = begin + PRODUCT
        self.spans.append(Span(f"products {consumer}", begin, begin + PRODUCT, f"{block}", colour))
        return begin + PRODUCT

    def exponentiate(self, consumer: int, ready: float, block: int) -> float:
        """Compute the softmax of the scores of `block`: return when it is complete."""
        self.spans.append(Span(f"softmax {consumer}", ready, ready + SOFTMAX, f"{block}", EXPONENTIALS))
        return ready + SOFTMAX

    def hold(self) -> None:
        """Add the spans for which stages hold blocks: of K until it is left, of V until the next block is."""
        for (kind, block), full in self.full.items():
            left = [self.left.get((consumer, block + (kind == "V")), 0.0) for consumer in range(CONSUMERS)]
            end = max(left) or self.tensor_cores_free  # nobody replaces the last V
            lane = f"{kind}, stage {block % STAGES}"
            self.spans += [Span(lane, full - LOAD, full, f"{block}", LOADED), Span(lane, full, end, "", FULL)]


def make_schedule() -> Schedule:
    """Return the schedule of one tile of rows that sees `BLOCKS` blocks of keys."""
    schedule, ready = Schedule(), [0.0] * CONSUMERS
    schedule.load("K", 0)
    for block in range(BLOCKS):
        if block + 1 < BLOCKS:  # the producer is one block ahead
            schedule.wait_until_empty(block + 1)
            schedule.load("K", block + 1)
        else:
            schedule.wait_until_empty(block + 1)
        schedule.load("V", block)
        for consumer in range(CONSUMERS):
            scored = schedule.multiply(consumer, ready[consumer], block, SCORES)
            if block == 0:
                schedule.left[consumer, 0] = scored
                ready[consumer] = schedule.exponentiate(consumer, scored, 0)
            else:
                added = schedule.multiply(consumer, scored, block - 1, VALUES)
                ready[consumer] = schedule.exponentiate(consumer, scored, block)
                schedule.left[consumer, block] = ready[consumer] = max(ready[consumer], added)
    for consumer in range(CONSUMERS):
        schedule.multiply(consumer, ready[consumer], BLOCKS - 1, VALUES)
    schedule.hold()
    return schedule


def draw_pipeline() -> Figure:
    """Draw the schedule, with the barriers of one block as arrows."""
    schedule = make_schedule()
    rings = [f"{kind}, stage {stage}" for kind in "KV" for stage in range(STAGES)]
    workers = [f"{work} {consumer}" for consumer in range(CONSUMERS) for work in ("products", "softmax")]
    lanes = {lane: i + 0.5 * (i > 0) for i, lane in enumerate(["producer", *rings])}
    lanes |= {lane: len(lanes) + 1 + i + 0.5 * (i // 2) for i, lane in enumerate(workers)}
    figure = new_figure(450)
    axes = figure.subplots()
    axes.set_title(f"{BLOCKS} blocks of keys stream past {CONSUMERS} consumers")
    for span in schedule.spans:
        box(axes, (span.begin, lanes[span.lane], span.end - span.begin, 0.8), span.text, span.colour)
    end, bottom = max(span.end for span in schedule.spans), max(lanes.values()) + 1
    for lane in ("producer", *rings):
        axes.text(-0.3, lanes[lane] + 0.4, lane, ha="right", va="center")
    for consumer in range(CONSUMERS):
        axes.text(-0.3, lanes[f"products {consumer}"] + 0.9, f"consumer {consumer}", ha="right", va="center")
    _draw_barriers(axes, schedule, lanes)
    axes.annotate("", (end, bottom + 0.2), (0, bottom + 0.2), arrowprops={"arrowstyle": "-|>", "color": INK})
    axes.text(end / 2, bottom + 0.35, "time", ha="center", va="top", fontsize=SMALL)
    blank(axes, (-4.3, end + 0.2), (bottom + 1.1, -0.3))
    handles = [Rectangle((0, 0), 1, 1, facecolor=colour, label=name) for name, colour in COLOURS.items()]
    handles += [
        axes.plot([], [], color=colour, linewidth=2, label=name)[0]
        for name, colour in (("full barrier: block 1 has arrived", BLUE), ("empty barrier: block 1 is left", ORANGE))
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, handlelength=1.2)
    return figure


def _draw_barriers(axes: Axes, schedule: Schedule, lanes: dict[str, float]) -> None:
    """Draw who waits for block 1: the consumers until it is full, and the producer until they have left it."""
    arrived = (schedule.full["K", 1], lanes[f"K, stage {1 % STAGES}"] + 0.8)
    again = schedule.full["K", 1 + STAGES] - LOAD  # of the block that takes the stage
    for consumer in range(CONSUMERS):
        products = [span for span in schedule.spans if span.lane == f"products {consumer}"]
        scores = next(span for span in products if span.text == "1" and span.colour == SCORES)
        left = schedule.left[consumer, 1]
        _arrow(axes, arrived, (scores.begin, lanes[scores.lane] + 0.1), BLUE, 0.25)
        _arrow(axes, (left, lanes[f"softmax {consumer}"] + 0.1), (again, lanes["producer"] + 0.8), ORANGE, 0.1)


def _arrow(axes: Axes, begin: tuple[float, float], end: tuple[float, float], colour: str, bend: float) -> None:
    style = {"arrowstyle": "-|>", "color": colour, "linewidth": 1.8, "connectionstyle": f"arc3,rad={bend}"}
    axes.annotate("", end, begin, arrowprops=style | {"shrinkA": 0, "shrinkB": 0})
