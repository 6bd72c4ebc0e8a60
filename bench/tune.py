"""Searches tile sizes for one kernel on this machine's GPU, and writes a file for `ZIGZAG_KERNEL_CONFIG`.

    python bench/tune.py --kernel forward --head-dim 128 [--dtype bfloat16] [--output tiles.json]

Every configuration that `fits()` is compiled, checked against float32, and timed in turns with the one in use, because
clocks move by more than configurations differ. The score of a configuration is its time for the whole pass relative to
the one in use, as the geometric mean over the cases. The best configuration is added to `tiles.json`, and replaces an
entry for the same kernel there. `tiles.measured.json` has every configuration with its time or its error.
"""

import argparse
import concurrent.futures
import contextlib
import itertools
import json
import math
import multiprocessing
import os
import statistics
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import triton
from tqdm import tqdm

from bench import timing
from bench.arguments import new_file
from bench.planning import Planning
from tests.support.cases import CASES
from zigzag_kernels.checks import DTYPE_BYTES
from zigzag_kernels.families import FAMILIES, choose_tiles, family_of, kernels_by_name
from zigzag_kernels.modes import LengthClass, Operation
from zigzag_kernels.tiles import override
from zigzag_kernels.tiles.config import KernelId, TileConfig

NAMES = "rectangle-d128", "short-d128", "packed16-d128", "packed64-d128"  # with the head_dim and type asked for
RANK = 3
WORKERS = 8
GIVE_UP = 1.25  # a configuration that takes this many times the current time in any case is given up
# The shape of a batch decides which Hopper kernel runs, so each kernel is tuned on the cases that it runs.
LONG, FEW, SHORT = ("rectangle-d128",), ("short-d128", "packed16-d128"), ("packed64-d128",)
SERVES = {
    KernelId("hopper", operation, length_class): cases
    for operation in (Operation.FORWARD, Operation.DQ)
    for length_class, cases in zip(LengthClass, (LONG, FEW, SHORT), strict=True)
} | {
    KernelId("hopper", Operation.DKDV): LONG + FEW,
    KernelId("hopper", Operation.DKDV, LengthClass.SHORT): SHORT,
}


@dataclass(frozen=True)
class Trial:
    """A configuration with its time relative to the one in use, by case, or with the reason why it failed."""

    config: TileConfig
    relative: dict[str, float] | None = None
    failure: str | None = None

    @property
    def mean(self) -> float:
        """Geometric mean; infinite if it failed."""
        return statistics.geometric_mean(self.relative.values()) if self.relative else math.inf


def candidates(kernel, head_dim, dtype, target):
    """Every configuration of `kernel` worth a try: blocks that fit, at least 4 warps, up to 4 stages."""
    blocks, fits = (32, 64, 128, 192, 256), family_of(kernel).fits
    heads = (1,) if kernel.length_class is LengthClass.LONG else (1, 2, 4, 8)
    every = itertools.starmap(TileConfig, itertools.product(blocks, blocks[:-1], (4, 8), (1, 2, 3, 4), (0, 1), heads))
    return [config for config in every if fits(kernel, config, head_dim, dtype, target) is None]


def entry(kernel, head_dim, dtype, target, config):
    """The contents of an override file with `config`."""
    place = override.find_entry(family_of(kernel).architecture(target), kernel, head_dim, dtype)
    return override.as_tables(place, config)


def merged(tables, new):
    """Nested `tables`, in which the entries of `new` replace existing entries."""
    if not (isinstance(tables, dict) and isinstance(new, dict)):
        return new
    return tables | {name: merged(tables[name], x) if name in tables else x for name, x in new.items()}


def search(configs, measure, tick=lambda trial: None):
    """A `Trial` of each of `configs`, best first; `measure(config) -> {case: relative time}`, or it raises."""
    trials = []
    for config in configs:
        try:
            trials.append(Trial(config, measure(config)))
        except Exception as error:  # a compiler that gives up, or a wrong result, rules out one configuration
            failure = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            trials.append(Trial(config, failure=failure))
        tick(trials[-1])
    return sorted(trials, key=lambda trial: trial.mean)


class Bench:
    """The pass that `kernel` is part of, on every case, under any configuration of that kernel."""

    def __init__(self, kernel, cases, device="cuda", backend=None):
        self.kernel, self.cases, self.device, self.backend = kernel, cases, device, backend
        self.direction = "forward" if kernel.operation is Operation.FORWARD else "backward"
        self.inputs = {case.name: timing.inputs(case, device) for case in cases}
        self.expected = {case.name: timing.exact(case, RANK, 0, *self.inputs[case.name]) for case in cases}
        self.in_use = {case.name: self.calls(case, None) for case in cases}

    def calls(self, case, tiles):
        """(planning, call) of a pass whose results are right; `tiles` None is the configuration in use."""
        planning = Planning(**environment(self.kernel, tiles))
        with planning:
            calls = timing.torch_calls(
                case, RANK, *self.inputs[case.name], backend=self.backend, deterministic=is_deterministic(self.kernel)
            )
            timing.check(case, RANK, 0, calls.results(), self.expected[case.name])
        if self.kernel not in planning.planner.kernels:
            raise RuntimeError(f"{case}: another kernel than {override.kernel_name(self.kernel)} serves")
        return planning, getattr(calls, self.direction)

    def relative(self, tiles):
        """{case: time with the file `tiles` over that of the configuration in use, medians of rounds in turns}.

        `RuntimeError` if it is hopeless.
        """
        result = {}
        for case in self.cases:
            both = {"in use": self.in_use[case.name], "tried": self.calls(case, tiles)}
            times = timing.in_turns({name: self.sampler(*x) for name, x in both.items()})
            medians = {name: statistics.median(x) for name, x in times.items()}
            result[case.name] = medians["tried"] / medians["in use"]
            if result[case.name] > GIVE_UP:
                raise RuntimeError(f"{case}: {result[case.name]:.2f} of the time in use")
        return result

    def sampler(self, planning, call):
        def sample():
            with planning:
                if self.device == "cuda":
                    return timing.cuda_sample([call], count)
                return timing.host_sample([call], count, lambda _: None)

        count = 1
        count = timing.calls_per_round(sample())
        return sample


