"""A cache for tests: a launch with the same kernel, constants and bits is interpreted only once."""

import contextlib
from unittest import mock

import numpy as np

from tests.support.processes import torch_numpy
from zigzag_kernels import interpreter


@contextlib.contextmanager
def each_launch_once():
    """Repeat the results of a launch that was interpreted before in this context.

    A launch with any other bit or constant is another launch. Correct front ends launch the same kernels on the same
    arrays, so that a comparison of both takes half the time. Use this in tests of launches and their arrays, not in
    tests that count the work of kernels.
    """
    run, known = interpreter.interpret, {}

    def remembered(launch, inputs, outputs):
        arrays, results = list(map(_array, inputs)), list(map(_array, outputs))
        key = _key(launch, arrays, results)
        if key in known:
            for result, value in zip(results, known[key], strict=True):
                result[...] = value
        else:
            run(launch, inputs, outputs)
            known[key] = [result.copy() for result in results]

    with mock.patch.object(interpreter, "interpret", remembered):
        yield


def _array(x):
    """The NumPy array that shares the memory of a tensor, or of the array that JAX's launch passes on."""
    return x.array if hasattr(x, "array") else torch_numpy(x)


def _key(launch, arrays, results):
    """All that the results depend on: how a kernel is launched, its arrays, and which of them share memory."""
    new = {place for place, x in zip(launch.places, results, strict=True) if _is_new(place, x, arrays)}
    inputs = [None if i in new else x for i, x in enumerate(arrays)]
    described = tuple(x is not None and (str(x.dtype), x.shape, _steps(x), x.tobytes()) for x in inputs)
    outputs = tuple((str(x.dtype), x.shape, _steps(x)) for x in results)
    shared = tuple(x is not None and np.may_share_memory(x, result) for x in inputs for result in results)
    constants = tuple(launch.scalars.items()), tuple(sorted(launch.constexprs.items(), key=lambda item: item[0]))
    return launch.kernel, launch.grid, constants, described, outputs, shared


def _is_new(place, result, arrays):
    """Return whether an output in place begins empty: no array was given for it, or all of it is NaN."""
    return place is not None and (arrays[place].shape != result.shape or bool(np.isnan(arrays[place]).all()))


def _steps(x):
    return None if x.flags.c_contiguous else x.strides
