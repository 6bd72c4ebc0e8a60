"""The only place in this package that launches a kernel, and the choice of the backend that does it."""

import contextlib
from typing import TYPE_CHECKING

import torch

from zigzag_kernels import backend as backends

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


# What torch.compiler.assume_constant_result does, which imports triton, and that must wait until a kernel is asked for:
# both depend on their arguments and the machine alone, and are called rather than traced.
for _function in (choose_backend, target):
    _function._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]


def allocate(output: "Output", device: torch.device) -> torch.Tensor:
    """Room for what a launch writes."""
    return torch.empty(output.shape, dtype=getattr(torch, output.dtype), device=device)


def run(launch: "Launch", *arrays: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Execute `launch` on the device of `arrays`, asynchronously; returns its outputs, freshly allocated."""
    from zigzag_kernels import plan

    outputs = tuple(allocate(output, arrays[0].device) for output in launch.outputs)
    turn = plan.INTERPRETER if launch.target == backends.INTERPRET else contextlib.nullcontext()
    with turn, torch.cuda.device_of(arrays[0]):
        launch.kernel[launch.grid](
            *arrays,
            *launch.scalars.values(),
            *outputs,
            **launch.constexprs,
            num_warps=launch.num_warps,
            num_stages=launch.num_stages,
        )
    return outputs
