"""The three flags of the published names, as environment variables and as `ZigzagConfig`.

Every call reads the flags again: from the innermost active `ZigzagConfig`, or without one from the environment.
"""

import functools
import os
from dataclasses import dataclass, field, fields

from .. import profiling

DEFAULTS = {"ZIGZAG_USE_FUSED_TRITON_V2": "1", "ZIGZAG_VERIFY_CORRECTNESS": "0", "ZIGZAG_PROFILE_KERNELS": "0"}


# The dict behind `os.environ`, if this release of Python has it there. Every launch looks up a flag, and `os.environ`
# takes ten times as long for an unset variable.
_environment = getattr(os.environ, "_data", os.environb)
_VALUES = {b"0": False, b"1": True}


def _from_environment(variable: str) -> bool:
    value = _environment.get(variable.encode(), DEFAULTS[variable].encode())
    if value not in _VALUES:
        raise ValueError(f"{variable}: expected 0 or 1, got {os.fsdecode(value)!r}")
    return _VALUES[value]


def _flag(variable: str):
    return field(default_factory=lambda: _from_environment(variable), metadata={"variable": variable})


class _PublishedNames(type):
    """The current values of the flags, under the published names, such as `ZigzagConfig.USE_FUSED_TRITON_V2`."""

    USE_FUSED_TRITON_V2 = property(lambda _: enabled("use_fused_triton_v2"))
    VERIFY_CORRECTNESS = property(lambda _: enabled("verify_correctness"))
    PROFILE_KERNELS = property(lambda _: enabled("profile_kernels"))

    def __setattr__(cls, name: str, value) -> None:
        if f"ZIGZAG_{name}" in DEFAULTS:
            raise AttributeError(
                f"ZigzagConfig.{name} is read-only: set the environment variable ZIGZAG_{name}, or use "
                f"`with ZigzagConfig({name.lower()}=...)`"
            )
        super().__setattr__(name, value)


@dataclass(frozen=True, kw_only=True)
class ZigzagConfig(metaclass=_PublishedNames):
    """The flags as an object; flags that are not given keep the value of the environment.

    `with ZigzagConfig(use_fused_triton_v2=False): ...` sets the flags for the whole process, like the environment,
    because the backward pass runs in other threads. `ZigzagConfig.USE_FUSED_TRITON_V2`, `.VERIFY_CORRECTNESS` and
    `.PROFILE_KERNELS` are the current values of the flags. Raises `ValueError` for a flag that is not a bool.
    """

    use_fused_triton_v2: bool = _flag("ZIGZAG_USE_FUSED_TRITON_V2")
    """True uses the fused kernels, False the unfused path."""
    verify_correctness: bool = _flag("ZIGZAG_VERIFY_CORRECTNESS")
    """True computes both paths, forward and backward, and raises `AssertionError` if they differ."""
    profile_kernels: bool = _flag("ZIGZAG_PROFILE_KERNELS")
    """True names every launch for profilers, and records its time for `profile_report`."""

    def __post_init__(self):
        for name in VARIABLES:
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}: expected True or False, got {getattr(self, name)!r}")

    def __enter__(self):
        _in_force.append(self)
        return self

    def __exit__(self, *_):
        _in_force.pop()


VARIABLES = {field.name: field.metadata["variable"] for field in fields(ZigzagConfig)}
_in_force: list[ZigzagConfig] = []


def enabled(name: str) -> bool:
    """Return the current value of the flag `name`, a field of `ZigzagConfig`."""
    return getattr(_in_force[-1], name) if _in_force else _from_environment(VARIABLES[name])


profiling.record_while(functools.partial(enabled, "profile_kernels"))
