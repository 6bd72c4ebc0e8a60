"""Shows whether a change leaves all launches, and the code that their kernels compile to, as they were.

    python -m tests.programs.guard write before.json --compile          (in a checkout of the code before)
    python -m tests.programs.guard write after.json --like before.json
    python -m tests.programs.guard compare before.json after.json

`write` needs no GPU: it makes the public calls of both front ends for the cases of the tests, as if on each kind of
GPU, and records the launches of the code in this checkout. `--compile` compiles some of the launches, and records
fingerprints of their code; `--like before.json` compiles those that the other record has compiled. Portable kernels
must keep their PTX. Gluon kernels must keep the number of each instruction, in any order. `compare` prints the
differences, and exits with 1 if there are any; it leaves out what only one of the records was asked for.
"""

import argparse
import contextlib
import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

FRAMEWORKS = ("torch", "jax")


def record(selection: dict[str, list[str]], report=print) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return (the record, {name: kernel}) of the launches of what is selected."""
    from .recorder import identity

    launches, calls, kernels = {}, {}, {}
    for framework in selection["frameworks"]:
        for place, made, kernel in _calls(framework, selection):
            kernels |= kernel
            kept = [x for x in made if not selection["kernels"] or x["kernel"] in selection["kernels"]]
            calls[place] = [identity(x) for x in kept]
            launches |= {identity(x): x for x in kept}
        report(f"{framework}: {len(calls)} calls, {len(launches)} different launches so far")
    unknown = set(selection["kernels"]) - kernels.keys()
    if unknown:
        raise SystemExit(f"--kernels: expected some of {', '.join(sorted(kernels))}, got {', '.join(sorted(unknown))}")
    return {"selection": selection, "launches": launches, "calls": calls, "compiled": {}}, kernels


def _calls(framework: str, selection: dict[str, list[str]]):
    """Yield ("framework | target | case | call", launches, kernels)."""
    from tests.support.cases import CASES

    from .recorder import TARGETS, Recorder, import_all, on_target

    module: Any = importlib.import_module(f".{framework}_calls", __package__)
    for package in ("zigzag_kernels", module.PACKAGE):
        import_all(package)
    cases = [x for x in CASES if x.name in selection["cases"]]
    with module.groups() if framework == "torch" else contextlib.nullcontext() as group_of:
        more, stand_ins = ((group_of,), module.stand_ins()) if framework == "torch" else ((), {})
        for target in selection["targets"]:
            recorder = Recorder(module.make)
            with on_target(module.PACKAGE, TARGETS[target], recorder, **stand_ins):
                for case in cases:
                    for name, call in module.calls(case, *more).items():
                        call()
                        launches = recorder.take()
                        place = f"{framework} | {target} | {case.name} | {name}"
                        assert launches, f"{place}: nothing was launched"
                        yield place, launches, recorder.kernels


def write(options: argparse.Namespace) -> int:
    for name in ("TRITON_INTERPRET", "ZIGZAG_HOPPER", "ZIGZAG_KERNEL_CONFIG"):
        os.environ.pop(name, None)
    os.environ["JAX_PLATFORMS"] = "cpu"
    import triton

    import zigzag_kernels
    from tests.support.cases import CASES

    from . import compiled
    from .recorder import TARGETS

    print(f"{Path(zigzag_kernels.__file__ or '').parent}, Triton {triton.__version__}", flush=True)
    asked = options.cases or ["every"]
    selection = {
        "frameworks": options.frameworks or list(FRAMEWORKS),
        "targets": options.targets or list(TARGETS),
        "cases": [x.name for x in CASES if "every" in asked or x.name in asked or x.tags & set(asked)],
        "kernels": options.kernels or [],
    }
    made, kernels = record(selection)
    made["triton"] = triton.__version__
    if options.compile or options.like:
        like = json.loads(Path(options.like).read_text()) if options.like else None
        jobs = compiled.choose(made["launches"].values(), like)
        made["compiled"] = dict(compiled.fingerprints(jobs, kernels, report=lambda text: print(text, flush=True)))
    Path(options.file).write_text(json.dumps(made))
    return 0


def compare(options: argparse.Namespace) -> int:
    from . import report

    records = [json.loads(Path(file).read_text()) for file in (options.before, options.after)]
    differences, remarks = report.compare(*records)
    print("\n".join([*differences, *remarks]))
    print(f"{len(differences)} differences" if differences else "no difference")
    return 1 if differences else 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    writing = commands.add_parser("write", help="record launches, and compiled code")
    writing.add_argument("file")
    writing.add_argument("--frameworks", nargs="+", choices=FRAMEWORKS)
    writing.add_argument("--targets", nargs="+", help="compute capabilities, 9.0-portable (no Gluon), or interpret")
    writing.add_argument("--cases", nargs="+", help="names or tags of cases")
    writing.add_argument("--kernels", nargs="+", help="kernel functions, such as attention_forward")
    writing.add_argument("--compile", action="store_true")
    writing.add_argument("--like", metavar="FILE", help="compile the launches that this record has compiled")
    writing.set_defaults(run=write)
    comparing = commands.add_parser("compare", help="print the differences of two records")
    comparing.add_argument("before")
    comparing.add_argument("after")
    comparing.set_defaults(run=compare)
    options = parser.parse_args(arguments)
    return options.run(options)


if __name__ == "__main__":
    sys.exit(main())
