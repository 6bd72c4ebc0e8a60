"""`zigzag-doctor`: prints the installed versions and the backends, and a command that fixes each problem.

It imports no framework: each front end is tried in a process of its own (`zigzag_torch.selftest`,
`zigzag_jax.selftest`). The exit status is 0 if it finds no problem, otherwise 1.
"""

import argparse
import difflib
import json
import math
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from . import families
from .tiles import override

FRONT_ENDS = {  # package, front end, and the command that installs a build for NVIDIA GPUs
    "PyTorch": ("torch", "zigzag_torch", "pip install --force-reinstall torch"),
    "JAX": ("jax", "zigzag_jax", "pip install 'jax[cuda13]>=0.10'"),
}
PACKAGES = ("torch", "triton", "jax", "jaxlib", "jax-triton", "numpy", "nvidia-cuda-nvcc", "transformers")
FLAGS = (
    "ZIGZAG_USE_FUSED_TRITON_V2",
    "ZIGZAG_VERIFY_CORRECTNESS",
    "ZIGZAG_PROFILE_KERNELS",
    "ZIGZAG_AGREE_IN_EVERY_CALL",
)
PREFIX = "ZIGZAG_"
# Runs a module. The current folder is not in the path, because a file torch.py in it would hide PyTorch. The folder of
# these packages is last in the path, for a checkout that is not installed.
SELF_TEST = "import runpy, sys; sys.path.append({folder!r}); runpy.run_module({module!r}, run_name='__main__')"


class Finding(NamedTuple):
    """A problem and the command that fixes it; a `note` concerns only users of the feature that its text names."""

    text: str
    command: str
    note: bool = False


@dataclass(frozen=True)
class Machine:
    """The facts about this machine that `diagnose` judges.

    `reports` are the results of the self-tests, by framework. `versions` has no entry for a package that is missing.
    """

    versions: dict[str, str]
    gpus: list[tuple[str, str]] = field(default_factory=list)  # name and compute capability
    reports: dict[str, dict] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    processors: int = 64

    def has(self, package: str, at_least: str = "0", below: str = "999999") -> bool:
        """Return whether `package` is installed in a version from `at_least` to before `below`."""
        version = self.versions.get(package)
        return version is not None and _release(at_least) <= _release(version) < _release(below)


def _release(version: str) -> tuple[int, ...]:
    """Return the leading numbers of a version: (2, 13, 0) for "2.13.0+cu130"."""
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in match[0].split(".")) if match else ()


