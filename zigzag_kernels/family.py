"""The interface between the plan, which makes a `Draft`, and a `Family`, which makes launches of it.

A family is written for some generations of GPUs and has a folder of its own. `families` chooses the family of a call.
"""

import abc
import os
from dataclasses import dataclass
from typing import Any, ClassVar

from .launch import Launch, Output
from .modes import LengthClass, Operation
from .problem import Problem
from .tiles.config import Architecture, KernelId, TileConfig


@dataclass(frozen=True, kw_only=True)
class Draft:
    """A launch without its kernel: the arrays, numbers, constants and grid, which do not depend on the family."""

    problem: Problem
    kernel: KernelId
    config: TileConfig  # its `tiles_together` is the final order of tiles
    heads_together: int  # KV heads that one program computes, one after the other
    grid: tuple[int, int, int]
    inputs: tuple[str, ...]
    scalars: dict[str, int]
    outputs: tuple[Output, ...]
    in_place: dict[str, str]
    constexprs: dict[str, Any]

    def launch(self, function: Any, constexprs: dict[str, Any], **resources: int) -> Launch:
        """Return the launch of the kernel `function`, with the `constexprs` that only this family's kernels take.

        `resources` are the fields `num_warps`, `num_stages` and `scratch` of `Launch`.
        """
        return Launch(
            kernel=function,
            target=self.problem.target,
            grid=self.grid,
            inputs=self.inputs,
            scalars=self.scalars,
            outputs=self.outputs,
            constexprs=self.constexprs | constexprs,
            in_place=self.in_place,
            **resources,
        )


def read_switch(variable: str) -> bool | None:
    """Return True or False if the environment variable is 1 or 0, and None if it is not set."""
    value = os.environ.get(variable)
    if value not in (None, "0", "1"):
        raise ValueError(f"{variable}: expected 0 or 1, got {value!r}")
    return None if value is None else value == "1"


class Family(abc.ABC):
    """A family says which problems its kernels can run, when they are expected to be fastest, and with which tiles.

    Importing a family does not import its kernels; `make_launches` does. So tiles can be looked up without Triton.
    """

    name: ClassVar[str]
    variable: ClassVar[str | None] = None
    """Environment variable that forbids the family (0), or makes it run every problem that it can run (1)."""
    switches: ClassVar[tuple[str, ...]] = ()
    """Other environment variables of the family, each 0 or 1."""
    architectures: ClassVar[tuple[Architecture, ...]]
    """Generations of GPUs that the family has tiles for."""

    @property
    def kernels(self) -> tuple[KernelId, ...]:
        """Kernels that have tiles of their own."""
        tables = [table for architecture in self.architectures for table in architecture.tiles.values()]
        return tuple(dict.fromkeys(kernel for table in tables for kernel in table if kernel.family == self.name))

    def architecture(self, target: str) -> Architecture:
        """Return the architecture whose tiles `target` uses; `LookupError` if there is none."""
        best = max(self.architectures, key=lambda architecture: architecture.match(target))
        if best.match(target) < 0:
            raise LookupError(f"the {self.name} kernels have no tiles for {target}")
        return best

    def has_tiles_for(self, target: str) -> bool:
        """Return whether the family has an architecture for `target`."""
        return any(architecture.match(target) >= 0 for architecture in self.architectures)

    def choose_kernel(self, problem: Problem, operation: Operation) -> KernelId:
        """Return the kernel for `operation` of `problem`: the kernel of its length class, if it has its own tiles."""
        kernel = KernelId(self.name, operation, self.length_class(problem))
        return kernel if kernel in self.kernels else KernelId(self.name, operation)

    def length_class(self, problem: Problem) -> LengthClass:
        """Return the length class of `problem`; LONG from a family whose tiles do not depend on lengths."""
        return LengthClass.LONG

    def fit_tiles(self, problem: Problem, operation: Operation, config: TileConfig) -> TileConfig:
        """Return `config`, the tiles of the kernel for `operation`, adjusted to the options of `problem`."""
        return config

    @abc.abstractmethod
    def can_run(self, problem: Problem, operation: Operation, dout_strides: tuple[int, int] | None) -> bool:
        """Return whether a kernel of this family can run `operation` of `problem`.

        `dout_strides` are the (token, head) strides of dO in elements, None in the forward pass.
        """

    @abc.abstractmethod
    def is_faster(self, problem: Problem, operation: Operation) -> bool:
        """Return whether this family's kernel is expected to beat the kernels of later entries of `FAMILIES`."""

    @abc.abstractmethod
    def shared_memory(
        self, kernel: KernelId, config: TileConfig, head_dim: int, dtype: str, architecture: Architecture
    ) -> int:
        """Return an upper bound of the shared memory of one program, in bytes."""

    @abc.abstractmethod
    def exceeds(
        self, kernel: KernelId, config: TileConfig, head_dim: int, dtype: str, architecture: Architecture
    ) -> str | None:
        """Return in words which limit other than shared memory `config` exceeds, or None."""

    def fits(self, kernel: KernelId, config: TileConfig, head_dim: int, dtype: str, target: str) -> str | None:
        """Return None if `config` can run on `target`, otherwise in words which limit it exceeds."""
        architecture = self.architecture(target)
        need, limit = self.shared_memory(kernel, config, head_dim, dtype, architecture), architecture.shared_memory
        if need > limit:
            return f"{need} bytes of shared memory, the GPU has {limit}"
        return self.exceeds(kernel, config, head_dim, dtype, architecture)

    @abc.abstractmethod
    def make_launches(self, draft: Draft) -> tuple[Launch, ...]:
        """Return the launches of `draft`, in the order in which they run.

        DKDV may have several launches; each launch adds to the results of the earlier ones. FUSED_BACKWARD has three:
        the first clears float32 sums, the second computes dK and dV and adds dQ to the sums, the third scales and casts
        the sums.
        """
