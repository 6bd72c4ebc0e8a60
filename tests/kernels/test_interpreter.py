"""What `zigzag_kernels.interpreter` leaves out of Triton's interpreter changes no result, and is back afterwards."""

import contextlib

import pytest
from triton.runtime import interpreter as triton_interpreter

from tests.support.cases import CASES, make_inputs
from tests.support.frameworks import attend_torch
from tests.support.machine import GPU
from tests.support.rank import rank_arrays
from zigzag_kernels import interpreter

pytestmark = pytest.mark.skipif(GPU, reason="this process compiles")


def state():
    """What a launch replaces."""
    return triton_interpreter.interpreter_builder.options, triton_interpreter._patch_lang


def results(case):
    inputs = rank_arrays(case, make_inputs(case), 1)
    return {name: x.tobytes() for name, x in attend_torch(case, *inputs, 1, "interpret").items()}


def test_the_results_are_those_of_the_whole_interpreter(monkeypatch):
    (case,) = (case for case in CASES if case.name == "w2-uneven")
    replaced, replace = [], triton_interpreter._patch_lang
    monkeypatch.setattr(triton_interpreter, "_patch_lang", lambda called: replaced.append(called) or replace(called))
    before, ours = state(), results(case)
    assert state() == before
    few = len(replaced)
    monkeypatch.setattr(interpreter, "_without_waste", contextlib.nullcontext)
    assert results(case) == ours
    assert len(replaced) - few > 10 * few


def test_a_launch_that_fails_leaves_the_interpreter_as_it_was():
    before = state()
    with interpreter._without_waste():
        assert not triton_interpreter.interpreter_builder.options.sanitize_overflow
    assert state() == before

    class Failing:
        def __getitem__(self, grid):
            raise ZeroDivisionError

    launch = type("Launch", (), {"kernel": Failing(), "grid": (1, 1, 1)})
    with pytest.raises(ZeroDivisionError):
        interpreter.interpret(launch, [], [])
    assert state() == before
