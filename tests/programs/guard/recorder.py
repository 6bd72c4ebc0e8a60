"""Recorded launches: stand-ins for a front end's launch function and for its view of the GPU."""

import contextlib
import hashlib
import importlib
import json
import pkgutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any
from unittest import mock


@dataclass(frozen=True)
class Target:
    """A GPU as the front ends describe it: compute capability or "interpret", and whether Gluon can be launched."""

    capability: str
    gluon: bool = True


TARGETS = {name: Target(name) for name in ("8.0", "8.6", "9.0", "10.0", "interpret")}
TARGETS["9.0-portable"] = Target("9.0", gluon=False)


@dataclass
class Recorder:
    """Stands for `launch.run`: keeps the fields of each launch, and returns arrays made by `make(output)`."""

    make: Callable[[Any], Any]
    launches: list[dict[str, Any]] = field(default_factory=list)
    kernels: dict[str, Any] = field(default_factory=dict)

    def __call__(self, launch, *arrays) -> tuple:
        kernel = self.kernels.setdefault(launch.kernel.fn.__name__, launch.kernel)
        assert kernel is launch.kernel, f"two kernels are called {launch.kernel.fn.__name__}"
        self.launches.append(fields(launch, arrays))
        given = dict(zip(launch.inputs, arrays, strict=True))
        places = (given.get(launch.in_place.get(output.name)) for output in launch.outputs)
        return tuple(self.make(output) if x is None else x for output, x in zip(launch.outputs, places, strict=True))

    def take(self) -> list[dict[str, Any]]:
        """Return the launches since the last call, and forget them."""
        launches, self.launches = self.launches, []
        return launches


def fields(launch, arrays) -> dict[str, Any]:
    """Return everything that a launch on `arrays` hands to Triton, as values of JSON."""
    dtypes = [None if x is None else str(x.dtype).removeprefix("torch.") for x in arrays]
    made = {
        "kernel": launch.kernel.fn.__name__,
        "target": launch.target,
        "grid": launch.grid,
        "inputs": list(zip(launch.inputs, dtypes, strict=True)),
        "scalars": list(launch.scalars.items()),
        "outputs": [(output.name, output.shape, output.dtype) for output in launch.outputs],
        "constexprs": launch.constexprs,
        "in_place": launch.in_place,
        "num_warps": launch.num_warps,
        "num_stages": launch.num_stages,
        "scratch": launch.scratch,
    }
    return json.loads(json.dumps(made))


def identity(value: Any) -> str:
    """Return a short name of a value of JSON: equal values have equal names."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


@contextlib.contextmanager
def replaced(package: str, **stand_ins: Callable) -> Iterator[None]:
    """Replace functions of `package` by name, in every module that holds them, wherever they are defined.

    `LookupError` unless the package has exactly one function of each name.
    """
    with contextlib.ExitStack() as stack:
        for name, stand_in in stand_ins.items():
            places = _places(package, name)
            if len({id(value) for *_, value in places}) != 1:
                found = sorted({value.__module__ for *_, value in places})
                raise LookupError(f"{package}: expected one function called {name}, got those of {found}")
            for module, attribute, _ in places:
                stack.enter_context(mock.patch.object(module, attribute, stand_in))
        yield


def clear_caches(package: str) -> None:
    """Make `package` forget what it planned for another target."""
    for module in _modules(package):
        for value in list(vars(module).values()):
            if hasattr(value, "cache_clear"):
                value.cache_clear()


@contextlib.contextmanager
def on_target(package: str, target: Target, recorder: Recorder, **stand_ins: Callable) -> Iterator[None]:
    """Let the front end `package` believe that it runs on `target`, and launch through `recorder`."""
    (choose_backend,) = {value for *_, value in _places("zigzag_kernels", "choose_backend")}
    backend = type(choose_backend("reference", "cpu", ()))  # text, or an enumeration
    wanted = backend("interpret" if target.capability == "interpret" else "triton")
    for name in ("zigzag_kernels", package):
        clear_caches(name)
    stand_ins |= {
        "run": recorder,
        "choose_backend": lambda *_: wanted,
        "target": lambda *_: target.capability,
    }
    if not target.gluon:
        stand_ins["can_launch_gluon"] = lambda *_: False
    with replaced(package, **stand_ins):
        yield
    for name in ("zigzag_kernels", package):
        clear_caches(name)


def import_all(package: str) -> None:
    """Import every module of `package`, so that `replaced` sees those that are imported on first use too."""
    for module in pkgutil.walk_packages(importlib.import_module(package).__path__, f"{package}."):
        importlib.import_module(module.name)


def _places(package: str, name: str) -> list[tuple]:
    """Return (module, attribute, function) of every place where `package` holds its function called `name`."""
    return [
        (module, attribute, value)
        for module in _modules(package)
        for attribute, value in vars(module).items()
        if isinstance(value, FunctionType) and value.__name__ == name and _within(value.__module__, package)
    ]


def _modules(package: str) -> list:
    return [module for name, module in list(sys.modules.items()) if _within(name, package)]


def _within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")
