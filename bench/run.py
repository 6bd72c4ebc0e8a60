"""Times one rank's attention, this library's and others', on the bench cases, after checking what each computes.

    python bench/run.py [--quick] [--cases NAME ...] [--implementations NAME ...] [--json FILE] [--plots FOLDER]

Needs a GPU. An implementation that cannot run here, or whose results are wrong, gets a row that says so. Ends with
status 1 if that is one of this library's. docs/guide/benchmarking.md says how to read the table.
"""

import argparse
import concurrent.futures
import contextlib
import functools
import gc
import importlib.metadata
import json
import multiprocessing
import os
import sys
import time
from fnmatch import fnmatch
from pathlib import Path

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch shares the GPU
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from tqdm import tqdm

from bench import report, timing
from bench.compare import IMPLEMENTATIONS, TORCH, Unavailable, prepare
from tests.support.cases import BENCH, CASES, QUICK
from zigzag_kernels import cost

PACKAGES = "torch", "triton", "jax", "jax-triton", "flash-attn3-jax", "nvidia-cudnn-cu13"
FLOPS = dict(zip(report.DIRECTIONS, (cost.forward_flops, cost.backward_flops), strict=True))
MOST_SETS = 8
QUICK_ROUNDS = 9
FLEX = "flex-torch"
WORKERS = 8  # processes that compile at the same time, each with some GiB of host memory


def rank_of(case):
    """The rank that is played: neither the first nor the last one of eight."""
    return 3 * case.world_size // 8


def make_sets(case, device):
    """Inputs several times over, until together they exceed what the L2 cache may keep of one call until the next."""
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
        for name, a, b in zip(timing.NAMES, results, done[twin], strict=True):
            assert torch.equal(a, b), f"{name} is not that of {twin} bit for bit"
    return results


def set_up(case, rank, sets, names, device, tick):
    """Prepare the implementations `names`: return two dicts.

    They are {name: {direction: (sampler, MiB, host ms)}} of the ones that work, and {name: reason} of the others.
    """
    expected = {kv_head: timing.exact(case, rank, kv_head, *sets[0]) for kv_head in {0, case.kv_heads - 1}}
    working, reasons, done = {}, {}, {}
    for name in names:
        try:
            ready = prepare(name, case, rank, sets)
            results = check(case, rank, ready, expected, done)
            if IMPLEMENTATIONS[name].ours:
                done[name] = results
            working[name] = {}
            for x in report.DIRECTIONS:
                with ready.planning:
                    memory = peak_mib(getattr(ready.calls[0], x), ready.implementation.framework, device)
                working[name][x] = sampler(ready, x, device), memory, time_host(ready, x, device)
        except Unavailable as error:
            reasons[name] = f"not available: {error}"
        except Exception as error:  # whatever another library raises is a row, not the end of the run
            working.pop(name, None)
            reasons[name] = f"failed: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
        tick(f"{case}: {name}")
    return working, reasons


def measure(case, names, device, matmul, rounds, tick):
    """The rows of one case; `tick(what)` is called len(names) + rounds + 1 times."""
    rank = rank_of(case)
    working, reasons = set_up(case, rank, make_sets(case, device), names, device, tick)
    samplers = {(name, x): one_round for name, found in working.items() for x, (one_round, *_) in found.items()}
    times = timing.in_turns(samplers, functools.partial(tick, f"{case}: timing"), rounds)
    scores = cost.unmasked_scores(case.lengths, rank, case.world_size, case.causal)
    rows = []
    for name in names:
        for direction in report.DIRECTIONS:
            row = {"case": case.name, "implementation": name, "direction": direction}
            if name in reasons:
                rows.append(row | {"status": reasons[name]})
                continue
            summary = report.summarise(times[name, direction])
            tflops = FLOPS[direction](scores, case.heads, case.head_dim) / summary["ms"] / 1e9
            _, memory, host = working[name][direction]
            row |= {"status": report.OK, **summary, "host_ms": host}
            rows.append(row | {"tflops": tflops, "of_matmul": tflops / matmul, "peak_mib": memory})
    return rows


