"""Runs a small case of every kernel under NVIDIA's compute-sanitizer, and says where each report is from.

    python -m bench.lab.sanitize [--tools memcheck racecheck initcheck] [--kernels portable hopper] [--logs FOLDER]
    python -m bench.lab.sanitize --kernels control hopper -- --racecheck-report all
    compute-sanitizer --tool memcheck python -m bench.lab.sanitize --launch portable

The first finds the binary, in PATH, CUDA's folders or a pip package, and runs the third with each tool and kind of
kernel, side by side; "control" are the kernels of `sanitizer_control.py`, correct ones and a wrong one. Arguments after
`--` are passed to the sanitizer. The exit status is 1 if a tool finds an error, and 77 if there is no such binary.
"""

import argparse
import ast
import collections
import functools
import itertools
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

TOOLS = "memcheck", "racecheck", "initcheck"
KINDS = {"portable": "0", "hopper": "1"}  # and what ZIGZAG_HOPPER says
CONTROL = "control"
NAME = "compute-sanitizer"
# Triton's kernels do not declare their mbarriers, so the tools would guess the number. A kernel has 3 for each of up to
# 4 stages (`hopper/stages.py`), and 3 more. Paths are printed in full, because two files are named forward.py.
OPTIONS = (
    "--error-exitcode", "1", "--num-cuda-barriers", "32", "--strip-paths", "no", "--show-backtrace", "no",
    "--print-limit", "100000",
)  # fmt: skip
ABSENT = f"no {NAME} in PATH, in CUDA_HOME, under /usr/local or in an nvidia pip package"
SKIPPED = 77  # what test harnesses take for "skipped"
TRITONS_OWN = "Triton's own"
PARTING = "gl.warp_specialize", "specialize_warps"  # calls at which a kernel's warps part

_PLACE = r"(?:(?P<at>0x\w+) in )?(?P<kernel>.+?)(?:\+(?P<offset>0x\w+))?(?: in (?P<path>\S.*):(?P<line>\d+))?"
_RACE = re.compile(r"\w+: Race reported between (\w+) access at (.+)")
_AND = re.compile(r"and (\w+) access at (.+?)(?: \[(\d+) hazards?\])?")
_HAZARD = re.compile(r"\w+: (?:\(.*\) ?)?Potential (\w+) hazard detected at .*")
_THREAD = re.compile(r"(?:Read|Write) Thread \(.*?\) at (.+)")
_ACCESS = re.compile(r"((?:Invalid|Uninitialized|Potential invalid|Barrier error|Warpgroup MMA|Unused) ?.*)")
_SAID = re.compile(r"launched .*|=+ (?:.*SUMMARY: .*|Warning: (?!Race|Potential).*)")


def find_binary() -> str | None:
    """Path of the sanitizer, or None."""
    if found := shutil.which(NAME):
        return found
    homes = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ]
    homes += sorted(Path("/usr/local").glob("cuda*"))
    places = [home / folder / NAME for home in homes for folder in ("bin", "compute-sanitizer")]
    places += sorted(Path(sysconfig.get_path("purelib"), "nvidia").glob(f"**/{NAME}"))
    return next((str(place) for place in places if place.is_file() and os.access(place, os.X_OK)), None)


def _zeros(size):
    """Replace `zigzag_torch.launch.scratch`: initcheck does not see the descriptors that kernels make there."""
    import torch

    return torch.zeros(size, dtype=torch.int8, device="cuda")


def launch(kind, lengths=(516, 4, 0, 260), device="cuda", backend="triton") -> set[str]:
    """Launch every kernel on lengths that end in the middle of tiles.

    The portable kernels run in one launch, in windows of KV heads and in ring steps, forward and backward. The kernels
    for Hopper run in one launch, the backward pass by two kernels and by the fused one.

    Returns the names of the kernels.
    """
    from zigzag_torch import launch as torch_launch

    zeroed = mock.patch.object(torch_launch, "scratch", _zeros)
    if kind == CONTROL:
        from bench.lab import sanitizer_control

        with zeroed:
            return sanitizer_control.launch()
    from bench import ranks, timing
    from bench.planning import Planning
    from tests.support.cases import Case

    names = set()
    for head_dim in (64, 128, 256):
        sizes = {"heads": 8, "kv_heads": 2, "head_dim": head_dim, "dtype": "bfloat16", "padding": 3}
        case = Case(name=f"head_dim {head_dim}", world_size=2, lengths=lengths, **sizes)
        tensors = timing.inputs(case, device)
        with Planning(ZIGZAG_HOPPER=KINDS[kind]) as planning, zeroed:
            if kind == "hopper":
                for deterministic in (True, False):
                    timing.torch_calls(case, 1, *tensors, backend=backend, deterministic=deterministic).results()
            else:
                windows = ranks.pack_windows(*tensors[1:3], 1)
                player = ranks.Player(case, 1, tensors, 1, backend)
                for call in player.calls(windows, player.new_sums()).values():
                    call()
        names |= {made.kernel.fn.__name__ for made in planning.planner.launches}
    return names


