"""The rule by which both front ends choose a backend; a backend that cannot run raises an error."""

import functools
import importlib.util

from .modes import Backend

_DEVICE = {Backend.TRITON: "gpu", Backend.INTERPRET: "cpu"}


def choose_backend(backend: str | None, device: str, packages: tuple[str, ...]) -> str:
    """Return the name of the backend that runs a call on `device` whose caller passed `backend`.

    `device` is "gpu", "cpu" or another platform's name. A `backend` of None selects "triton" on a GPU and "reference"
    elsewhere. `packages` are the packages that "triton" needs. Raises `ValueError` for an unknown name or a device that
    the backend does not support, and `RuntimeError` if this process cannot run the backend.
    """
    if backend is None:
        backend = Backend.TRITON if device == "gpu" else Backend.REFERENCE
    names = [known.value for known in Backend]
    if backend not in names:
        raise ValueError(f"backend: expected None, {', '.join(names)}, got {backend!r}")
    chosen = Backend(backend)
    if chosen is not Backend.REFERENCE:
        if device != _DEVICE[chosen]:
            raise ValueError(f"backend: {chosen.value!r} expected arrays on a {_DEVICE[chosen]}, got {device}")
        _check_process(chosen, packages)
    return chosen.value


@functools.cache
def _check_process(backend: Backend, packages: tuple[str, ...]) -> None:
    for package in packages if backend is Backend.TRITON else ("triton",):
        if importlib.util.find_spec(package) is None:
            raise RuntimeError(f"backend: {backend.value!r} needs the package {package}, which is not installed")
    from .interpreter import interpreting

    if interpreting() != (backend is Backend.INTERPRET):
        raise RuntimeError(
            "backend: 'interpret' needs TRITON_INTERPRET=1 in the environment before triton is imported"
            if backend is Backend.INTERPRET
            else "backend: 'triton' cannot compile in a process that imported triton with TRITON_INTERPRET=1"
        )
