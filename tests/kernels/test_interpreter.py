"""What `zigzag_kernels.fast_interpreter` shortens in Triton's interpreter changes no result, and is back afterwards."""

import contextlib
import itertools
import operator
from dataclasses import replace

import numpy as np
import pytest
import triton.language as tl
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


OPERATORS = {
    "+": operator.add, "-": operator.sub, "*": operator.mul, "<": operator.lt, "<=": operator.le, ">": operator.gt,
    ">=": operator.ge, "==": operator.eq, "&": operator.and_, "//": operator.floordiv, "/": operator.truediv,
    "%": operator.mod,
}  # fmt: skip
KINDS = "int1", "int32", "uint32", "int64", "fp16", "bf16", "fp32"
NUMBERS = 3, -2, 0, True, 0.0, 1.5, core.constexpr(5)


def in_a_kernel():
    """Names the language whose functions the interpreter replaces."""
    return tl


def operands():
    """A number, a scalar, and blocks of each type: contiguous, transposed, and of fewer rows or columns."""
    pointers = core.pointer_type(core.float16)
    for kind in (*map(core.dtype, KINDS), pointers):
        values = np.arange(1, 9).astype(triton_interpreter._get_np_dtype(kind))
        rows = values.reshape(2, 4)
        blocks = values[:1], values[:4], rows, values.reshape(4, 2).T, values[:2, None], values[None, :4]
        for place, data in enumerate(blocks):
            described = core.block_type(kind, list(data.shape)) if place else kind
            yield core.tensor(triton_interpreter.TensorHandle(data, kind), described)
    yield from NUMBERS


def described(compute, *given):
    """All that is known of the result, or the class of the error."""
    try:
        x = compute(*given)
    except Exception as error:
        return type(error)
    x = x.value if isinstance(x, core.constexpr) else x
    if not isinstance(x, core.tensor):
        return x
    data = x.handle.data
    shape = [size.value for size in x.shape]
    return str(x.type), shape, x.numel.value, x.handle.dtype.name, str(data.dtype), data.strides, data.tobytes()


def name_of(x):
    return x.dtype.name if isinstance(x, core.tensor) else repr(x)


def results_of_operators():
    """{(operator, types and places of two operands): what is known of the result}."""
    scope, found = triton_interpreter._patch_lang(in_a_kernel), {}
    try:
        with np.errstate(all="ignore"):
            for (i, left), (j, right) in itertools.product(enumerate(operands()), repeat=2):
                names = name_of(left), name_of(right)
                if names[0] == names[1] or "int32" in names or (names[0] in KINDS) != (names[1] in KINDS):
                    for name, compute in OPERATORS.items():
                        found[name, *names, i, j] = described(compute, left, right)
    finally:
        scope.restore()
    return found


def test_operators_of_any_two_operands_are_those_of_the_whole_interpreter():
    """Type, bits and the order of elements, the first time and when they are remembered."""
    options = triton_interpreter.interpreter_builder.options
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_interpreter.interpreter_builder, "options", replace(options, sanitize_overflow=False))
        whole = results_of_operators()
    for _ in range(2):
        with fast_interpreter.shortcuts():
            assert results_of_operators() == whole


def test_conversions_of_bfloat16_are_those_of_the_whole_interpreter():
    """All bfloat16 numbers and their neighbours in float32, also without subnormal numbers, and transposed."""
    short, long, whole = core.bfloat16, core.float32, triton_interpreter._convert_float
    every = np.arange(2**16, dtype=np.uint16)
    longer = [(every.astype(np.uint32) << 16) + low for low in (0, 1, 2**15, 2**16 - 1)]
    with fast_interpreter.shortcuts():
        convert = triton_interpreter._convert_float
        assert convert is not whole
        for x, types in ((every, (short, long)), *((x.view(np.float32), (long, short)) for x in longer)):
            normal = x.reshape(256, 256)[1:-1]
            for numbers in (x, normal, normal.T, normal[:, 7], x[:256], x[:1], normal[3, 3].reshape(())):
                for rounding in (None, core.ir.ROUNDING_MODE.RTNE):
                    ours, expected = (f(numbers, *types, rounding) for f in (convert, whole))
                    assert (ours.dtype, ours.shape) == (expected.dtype, expected.shape)
                    np.testing.assert_array_equal(ours, expected)


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
