"""The parts of Gluon that Triton 3.6 to 3.9 name differently, each under one name here."""

import inspect

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.language import core


def _renamed(module, name: str, before: str):
    return getattr(module, name, None) or getattr(module, before)


SINCE_3_8 = gl.constexpr(hasattr(hopper.tma, "async_load"))
thread_barrier = _renamed(gl, "barrier", "thread_barrier")  # in Triton 3.7
load_box = _renamed(hopper.tma, "async_load", "async_copy_global_to_shared")  # in 3.8
load_pointers = _renamed(async_copy, "async_load", "async_copy_global_to_shared")  # in 3.8
aggregate = getattr(gluon, "aggregate", None) or core._aggregate  # public in later releases only


def struct(cls):
    """Make `cls` a Gluon value whose constructor takes all annotated fields, by name only.

    Fields are tensors, buffers, tuples with names, other structs or constants; methods are `gluon.jit` functions. A
    struct may be an argument of a partition, and may change from trip to trip of a loop. The fields of a partition's
    arguments pass through shared memory in the order in which they are written here.

    Triton's cache of compiled kernels covers the methods but not the fields of a struct: it covers their names because
    every constructor call spells them.
    """
    kinds = inspect.get_annotations(cls)

    def construct(self, **values):
        if values.keys() != kinds.keys():
            raise TypeError(f"{cls.__name__}: expected the fields {sorted(kinds)}, got {sorted(values)}")
        for name, value in values.items():
            setattr(self, name, value if isinstance(value, gl.base_value) else gl.constexpr(value))

    construct.__triton_builtin__ = True  # Triton 3.6 refuses to hash a plain function
    cls.__init__ = construct
    return aggregate(cls)
