"""Times attention between all GPUs of a machine against one GPU that does its share of the work alone.

    torchrun --nproc_per_node=8 bench/scaling/run.py --framework torch [--only NAME ...] [--json FILE] [--trace DIR]
    python bench/scaling/run.py --framework jax [--json FILE] [--trace DIR]

Efficiency is the time of one GPU for 1 / W of the attention, divided by the time of a step between the ranks. The first
time is measured with the same kernels on K/V gathered beforehand, as the mean over the shares of all ranks; the second
is the time of the slowest rank. The table also has the prediction of the cost model for the measured rate of one GPU.
Results are checked before anything is timed; then all ways take turns. A GPU would wait for the host in short steps. So
PyTorch records them in a CUDA graph, and JAX does 36 of them in one program, like a model of 36 layers; the time of
single calls is in the table too. On a machine without a GPU the script runs on the CPU, and its times say nothing about
GPUs.
"""

import argparse
import json
import os
import random
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from tqdm import tqdm

from bench.arguments import new_file, positive
from bench.scaling.ways import ALONE, HEADS, PLANNED, Way, predictions, step_of
from examples.text import documents
from tests.support.cases import Case
from zigzag_kernels.callspec import NO_WINDOW
from zigzag_kernels.modes import Method

STRIDES = (1, 2, 4, 8)
LONGEST_DOCUMENT = 4096
WINDOW = 1024
DIRECTIONS = "forward", "forward + backward"
OUR_KERNELS = "attention_", "backward_", "clear_sums", "finish_dq"  # how their names begin
Interval = tuple[float, float]


@dataclass(frozen=True)
class Workload:
    """A batch, the ways to attend to it, and the number of rounds and steps whose median is its time."""

    case: Case
    ways: tuple[Way, ...]
    rounds: int
    steps: int

    @property
    def name(self) -> str:
        return f"{self.case.name}, {self.case.tokens} tokens a GPU"


