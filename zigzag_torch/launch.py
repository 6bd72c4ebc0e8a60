"""The only place in this package that launches a kernel, and the choice of the backend that does it."""

import importlib.util
from typing import TYPE_CHECKING

import torch

from zigzag_kernels.problem import INTERPRET

if TYPE_CHECKING:
    from zigzag_kernels.plan import Launch, Output

BACKENDS = ("triton", "interpret", "reference")


def choose_backend(backend: str | None, device: torch.device) -> str:
    """The backend for tensors on `device`; a request that cannot be met is an error, never another backend.

    Raises `ValueError` for an unknown name or a device that the backend does not serve, `RuntimeError` if the process
    cannot run it (triton missing, or interpreting when it should compile).
    """
    if backend is None:
        backend = "triton" if device.type == "cuda" else "reference"
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected None, {', '.join(BACKENDS)}, got {backend!r}")
    if backend == "reference":
        return backend
    wanted = "cuda" if backend == "triton" else "cpu"
    if device.type != wanted:
        raise ValueError(f"backend: {backend!r} expected tensors on {wanted}, got {device}")
    if importlib.util.find_spec("triton") is None:
        raise RuntimeError(f"backend: {backend!r} needs the package triton, which is not installed")
    from zigzag_kernels.plan import interpreting

    if interpreting() != (backend == "interpret"):
        raise RuntimeError(
            "backend: 'interpret' needs TRITON_INTERPRET=1 in the environment before triton is imported"
            if backend == "interpret"
            else "backend: 'triton' cannot compile in a process that imported triton with TRITON_INTERPRET=1"
        )
    return backend


def target(backend: str, device: torch.device) -> str:
    """What `Problem.target` says of `device` under `backend`."""
    if backend == "interpret":
        return INTERPRET
    if backend == "reference":
        return backend
    major, minor = torch.cuda.get_device_capability(device)
    return f"{major}.{minor}"


def allocate(output: "Output", device: torch.device) -> torch.Tensor:
    """Room for what a launch writes."""
    return torch.empty(output.shape, dtype=getattr(torch, output.dtype), device=device)


def run(launch: "Launch", *arrays: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Execute `launch` on the device of `arrays`, asynchronously; returns its outputs, freshly allocated."""
    outputs = tuple(allocate(output, arrays[0].device) for output in launch.outputs)
    with torch.cuda.device_of(arrays[0]):
        launch.kernel[launch.grid](
            *arrays,
            *launch.scalars,
            *outputs,
            **launch.constexprs,
            num_warps=launch.num_warps,
            num_stages=launch.num_stages,
        )
    return outputs
