"""Launches in Triton's interpreter, for machines without a GPU; `fast_interpreter` makes them faster."""

import threading
from collections.abc import Sequence

import triton

from .fast_interpreter import shortcuts
from .launch import Launch

_LOCK = threading.Lock()  # the interpreter keeps global state, and JAX's host devices call it from several threads


@triton.jit
def _kernel():
    pass


def interpreting() -> bool:
    """Return whether this process imported triton with TRITON_INTERPRET=1.

    A process interprets kernels or compiles them, never both.
    """
    return not isinstance(_kernel, triton.JITFunction)


def interpret(launch: Launch, inputs: Sequence, outputs: Sequence) -> None:
    """Run all programs of `launch`, one after the other, on arrays that the interpreter accepts as tensors."""
    with _LOCK, shortcuts():
        launch.kernel[launch.grid](*inputs, *launch.scalars.values(), *outputs, **launch.constexprs)
