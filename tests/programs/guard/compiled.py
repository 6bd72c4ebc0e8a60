"""Compiles a few of the recorded launches of each kernel without a GPU, and takes the fingerprint of their PTX."""

import hashlib
import itertools
import re
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any
from unittest import mock

from .recorder import identity

CAPABILITIES = ("8.0", "9.0")
POINTERS = {"float16": "*fp16", "bfloat16": "*bf16", "float32": "*fp32", "int32": "*i32"}
# Constexprs of which only the size matters, up to this number, and those that change nothing but numbers in the code.
UP_TO = {"SLOTS": 2, "WORLD_SIZE": 3, "GROUP": 2, "HEADS_TOGETHER": 2, "TILES_TOGETHER": 1}
NUMBERS = ("SOFTMAX_SCALE", "KV_HEADS", "HEADS", "ROW")
# Of these every pair of values is wanted once, of all others every value.
PAIRED = ("dtype", "HEAD_DIM", "CAUSAL", "ACCUMULATE", "SLOTS")


def choose(launches: Iterable[dict[str, Any]], like: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    """Return few compilations which have every value of each constexpr, and every pair of the important ones.

    `like` is a record, if those that it has compiled are wanted instead.
    """
    jobs = {}
    for launch in launches:
        if launch["target"] in CAPABILITIES:
            made = job(launch)
            jobs[identity(made)] = made
    if like:
        return [made for number, made in jobs.items() if _name(made, number) in like["compiled"]]
    chosen = []
    by_kernel = sorted(jobs.values(), key=lambda x: (x["kernel"], x["target"], identity(x)))
    for _, group in itertools.groupby(by_kernel, key=lambda x: (x["kernel"], x["target"])):
        candidates = [(x, features(x)) for x in group]
        wanted = set().union(*(found for _, found in candidates))
        while wanted:
            best, found = max(candidates, key=lambda candidate: len(candidate[1] & wanted))
            chosen.append(best)
            wanted -= found
    return chosen


def _name(made: dict[str, Any], number: str) -> str:
    return f"{made['kernel']} for {made['target']}, {number}"


def job(launch: dict[str, Any]) -> dict[str, Any]:
    """Return the part of a launch that the compiler sees."""
    dtypes = {name: dtype for name, _, dtype in launch["outputs"]}
    absent = {place: dtypes[name] for name, place in launch["in_place"].items()}
    types = [POINTERS[dtype or absent[name]] for name, dtype in launch["inputs"]]
    types += ["i32"] * len(launch["scalars"]) + [POINTERS[dtype] for dtype in dtypes.values()]
    same = ("kernel", "target", "constexprs", "num_warps", "num_stages")
    return {name: launch[name] for name in same} | {"types": types}


def features(made: dict[str, Any]) -> set:
    """Return what a compilation is an example for."""
    values = {"dtype": made["types"][0], "types": tuple(made["types"]), "num_warps": made["num_warps"]}
    values |= {"num_stages": made["num_stages"]}
    for name, value in made["constexprs"].items():
        if not name.startswith("STRIDE_") and name not in NUMBERS:
            values[name] = min(value, UP_TO.get(name, value))
    paired = [(name, values[name]) for name in PAIRED if name in values]
    return {*values.items(), *itertools.combinations(paired, 2)}


def fingerprints(jobs: list[dict[str, Any]], kernels: dict[str, Any], report=print) -> Iterator[tuple[str, dict]]:
    """Yield (name, fingerprint) of each job; nothing is taken from Triton's cache, or left there."""
    from triton import knobs
    from triton.backends.nvidia.compiler import CUDABackend

    no_assembler = mock.patch.object(CUDABackend, "make_cubin", return_value=b"")
    with tempfile.TemporaryDirectory() as directory, no_assembler:
        knobs.cache.dir = directory
        knobs.compilation.always_compile = True
        knobs.compilation.disable_line_info = True
        for number, made in enumerate(jobs):
            began = time.perf_counter()
            found = fingerprint(made, kernels[made["kernel"]])
            seconds = time.perf_counter() - began
            name = _name(made, identity(made))
            report(f"{number + 1}/{len(jobs)} {name}: {found['lines']} lines, {seconds:.1f} s")
            yield name, made | found


def fingerprint(made: dict[str, Any], kernel: Any) -> dict[str, Any]:
    """Compile up to PTX, and describe it: a hash of its text, and how often each instruction occurs."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    types, constexprs = made["types"], made["constexprs"]
    names = kernel.arg_names
    signature = dict(zip(names, types, strict=False)) | dict.fromkeys(constexprs, "constexpr")
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(types) if kind[0] == "*"}
    source = (GluonASTSource if kernel.is_gluon() else ASTSource)(kernel, signature, constexprs, aligned)
    options = {"num_warps": made["num_warps"], "num_stages": made["num_stages"]}
    target = GPUTarget("cuda", int(made["target"].replace(".", "")), 32)
    compiled = triton.compile(source, target, options)
    text = normalised(compiled.asm["ptx"])
    return {
        "gluon": kernel.is_gluon(),
        "ptx": hashlib.sha256("\n".join(text).encode()).hexdigest(),
        "lines": len(text),
        "opcodes": dict(sorted(opcodes(text).items())),
        "shared_memory": compiled.metadata.shared,
        "warps": compiled.metadata.num_warps,
        "scratch": compiled.metadata.global_scratch_size,
    }


def normalised(ptx: str) -> list[str]:
    """Return the lines of `ptx` without comments, places in the source, and the modules that functions come from."""
    ptx = re.sub(r"\.section\s+\.debug\w*\s*\{.*?\n\s*\}", "", ptx, flags=re.DOTALL)
    names = re.findall(r"\.func\s+(?:\([^)]*\)\s*)?([\w.$]+)", ptx)
    for number, name in enumerate(dict.fromkeys(names)):
        ptx = re.sub(rf"(?<![\w.$]){re.escape(name)}(?![\w.$])", f"function{number}", ptx)
    lines = (line.split("//")[0].strip() for line in ptx.splitlines())
    return [line for line in lines if line and not re.match(r"\.loc\s|\.file\s|\$L__(tmp|func_)\w*:", line)]


def opcodes(lines: list[str]) -> Counter:
    """Count the instructions by their whole names."""
    found = (re.match(r"(?:@!?%\w+\s+)?([a-z][\w.:]*)", line) for line in lines)
    return Counter(match[1] for match in found if match)
