"""Times the attention of one rank, by this library and by others, on the bench cases, after checking all results.

    python bench/run.py [--quick] [--cases NAME ...] [--implementations NAME ...] [--json FILE] [--plots FOLDER]
                        [--processes N]

The script needs a GPU. An implementation that cannot run, or whose results are wrong, has a row with the reason. The
exit status is 1 if that is an implementation of this library. docs/guide/benchmarking.md says how to read the table.
"""

import argparse
import contextlib
import functools
import gc
import importlib.metadata
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch shares the GPU
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from tqdm import tqdm

from bench import report, timing
from bench.arguments import new_file, positive
from bench.compare import IMPLEMENTATIONS, TORCH, Unavailable, prepare
from bench.slices import scores_of
from bench.waves import in_waves
from tests.support.cases import BENCH, CASES, MASKS, QUICK
from zigzag_kernels import cost

PACKAGES = "torch", "triton", "jax", "jax-triton", "flash-attn3-jax", "flash-attn-4", "nvidia-cudnn-cu13"
FLOPS = dict(zip(report.DIRECTIONS, (cost.forward_flops, cost.backward_flops), strict=True))
MOST_SETS = 8
QUICK_ROUNDS = 9
GRAPH_BELOW_MS = 5  # calls that take longer keep the GPU busy, however slow the host is
PROCESSES = 8  # that compile at the same time, each with some GiB of host memory and the arrays of a case


def rank_of(case):
    """The rank that is played: neither the first nor the last one of eight."""
    return 3 * case.world_size // 8


def make_sets(case, device):
    """Make several sets of inputs, enough that the L2 cache cannot keep data from one call for the next."""
    first = timing.inputs(case, device)
    cache = torch.cuda.get_device_properties(device).L2_cache_size if device == "cuda" else 0
    count = min(MOST_SETS, 1 + 2 * cache // sum(x.nbytes for x in first))
    return [first, *(timing.inputs(case, device, seed) for seed in range(1, count))]


def peak_mib(call, framework, device):
    """MiB that a call needs at its peak, results and temporaries; of JAX what the compiler says."""
    if framework != TORCH:
        analysis = call.func.memory_analysis()
        return (analysis.temp_size_in_bytes + analysis.output_size_in_bytes) / 2**20 if analysis else None
    if device != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def clocks(ready, device):
    """(sample, wait): how the framework of `ready` is timed, and how the host waits for a result."""
    if ready.implementation.framework != TORCH:
        import jax

        return functools.partial(timing.host_sample, wait=jax.block_until_ready), jax.block_until_ready
    if device == "cuda":
        return timing.cuda_sample, lambda _: torch.cuda.synchronize()
    return functools.partial(timing.host_sample, wait=lambda _: None), lambda _: None


def time_host(ready, direction, device):
    """Milliseconds that a call keeps the host."""
    _, wait = clocks(ready, device)
    with ready.planning:
        return timing.host_ms(getattr(ready.calls[0], direction), wait)


def sampler(ready, direction, device):
    """A call that times one round: as many calls as fill it, in the framework's own way."""
    calls = [getattr(x, direction) for x in ready.calls]
    sample, _ = clocks(ready, device)
    with ready.planning:
        sample(calls, len(calls))  # compiles, and allocates
        count = timing.calls_per_round(sample(calls, 2))

    def one_round():
        with ready.planning:
            return sample(calls, count)

    return one_round


def graphs(ready, case, rank, sets, direction):
    """Return replays of CUDA graphs, one for each set of inputs; `AssertionError` unless they equal eager calls.

    All arrays are made anew on the stream of the capture: autograd goes back on the stream of the forward pass.
    """
    stream, replays = torch.cuda.Stream(), []
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), ready.planning:
        for calls in ready.implementation.make(case, rank, sets):
            call = getattr(calls, direction)
            expected = call()
            stream.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                kept = call()
            graph.replay()
            both = ([x] if isinstance(x, torch.Tensor) else x for x in (kept, expected))
            for got, wanted in zip(*both, strict=True):
                timing.check_close(f"{case}: {direction} of a CUDA graph", got, wanted)
            replays.append(functools.partial(_replay, graph, kept, calls))
    return replays


