"""What `zigzag_kernels.fast_interpreter` shortens in Triton's interpreter changes no result, and is back afterwards."""

import contextlib
import itertools
from dataclasses import replace

import pytest
from triton.language import core
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter as triton_interpreter

from tests.support.cases import CASES, RANGES, make_inputs
from tests.support.frameworks import attend_torch
from tests.support.machine import GPU
from tests.support.rank import rank_arrays
from zigzag_kernels import fast_interpreter, interpreter

pytestmark = pytest.mark.skipif(GPU, reason="this process compiles")


def state():
    """What a launch replaces."""
    constant = [getattr(owner, name) for owner, name, _ in fast_interpreter._constant()]
    return triton_interpreter.interpreter_builder.options, triton_interpreter._patch_lang, constant, core.tensor.__add__


def results(case):
    inputs = make_inputs(case)
    rank = case.world_size - 1
    named = attend_torch(case, *rank_arrays(case, inputs, rank), rank, "interpret", sinks=inputs.get("sinks"))
    return {name: x.tobytes() for name, x in named.items()}


SMALL = {
    "w2-uneven": {"lengths": (12, 4)},
    "w2-mha": {"lengths": (8,)},
    "w2-all": {"lengths": (12, 0, 8), "lengths_real": (11, 0, 7)},
}


@pytest.mark.parametrize("name", [pytest.param("w2-uneven", marks=pytest.mark.slow), "w2-mha", "w2-all"])
def test_the_results_are_those_of_the_whole_interpreter(name, monkeypatch):
    case = replace(next(case for case in CASES + RANGES if case.name == name), **SMALL[name])
    replaced, patch = [], triton_interpreter._patch_lang
    monkeypatch.setattr(triton_interpreter, "_patch_lang", lambda called: replaced.append(called) or patch(called))
    before, ours = state(), results(case)
    assert state() == before
    few = len(replaced)
    monkeypatch.setattr(interpreter, "shortcuts", contextlib.nullcontext)
    assert results(case) == ours
    assert len(replaced) - few > 10 * few


def outcome(function, *arguments):
    """The name of the type that `function` returns, or the class of its error."""
    try:
        return function(triton_interpreter.interpreter_semantic, *arguments).name
    except TypeError as error:
        return type(error)


def test_operands_of_any_two_types_are_computed_in_the_same_type():
    names = "int1", "int8", "uint8", "int32", "uint32", "int64", "fp16", "bf16", "fp32", "fp64", "fp8e5"
    types, flags = list(map(core.dtype, names)), (False, True)
    whole = TritonSemantic.computation_type_impl
    with fast_interpreter.shortcuts():
        for arguments in itertools.product(types, flags, types, flags, flags):
            for _ in flags:  # worked out, and remembered
                assert outcome(TritonSemantic.computation_type_impl, *arguments) == outcome(whole, *arguments), (
                    arguments
                )


def test_a_launch_that_fails_leaves_the_interpreter_as_it_was():
    before = state()
    with fast_interpreter.shortcuts():
        assert not triton_interpreter.interpreter_builder.options.sanitize_overflow
        assert all(now is not then for now, then in zip(state()[2], before[2], strict=True))
    assert state() == before

    class Failing:
        def __getitem__(self, grid):
            raise ZeroDivisionError

    launch = type("Launch", (), {"kernel": Failing(), "grid": (1, 1, 1)})
    with pytest.raises(ZeroDivisionError):
        interpreter.interpret(launch, [], [])
    assert state() == before