def examine() -> Machine:
    """Collect the facts of this machine, and run the self-test of each installed framework."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    reports = {name: _self_test(module) for name, (package, module, _) in FRONT_ENDS.items() if package in versions}
    return Machine(versions, _gpus(), reports, dict(os.environ), os.cpu_count() or 1)


def _gpus() -> list[tuple[str, str]]:
    query = ["nvidia-smi", "--query-gpu=name,compute_cap", "--format=csv,noheader"]
    try:
        result = subprocess.run(query, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    lines = (line.rsplit(",", 1) for line in result.stdout.splitlines())
    return [(name.strip(), capability.strip()) for name, capability in lines]


def _self_test(module: str) -> dict:
    program = SELF_TEST.format(folder=str(Path(__file__).parents[1]), module=f"{module}.selftest")
    command = [sys.executable, "-P", "-c", program]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    except subprocess.TimeoutExpired:
        return {"error": "the self-test did not end within ten minutes"}
    if result.returncode:
        return {"error": (result.stderr.strip().splitlines() or [f"exit status {result.returncode}"])[-1]}
    return json.loads(result.stdout.splitlines()[-1])


def diagnose(machine: Machine) -> Iterator[Finding]:
    """Yield every problem of `machine`."""
    has, versions, gpu = machine.has, machine.versions, bool(machine.gpus)
    if has("python", below="3.11"):
        yield Finding(f"Python {versions['python']} is too old", "python3.11 -m venv .venv")
    if not has("torch") and not has("jax"):
        yield Finding("Neither PyTorch nor JAX is installed", "pip install 'torch>=2.11'")
    if has("torch", below="2.11"):
        yield Finding(f"PyTorch {versions['torch']} is too old", "pip install --upgrade 'torch>=2.11'")
    if not has("triton"):
        yield Finding(
            "Triton, which the kernels are written in, is not installed", "pip install 'triton>=3.6'", not gpu
        )
    if has("triton", below="3.6"):
        yield Finding(f"Triton {versions['triton']} is too old", "pip install --upgrade 'triton>=3.6'")
    if has("jax"):
        yield from _diagnose_jax(machine)
    if has("transformers") and not has("transformers", "5.17", "6"):
        text = f"zigzag_torch.hf needs transformers 5.17 or newer, below 6, and {versions['transformers']} is installed"
        yield Finding(text, "pip install 'transformers>=5.17,<6'", note=True)
    for name, capability in dict.fromkeys(machine.gpus):
        if _release(capability) < (8, 0):
            text = f"{name} has compute capability {capability}, and the kernels need 8.0 or newer"
            yield Finding(text, "export CUDA_VISIBLE_DEVICES=")
        else:
            yield from _diagnose_tiles(name, capability)
    if any(capability == "9.0" for _, capability in machine.gpus) and has("triton", "3.6"):
        yield from _diagnose_hopper(machine)
    if gpu and machine.environment.get("TRITON_INTERPRET", "0") != "0":
        yield Finding("TRITON_INTERPRET is set, so that nothing is compiled for the GPU", "unset TRITON_INTERPRET")
    yield from _diagnose_variables(machine.environment)
    for name, report in machine.reports.items():
        _, module, install = FRONT_ENDS[name]
        if report.get("amd"):
            yield Finding(f"This {name} is for AMD GPUs, which the kernels do not support", install)
        elif gpu and report.get("gpu") is False:
            yield Finding(f"{name} does not see the GPU", install)
        if error := report.get("error"):
            yield Finding(f"The self-test of {name} failed: {error}", f"python -P -m {module}.selftest")


def _diagnose_variables(environment: dict[str, str]) -> Iterator[Finding]:
    """Yield the variables ZIGZAG_... with an invalid value or an unknown name."""
    switches = [name for family in families.FAMILIES for name in (family.variable, *family.switches) if name]
    checks = dict.fromkeys((*FLAGS, *switches), _not_a_flag)
    checks |= {override.VARIABLE: _not_a_config, "ZIGZAG_AGREEMENT_TIMEOUT": _not_seconds}
    for name, value in environment.items():
        if name in checks:
            if fault := checks[name](value):
                yield Finding(f"{name} is {value!r}, {fault}", f"unset {name}")
        elif name.startswith(PREFIX):
            known = {variable.removeprefix(PREFIX): variable for variable in sorted(checks)}
            similar = difflib.get_close_matches(name.removeprefix(PREFIX), known, n=1)
            meant = f"{known[similar[0]]} is probably meant" if similar else f"there are {', '.join(known.values())}"
            yield Finding(f"{name} is set, and nothing reads it: {meant}", f"unset {name}")


def _not_a_flag(value: str) -> str | None:
    return None if value in ("0", "1") else "neither 0 nor 1"


def _not_seconds(value: str) -> str | None:
    try:
        return None if 0 < float(value) < math.inf else "not a positive number of seconds"
    except ValueError:
        return "not a number of seconds"


def _not_a_config(value: str) -> str | None:
    """Return in words why the file `value` has no valid tiles, or None; an empty value names no file."""
    try:
        if value:
            override.check_file(value, families.known_names())
    except (OSError, ValueError, TypeError, AttributeError) as error:
        return f"which is no file of tiles: {error}"
    return None


def _diagnose_tiles(name: str, capability: str) -> Iterator[Finding]:
    """Yield a note for a GPU on which no tiles were measured; its kernels may be slower than necessary."""
    measured = [target for architecture in families.architectures() for target in architecture.measured_on]
    if capability in measured:
        return
    used = {family.architecture(capability).name for family in families.FAMILIES if family.has_tiles_for(capability)}
    text = (
        f"{name}, compute capability {capability}, takes the tiles of {' and '.join(sorted(used))}, not measured on it"
    )
    yield Finding(text, "python bench/tune.py --kernel forward --head-dim 128", note=True)


def _diagnose_jax(machine: Machine) -> Iterator[Finding]:
    """Yield the versions of JAX, jax-triton, Triton and their dependencies that do not work with each other."""
    has, versions, gpu = machine.has, machine.versions, bool(machine.gpus)
    supported = "pip install 'jax>=0.10' 'jax-triton>=0.3.1,<0.4'"
    if has("jax", below="0.10"):
        yield Finding(f"JAX {versions['jax']} is too old", supported)
    if has("jax", "0.12") and has("jax-triton", "0.4"):
        text = f"With JAX {versions['jax']}, jax-triton {versions['jax-triton']} fails to trace any kernel"
        yield Finding(text, supported)
    if gpu and not has("jax-triton", "0.3.1"):
        yield Finding("jax-triton 0.3.1 or newer, which launches the kernels, is not installed", supported)
    if gpu and has("jax-triton", "0.4") and has("triton", below="3.7"):
        text = (
            f"jax-triton {versions['jax-triton']} does not work with Triton {versions['triton']}, and does not say so"
        )
        yield Finding(text, "pip install 'jax-triton==0.3.1'")
    if gpu and has("triton", "3.9") and has("nvidia-cuda-nvcc", below="13.1"):
        text = f"The assembler of CUDA {versions['nvidia-cuda-nvcc']} rejects what Triton {versions['triton']} emits"
        yield Finding(text, "pip install 'triton>=3.6,<3.9'")
    if not gpu and has("numpy", "2.4") and has("triton", below="3.7.1"):
        text = f"backend='interpret': Triton {versions['triton']} fails with NumPy {versions['numpy']}"
        yield Finding(text, "pip install 'numpy<2.4'", note=True)
    if not gpu and has("jax", below="0.11") and machine.processors <= 2 and "NPROC" not in machine.environment:
        text = f"backend='interpret': JAX {versions['jax']} can wait for ever in a callback on two cores"
        yield Finding(text, "export NPROC=16", note=True)


def _diagnose_hopper(machine: Machine) -> Iterator[Finding]:
    """Yield the reasons why a Hopper GPU would run the portable kernels, which are slower there."""
    has, versions = machine.has, machine.versions
    if has("triton", "3.10"):
        text = f"The kernels for Hopper are written for Triton 3.6 to 3.9, not {versions['triton']}: portable ones run"
        yield Finding(text, "pip install 'triton>=3.6,<3.10'" + " 'torch>=2.11'" * has("torch"), note=True)
    if has("jax", "0.10", "0.10.1"):
        text = f"JAX {versions['jax']} cannot launch the kernels for Hopper, and takes the portable ones"
        yield Finding(text, "pip install 'jax>=0.10.1'", note=True)


def describe(machine: Machine) -> list[str]:
    """Return the installed versions, the GPUs and the results of the self-tests, one line each."""
    lines = [f"{package:<17} {version}" for package, version in machine.versions.items()]
    if cuda := machine.reports.get("PyTorch", {}).get("cuda"):
        lines.append(f"{'CUDA of PyTorch':<17} {cuda}")
    lines += [f"{'GPU':<17} {name}, compute capability {capability}" for name, capability in machine.gpus]
    if not machine.gpus:
        lines.append(f"{'GPU':<17} none")
    for name, report in machine.reports.items():
        test = "failed" if "error" in report else f"passed in {report['seconds']:.1f} s"
        lines.append(f"{name:<17} backend {report.get('backend', 'none')}, self-test {test}")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(prog="zigzag-doctor", description=__doc__)
    parser.parse_args()
    machine = examine()
    print("\n".join(describe(machine)))
    findings = list(diagnose(machine))
    for finding in sorted(findings, key=lambda finding: finding.note):
        print(f"\n{'Note' if finding.note else 'Problem'}: {finding.text}.\n    {finding.command}")
    wrong = any(not finding.note for finding in findings)
    print("\nRun the commands above to fix the problems." if wrong else "\nAll is well.")
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
