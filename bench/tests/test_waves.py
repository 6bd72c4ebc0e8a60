"""Waves of tasks: prepared side by side, measured one after another in the same process, and none ends the others."""

import os
import time
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path

import pytest

from bench.waves import in_waves

WAVE = 2
prepared = []


def prepare(task: int, folder: Path):
    if task == 5:
        os._exit(1)
    if task == 4:
        raise ValueError("no such task")
    (folder / f"prepared{task}").touch()
    others = range(task // WAVE * WAVE, min(task // WAVE * WAVE + WAVE, 4))
    while not all((folder / f"prepared{x}").exists() for x in others):  # for ever, if the other waits for this one
        time.sleep(0.01)
    prepared.append(task)


def measure(task: int, folder: Path):
    assert prepared.pop() == task, "another process has prepared it"
    (folder / "measuring").touch(exist_ok=False)  # raises if another one measures
    time.sleep(0.05)
    (folder / "measuring").unlink()
    return task


def test_a_wave_is_prepared_together_and_measured_in_turns(tmp_path):
    tasks = [0, 1, 2, 3, 4, 5, 6]
    found = list(in_waves(tasks, WAVE, partial(prepare, folder=tmp_path), partial(measure, folder=tmp_path)))
    assert [task for task, _ in found] == tasks
    assert [result for _, result in found[:4]] == tasks[:4]
    assert isinstance(found[4][1], ValueError)
    assert isinstance(found[5][1], BrokenProcessPool)
    assert found[6][1] == 6


def test_one_process_is_this_one():
    seen = []

    def fail(task):
        raise KeyError(task)

    assert list(in_waves([1, 2], 1, seen.append, lambda task: (task, list(seen)))) == [(1, (1, [1])), (2, (2, [1, 2]))]
    ((_, error),) = in_waves([1], 1, seen.append, fail)
    with pytest.raises(KeyError):
        raise error
