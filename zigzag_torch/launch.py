"""The only place in this package that launches a kernel, and the choice of the backend that does it."""

import contextlib
import contextvars
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
    if backend != "triton":
        return backend
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
    from zigzag_kernels import plan

    inputs = dict(zip(launch.inputs, (first, *others), strict=True))
    outputs = []
    for output in launch.outputs:
        place = launch.in_place.get(output.name)
        given = inputs[place] if place else None
        x = allocate(output, first.device) if given is None else given
        if place:
            inputs[place] = x
        outputs.append(x)
    arguments = *inputs.values(), *launch.scalars.values(), *outputs
    options = launch.constexprs | {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    kernel = launch.kernel[launch.grid]
    turn = plan.INTERPRETER if launch.target == backends.INTERPRET else contextlib.nullcontext()
    with turn, torch.cuda.device_of(first), profiling.region(launch.kernel.fn.__name__, first.device):
        if launch.scratch:  # in a context of its own, so that the allocator that the user has set stays
            contextvars.copy_context().run(_with_scratch, kernel, arguments, options)
        else:
            kernel(*arguments, **options)
    return tuple(outputs)


def _with_scratch(kernel, arguments: tuple, options: dict) -> None:
    import triton

    triton.set_allocator(lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device="cuda"))
    kernel(*arguments, **options)
