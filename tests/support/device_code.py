"""Device functions and structs of the kernels, run as plain Python on NumPy arrays."""

import types

import numpy as np


def in_numpy(function, **others):
    """A device function as a plain one on NumPy arrays."""
    language = types.SimpleNamespace(
        maximum=np.maximum, minimum=np.minimum, where=np.where, load=lambda entry: entry[0], SliceLayout=lambda *_: None
    )
    names = function.fn.__globals__ | {"gl": language, "tl": language} | others
    return types.FunctionType(function.fn.__code__, names)


def struct_in_numpy(struct, **others):
    """A struct of the kernels as a plain class with the same fields, whose methods run on NumPy."""
    methods = {name: in_numpy(method, **others) for name, method in vars(struct).items() if hasattr(method, "fn")}
    return type(struct.__name__, (types.SimpleNamespace,), methods)