def is_deterministic(kernel):
    """Return whether `kernel` gives the same bits each time."""
    return kernel.operation is not Operation.FUSED_BACKWARD


def environment(kernel, tiles):
    """Environment variables that force the family of `kernel`, with the file `tiles` if there is one."""
    families = {family.variable: str(int(family.name == kernel.family)) for family in FAMILIES if family.variable}
    families |= {switch: "0" for family in FAMILIES for switch in family.switches}  # no form that shares its work
    return families | ({override.VARIABLE: str(tiles)} if tiles else {})


def compile_one(kernel, case, tiles):
    """Compile the kernels with the file `tiles` into Triton's cache; the search will report any error again."""
    with contextlib.suppress(Exception), Planning(**environment(kernel, tiles)):
        timing.torch_calls(case, RANK, *timing.inputs(case), deterministic=is_deterministic(kernel)).results()
    torch.cuda.empty_cache()


def compile_all(kernel, case, overrides):
    """`compile_one` of all `overrides`, in processes side by side."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(min(WORKERS, os.cpu_count() or 1), context) as pool:
        futures = [pool.submit(compile_one, kernel, case, path) for path in overrides]
        for _ in tqdm(concurrent.futures.as_completed(futures), total=len(futures), desc="compiling"):
            pass


def write_overrides(folder, configs, entry_of):
    """{config: file with its override}, on top of the current tables."""
    before = os.environ.get(override.VARIABLE)
    tables = json.loads(Path(before).read_text(encoding="utf-8")) if before else {}
    paths = {}
    for i, config in enumerate(configs):
        paths[config] = Path(folder) / f"{i}.json"
        paths[config].write_text(json.dumps(merged(tables, entry_of(config))), encoding="utf-8")
    return paths


def save(path, trials, entry_of, about):
    """Write the best of `trials` into the override `path`, and all of them beside it."""
    tables = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    tables = merged(tables, entry_of(trials[0].config))
    path.write_text(json.dumps(tables, indent=1) + "\n", encoding="utf-8")
    tried = [asdict(trial) for trial in trials]
    beside = path.with_suffix(".measured.json")
    beside.write_text(json.dumps({"machine": about, "tried, best first": tried}, indent=1) + "\n", encoding="utf-8")


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kernel", choices=kernels_by_name(), required=True)
    parser.add_argument("--head-dim", type=int, required=True)
    parser.add_argument("--dtype", choices=tuple(DTYPE_BYTES), default="bfloat16")
    parser.add_argument("--output", type=new_file, default=Path("tiles.json"))
    options = parser.parse_args(arguments)
    about = {"gpu": timing.require_gpu(), "torch": torch.__version__, "triton": triton.__version__}
    target = "{}.{}".format(*torch.cuda.get_device_capability())
    kernel = kernels_by_name()[options.kernel]
    names = SERVES.get(kernel, NAMES)
    sizes = {"head_dim": options.head_dim, "dtype": options.dtype}
    cases = [replace(case, name=case.name.partition("-")[0], **sizes) for case in CASES if case.name in names]
    about |= {"kernel": options.kernel, **sizes}
    print(", ".join(f"{name} {value}" for name, value in about.items()), flush=True)

    def entry_of(config):
        return entry(kernel, options.head_dim, options.dtype, target, config)

    try:
        used = choose_tiles(kernel, options.head_dim, options.dtype, target)
    except LookupError:
        parser.error(f"there is no {options.kernel} for head_dim {options.head_dim} on {target}")
    configs = candidates(kernel, options.head_dim, options.dtype, target)
    configs = [used, *(config for config in configs if config != used)]
    with tempfile.TemporaryDirectory() as folder:
        paths = write_overrides(folder, configs, entry_of)
        compile_all(kernel, cases[-1], paths.values())
        bench = Bench(kernel, cases)
        with tqdm(total=len(configs), desc="timing") as bar:
            trials = search(configs, lambda config: bench.relative(paths[config]), lambda _: bar.update())
    for trial in trials[:10]:
        if trial.relative:
            by_case = ", ".join(f"{name} {x:.3f}" for name, x in trial.relative.items())
            print(f"{trial.mean:.3f} of the time in use: {trial.config} ({by_case})")
    failures = sum(trial.failure is not None for trial in trials)
    if failures == len(trials):
        print("no configuration works", file=sys.stderr)
        return 1
    save(options.output, trials, entry_of, about)
    print(f"{len(trials)} configurations, {failures} of which failed; in use: {used}")
    print(f"{options.output} has the best one; try it with {override.VARIABLE}={options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
