"""Shortcuts that make Triton's interpreter faster and change no result: correctness never depends on this file.

For a tile of a few hundred elements the interpreter spends little time on arithmetic. Most of its time goes into types,
shapes and names, which it derives again for every operation. During a launch, the shortcuts replace some functions of
the interpreter by faster ones. They are used only with releases of Triton that they were compared with.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import triton
from triton.language import core, semantic
from triton.runtime import interpreter

RELEASES = ("3.9.",)  # releases of Triton whose functions the replacements below equal
MOST_SHAPES = 4096  # entries of each cache of shapes

_Replaced = tuple[Any, str, Any]  # (object, name of its attribute, value of the attribute during a launch)


@contextlib.contextmanager
def shortcuts() -> Iterator[None]:
    """Install the shortcuts for the time of this context; they are global, so the caller must hold a lock."""
    replaced = [*_constant(), *_of_one_launch()] if triton.__version__.startswith(RELEASES) else []
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in replaced]
    try:
        for owner, name, value in replaced:
            setattr(owner, name, value)
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)


def _of_one_launch() -> Iterator[_Replaced]:
    """Yield the replacements that each launch needs anew.

    The first turns off the check of integers for overflow, which only a debugging interpreter reports. The second makes
    the interpreter patch each module once: by itself it patches `triton.language` whenever one kernel function calls
    another.
    """
    builder, replace, seen = interpreter.interpreter_builder, interpreter._patch_lang, set()
    options = builder.options
    yield builder, "options", dataclasses.replace(options, sanitize_overflow=options.debug)

    def replace_once(function):
        languages = _languages(function)
        if languages in seen:
            return interpreter._LangPatchScope()  # nothing to restore
        seen.add(languages)
        return _replace_again(languages) or _remember(languages, replace(function))

    yield interpreter, "_patch_lang", replace_once


_LANGUAGES: dict[str, tuple] = {}  # for each module of kernels, the ids of the Triton modules that it names
# For those modules, the attributes that the interpreter replaced in them: (owner, name, before, replacement).
_REPLACED: dict[tuple, list[tuple]] = {}


def _languages(function) -> tuple:
    module = function.__globals__["__name__"]
    if module not in _LANGUAGES:
        named = (value for value in function.__globals__.values() if value is triton.language or value is core)
        _LANGUAGES[module] = tuple(sorted({id(value) for value in named}))
    return _LANGUAGES[module]


def _remember(languages: tuple, scope):
    known = {}
    for owner, name, before in scope._changes:
        known.setdefault((id(owner), name), (owner, name, before))
    _REPLACED[languages] = [(*replaced, replaced[0].__dict__[replaced[1]]) for replaced in known.values()]
    return scope


def _replace_again(languages: tuple):
    """Repeat the replacements of an earlier launch, and return the scope that undoes them.

    Returns None if there was no earlier launch, or if somebody else has changed one of the functions since.
    """
    known = _REPLACED.get(languages, ())
    if not known or any(getattr(owner, name, interpreter._MISSING) is not before for owner, name, before, _ in known):
        return None
    scope = interpreter._LangPatchScope()
    for owner, name, _, value in known:
        scope.set_attr(owner, name, value)
    return scope


@functools.cache
def _constant() -> tuple[_Replaced, ...]:
    """The replacements that are the same in all launches."""
    kinds, operations = core.dtype, semantic.TritonSemantic
    signed, unsigned = frozenset(kinds.SINT_TYPES), frozenset(kinds.UINT_TYPES)
    integers, floats = signed | unsigned, frozenset(kinds.FP_TYPES)
    return (
        (core, "_unwrap_if_constexpr", _unwrap),
        (core.tensor, "__init__", _make_tensor),
        (core.block_type, "__init__", _make_block_type(core.block_type.__init__)),
        (kinds, "__eq__", _is_equal(kinds.__eq__)),
        (kinds, "is_int", lambda self: self.name in integers),
        (kinds, "is_int_signed", lambda self: self.name in signed),
        (kinds, "is_int_unsigned", lambda self: self.name in unsigned),
        (kinds, "is_floating", lambda self: self.name in floats),
        (core.block_type, "to_ir", lambda self, builder: self),  # the interpreter has no IR: a type stands for itself
        (operations, "computation_type_impl", _computation_type(operations.computation_type_impl)),
        (operations, "_cast_to_computation_type", _cast(operations._cast_to_computation_type)),
        (operations, "binary_op_type_checking_impl", _operands(operations.binary_op_type_checking_impl, integers)),
        (operations, "broadcast_impl_value", _broadcast(operations.broadcast_impl_value)),
        # The replaced method only checks the interpreter's own arithmetic.
        (interpreter.TensorHandle, "__post_init__", lambda self: None),
        (interpreter, "_get_np_dtype", _numpy_type(interpreter._get_np_dtype)),
        (interpreter, "_convert_float", _convert(interpreter._convert_float)),
        (interpreter, "_patch_attr", _replace_attribute),
    )


_SCALARS = frozenset({int, bool, float, str, type(None), core.dtype, core.pointer_type, core.block_type, core.tensor})
_unwrap_any = core._unwrap_if_constexpr


def _unwrap(value):
    kind = type(value)
    if kind is core.constexpr:
        return value.value
    return value if kind in _SCALARS else _unwrap_any(value)


_NO_SHAPE = core.tuple([]), core.constexpr(1)


def _make_tensor(self, handle, type):
    self.handle, self.type, self.dtype = handle, type, type.scalar
    self.shape, self.numel = type.of_tensors if type.is_block() else _NO_SHAPE


@functools.lru_cache(MOST_SHAPES)
def _of_tensors(shape: tuple[int, ...]) -> tuple:
    """Return (shape, number of elements) in the form that tensors hold; all tensors of a shape share the objects."""
    return core.tuple(list(map(core.constexpr, shape))), core.constexpr(math.prod(shape))


def _make_block_type(initialise: Callable) -> Callable:
    known = {}

    def remembered(self, element_ty, shape):
        key = id(element_ty), *map(_unwrap, shape)  # the type lives as long as its entry
        if key not in known:
            initialise(self, element_ty, shape)
            self.of_tensors = _of_tensors(tuple(self.shape))
            _keep(known, key, dict(self.__dict__))
        self.__dict__.update(known[key])

    return remembered


def _is_equal(compare: Callable) -> Callable:
    return lambda self, other: self is other or compare(self, other)


def _computation_type(compute: Callable) -> Callable:
    known = {}

    def remembered(self, a_ty, a_is_scalar, b_ty, b_is_scalar, div_or_mod):
        key = a_ty.name, a_is_scalar, b_ty.name, b_is_scalar, div_or_mod
        if key not in known:
            known[key] = compute(self, a_ty, a_is_scalar, b_ty, b_is_scalar, div_or_mod)
        return known[key]

    return remembered


def _cast(cast: Callable) -> Callable:
    def unless_of_that_type(self, value, dtype):
        return value if type(value) is core.tensor and value.dtype is dtype else cast(self, value, dtype)

    return unless_of_that_type


def _keep(known: dict, key, value) -> None:
    """Add an entry to a cache of limited size. The `value` keeps alive each object whose id is in the `key`."""
    if len(known) >= MOST_SHAPES:
        known.clear()
    known[key] = value


def _operands(check: Callable, integers: frozenset[str]) -> Callable:
    """Return a faster check of operands: equal types pass unchanged, and each number becomes a tensor only once.

    Operands of unequal types go through the original `check`, and so do quotients of numbers that are not integers.
    """
    numbers = {}

    def unless_alike(self, lhs, rhs, allow_lhs_ptr=False, allow_rhs_ptr=False, arithmetic_check=True, div_or_mod=False):
        if type(lhs) is core.tensor and arithmetic_check:
            kind = lhs.dtype
            if type(kind) is core.dtype:
                if type(rhs) is core.tensor and kind is rhs.dtype and (not div_or_mod or kind.name in integers):
                    return self.broadcast_impl_value(lhs, rhs)
                if type(rhs) is int or (type(rhs) is float and rhs):  # 0.0 equals -0.0, so neither may be a cache key
                    key = type(rhs), rhs, kind.name, div_or_mod, id(lhs.shape)  # the shape lives as long as its entry
                    if key in numbers:
                        return lhs, numbers[key][0]
                    checked, number = check(self, lhs, rhs, div_or_mod=div_or_mod)
                    if checked is lhs:
                        _keep(numbers, key, (number, lhs.shape))
                    return checked, number
            elif allow_lhs_ptr and kind.is_ptr() and type(rhs) is core.tensor and rhs.dtype.name in integers:
                return self.broadcast_impl_value(lhs, rhs)
        return check(self, lhs, rhs, allow_lhs_ptr, allow_rhs_ptr, arithmetic_check, div_or_mod)

    return unless_alike


def _broadcast(broadcast: Callable) -> Callable:
    def unless_alike(self, lhs, rhs):
        if lhs.shape is rhs.shape:
            return lhs, rhs
        return broadcast(self, lhs, rhs)

    return unless_alike


def _numpy_type(find: Callable) -> Callable:
    known = {}

    def remembered(kind):
        while type(kind) is core.block_type:
            kind = kind.element_ty
        name = kind.name
        if name not in known:
            known[name] = find(kind)
        return known[name]

    return remembered


def _convert(convert: Callable) -> Callable:
    """Return a faster conversion between bfloat16 and float32, which have the same exponents.

    Without a rounding mode it drops bits or adds zeros. Arrays with subnormal numbers, and all other conversions, go
    through the original `convert`.
    """
    numpy, both = interpreter.np, {"bf16", "fp32"}

    def unless_subnormal(x, from_type, to_type, rounding_mode):
        if rounding_mode is None and {from_type.name, to_type.name} == both:
            widens = to_type.name == "fp32"
            bits = numpy.ascontiguousarray(x).view(numpy.uint16 if widens else numpy.uint32)
            exponents = bits & (0x7F80 if widens else 0x7F800000)
            if not (bits[exponents == 0] << 1).any():
                converted = bits.astype(numpy.uint32) << 16 if widens else (bits >> 16).astype(numpy.uint16)
                return converted.reshape(x.shape)
        return convert(x, from_type, to_type, rounding_mode)

    return unless_subnormal


class _Operators:
    """Shorter ways of methods of tensors, for operands that need no other look than one at their types.

    Everything else goes through the `original` method, which each way is given. NumPy broadcasts scalars, as the
    interpreter does before it calls NumPy; blocks it would broadcast with the elements of the result in another order.
    """

    def __init__(self):
        self.bools = {}  # {id of a shape: (the type of int1 of that shape, the shape)}
        numpy = interpreter.np
        self.boolean = numpy.dtype(bool)
        arithmetic = {"__sub__": numpy.subtract, "__mul__": numpy.multiply}
        comparisons = {"__lt__": numpy.less, "__le__": numpy.less_equal}
        comparisons |= {"__gt__": numpy.greater, "__ge__": numpy.greater_equal}
        self.ways = {name: functools.partial(self.arithmetic, compute) for name, compute in arithmetic.items()}
        self.ways |= {name: functools.partial(self.comparison, compute) for name, compute in comparisons.items()}
        self.ways |= {"__add__": functools.partial(self.sum, numpy.add)}
        self.ways |= {"__and__": functools.partial(self.both, numpy.bitwise_and)}

    def arithmetic(self, compute: Callable, original: Callable) -> Callable:
        builder, handle_of, tensor_of = interpreter.interpreter_builder, interpreter.TensorHandle, core.tensor

        def operator(left, right):
            alike = None if builder.options.sanitize_overflow else self._alike(left, right)
            if alike is None:
                return original(left, right)
            x, y, kind = alike
            result = compute(x.data, y.data)
            if result.dtype is not x.data.dtype:
                return original(left, right)
            return tensor_of(handle_of(result, x.dtype.scalar), kind)

        return operator

    def sum(self, compute: Callable, original: Callable) -> Callable:
        of_numbers, signed = self.arithmetic(compute, original), frozenset(core.dtype.SINT_TYPES)
        builder = interpreter.interpreter_builder

        def operator(left, right):
            if not left.dtype.is_ptr():
                return of_numbers(left, right)
            if type(right) is core.tensor and right.dtype.name in signed:
                x, y, kind = self._broadcast(left, right)
                return core.tensor(builder.create_addptr(x, y), kind)
            return original(left, right)

        return operator

    def comparison(self, compute: Callable, original: Callable) -> Callable:
        handle_of, tensor_of = interpreter.TensorHandle, core.tensor

        def operator(left, right):
            alike = self._alike(left, right)
            if alike is None:
                return original(left, right)
            x, y, kind = alike
            return tensor_of(handle_of(compute(x.data, y.data), x.dtype.scalar), self._bool_type(kind))

        return operator

    def both(self, compute: Callable, original: Callable) -> Callable:
        handle_of, tensor_of = interpreter.TensorHandle, core.tensor

        def operator(left, right):
            if type(right) is core.tensor and left.dtype is right.dtype is core.int1:
                x, y, kind = self._broadcast(left, right)
                ordered = x.data.flags.c_contiguous and y.data.flags.c_contiguous
                if ordered and x.data.dtype is y.data.dtype is self.boolean:
                    return tensor_of(handle_of(compute(x.data, y.data), x.dtype.scalar), kind)
            return original(left, right)

        return operator

    def _alike(self, left, right):
        """Return the handles of operands of one type and the type of a result, or None for other operands."""
        kind = left.dtype
        if type(kind) is not core.dtype or left.handle.data.dtype is self.boolean:
            return None
        if type(right) is core.tensor:
            return self._broadcast(left, right) if right.dtype is kind else None
        right = _unwrap(right)
        if type(right) is not int and type(right) is not float:
            return None
        left, right = interpreter.interpreter_semantic.binary_op_type_checking_impl(left, right)
        return (left.handle, right.handle, left.type) if left.dtype is kind else None

    def _broadcast(self, left, right):
        """Return the handles of both, and the type of `left` as wide as both are."""
        if left.shape is not right.shape:
            blocks = left.type.is_block(), right.type.is_block()
            if blocks == (True, False) and left.handle.data.flags.c_contiguous:
                return left.handle, right.handle, left.type
            if blocks == (False, True) and right.handle.data.flags.c_contiguous and left.dtype is right.dtype:
                return left.handle, right.handle, right.type
            left, right = interpreter.interpreter_semantic.broadcast_impl_value(left, right)
        return left.handle, right.handle, left.type

    def _bool_type(self, wide):
        """Return the type of int1 that has the shape of the type `wide`."""
        if not wide.is_block():
            return core.int1
        shape = wide.of_tensors[0]
        if id(shape) not in self.bools:
            _keep(self.bools, id(shape), (wide.with_element_ty(core.int1), shape))
        return self.bools[id(shape)][0]


_operators = functools.cache(_Operators)


_CHECKED = core.builtin(lambda: None).__code__


def _replace_attribute(owner, name, member, builder, scope):
    """Do the work of `interpreter._patch_attr`, but leave out its check that `_semantic` was passed."""
    given = interpreter.interpreter_semantic
    called = member.__wrapped__ if getattr(member, "__code__", None) is _CHECKED else member

    def replacement(*arguments, **options):
        options["_semantic"] = given
        return called(*arguments, **options)

    shorter = _operators().ways.get(name) if owner is core.tensor else None
    scope.set_attr(owner, name, shorter(replacement) if shorter else replacement)
