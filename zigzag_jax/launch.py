"""The only place in this package that launches a kernel, jax-triton's quirks with it, and the choice of the backend."""

import inspect
import os
import warnings
from typing import TYPE_CHECKING

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from zigzag_kernels import backends
from zigzag_kernels.modes import Backend

if TYPE_CHECKING:
    from zigzag_kernels.plan import Launch

GLUON_JAX = (0, 10, 1)  # the first whose jaxlib has the custom call that `gluon.py` uses


def choose_backend(backend: str | None) -> str:
    """The backend on JAX's default platform: see `zigzag_kernels.backends.choose_backend`."""
    platform = "rocm" if _is_rocm() else jax.default_backend()
    return backends.choose_backend(backend, platform, ("triton", "jax_triton"))


def _is_rocm() -> bool:
    """JAX calls any GPU "gpu"; these kernels are for NVIDIA's."""
    return jax.default_backend() == "gpu" and "rocm" in jax.devices()[0].client.platform_version.lower()


def target(backend: str) -> str:
    """What `Problem.target` says of the default device under `backend`."""
    if backend != "triton":
        return backend
    return jax.devices()[0].compute_capability


def can_launch_gluon(backend: str) -> bool:
    """What `Problem.gluon` says: Triton compiles, and jaxlib has the custom call. All arrays of XLA are aligned."""
    return backend == "triton" and jax.__version_info__ >= GLUON_JAX


def export_disabled_checks() -> list[jax.export.DisabledSafetyCheck]:
    """What `jax.export.export(..., disabled_checks=...)` needs to accept the kernels of any jax-triton."""
    names = ("triton_kernel_call", "triton_kernel_call_ffi")
    return [jax.export.DisabledSafetyCheck.custom_call(name) for name in names]


def varying_axes(*arrays: jax.Array) -> tuple[str, ...]:
    """The mesh axes along which any of `arrays` varies: none outside `shard_map` or if it does not check them."""
    return tuple(sorted(frozenset().union(*(jax.typeof(x).manual_axis_type.varying for x in arrays))))


def vary(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """`x` typed as varying along `axes`; the transpose sums a gradient over those along which `x` did not vary."""
    missing = tuple(axis for axis in axes if axis not in varying_axes(x))
    return jax.lax.pcast(x, missing, to="varying") if missing else x


def run(launch: "Launch", *arrays: jax.Array | None) -> tuple[jax.Array, ...]:
    """Execute `launch` on `arrays`; returns its outputs. Under `vmap` the launches follow one another."""
    execute = _interpret if launch.target == Backend.INTERPRET else _compile
    outputs = tuple(jax.ShapeDtypeStruct(output.shape, jnp.dtype(output.dtype)) for output in launch.outputs)
    inputs = dict(zip(launch.inputs, arrays, strict=True))
    aliases = {}  # of the inputs, by number, to the outputs
    for i, output in enumerate(launch.outputs):
        place = launch.in_place.get(output.name)
        if place and inputs[place] is None:
            inputs[place] = jnp.zeros(1, output.dtype)  # a pointer of the right type that nothing reads
        elif place:
            aliases[launch.inputs.index(place)] = i
    arrays = tuple(inputs.values())

    @jax.custom_batching.sequential_vmap
    def launch_once(*arrays):
        # Not every kind of call says that its results vary where its operands do, or takes operands that differ in it.
        axes = varying_axes(*arrays)
        arrays = tuple(vary(x, axes) for x in arrays)
        with jax.named_scope(f"zigzag::{launch.kernel.fn.__name__}"):  # for profilers
            return tuple(vary(x, axes) for x in execute(launch, outputs, arrays, aliases))

    return launch_once(*arrays)


def _compile(launch: "Launch", outputs: tuple, arrays: tuple, aliases: dict[int, int]) -> tuple:
    if launch.scratch:
        from . import gluon

        return gluon.call(launch, outputs, arrays, aliases)
    jax_triton = _import_jax_triton()
    arguments: tuple = (*arrays, *launch.scalars.values())
    since_04 = "out_type" in inspect.signature(jax_triton.triton_call).parameters
    if since_04 and aliases:  # there the kernel gets what is written in place once, here behind the scalars
        places = tuple(arrays[i] for i in aliases)
        unused = {i: jnp.zeros(1, arrays[i].dtype) for i in aliases}
        arguments = (*(unused.get(i, x) for i, x in enumerate(arrays)), *launch.scalars.values(), *places)
        aliases = {len(arguments) - len(places) + i: output for i, output in enumerate(aliases.values())}
    with warnings.catch_warnings():  # 0.4 would have a mutable reference for each result that is written in place
        warnings.filterwarnings("ignore", "input_output_aliases is deprecated", DeprecationWarning)
        return jax_triton.triton_call(
            *arguments,
            kernel=launch.kernel,
            grid=launch.grid,
            num_warps=launch.num_warps,
            num_stages=launch.num_stages,
            input_output_aliases=aliases,
            **{"out_type" if since_04 else "out_shape": outputs},
            **launch.constexprs,
        )


def _import_jax_triton():
    """The module, imported on first use: it fails without a GPU plugin, and it clears Triton's cache directory."""
    name = "TRITON_CACHE_DIR"
    cache_dir = os.environ.get(name)
    try:
        import jax_triton
    finally:
        os.environ.pop(name, None)
        if cache_dir is not None:
            os.environ[name] = cache_dir
    return jax_triton


class _HostTensor:
    """What Triton's interpreter asks of a tensor, and of its storage, for a NumPy array that is already on the host."""

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


def _interpret(launch: "Launch", outputs: tuple, arrays: tuple, aliases: dict[int, int]) -> tuple:
    from zigzag_kernels.interpreter import interpret

    def on_host(*arrays):
        arrays = [np.ascontiguousarray(x) for x in arrays]
        results = [np.empty(output.shape, output.dtype) for output in outputs]
        for x in results:
            x.view(np.uint8).fill(0xFF)  # NaN, or -1: what a kernel forgets to write is found out
        for i, output in aliases.items():
            results[output][...] = arrays[i]
            arrays[i] = results[output]
        interpret(launch, [*map(_HostTensor, arrays)], [*map(_HostTensor, results)])
        return tuple(results)

    return jax.pure_callback(on_host, outputs, *arrays)
