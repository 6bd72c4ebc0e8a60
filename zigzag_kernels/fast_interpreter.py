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
        (operations, "binary_op_type_checking_impl", _operands(operations.binary_op_type_checking_impl)),
        (operations, "broadcast_impl_value", _broadcast(operations.broadcast_impl_value)),
        # The replaced method only checks the interpreter's own arithmetic.
        (interpreter.TensorHandle, "__post_init__", lambda self: None),
        (interpreter, "_get_np_dtype", _numpy_type(interpreter._get_np_dtype)),
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
            if len(known) >= MOST_SHAPES:
                known.clear()
            known[key] = dict(self.__dict__)
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


def _operands(check: Callable) -> Callable:
    """Return a faster check of operands: equal types pass unchanged, and each number becomes a tensor only once.

    Pointers and divisions go through the original `check`.
    """
    numbers = {}

    def unless_alike(self, lhs, rhs, allow_lhs_ptr=False, allow_rhs_ptr=False, arithmetic_check=True, div_or_mod=False):
        if type(lhs) is core.tensor and type(lhs.dtype) is core.dtype and arithmetic_check and not div_or_mod:
            if type(rhs) is core.tensor and lhs.dtype is rhs.dtype:
                return self.broadcast_impl_value(lhs, rhs)
            if type(rhs) is int or (type(rhs) is float and rhs):  # 0.0 equals -0.0, so neither may be a cache key
                key = type(rhs), rhs, lhs.dtype.name, id(lhs.shape)  # the shape lives as long as its entry
                if key in numbers:
                    return lhs, numbers[key][0]
                checked, number = check(self, lhs, rhs)
                if checked is lhs:
                    if len(numbers) >= MOST_SHAPES:
                        numbers.clear()
                    numbers[key] = number, lhs.shape
                return checked, number
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


_CHECKED = core.builtin(lambda: None).__code__


def _replace_attribute(owner, name, member, builder, scope):
    """Do the work of `interpreter._patch_attr`, but leave out its check that `_semantic` was passed."""
    given = interpreter.interpreter_semantic
    called = member.__wrapped__ if getattr(member, "__code__", None) is _CHECKED else member

    def replacement(*arguments, **options):
        options["_semantic"] = given
        return called(*arguments, **options)

    scope.set_attr(owner, name, replacement)
