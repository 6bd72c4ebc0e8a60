"""The only place in this package that launches kernels, with the choice of the backend."""

import inspect
import os
import warnings
from importlib.metadata import version

import jax
import jax.export
import jax.numpy as jnp

from zigzag_kernels import backends
from zigzag_kernels.launch import Launch
from zigzag_kernels.modes import Backend
from zigzag_kernels.problem import ArraySpec

from .arguments import Array
from .axes import vary, varying_axes
from .target import chosen_target

GLUON_JAX = (0, 10, 1)  # the first release of JAX whose jaxlib has the custom call that `launch_gluon` uses


def choose_backend(backend: str | None) -> str:
    """Return the backend for JAX's default platform, or for a GPU inside a `lower_for` block.

    `zigzag_kernels.backends.choose_backend` has the rule and the errors.
    """
    platform = "gpu" if chosen_target() else "rocm" if _is_rocm() else jax.default_backend()
    return backends.choose_backend(backend, platform, ("triton", "jax_triton"))


def _is_rocm() -> bool:
    """Return whether JAX's "gpu" is an AMD GPU, which the kernels do not support."""
    return jax.default_backend() == "gpu" and "rocm" in jax.devices()[0].client.platform_version.lower()


def target(backend: str) -> str:
    """Return the value of `Problem.target`: the default device, or the target of the `lower_for` around this call."""
    if backend != "triton":
        return backend
    return chosen_target() or jax.devices()[0].compute_capability


def can_launch_gluon(backend: str) -> bool:
    """Return the value of `Problem.gluon`: whether jaxlib has the custom call for Gluon kernels.

    Alignment needs no check, because all arrays of XLA are aligned.
    """
    return backend == "triton" and jax.__version_info__ >= GLUON_JAX


def describe(x: Array) -> ArraySpec:
    """Return the `ArraySpec` of `x` for `make_problem`; XLA passes contiguous arrays to kernels."""
    return ArraySpec(x.shape, str(x.dtype), (x.shape[1] * x.shape[2], x.shape[2]) if x.ndim == 3 else (0, 0))


def export_disabled_checks() -> list[jax.export.DisabledSafetyCheck]:
    """Return the safety checks that `jax.export.export` has to skip to accept the kernels.

    Pass them as `jax.export.export(..., disabled_checks=export_disabled_checks())`.
    """
    names = ("triton_kernel_call", "triton_kernel_call_ffi")
    return [jax.export.DisabledSafetyCheck.custom_call(name) for name in names]


def run(launch: Launch, *arrays: jax.Array | None) -> tuple[jax.Array, ...]:
    """Execute `launch` on `arrays` and return its outputs; under `vmap` there is one launch after another."""
    outputs = tuple(jax.ShapeDtypeStruct(output.shape, jnp.dtype(output.dtype)) for output in launch.outputs)
    inputs = dict(zip(launch.inputs, arrays, strict=True))
    aliases = {}  # number of an input → number of the output that is written in its memory
    for i, output in enumerate(launch.outputs):
        place = launch.in_place.get(output.name)
        if place and inputs[place] is None:
            inputs[place] = jnp.zeros(1, output.dtype)  # the kernel needs a pointer of this type, but does not read it
        elif place:
            aliases[launch.inputs.index(place)] = i
    arrays = tuple(inputs.values())

    @jax.custom_batching.sequential_vmap
    def launch_once(*arrays):
        # Some custom calls require operands that vary along the same mesh axes, or lose these axes in their results.
        axes = varying_axes(*arrays)
        arrays = tuple(vary(x, axes) for x in arrays)
        with jax.named_scope(f"zigzag::{launch.kernel.fn.__name__}"):  # for profilers
            return tuple(vary(x, axes) for x in _execute(launch, outputs, arrays, aliases))

    return launch_once(*arrays)


def _execute(launch: Launch, outputs: tuple, arrays: tuple, aliases: dict[int, int]) -> tuple:
    if launch.target == Backend.INTERPRET:
        from . import interpret

        return interpret.call(launch, outputs, arrays, aliases)
    if launch.scratch:
        from . import launch_gluon

        return launch_gluon.call(launch, outputs, arrays, aliases)
    return _call_jax_triton(launch, outputs, arrays, aliases)


def _call_jax_triton(launch: Launch, outputs: tuple, arrays: tuple, aliases: dict[int, int]) -> tuple:
    jax_triton = import_jax_triton()
    arguments: tuple = (*arrays, *launch.scalars.values())
    since_04 = "out_type" in inspect.signature(jax_triton.triton_call).parameters
    if since_04 and aliases:
        # In jax-triton 0.4 an aliased operand is the output itself. So it is passed behind the scalars, where kernels
        # have their outputs, and an unused pointer takes the place of the input.
        places = tuple(arrays[i] for i in aliases)
        unused = {i: jnp.zeros(1, arrays[i].dtype) for i in aliases}
        arguments = (*(unused.get(i, x) for i, x in enumerate(arrays)), *launch.scalars.values(), *places)
        aliases = {len(arguments) - len(places) + i: output for i, output in enumerate(aliases.values())}
    with warnings.catch_warnings():  # 0.4 recommends a mutable reference for each result that is written in place
        warnings.filterwarnings("ignore", "input_output_aliases is deprecated", DeprecationWarning)
        return jax_triton.triton_call(
            *arguments,
            kernel=launch.kernel,
            grid=launch.grid,
            num_warps=launch.num_warps,
            num_stages=launch.num_stages,
            input_output_aliases=aliases,
            **({"compute_capability": int(launch.target.replace(".", ""))} if chosen_target() else {}),
            **{"out_type" if since_04 else "out_shape": outputs},
            **launch.constexprs,
        )


def import_jax_triton():
    """Import jax-triton, and restore `TRITON_CACHE_DIR`, which the import clears.

    Raises `RuntimeError` if the import fails, as it does without JAX's plugin for CUDA. Only the backend "triton" calls
    this function.
    """
    name = "TRITON_CACHE_DIR"
    cache_dir = os.environ.get(name)
    try:
        import jax_triton
    except ImportError as error:
        raise RuntimeError(
            "backend: 'triton' needs JAX's plugin for CUDA, with a GPU or without: jax-cuda13-plugin "
            f"{version('jaxlib')}, by pip install --no-deps where there is no GPU; {error}"
        ) from error
    finally:
        os.environ.pop(name, None)
        if cache_dir is not None:
            os.environ[name] = cache_dir
    return jax_triton
