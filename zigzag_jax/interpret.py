"""Launches in Triton's interpreter for machines without a GPU: XLA calls the interpreter on the host."""

import jax
import numpy as np

from zigzag_kernels.launch import Launch


def call(launch: Launch, outputs: tuple, arrays: tuple, aliases: dict[int, int]) -> tuple:
    """Execute `launch` on `arrays` and return results of the shapes and dtypes `outputs`.

    `aliases` maps the number of an input to the number of the output that is written in its memory.
    """
    from zigzag_kernels.interpreter import interpret

    def on_host(*arrays):
        arrays = [np.ascontiguousarray(x) for x in arrays]
        results = [np.empty(output.shape, output.dtype) for output in outputs]
        for x in results:
            x.view(np.uint8).fill(0xFF)  # NaN, or -1, so that elements which a kernel does not write are visible
        for i, output in aliases.items():
            results[output][...] = arrays[i]
            arrays[i] = results[output]
        interpret(launch, [*map(HostTensor, arrays)], [*map(HostTensor, results)])
        return tuple(results)

    return jax.pure_callback(on_host, outputs, *arrays)


class HostTensor:
    """A NumPy array with the methods that the interpreter calls on a tensor and on its storage.

    The array is already on the host, so every "copy" to the host or back returns the array itself.
    """

    def __init__(self, array: np.ndarray):
        self.array = array
        self.dtype = array.dtype

    def data_ptr(self):
        return self.array.ctypes.data

    def size(self):
        return self.array.shape

    def stride(self):
        return tuple(step // self.array.itemsize for step in self.array.strides)

    def storage_offset(self):
        return 0

    def untyped_storage(self):
        return self

    cpu = untyped_storage

    def new_empty(self, *_, **__):
        return self

    def set_(self, *_):
        pass

    copy_ = set_
