"""The only place in this package that launches a kernel, and the choice of the backend that does it."""

import contextvars
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from zigzag_kernels import backend as backends

from . import profiling

if TYPE_CHECKING:
    from zigzag_kernels.plan import Launch, Output


def choose_backend(backend: str | None, device: torch.device) -> str:
    """The backend for tensors on `device`: see `zigzag_kernels.backend.choose_backend`."""
    # PyTorch for AMD GPUs calls them cuda too.
    kind = "gpu" if device.type == "cuda" and torch.version.hip is None else device.type
    return backends.choose_backend(backend, kind, ("triton",))


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


def allocate(output: "Output", device: torch.device) -> torch.Tensor:
    """Room for what a launch writes."""
    return torch.empty(output.shape, dtype=getattr(torch, output.dtype), device=device)


def run(launch: "Launch", first: torch.Tensor, *others: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    """Execute `launch` on the device of its arrays, asynchronously; returns its outputs: those to be written in place
    are the arrays given for them, all others new."""
    inputs = dict(zip(launch.inputs, (first, *others), strict=True))
    outputs = []
    for output in launch.outputs:
        place = launch.in_place.get(output.name)
        given = inputs[place] if place else None
        x = allocate(output, first.device) if given is None else given
        if place:
            inputs[place] = x
        outputs.append(x)
    execute = _interpret if launch.target == backends.INTERPRET else _start
    with torch.cuda.device_of(first), profiling.region(launch.kernel.fn.__name__, first.device):
        execute(launch, tuple(inputs.values()), tuple(outputs))
    return tuple(outputs)


def _interpret(launch: "Launch", inputs: tuple, outputs: tuple) -> None:
    from zigzag_kernels import plan

    with plan.INTERPRETER:
        launch.kernel[launch.grid](*inputs, *launch.scalars.values(), *outputs, **launch.constexprs)


def _start(launch: "Launch", inputs: tuple, outputs: tuple) -> None:
    """Launch the compiled kernel, which Triton's own call looks up by all arguments and options, in three times the
    time. It is the same one for inputs of the same types that Triton calls aligned alike, under the same settings;
    outputs are among them, or new and so always alike."""
    from triton import knobs

    arguments = *inputs, *launch.scalars.values(), *outputs
    settings = knobs.runtime.debug, knobs.compilation.instrumentation_mode
    key = inputs[0].device, settings, *[x.dtype for x in inputs], *[x.data_ptr() % 16 == 0 for x in inputs]
    started = _started(launch)
    if key in started:
        kernel, constants = started[key]
        _call(launch, kernel, (*arguments, *constants), {})
        return
    options = launch.constexprs | {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    compiled = _call(launch, launch.kernel[launch.grid], arguments, options)
    if compiled is not None:
        constants = tuple(launch.constexprs[name] for name in launch.kernel.arg_names[len(arguments) :])
        started[key] = compiled[launch.grid], constants


@functools.lru_cache(maxsize=4096)
def _started(launch: "Launch") -> dict:
    """{what a compiled kernel depends on: (the kernel with its grid, the constants that follow the arguments)}."""
    return {}


def _call(launch: "Launch", kernel: Callable, arguments: tuple, options: dict):
    if launch.scratch:  # in a context of its own, so that the allocator that the user has set stays
        return contextvars.copy_context().run(_with_scratch, kernel, arguments, options)
    return kernel(*arguments, **options)


def _with_scratch(kernel: Callable, arguments: tuple, options: dict):
    import triton

    triton.set_allocator(lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device="cuda"))
    return kernel(*arguments, **options)
