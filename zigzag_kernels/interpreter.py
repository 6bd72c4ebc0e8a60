"""Launches in Triton's interpreter, for machines without a GPU, and without what it does in vain."""

import contextlib
import dataclasses
import threading
from collections.abc import Iterator, Sequence

import triton
from triton.runtime import interpreter

from .launch import Launch

_LOCK = threading.Lock()  # the interpreter keeps global state, and JAX's host devices call it from several threads


@triton.jit
def _kernel():
    pass


def interpreting() -> bool:
    """Return whether triton was imported with TRITON_INTERPRET=1: a process interprets or compiles, never both."""
    return not isinstance(_kernel, triton.JITFunction)


def interpret(launch: Launch, inputs: Sequence, outputs: Sequence) -> None:
    """Run all programs of `launch`, one after the other, on arrays that the interpreter takes for tensors."""
    with _LOCK, _without_waste():
        launch.kernel[launch.grid](*inputs, *launch.scalars.values(), *outputs, **launch.constexprs)


@contextlib.contextmanager
def _without_waste() -> Iterator[None]:
    """Half of the interpreter's time went into two things that no result depends on.

    It replaces the functions of `triton.language` by its own at every call of one kernel function by another: here once
    for each module whose functions a launch calls. It computes of every integer whether it overflowed, for an assertion
    that only a debugging interpreter makes.
    """
    names = "interpreter_builder", "_patch_lang", "_LangPatchScope"
    if not all(hasattr(interpreter, name) for name in names):  # private: another release may do without
        yield
        return
    builder, replace, done = interpreter.interpreter_builder, interpreter._patch_lang, set()
    options = builder.options

    def replace_once(function):
        module = function.__globals__["__name__"]
        if module in done:
            return interpreter._LangPatchScope()  # nothing to restore
        done.add(module)
        return replace(function)

    builder.options = dataclasses.replace(options, sanitize_overflow=options.debug)
    interpreter._patch_lang = replace_once
    try:
        yield
    finally:
        builder.options, interpreter._patch_lang = options, replace
