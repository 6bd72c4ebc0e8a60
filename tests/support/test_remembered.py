"""Launches that are interpreted once are interpreted again when any bit, constant or piece of shared memory differs."""

from dataclasses import replace
from unittest import mock

import pytest
import torch

from tests.support.cases import CASES, make_inputs
from tests.support.frameworks import attend_jax, attend_torch
from tests.support.machine import GPU
from tests.support.rank import rank_arrays
from tests.support.remembered import each_launch_once
from zigzag_kernels import interpreter
from zigzag_kernels.launch import Launch, Output

pytestmark = pytest.mark.skipif(GPU, reason="nothing is interpreted")


class Kernel:
    """Stands for a kernel: `y = x + NUMBER`, and counts how often it ran."""

    @staticmethod
    def fn(x_ptr, y_ptr, NUMBER):
        pass


LAUNCH = Launch(Kernel(), "interpret", (1, 1, 1), ("x",), {}, (Output("y", (3,), "float32"),), {"NUMBER": 1})


@pytest.fixture
def interpreted(monkeypatch):
    """The launches that were interpreted, in a list that fills."""
    ran = []

    def run(launch, inputs, outputs):
        ran.append(launch)
        outputs[0][...] = inputs[0] + launch.constexprs["NUMBER"]

    monkeypatch.setattr(interpreter, "interpret", run)
    with each_launch_once():
        yield ran


def launched(launch, x, y=None):
    y = torch.full((3,), torch.nan) if y is None else y
    interpreter.interpret(launch, [x], [y])
    return y


def test_the_same_launch_is_interpreted_once(interpreted):
    x = torch.arange(3.0)
    for _ in range(3):
        assert launched(LAUNCH, x.clone()).tolist() == [1, 2, 3]
    assert len(interpreted) == 1


@pytest.mark.parametrize("other", ["bit", "strides", "constant", "grid", "kernel", "memory"])
def test_another_launch_is_interpreted(other, interpreted):
    x, launch, y = torch.arange(3.0), LAUNCH, None
    launched(launch, x)
    if other == "bit":
        x = x.clone()
        x[0] = -0.0
    if other == "strides":
        x = torch.arange(3.0).repeat_interleave(2)[::2]
    if other == "memory":
        y = x
    changed = {"constant": {"constexprs": {"NUMBER": 2}}, "grid": {"grid": (2, 1, 1)}, "kernel": {"kernel": Kernel()}}
    launched(replace(launch, **changed.get(other, {})), x, y)
    assert len(interpreted) == 2


def test_both_frameworks_launch_the_same():
    """Without this the comparison of their bits would still be right, and take twice as long."""
    case = replace(next(case for case in CASES if case.name == "w2-mha"), lengths=(8,))
    arrays = *rank_arrays(case, make_inputs(case), 1), 1, "interpret"
    counted = mock.Mock(side_effect=interpreter.interpret)
    with mock.patch.object(interpreter, "interpret", counted), each_launch_once():
        ours = attend_torch(case, *arrays)
        launches = counted.call_count
        theirs = attend_jax(case, *arrays)
    assert counted.call_count == launches
    assert all(ours[name].tobytes() == theirs[name].tobytes() for name in ours)