def clean():
    """Give memory back, so that both frameworks may have it."""
    gc.collect()
    torch._dynamo.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def warm_one(name, case):
    """Compile what `name` needs for `case`; what goes wrong here will again, where it is reported."""
    with contextlib.suppress(Exception):
        ready = prepare(name, case, rank_of(case), [timing.inputs(case)])
        with ready.planning:
            ready.calls[0].results()
    clean()


def _one_thread():
    """Keep PyTorch from starting processes to compile in: this process compiles itself."""
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"


def warm(cases, names):
    """Compile for PyTorch in several processes, which leave it in caches on disk, and meanwhile for JAX in this one."""
    kernels, shapes = {}, {}  # a case for each set of kernels, and for each shape: FlexAttention is compiled for one
    for case in cases:
        sizes = case.heads, case.kv_heads, case.head_dim, case.dtype, case.causal, case.world_size
        kernels.setdefault(sizes, case)
        shapes.setdefault((*sizes, case.tokens), case)
    tasks = [(name, case) for name in names if IMPLEMENTATIONS[name].ours for case in kernels.values()]
    tasks += [(name, case) for name in names if name == FLEX for case in shapes.values()]
    context = multiprocessing.get_context("spawn")
    with (
        tqdm(total=len(tasks), desc="compiling", unit="case") as bar,
        concurrent.futures.ProcessPoolExecutor(min(WORKERS, os.cpu_count() or 1), context, _one_thread) as pool,
    ):
        futures = [pool.submit(warm_one, *task) for task in tasks if IMPLEMENTATIONS[task[0]].framework == TORCH]
        for task in tasks:
            if IMPLEMENTATIONS[task[0]].framework != TORCH:
                warm_one(*task)
                bar.update()
        for _ in concurrent.futures.as_completed(futures):
            bar.update()


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
    parser.add_argument("--json", type=Path, help="write what was measured to this file")
    parser.add_argument("--plots", type=Path, help="draw throughput.png and speedup.png into this folder")
    return parser.parse_args(arguments)


def main(arguments=None, device="cuda"):
    options, start = parse(arguments), time.monotonic()
    cases = {case.name: case for case in CASES if case.tags & (QUICK if options.quick else BENCH)}
    cases = [cases[name] for name in chosen(list(cases), options.cases)]
    names = chosen(list(IMPLEMENTATIONS), options.implementations)
    ours = [name for name in names if IMPLEMENTATIONS[name].ours]
    about = machine(device)
    print(", ".join(f"{name} {value}" for name, value in about.items()), flush=True)
    if device == "cuda":
        warm(cases, names)
    about["matmul_tflops"] = matmul = timing.matmul_tflops(torch.bfloat16, 8192 if device == "cuda" else 64, device)
    rows, rounds = [], QUICK_ROUNDS if options.quick else timing.ROUNDS
    with tqdm(total=len(cases) * (len(names) + rounds + 1), unit="step") as bar:

        def tick(what):
            bar.set_description(what)
            bar.update()

        for case in cases:
            rows += measure(case, names, device, matmul, rounds, tick)
            clean()
            if options.json:  # after every case, so that a run cut short leaves what it has measured
                written = {"machine": about, "headlines": report.headlines(rows, ours), "rows": rows}
                options.json.write_text(json.dumps(written, indent=1), encoding="utf-8")
    print(f"\nmatrix product, bfloat16: {matmul:.1f} TFLOP/s\n", *report.table(rows), sep="\n")
    print("", *report.missing(rows), "", sep="\n")
    print(*report.headlines(rows, ours), sep="\n")
    print(f"\n{time.monotonic() - start:.0f} s in all")
    if options.plots:
        report.save_plots(options.plots, rows, matmul)
    failed = [row for row in rows if row["implementation"] in ours and row["status"].startswith("failed")]
    for row in failed:
        print(f"{row['case']}, {row['implementation']}, {row['direction']}: {row['status']}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
