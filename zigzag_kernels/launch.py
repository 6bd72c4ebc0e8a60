"""`Launch`: one kernel call in plain values, which the plan makes and both front ends execute."""

import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Output:
    """An array that a launch writes completely."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @functools.cached_property
    def strides(self) -> tuple[int, ...]:
        """Strides in elements; the array is contiguous."""
        return tuple(math.prod(self.shape[i + 1 :]) for i in range(len(self.shape)))


@dataclass(frozen=True, eq=False)
class Launch:
    """One kernel launch, equal only to itself, so that front ends can cache by identity.

    Kernel arguments in order: `inputs` (arrays), `scalars`, `outputs`, then `constexprs`.

    `in_place` maps an output to the input whose memory it shares; the kernel may leave some elements of such an output
    unchanged. If the caller passes None for that input, the output is new memory, like any other output.
    """

    kernel: Any
    target: str
    grid: tuple[int, int, int]
    inputs: tuple[str, ...]
    scalars: dict[str, int]
    outputs: tuple[Output, ...]
    constexprs: dict[str, Any]
    in_place: dict[str, str] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 1
    scratch: int = 0  # bytes of global memory, aligned to 128, that the launch must provide for each program

    @functools.cached_property
    def places(self) -> tuple[int | None, ...]:
        """The index of the input whose memory each output shares, or None."""
        places = (self.in_place.get(output.name) for output in self.outputs)
        return tuple(None if place is None else self.inputs.index(place) for place in places)

    def __post_init__(self):
        # jax-triton does not check names: it would pass a misspelt argument as a constant, and the arrays after it in
        # the wrong order.
        expected = list(inspect.signature(self.kernel.fn).parameters)
        given = [f"{name}_ptr" for name in self.inputs] + list(self.scalars)
        given += [f"{output.name}_ptr" for output in self.outputs]
        if given != expected[: len(given)] or set(expected[len(given) :]) != set(self.constexprs):
            raise TypeError(
                f"{self.kernel.fn.__name__}: expected arguments {expected}, got {given} and {sorted(self.constexprs)}"
            )


def inputs_by_name(launch: Launch, arrays: Mapping[str, Any]) -> list:
    """Return the inputs of `launch` from `arrays`; an input `into_x` is the array `x`, or None without one."""
    return [arrays.get(name[5:]) if name.startswith("into_") else arrays[name] for name in launch.inputs]


def run_by_name(run: Callable[..., tuple], launches: Sequence[Launch], arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Call `run` for each of `launches` in order, and return {name: output}.

    An input is the latest output of that name, or the array of that name if no launch has written one.
    """
    outputs: dict[str, Any] = {}
    for launch in launches:
        made = run(launch, *inputs_by_name(launch, {**arrays, **outputs}))
        outputs |= zip((output.name for output in launch.outputs), made, strict=True)
    return outputs