@functools.cache
def describe(path: str, line: int) -> str:
    """Return "file:line function" for a place in the source, or `TRITONS_OWN` for code that Triton adds.

    The tools report such code at the line of the kernel's head or of its warp specialisation: the exchange of arguments
    between partitions, and the loop in which warps wait for work.
    """
    where = f"{Path(path).name}:{line}"
    if not Path(path).is_file() or not path.endswith(".py"):
        return where

    def holds(node):
        start = min(x.lineno for x in (node, *getattr(node, "decorator_list", ())))
        return start <= line <= node.end_lineno

    nodes = [x for x in ast.walk(ast.parse(Path(path).read_text(encoding="utf-8"))) if hasattr(x, "end_lineno")]
    function = next((x for x in nodes if isinstance(x, ast.FunctionDef) and holds(x)), None)
    calls = (x for x in nodes if isinstance(x, ast.Call) and ast.unparse(x.func) in PARTING)
    if function is None:
        return where
    if line < function.body[0].lineno or any(map(holds, calls)):
        return TRITONS_OWN
    return f"{where} {function.name}"


def place(text: str) -> tuple[str, str]:
    """(kernel, where in it) of a place as the tools print it."""
    found = re.fullmatch(_PLACE, text.strip())
    assert found, text
    kernel = re.split(r"[<(]", found["kernel"])[0].removeprefix("void ")
    offset = found["offset"] or found["at"] or "?"
    return kernel, describe(found["path"], int(found["line"])) if found["path"] else offset


def read_reports(text: str) -> collections.Counter[tuple[str, str, str]]:
    """Count the reports in the output `text` of a tool: {(kernel, error, place): number}."""
    counts = collections.Counter()
    lines = [line.lstrip("=").strip() for line in text.splitlines() if line.startswith("====")]
    lines += ["", ""]
    first = None
    for line, second, third in zip(lines, lines[1:], lines[2:], strict=False):
        if found := _RACE.fullmatch(line):
            first = found
        elif first and (found := _AND.fullmatch(line)):
            (kernel, here), (_, there) = place(first[2]), place(found[2])
            counts[kernel, f"race: {first[1]}, {found[1]}", f"{here} | {there}"] += int(found[3] or 1)
        elif (found := _HAZARD.fullmatch(line)) and (threads := [_THREAD.match(x) for x in (second, third)]):
            (kernel, here), (_, there) = (place(x[1]) if x else ("?", "?") for x in threads)
            counts[kernel, f"hazard: {found[1]}", f"{here} | {there}"] += 1
        elif found := _ACCESS.fullmatch(line):
            kernel, where = place(second.removeprefix("at ")) if second.startswith("at ") else ("?", "?")
            counts[kernel, found[1], where] += 1
    return counts


def table(reports: dict[tuple[str, str], collections.Counter]) -> list[str]:
    """Rows of Markdown; `reports` {(tool, kind of kernel): what `read_reports` gave}."""
    rows = [
        (*key, kernel, what, where, str(count))
        for key, counts in reports.items()
        for (kernel, what, where), count in sorted(counts.items(), key=lambda item: (item[0][0], -item[1]))
    ]
    header = ("tool", "kernels", "kernel", "reported", "where", "times")
    return ["| " + " | ".join(x.replace("|", "and") for x in row) + " |" for row in (header, ("---",) * 6, *rows)]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=TOOLS)
    parser.add_argument("--kernels", nargs="+", choices=(*KINDS, CONTROL), default=tuple(KINDS))
    parser.add_argument("--launch", choices=(*KINDS, CONTROL), help="only launch these, for the sanitizer to see")
    parser.add_argument("--logs", type=Path, help="folder for all that the tools print")
    parser.add_argument("options", nargs="*", help="of the sanitizer, behind --")
    options = parser.parse_args(arguments)
    if options.launch:
        print("launched", *sorted(launch(options.launch)), flush=True)
        return 0
    binary = find_binary()
    if binary is None:
        print(f"skipped: {ABSENT}")
        return SKIPPED
    # Memory that PyTorch keeps for reuse would hide what runs over the end of an array.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}

    def run(job):
        tool, kind = job
        script = sys.executable, "-m", "bench.lab.sanitize", "--launch", kind
        command = [binary, "--tool", tool, *OPTIONS, *options.options, *script]
        return subprocess.run(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        )

    failed, reports = [], {}
    jobs = list(itertools.product(options.tools, options.kernels))
    with ThreadPoolExecutor(len(jobs)) as pool:
        for (tool, kind), result in zip(jobs, pool.map(run, jobs), strict=True):
            print(f"{binary} --tool {tool}, {kind} kernels", flush=True)
            if options.logs:
                options.logs.mkdir(parents=True, exist_ok=True)
                (options.logs / f"{tool}-{kind}.txt").write_text(result.stdout, encoding="utf-8")
            counts = reports[tool, kind] = read_reports(result.stdout)
            lines = result.stdout.splitlines()
            if result.returncode:
                failed.append(f"{tool} ({kind} kernels)")
            # Of a run that failed without a report, show the end of its output.
            said = lines[-40:] if result.returncode and not counts else filter(_SAID.fullmatch, lines)
            print("\n".join(said), flush=True)
    if any(reports.values()):
        print("\n".join(table(reports)))
    print(f"errors under {', '.join(failed)}" if failed else "no errors")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