def _replay(graph, *kept):
    """Replay `graph`; `kept` is memory that it uses."""
    graph.replay()


def graph_sampler(ready, case, rank, sets, direction, eager, device):
    """Return a call that times one round of CUDA graphs; None for long calls, JAX, and what cannot be captured."""
    if device != "cuda" or ready.implementation.framework != TORCH or eager() > GRAPH_BELOW_MS:
        return None
    try:
        replays = graphs(ready, case, rank, sets, direction)
    except Exception as error:  # of other libraries, too; of this one a wrong result is a failure
        if ready.implementation.ours:
            raise
        print(f"{case}, {ready.name}: no CUDA graph: {_in_a_line(error)}", file=sys.stderr)
        torch.cuda.synchronize()
        return None
    count = timing.calls_per_round(timing.cuda_sample(replays, len(replays)))
    return functools.partial(timing.cuda_sample, replays, count)


def _in_a_line(error):
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def check(case, rank, ready, expected, done):
    """Raise `AssertionError` unless the results are right, and equal the other framework's bit for bit.

    `done` has the results that were checked before.
    """
    with ready.planning:
        results = ready.calls[0].results()
    for kv_head, right in expected.items():
        timing.check(case, rank, kv_head, results, right)
    twin = ready.implementation.twin
    if twin in done:
        for name, a, b in zip(timing.NAMES[: len(results)], results, done[twin], strict=True):
            assert torch.equal(a, b), f"{name} is not that of {twin} bit for bit"
    return results


class Timed(NamedTuple):
    """One direction of an implementation that was checked: calls that time a round, and its other numbers."""

    eager: Callable[[], float]
    graph: Callable[[], float] | None
    peak_mib: float | None
    host_ms: float


def set_up(case, names, device):
    """Check the implementations `names`: return {(name, direction): Timed} and {name: reason} of the others."""
    rank, sets = rank_of(case), make_sets(case, device)
    expected = {kv_head: timing.exact(case, rank, kv_head, *sets[0]) for kv_head in {0, case.kv_heads - 1}}
    working, reasons, done = {}, {}, {}
    for name in names:
        try:
            ready = prepare(name, case, rank, sets)
            results = check(case, rank, ready, expected, done)
            if IMPLEMENTATIONS[name].ours:
                done[name] = results
            made = {}
            for x in report.DIRECTIONS:
                with ready.planning:
                    memory = peak_mib(getattr(ready.calls[0], x), ready.implementation.framework, device)
                eager = sampler(ready, x, device)
                graph = graph_sampler(ready, case, rank, sets, x, eager, device)
                made[name, x] = Timed(eager, graph, memory, time_host(ready, x, device))
            working |= made
        except Unavailable as error:
            reasons[name] = f"not available: {error}"
        except Exception as error:  # whatever another library raises is a row, not the end of the run
            reasons[name] = f"failed: {_in_a_line(error)}"
    return working, reasons


def measure(case, names, found, matmul, rounds):
    """Return the rows of one case; `found` is its `set_up`."""
    working, reasons = found
    samplers = {(*key, False): timed.eager for key, timed in working.items()}
    samplers |= {(*key, True): timed.graph for key, timed in working.items() if timed.graph}
    times = timing.in_turns(samplers, rounds=rounds)
    scores = scores_of(case, rank_of(case))
    rows = []
    for name in names:
        for direction in report.DIRECTIONS:
            row = {"case": case.name, "implementation": name, "direction": direction}
            if name in reasons:
                rows.append(row | {"status": reasons[name]})
                continue
            timed, summary = working[name, direction], report.summarise(times[name, direction, False])
            tflops = FLOPS[direction](scores, case.heads, case.head_dim) / summary["ms"] / 1e9
            graph = statistics.median(times[name, direction, True]) if timed.graph else None
            row |= {"status": report.OK, **summary, "graph_ms": graph, "host_ms": timed.host_ms}
            rows.append(row | {"tflops": tflops, "of_matmul": tflops / matmul, "peak_mib": timed.peak_mib})
    return rows


