"""What a front end is asked to launch, in plain values: `Launch`."""

import functools
import inspect
import math
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
        """In elements: rows follow each other."""
        return tuple(math.prod(self.shape[i + 1 :]) for i in range(len(self.shape)))


@dataclass(frozen=True, eq=False)
class Launch:
    """One kernel launch, equal only to itself: front ends keep what they make of it.

    Kernel arguments in order: `inputs` (arrays), `scalars`, `outputs`, then `constexprs`.

    An output named in `in_place` shares the memory of that input, unless the array given there is None: then it begins
    empty, like any other. The kernel leaves parts of such an output as they are.
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
    scratch: int = 0  # bytes of global memory for each program, aligned to 128, that the launch has to provide

    @functools.cached_property
    def places(self) -> tuple[int | None, ...]:
        """Of each output the number of the input whose memory it shares."""
        places = (self.in_place.get(output.name) for output in self.outputs)
        return tuple(None if place is None else self.inputs.index(place) for place in places)

    def __post_init__(self):
        # jax-triton takes a misspelt name for one more constant, and a wrong order for another array.
        expected = list(inspect.signature(self.kernel.fn).parameters)
        given = [f"{name}_ptr" for name in self.inputs] + list(self.scalars)
        given += [f"{output.name}_ptr" for output in self.outputs]
        if given != expected[: len(given)] or set(expected[len(given) :]) != set(self.constexprs):
            raise TypeError(
                f"{self.kernel.fn.__name__}: expected arguments {expected}, got {given} and {sorted(self.constexprs)}"
            )
