"""Kernels of two revisions side by side: each is timed beside its other self, after results were compared."""

import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from bench import timing
from bench.lab import revisions
from bench.planning import Planning
from tests.support.cases import Case
from tests.support.commands import ROOT
from tests.support.machine import GPU
from zigzag_kernels.portable.family import PORTABLE, sums_apart
from zigzag_torch import launch

DEVICE, BACKEND = ("cuda", None) if GPU else ("cpu", "interpret")
TINY = Case(name="tiny", world_size=2, lengths=(16, 8), heads=2, kv_heads=1, head_dim=16, dtype="float16")


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """The paths of this checkout and of its last commit."""
    if not shutil.which("git") or subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, check=False).returncode:
        pytest.skip("needs a git checkout")
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(timing, "ROUNDS", 1)
    yield revisions.PACKAGE, revisions.load("HEAD", tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == revisions.OTHER]:
        del sys.modules[name]


def clock(ms):
    def sample(calls, count):
        for call in calls:
            call()
        return next(ms)

    return sample


def test_each_kernel_is_timed_beside_its_other_self(packages):
    rows = revisions.compare(TINY, packages, DEVICE, BACKEND, clock(iter([0.25] * 1000)))
    kernels = {row["kernel"] for row in rows}
    assert {"build_segments", "backward_delta"} < kernels
    assert len(kernels) == len(rows) >= 5
    assert all(row == {"case": "tiny", "kernel": row["kernel"], "ms": 0.25, "ms_before": 0.25} for row in rows)
    new = {"case": "tiny", "kernel": "new", "ms": 2.0, "ms_before": None}
    assert revisions.table([{**rows[0], "ms_before": 0.5}, new])[2:] == [
        f"| tiny | {rows[0]['kernel']} | 0.2500 | 0.5000 | 2.000 |",
        "| tiny | new | 2.0000 |  |  |",
    ]


def test_a_kernel_that_is_launched_twice_is_timed_as_a_whole(packages, monkeypatch):
    """A portable one: kernels for Hopper are launched once."""
    case, rounds = replace(TINY, head_dim=256), []
    with Planning(ZIGZAG_HOPPER="0"):
        found, _ = revisions.launches(revisions.PACKAGE, case, timing.inputs(case, DEVICE), BACKEND)
    target = launch.target(launch.choose_backend(BACKEND, torch.device(DEVICE)), torch.device(DEVICE))
    times = len(found["backward_dkdv"])
    assert times == 1 + sums_apart(case.head_dim, case.dtype, PORTABLE.architecture(target))
    counted = {name: [lambda name=name: rounds.append(name)] * len(several) for name, several in found.items()}
    monkeypatch.setattr(revisions, "launches", lambda *_: (counted, timing.inputs(case, DEVICE)[:4]))
    revisions.compare(case, packages, DEVICE, BACKEND, clock(iter([0.25] * 1000)))
    assert rounds.count("backward_dkdv") == times * rounds.count("backward_dq")


def test_results_that_differ_are_not_timed(packages, monkeypatch):
    def spoilt(package, *others):
        calls, (out, dq, *more) = launches(package, *others)
        return calls, (out, dq if package == revisions.PACKAGE else 2 * dq, *more)

    launches = revisions.launches
    monkeypatch.setattr(revisions, "launches", spoilt)
    with pytest.raises(AssertionError, match=r"tiny: dq, beside that of the other revision is off by 5\.0e-01"):
        revisions.compare(TINY, packages, DEVICE, BACKEND)


def test_an_unknown_revision_or_case_is_named(packages, tmp_path):
    with pytest.raises(SystemExit, match=r"'nothing': fatal: .*nothing"):
        revisions.load("nothing", tmp_path)
    with pytest.raises(SystemExit, match="'rectangle' matches none of rectangle-d128"):
        revisions.main(["HEAD", "--cases", "rectangle"])
