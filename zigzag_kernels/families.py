"""The registry of kernel families, which chooses the family that runs a problem, and the tiles of a kernel.

To support a new generation of GPUs, add a folder with a `Family`, a file of tiles, and an entry here.
"""

import os

from .family import Family, read_switch
from .hopper.family import HOPPER
from .modes import Backend, Operation
from .portable.family import PORTABLE
from .problem import Problem
from .tiles import override
from .tiles.config import Architecture, KernelId, TileConfig

FAMILIES: tuple[Family, ...] = (HOPPER, PORTABLE)
"""Families by preference: the first one that can run a problem, and is expected to be faster, runs it."""


def choose_family(problem: Problem, operation: Operation, dout_strides: tuple[int, int] | None = None) -> Family | None:
    """Return the family that runs `operation` of `problem`.

    The portable family runs every operation except FUSED_BACKWARD. The result is None only for FUSED_BACKWARD, where
    DKDV and DQ are expected to be faster.
    """
    for family in FAMILIES:
        wanted = requested(family)
        if wanted is False or not family.can_run(problem, operation, dout_strides):
            continue
        if wanted or family.is_faster(problem, operation):
            return family
    return None


def requested(family: Family) -> bool | None:
    """Return True or False if the environment forces or forbids `family`, and None if it leaves the choice open."""
    return read_switch(family.variable) if family.variable else None


def choose_tiles(kernel: KernelId, head_dim: int, dtype: str, target: str) -> TileConfig:
    """Return the tiles of `kernel` on `target`, from the file that `ZIGZAG_KERNEL_CONFIG` names or from the tables.

    Raises `LookupError` if the family has no such tiles, and `ValueError` for a file with a mistake.
    """
    family = family_of(kernel)
    architecture = family.architecture(target)
    shipped = architecture.tiles_of(kernel, head_dim, dtype)
    if shipped is None:
        raise LookupError(f"there is no {override.kernel_name(kernel)} for head_dim {head_dim} on {target}")
    path = os.environ.get(override.VARIABLE)
    if not path or target == Backend.INTERPRET:
        return shipped
    entry = override.find_entry(architecture, kernel, head_dim, dtype)
    custom = override.read_config(
        path, entry, known_names(), lambda config: family.fits(kernel, config, head_dim, dtype, target)
    )
    return custom or shipped


def family_of(kernel: KernelId) -> Family:
    """Return the family that `kernel` belongs to."""
    return next(family for family in FAMILIES if family.name == kernel.family)


def kernels_by_name() -> dict[str, KernelId]:
    """Return every kernel by its name in override files, portable ones first."""
    return {override.kernel_name(kernel): kernel for family in reversed(FAMILIES) for kernel in family.kernels}


def known_names() -> override.KnownNames:
    """Return the names that override files may use."""
    names = tuple(architecture.name for architecture in architectures() if architecture.name != Backend.INTERPRET)
    return override.KnownNames(names, tuple(kernels_by_name()))


def architectures() -> tuple[Architecture, ...]:
    """Return every architecture that some family has tiles for."""
    return tuple(dict.fromkeys(architecture for family in reversed(FAMILIES) for architecture in family.architectures))
