"""The choice of the backend, in one place for both frameworks: nothing is ever swapped for another silently."""

import functools
import importlib.util

BACKENDS = ("triton", "interpret", "reference")
INTERPRET, REFERENCE = "interpret", "reference"
_DEVICE = {"triton": "gpu", "interpret": "cpu"}


def choose_backend(backend: str | None, device: str, packages: tuple[str, ...]) -> str:
    """The backend that runs on `device` ("gpu", "cpu" or another platform's name) when `backend` is asked for.

    None is "triton" on a GPU and "reference" elsewhere. `packages` are those that "triton" needs. Raises `ValueError`
    for an unknown name or a device that the backend does not serve, `RuntimeError` if this process cannot run it.
    """
    if backend is None:
        backend = "triton" if device == "gpu" else "reference"
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected None, {', '.join(BACKENDS)}, got {backend!r}")
    if backend == "reference":
        return backend
    if device != _DEVICE[backend]:
        raise ValueError(f"backend: {backend!r} expected arrays on a {_DEVICE[backend]}, got {device}")
    _check_process(backend, packages)
    return backend


@functools.cache
def _check_process(backend: str, packages: tuple[str, ...]) -> None:
    for package in packages if backend == "triton" else ("triton",):
        if importlib.util.find_spec(package) is None:
            raise RuntimeError(f"backend: {backend!r} needs the package {package}, which is not installed")
    from .plan import interpreting

    if interpreting() != (backend == "interpret"):
        raise RuntimeError(
            "backend: 'interpret' needs TRITON_INTERPRET=1 in the environment before triton is imported"
            if backend == "interpret"
            else "backend: 'triton' cannot compile in a process that imported triton with TRITON_INTERPRET=1"
        )
