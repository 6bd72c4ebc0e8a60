"""Times each kernel of this checkout beside the same kernel of another revision, in turns on one GPU.

    python -m bench.lab.revisions REVISION [--cases NAME ...] [--json FILE]

Use this script when you change a kernel: between two runs, clocks differ by more than most changes gain. The results of
both revisions must be close before anything is timed. Cases are names of `bench/run.py`, as shell patterns. The other
revision is read from git; both use the front ends of this checkout.
"""

import argparse
import importlib
import io
import json
import statistics
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import triton
from tqdm import tqdm

from bench import timing
from bench.arguments import new_file
from bench.run import chosen
from tests.support.cases import BENCH, CASES
from zigzag_torch import launch

ROOT = Path(__file__).parents[2]
PACKAGE, OTHER = "zigzag_kernels", "zigzag_kernels_before"
RANK = 3


def load(revision: str, folder: Path):
    """`zigzag_kernels` of `revision`, as the package `OTHER` in `folder`."""
    archived = subprocess.run(["git", "archive", revision, PACKAGE], cwd=ROOT, capture_output=True, check=False)
    if archived.returncode:
        raise SystemExit(f"{revision!r}: {archived.stderr.decode().strip()}")
    with tarfile.open(fileobj=io.BytesIO(archived.stdout)) as files:
        files.extractall(folder, filter="data")
    (folder / PACKAGE).rename(folder / OTHER)
    sys.path.insert(0, str(folder))
    return OTHER


def _problem(package: str, arrays: tuple, backend: str, options: dict, **sizes):
    """Return the `Problem` of `arrays` by `package`, which may be older than `CallSpec`."""
    make_problem, described = importlib.import_module(f"{package}.problem").make_problem, map(launch.describe, arrays)
    try:
        callspec = importlib.import_module(f"{package}.callspec")
    except ModuleNotFoundError:
        return make_problem(*described, **options, **sizes)
    call = callspec.make_call_spec(head_dim=arrays[0].shape[-1], backend=backend, **options)
    return make_problem(*described, call, **sizes)


def launches(package: str, case, tensors, backend: str | None, deterministic: bool = True) -> tuple[dict, tuple]:
    """({kernel: its calls}, (out, dq, dk, dv)) of a forward and backward pass of `case` by the plan of `package`."""
    plan = importlib.import_module(f"{package}.plan")
    q, k, v, dout, cu_seqlens = tensors
    backend = launch.choose_backend(backend, q.device)
    target, rank, calls = launch.target(backend, q.device), min(RANK, case.world_size - 1), {}

    def run(made, *arrays):
        call = partial(launch.run, made, *arrays)
        calls.setdefault(made.kernel.fn.__name__, []).append(call)
        return call()

    gluon = launch.can_launch_gluon(backend, q, k, v, dout)
    options = {"causal": case.causal, "softmax_scale": None, "deterministic": deterministic}
    asked = _problem(package, (q, k, v), backend, options, sequences=len(case.lengths), world_size=case.world_size,
                     target=target, gluon=gluon)  # fmt: skip
    own = torch.tensor([rank], dtype=torch.int32, device=q.device)
    sizes = {"sequences": len(case.lengths), "world_size": case.world_size, "target": target}
    segments, sequences = plan.segment_tables(run, cu_seqlens, own, **sizes)
    out, lse = plan.forward(run, asked, q, k, v, segments)
    gradients = plan.backward(
        run, asked, q, k, v, out, lse, dout, dlse=None, segments=segments, sequences=sequences,
        dout_strides=dout.stride()[:2],
    )  # fmt: skip
    return calls, (out, *gradients)


def compare(case, packages, device: str, backend: str | None = None, sample: Callable = timing.cuda_sample) -> list:
    """A row `{case, kernel, ms, ms_before}` for each kernel; `ms_before` is None for one that is new."""
    tensors = timing.inputs(case, device)
    calls = {}
    for deterministic in (True, False):
        results = []
        for package in packages:
            found, result = launches(package, case, tensors, backend, deterministic)
            calls |= {(package, kernel): several for kernel, several in found.items()}
            results.append(result)
        for name, now, before in zip(timing.NAMES, *results, strict=False):
            timing.check_close(f"{case}: {name}, beside that of the other revision", now, before)
    samplers = {}
    for key, several in calls.items():
        one = [lambda several=several: [call() for call in several]]
        count = timing.calls_per_round(sample(one, 2))
        samplers[key] = partial(sample, one, count)
    with tqdm(total=timing.ROUNDS + 1, desc=f"{case}: timing", unit="round") as bar:
        times = timing.in_turns(samplers, bar.update)
    medians = {key: statistics.median(rounds) for key, rounds in times.items()}
    this, other = packages
    return [
        {"case": str(case), "kernel": kernel, "ms": ms, "ms_before": medians.get((other, kernel))}
        for (package, kernel), ms in medians.items()
        if package == this
    ]


def table(rows: list[dict]) -> list[str]:
    """Markdown lines."""
    cells = [
        [row["case"], row["kernel"], f"{row['ms']:.4f}"]
        + ([f"{row['ms_before']:.4f}", f"{row['ms_before'] / row['ms']:.3f}"] if row["ms_before"] else ["", ""])
        for row in rows
    ]
    header = ["case", "kernel", "ms", "ms before", "times as fast"]
    return ["| " + " | ".join(line) + " |" for line in (header, ["---"] * len(header), *cells)]


def main(arguments=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("revision", help="as git names it: HEAD, main, a tag, a commit")
    parser.add_argument("--cases", nargs="+", default=["rectangle-d*", "packed16-d128"], metavar="NAME")
    parser.add_argument("--json", type=new_file, help="write what was measured to this file too")
    options = parser.parse_args(arguments)
    cases = {case.name: case for case in CASES if case.tags & BENCH}
    cases = [cases[name] for name in chosen(list(cases), options.cases)]
    gpu = timing.require_gpu()
    print(f"{gpu}, torch {torch.__version__}, triton {triton.__version__}; medians")
    with tempfile.TemporaryDirectory() as folder:
        packages = PACKAGE, load(options.revision, Path(folder))
        rows = [row for case in cases for row in compare(case, packages, "cuda")]
    print("", *table(rows), sep="\n")
    if options.json:
        options.json.write_text(json.dumps({"gpu": gpu, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