def workloads(ranks: int, tokens: int, long_tokens: int, rounds: int) -> list[Workload]:
    """Return the workloads: one sequence with all strides; a window, a long sequence and documents with the default."""

    def workload(name, lengths, strides, rounds, steps, *more, window_size=NO_WINDOW):
        case = Case(name=name, world_size=ranks, lengths=lengths, window_size=window_size, **HEADS)
        strides = strides or (step_of(case, (Method.ALLGATHER.value, None)).window,)
        moving = Method.RING if window_size == NO_WINDOW else Method.HALO
        ways = *((Method.ALLGATHER.value, stride) for stride in strides), (moving.value, None), *more
        return Workload(case, ways, rounds, steps)

    window = min(WINDOW, tokens // 2) - 1, -1  # a halo lies in one chunk
    return [
        workload("one sequence", (ranks * tokens,), STRIDES, rounds, 4),
        workload(f"one sequence, window of {window[0] + 1}", (ranks * tokens,), None, rounds, 4, window_size=window),
        workload("documents", document_lengths(ranks * tokens, 2 * ranks), None, rounds, 4, PLANNED),
        workload("one long sequence", (ranks * long_tokens,), None, max(1, rounds // 4), 1),
    ]


def chosen(batches: list[Workload], names: list[str]) -> list[Workload]:
    """Return the `batches` whose names begin with one of `names`; `SystemExit` for one with which none begins."""
    for name in names:
        if not any(batch.name.startswith(name) for batch in batches):
            raise SystemExit(f"--only: {name!r} begins none of {'; '.join(batch.name for batch in batches)}")
    return [batch for batch in batches if batch.name.startswith(tuple(names))]


def document_lengths(total: int, multiple: int) -> tuple[int, ...]:
    """Return lengths of the examples' documents, in random order, padded to a `multiple` each and `total` in all."""
    lengths = [-(-len(text) // multiple) * multiple for text in documents(LONGEST_DOCUMENT)]
    draw, chosen = random.Random(0), []
    while total:
        chosen.append(min(draw.choice(lengths), total))
        total -= chosen[-1]
    return tuple(chosen)


def in_turns(calls: dict, rounds: int, milliseconds: Callable) -> dict:
    """{key: median of `milliseconds(call)`} of rounds in which the calls take turns, after one that warms up."""
    times = {key: [] for key in calls}
    for i in range(rounds + 1):
        for key, call in calls.items():
            elapsed = milliseconds(call)
            if i:
                times[key].append(elapsed)
    return {key: statistics.median(measured) for key, measured in times.items()}


def measure(ranks, workload: Workload) -> tuple[list[dict], dict[Way, Callable]]:
    """Return a row for each way and direction, and the call of each way, forward + backward.

    The share of one GPU comes first.

    `ranks` is the `Ranks` of either framework.
    """
    ranks.load(workload.case)
    calls = {(ALONE, i): call for i, call in enumerate(ranks.share_calls())}
    for way in tqdm(workload.ways, desc=f"{workload.name}: checking", unit="way", disable=not ranks.chief):
        own = ranks.calls(way)
        ranks.check(way, *own)
        calls |= {(way, i): call for i, call in enumerate(own)}

    def timed(calls: dict, steps: int = 1) -> dict:
        times = in_turns(calls, workload.rounds, lambda call: ranks.milliseconds(call, workload.steps) / steps)
        return {(way, i): ranks.mean(ms) if way == ALONE else ranks.slowest(ms) for (way, i), ms in times.items()}

    of_calls = times = timed(calls)
    if ranks.records and workload.steps > 1:
        times = timed({key: ranks.record(call) for key, call in calls.items()}, ranks.recorded_steps)
    predicted = predictions(workload.case, workload.ways, [times[ALONE, i] for i in range(len(DIRECTIONS))])
    rows = [
        {
            "workload": workload.name,
            "method": way[0],
            "heads_k_stride": way[1],
            "direction": DIRECTIONS[direction],
            "ms": ms,
            "call_ms": of_calls[way, direction],
            "efficiency": times[ALONE, direction] / ms,
            "predicted": predicted.get((way, direction)),
        }
        for (way, direction), ms in times.items()
    ]
    return rows, {way: calls[way, 1] for way in workload.ways}


def table(rows: list[dict]) -> list[str]:
    """Markdown: a line for each way, both directions side by side."""
    units = ", ms", ", by calls, ms", ", efficiency", ", predicted"
    header = ["", "method", "stride", *(f"{x}{unit}" for x in DIRECTIONS for unit in units)]
    lines = {}
    for row in rows:
        place = row["workload"], row["method"], str(row["heads_k_stride"] or "")
        shares = ("" if x is None else f"{100 * x:.1f} %" for x in (row["efficiency"], row["predicted"]))
        cells = f"{row['ms']:.3f}", f"{row['call_ms']:.3f}", *shares
        lines.setdefault(place, []).extend(cells)
    lines = [[*place, *cells] for place, cells in lines.items()]
    return ["| " + " | ".join(line) + " |" for line in (header, ["---"] * len(header), *lines)]


def merged(intervals: list[Interval]) -> list[Interval]:
    """The union of `intervals` (start, end), in order."""
    result = []
    for start, end in sorted(intervals):
        if result and start <= result[-1][1]:
            result[-1] = result[-1][0], max(end, result[-1][1])
        else:
            result.append((start, end))
    return result


def length(intervals: list[Interval]) -> float:
    return sum(end - start for start, end in intervals)


def overlap(kernels: list[tuple[str, float, float]]) -> dict | None:
    """Return how much of the transfers ran beside attention, or None if nothing was sent.

    `kernels` is the timeline of one GPU, as (name, start, end) in ms.
    """
    sent = [(start, end) for name, start, end in kernels if "nccl" in name.lower()]
    computed = [(start, end) for name, start, end in kernels if name.startswith(OUR_KERNELS)]
    if not sent or not computed:
        return None
    sent, computed = merged(sent), merged(computed)
    both = [(max(start, a), min(end, b)) for start, end in sent for a, b in computed if start < b and a < end]
    return {
        "step_ms": max(sent[-1][1], computed[-1][1]) - min(sent[0][0], computed[0][0]),
        "attention_ms": length(computed),
        "communication_ms": length(sent),
        "beside_attention": length(both) / length(sent),
    }


def trace(ranks, calls: dict[Way, Callable], directory: Path) -> list[dict]:
    """Writes the timeline of each call into `directory`, and prints what it says of communication."""
    directory.mkdir(parents=True, exist_ok=True)
    seen = []
    for (method, stride), call in calls.items():
        name = f"{ranks.framework}-{method}{stride or ''}"
        found = overlap(ranks.timeline(call, directory / name))
        if not ranks.chief:
            continue
        if found is None:
            print(f"{name}: no communication of a GPU in this trace")
            continue
        seen.append({"method": method, "heads_k_stride": stride, **found})
        print(
            f"{name}: of {found['step_ms']:.2f} ms attention took {found['attention_ms']:.2f} and communication "
            f"{found['communication_ms']:.2f}, {100 * found['beside_attention']:.0f} % of it beside attention"
        )
    return seen


def save(file: Path | None, measured: dict) -> None:
    if file:
        file.write_text(json.dumps(measured))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--framework", choices=("torch", "jax"), required=True)
    parser.add_argument("--tokens", type=positive, default=8192, help="of a GPU (default 8192)")
    parser.add_argument(
        "--long-tokens", type=positive, default=65536, help="of a GPU, the long sequence (default 65536)"
    )
    parser.add_argument("--rounds", type=positive, default=20, help="of which the median is taken (default 20)")
    parser.add_argument("--only", nargs="+", default=[""], help="batches whose name begins with one of these")
    parser.add_argument("--json", type=new_file, help="write what was measured to this file too")
    parser.add_argument("--trace", type=Path, help="write the timeline of a step of each way into this directory")
    options = parser.parse_args()
    for name in ("tokens", "long_tokens"):
        if getattr(options, name) % 2:
            parser.error(f"--{name.replace('_', '-')}: expected an even number, as a rank has two chunks")
    if options.framework == "torch":
        if "RANK" not in os.environ:
            parser.error("--framework torch: expected to be started by torchrun")
        from bench.scaling.torch_ranks import Ranks
    else:
        from bench.scaling.jax_ranks import Ranks

    ranks = Ranks()
    say = print if ranks.chief else lambda *_, **__: None
    say(", ".join(f"{name} {value}" for name, value in ranks.versions.items()))
    file = options.json if ranks.chief else None
    measured = {"versions": ranks.versions, "rows": [], "timelines": []}
    batches = chosen(workloads(ranks.size, options.tokens, options.long_tokens, options.rounds), options.only)
    for i, workload in enumerate(batches):
        rows, calls = measure(ranks, workload)
        measured["rows"] += rows
        say("\n".join(["", *table(rows)]), flush=True)
        save(file, measured)  # after each, as a long run may be cut off
        if options.trace and i == 0:
            measured["timelines"] = trace(ranks, calls, options.trace)
            save(file, measured)
    ranks.leave()


if __name__ == "__main__":
    main()
