"""The backward pass repeats bit for bit on a GPU, kernels write their own memory only, and checks find faults."""

import inspect
import subprocess
import sys

import pytest
import torch

from bench import timing
from bench.lab import sanitize
from bench.planning import Planning
from tests.support.cases import CASES
from tests.support.commands import ROOT
from tests.support.machine import GPU
from zigzag_kernels.portable import delta, dkdv, dq, forward
from zigzag_kernels.segments import build

REPEATS = 200
NAMES = "w8-one", "w8-64-uneven", "w2-edges"


@pytest.mark.gpu
@pytest.mark.parametrize("hopper", ["0", "1"])
@pytest.mark.parametrize("case", [case for case in CASES if case.name in NAMES], ids=str)
def test_the_backward_pass_repeats_bit_for_bit(case, hopper):
    tensors = timing.inputs(case)
    rank = case.world_size // 2
    with Planning(ZIGZAG_HOPPER=hopper):
        calls = timing.torch_calls(case, rank, *tensors)
        first = calls.backward()
        for i in range(REPEATS):
            for name, a, b in zip(("dq", "dk", "dv"), calls.backward(), first, strict=True):
                assert torch.equal(a, b), f"{name} of run {i + 1} differs from the first"


@pytest.mark.gpu
@pytest.mark.parametrize(("tool", "kind"), [*((tool, "portable") for tool in sanitize.TOOLS), ("memcheck", "hopper")])
def test_under_the_sanitizer(tool, kind):
    if sanitize.find_binary() is None:
        pytest.skip(sanitize.ABSENT)
    command = [sys.executable, "-m", "bench.lab.sanitize", "--tools", tool, "--kernels", kind]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]


@pytest.mark.skipif(GPU, reason="compiled kernels run under the sanitizer itself")
def test_the_sanitizer_sees_every_portable_kernel():
    names = sanitize.launch("portable", (12, 4, 0, 8), "cpu", "interpret")
    modules = build, forward, delta, dkdv, dq
    functions = [x for module in modules for x in vars(module).values() if hasattr(x, "fn")]
    # Helpers of kernels have private names, or take no pointer first.
    kernels = [x for x in functions if not x.fn.__name__.startswith("_") and _first_argument(x).endswith("_ptr")]
    jitted = {(x.fn.__name__, x.fn.__module__) for x in kernels}
    here = {module.__name__ for module in modules}
    assert names == {name for name, home in jitted if home in here}


def _first_argument(jitted):
    return next(iter(inspect.signature(jitted.fn).parameters))


def test_the_binary_is_found_where_cuda_says_it_is(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(sanitize.sysconfig, "get_path", lambda _: str(tmp_path / "site-packages"))
    place = tmp_path / "site-packages" / "nvidia" / "cu13" / "bin" / sanitize.NAME
    place.parent.mkdir(parents=True)
    place.write_text("#!/bin/sh\n")
    assert sanitize.find_binary() != str(place)  # not executable
    place.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "site-packages" / "nvidia" / "cu13"))
    assert sanitize.find_binary() == str(place)


def test_each_tool_and_kind_of_kernel_is_reported(tmp_path, monkeypatch, capsys):
    """A stand-in for the binary, that finds an error under one tool in one kind of kernel."""
    binary = tmp_path / sanitize.NAME
    binary.write_text('#!/bin/sh\ncase "$*" in *racecheck*hopper) exit 1;; esac\n')
    binary.chmod(0o755)
    monkeypatch.setattr(sanitize, "find_binary", lambda: str(binary))
    assert sanitize.main([]) == 1
    assert capsys.readouterr().out.endswith("errors under racecheck (hopper kernels)\n")
    assert sanitize.main(["--kernels", "portable"]) == 0
    monkeypatch.setattr(sanitize, "find_binary", lambda: None)
    assert sanitize.main([]) == sanitize.SKIPPED
