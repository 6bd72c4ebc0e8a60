"""The only place in this package that launches kernels, and the descriptions of tensors and devices for it."""

import contextvars
import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from zigzag_kernels import backends
from zigzag_kernels.launch import run_by_name
from zigzag_kernels.modes import Backend
from zigzag_kernels.problem import ArraySpec, Problem

from . import profiling

try:
    from . import fast_launch
except (AttributeError, ImportError):  # a release of PyTorch without one of the private symbols
    fast_launch = None  # pyright: ignore[reportAssignmentType]

if TYPE_CHECKING:
    from zigzag_kernels.plan import Launch, Output


def choose_backend(backend: str | None, device: torch.device) -> str:
    """Return the backend for tensors on `device`: see `zigzag_kernels.backends.choose_backend`."""
    try:
        return _known_backend(backend, device)
    except TypeError:  # an unhashable backend is invalid; `_choose_backend` raises an error that names it
        return _choose_backend(backend, device)


def _choose_backend(backend: str | None, device: torch.device) -> str:
    # PyTorch for AMD GPUs uses the device type "cuda" too.
    kind = "gpu" if device.type == "cuda" and torch.version.hip is None else device.type
    return backends.choose_backend(backend, kind, ("triton",))


_known_backend = functools.cache(_choose_backend)


def target(backend: str, device: torch.device) -> str:
    """Return `Problem.target` for `device` under `backend`."""
    return _capability(device) if backend == Backend.TRITON else backend


@functools.cache
def _capability(device: torch.device) -> str:
    major, minor = torch.cuda.get_device_capability(device)
    return f"{major}.{minor}"


# torch.compile calls both functions instead of tracing them: their results depend on arguments and machine only. The
# public torch.compiler.assume_constant_result does the same but imports triton, which must wait for the first kernel.
for _function in (choose_backend, target):
    _function._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]


def describe(x: torch.Tensor) -> ArraySpec:
    """Return the `ArraySpec` of `x` for `make_problem`."""
    return make_array_spec(x.shape, x.dtype, x.stride())


def make_array_spec(shape: torch.Size, dtype: torch.dtype, strides: tuple[int, ...]) -> ArraySpec:
    """Return the `ArraySpec` of a tensor of this shape, dtype and strides."""
    token_and_head = (strides[0], strides[1]) if len(shape) == 3 else (0, 0)
    return ArraySpec(tuple(shape), str(dtype).removeprefix("torch."), token_and_head)


def last_dim_contiguous(x: torch.Tensor) -> torch.Tensor:
    """Return `x`, or a copy if its last dimension is not contiguous; kernels accept all other strides."""
    return x if not x.ndim or x.stride(-1) == 1 else x.contiguous()


def can_launch_gluon(backend: str, *arrays: torch.Tensor) -> bool:
    """Return the value of `Problem.gluon`: true if Triton compiles, and `arrays` begin at multiples of 16 bytes."""
    return backend == Backend.TRITON and all(x.data_ptr() % 16 == 0 for x in arrays)


def without_gluon_if_misaligned(problem: Problem, *arrays: torch.Tensor) -> Problem:
    """Return `problem`, with `gluon` false if one of `arrays` does not begin at a multiple of 16 bytes."""
    if problem.gluon and not can_launch_gluon(problem.call.backend, *arrays):
        return _without_gluon(problem)
    return problem


@functools.lru_cache(maxsize=1024)
def _without_gluon(problem: Problem) -> Problem:
    return dataclasses.replace(problem, gluon=False)


def allocate(output: "Output", like: torch.Tensor) -> torch.Tensor:
    """Return memory for an output of a launch on the device of `like`; a GPU must be the current device."""
    dtype = getattr(torch, output.dtype)
    if fast_launch is not None and like.is_cuda:
        return fast_launch.empty_on_gpu(output.shape, output.strides, dtype)
    return torch.empty(output.shape, dtype=dtype, device=like.device)


def run(launch: "Launch", first: torch.Tensor, *others: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    """Execute `launch` on the device of its arrays, asynchronously, and return its outputs.

    If the caller passes an array for an in-place output, the result is that array. All other outputs are new.
    """
    execute = _interpret if launch.target == Backend.INTERPRET else _start
    on_device = torch.cuda.device if fast_launch is None else fast_launch.DeviceGuard
    inputs, outputs = [first, *others], []
    with on_device(first.get_device()), profiling.region(launch.kernel.fn.__name__, first.device):
        for output, place in zip(launch.outputs, launch.places, strict=True):
            x = None if place is None else inputs[place]
            if x is None:
                x = allocate(output, first)
                if place is not None:
                    inputs[place] = x
            outputs.append(x)
        execute(launch, inputs, outputs)
    return tuple(outputs)


def run_together(launches: "tuple[Launch, ...]", arrays: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Execute `launches` one after the other, with the arguments and results of `run_by_name`.

    If these launches have run before with arrays of this kind, their arrays are checked only once for all launches.
    """
    quickly = fast_launch is not None and launches[0].target != Backend.INTERPRET and not profiling.is_on()
    if fast_launch is not None and quickly:
        with fast_launch.DeviceGuard(arrays["q"].get_device()):
            outputs = fast_launch.start_together(launches, arrays, allocate, scratch)
        if outputs is not None:
            return outputs
    outputs = run_by_name(run, launches, arrays)
    if fast_launch is not None and quickly:
        fast_launch.remember_together(launches, arrays, outputs)
    return outputs


run.together = run_together  # pyright: ignore[reportFunctionMemberAccess]


def _interpret(launch: "Launch", inputs: list, outputs: list) -> None:
    from zigzag_kernels.interpreter import interpret

    interpret(launch, inputs, outputs)


def _start(launch: "Launch", inputs: list, outputs: list) -> None:
    """Start the kernel of `launch`; a new kernel goes through Triton, which checks all arguments and compiles."""
    if fast_launch is not None and fast_launch.start_again(launch, inputs, outputs, scratch):
        return
    options = launch.constexprs | {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    compiled = with_scratch(launch.kernel[launch.grid], *inputs, *launch.scalars.values(), *outputs, **options)
    if fast_launch is not None and compiled is not None:
        through_triton = functools.partial(with_scratch, compiled[launch.grid])
        fast_launch.remember(launch, inputs, compiled, through_triton)


def scratch(size: int) -> torch.Tensor:
    """Return `size` bytes for the descriptors of a launch; later launches on the current stream may reuse them."""
    if fast_launch is not None:
        return fast_launch.empty_on_gpu((size,), (1,), torch.int8)
    return torch.empty(size, dtype=torch.int8, device="cuda")


def with_scratch(kernel: Callable, *arguments, **options):
    """Call `kernel` with scratch memory from `scratch`, without changing the allocator that the user has set."""
    import triton

    context = contextvars.copy_context()
    context.run(triton.set_allocator, lambda size, alignment, stream: scratch(size))
    return context.run(kernel, *arguments, **options)
