"""The only place in this package that launches a kernel, and the choice of the backend that does it."""

import contextvars
import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch

from zigzag_kernels import backends
from zigzag_kernels.modes import Backend

from . import profiling

if TYPE_CHECKING:
    from zigzag_kernels.plan import Launch, Output

# What code that PyTorch has compiled allocates by, in less than half of the host's time for torch.empty.
_empty_on_gpu = cast(Any, torch._C)._dynamo.guards._empty_strided_cuda
# How Triton 3.6 declares what its function in C takes besides the kernel's own arguments, and the releases that have
# the one that came after it.
IN_C, LATER = "iiiKKppOOOOOO", ("3.7.", "3.8.", "3.9.")


def choose_backend(backend: str | None, device: torch.device) -> str:
    """The backend for tensors on `device`: see `zigzag_kernels.backends.choose_backend`."""
    return backends.choose_backend(backend, _kind(device), ("triton",))


@functools.cache
def _kind(device: torch.device) -> str:
    # PyTorch for AMD GPUs calls them cuda too.
    return "gpu" if device.type == "cuda" and torch.version.hip is None else device.type


def target(backend: str, device: torch.device) -> str:
    """What `Problem.target` says of `device` under `backend`."""
    return _capability(device) if backend == "triton" else backend


@functools.cache
def _capability(device: torch.device) -> str:
    major, minor = torch.cuda.get_device_capability(device)
    return f"{major}.{minor}"


def can_launch_gluon(backend: str, *arrays: torch.Tensor) -> bool:
    """What `Problem.gluon` says: Triton compiles, and the copy engine can read `arrays` where they begin."""
    return backend == "triton" and all(x.data_ptr() % 16 == 0 for x in arrays)


# What torch.compiler.assume_constant_result does, which imports triton, and that must wait until a kernel is asked for:
# both depend on their arguments and the machine alone, and are called rather than traced.
for _function in (choose_backend, target):
    _function._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]


def allocate(output: "Output", like: torch.Tensor) -> torch.Tensor:
    """Room for what a launch writes, on the device of `like`: the current one, if that is a GPU."""
    dtype = getattr(torch, output.dtype)
    if like.is_cuda:
        return _empty_on_gpu(output.shape, output.strides, dtype)
    return torch.empty(output.shape, dtype=dtype, device=like.device)


def run(launch: "Launch", first: torch.Tensor, *others: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    """Execute `launch` on the device of its arrays, asynchronously; returns its outputs: those to be written in place
    are the arrays given for them, all others new."""
    execute = _interpret if launch.target == Backend.INTERPRET else _start
    inputs, outputs = [first, *others], []
    with torch.cuda._DeviceGuard(first.get_device()), profiling.region(launch.kernel.fn.__name__, first.device):
        for output, place in zip(launch.outputs, launch.places, strict=True):
            x = None if place is None else inputs[place]
            if x is None:
                x = allocate(output, first)
            if place is not None:
                inputs[place] = x
            outputs.append(x)
        execute(launch, inputs, outputs)
    return tuple(outputs)


def _interpret(launch: "Launch", inputs: list, outputs: list) -> None:
    from zigzag_kernels.interpreter import interpret

    interpret(launch, inputs, outputs)


def _start(launch: "Launch", inputs: list, outputs: list) -> None:
    """Launch the compiled kernel, which Triton's own call looks up by all arguments and options. It is the same one for
    inputs of the same types on the same devices that Triton calls aligned alike, under the same settings; outputs are
    among them, or new and so always alike."""
    knobs, kernels = _compiled(launch)
    scalars, pointers = launch.scalars.values(), [x.data_ptr() for x in inputs]
    settings = knobs.runtime.debug, knobs.compilation.instrumentation_mode
    key = *settings, *[x.dtype for x in inputs], *[x.get_device() for x in inputs], *[x & 15 for x in pointers]
    if start := kernels.get(key):
        start(*pointers, *scalars, *[x.data_ptr() for x in outputs])
        return
    arguments = *inputs, *scalars, *outputs
    options = launch.constexprs | {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    compiled = with_scratch(launch.kernel[launch.grid], *arguments, **options)
    if compiled is not None:
        constants = [launch.constexprs[name] for name in launch.kernel.arg_names[len(arguments) :]]
        kernels[key] = _again(compiled, launch.grid, inputs[0].get_device(), constants)


@functools.lru_cache(maxsize=4096)
def _compiled(launch: "Launch") -> tuple[Any, dict[tuple, Callable]]:
    """(Triton's settings, {what a compiled kernel depends on: what launches it again})."""
    from triton import knobs

    return knobs, {}


def _again(compiled: Any, grid: tuple[int, int, int], device: int, constants: list) -> Callable:
    """What launches `compiled` with given pointers and numbers, and `constants` behind them, on the current `device`.

    Where it is known, it calls the function in C that `compiled[grid]` comes to, without what Triton prepares for
    hooks: if there are any, the call is Triton's.
    """
    import triton
    from triton import knobs

    call, launch = compiled[grid], _in_c(compiled, grid, triton.__version__)

    def through_triton(*arguments) -> None:
        with_scratch(call, *arguments, *constants)

    if launch is None:
        return through_triton
    size = compiled.run.global_scratch_size * compiled.run.num_ctas * math.prod(grid)
    stream_of, runtime = cast(Any, triton.runtime.driver.active).get_current_stream, knobs.runtime

    def start(*arguments) -> None:
        before, after = runtime.launch_enter_hook, runtime.launch_exit_hook
        if getattr(before, "calls", before) or getattr(after, "calls", after):
            through_triton(*arguments)
            return
        launch(stream_of(device), scratch(size) if size else None, *arguments, *constants)

    return start


def _in_c(compiled: Any, grid: tuple[int, int, int], release: str) -> Callable | None:
    """`launch(stream, memory, *arguments)` by what this `release` of Triton has in C; None if that is not known."""
    from triton.backends.nvidia import driver

    launcher = compiled.run
    if type(launcher) is not driver.CudaLauncher or launcher.profile_scratch_size:
        return None
    launch, metadata = launcher.launch, compiled.packed_metadata
    flags = compiled.function, launcher.launch_cooperative_grid, launcher.launch_pdl
    if getattr(driver, "_BASE_ARGS_FORMAT", None) == IN_C:
        return lambda stream, memory, *arguments: launch(
            *grid, stream, *flags, memory, None, metadata, None, None, None, *arguments
        )
    if not release.startswith(LATER) or getattr(launcher, "gsan_enabled", False):
        return None
    kinds = launcher.arg_annotations, launcher.kernel_signature
    return lambda stream, memory, *arguments: launch(
        *grid, stream, *flags, metadata, None, None, None, memory, None, *kinds, arguments
    )


def scratch(size: int) -> torch.Tensor:
    """Memory for the descriptors of a launch on the current stream, freed for what follows there."""
    return _empty_on_gpu((size,), (1,), torch.int8)


def with_scratch(kernel: Callable, *arguments, **options):
    """Call `kernel`, which gets its scratch memory from `scratch`; the allocator that the user has set stays."""
    import triton

    context = contextvars.copy_context()
    context.run(triton.set_allocator, lambda size, alignment, stream: scratch(size))
    return context.run(kernel, *arguments, **options)