def failed_rows(case, names, error):
    """Return the rows of a case that could not be set up or timed at all."""
    row = {"case": case.name, "status": f"failed: {_in_a_line(error)}"}
    return [{**row, "implementation": name, "direction": x} for name in names for x in report.DIRECTIONS]


def clean():
    """Free cached memory, so that both frameworks can allocate it."""
    gc.collect()
    torch._dynamo.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


_found = {}  # {name of a case: its `set_up`} in this process


def prepare_case(case, names, device):
    _found[case.name] = set_up(case, names, device)


def measure_case(case, names, matmul, rounds):
    rows = measure(case, names, _found.pop(case.name), matmul, rounds)
    clean()
    return rows


def _one_thread():
    """Keep PyTorch from starting processes to compile in: this process compiles itself."""
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"


def machine(device):
    """Return the facts that the numbers depend on: the GPU and the installed versions."""
    versions = {}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {"gpu": timing.require_gpu() if device == "cuda" else "none", **versions}


def chosen(names, patterns):
    """Return the `names` that match any of the shell `patterns`; `SystemExit` for a pattern without a match."""
    for pattern in patterns:
        if not any(fnmatch(name, pattern) for name in names):
            raise SystemExit(f"{pattern!r} matches none of {', '.join(names)}")
    return [name for name in names if any(fnmatch(name, pattern) for pattern in patterns)]


def parse(arguments):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="only the few cases that matter most")
    parser.add_argument("--cases", nargs="+", default=["*"], metavar="NAME", help="shell patterns")
    parser.add_argument("--implementations", nargs="+", default=["*"], metavar="NAME", help="shell patterns")
    parser.add_argument(
        "--processes", type=positive, metavar="N", help="that compile side by side; one a case at a time"
    )
    parser.add_argument("--json", type=new_file, help="write what was measured to this file")
    parser.add_argument("--plots", type=Path, help="draw throughput.png and speedup.png into this folder")
    return parser.parse_args(arguments)


def main(arguments=None, device="cuda"):
    options, start = parse(arguments), time.monotonic()
    cases = {case.name: case for case in CASES + MASKS if case.tags & (QUICK if options.quick else BENCH)}
    cases = [cases[name] for name in chosen(list(cases), options.cases)]
    names = chosen(list(IMPLEMENTATIONS), options.implementations)
    ours = [name for name in names if IMPLEMENTATIONS[name].ours]
    about = machine(device)
    print(", ".join(f"{name} {value}" for name, value in about.items()), flush=True)
    about["matmul_tflops"] = matmul = timing.matmul_tflops(torch.bfloat16, 8192 if device == "cuda" else 64, device)
    rows, rounds = [], QUICK_ROUNDS if options.quick else timing.ROUNDS
    processes = options.processes or (min(PROCESSES, os.cpu_count() or 1, len(cases)) if device == "cuda" else 1)
    waves = in_waves(
        cases,
        processes,
        functools.partial(prepare_case, names=names, device=device),
        functools.partial(measure_case, names=names, matmul=matmul, rounds=rounds),
        _one_thread,
    )
    for case, found in tqdm(waves, total=len(cases), unit="case"):
        rows += failed_rows(case, names, found) if isinstance(found, Exception) else found
        if options.json:  # after every case, so that a run cut short leaves what it has measured
            written = {"machine": about, "headlines": report.headlines(rows, ours), "rows": rows}
            options.json.write_text(json.dumps(written, indent=1), encoding="utf-8")
    print(f"\nmatrix product, bfloat16: {matmul:.1f} TFLOP/s\n", *report.table(rows), sep="\n")
    print("", *report.missing(rows), "", sep="\n")
    print(*report.headlines(rows, ours), sep="\n")
    print("", *report.winners(rows), sep="\n")
    print(f"\n{time.monotonic() - start:.0f} s in all")
    if options.plots:
        report.save_plots(options.plots, rows, matmul)
    failed = [row for row in rows if row["implementation"] in ours and row["status"].startswith("failed")]
    for row in failed:
        print(f"{row['case']}, {row['implementation']}, {row['direction']}: {row['status']}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
