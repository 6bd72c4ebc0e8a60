"""The JSON file of `ZIGZAG_KERNEL_CONFIG`, whose entries replace those of the tile tables.

It nests architecture, width of the input type, kernel and head_dim around the fields of a `TileConfig`:
`{"sm_90": {"16-bit": {"forward": {"128": {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 3}}}}}`.
Nowhere else is a kernel a name.
"""

import functools
import json
from collections.abc import Callable
from dataclasses import asdict
from typing import NamedTuple

from ..modes import LengthClass, Operation
from .config import HEAD_DIMS, WIDTHS, Architecture, KernelId, TileConfig, entry_head_dim, width

VARIABLE = "ZIGZAG_KERNEL_CONFIG"
"""Environment variable that holds the path of the file; it is read when a problem is first seen."""


class Entry(NamedTuple):
    """The names that lead to one entry of the file."""

    architecture: str
    width: str
    kernel: str
    head_dim: str


class KnownNames(NamedTuple):
    """The names of architectures and kernels that a file may use."""

    architectures: tuple[str, ...]
    kernels: tuple[str, ...]


def kernel_name(kernel: KernelId) -> str:
    """Return the name of `kernel` in the file, such as "backward_dq" or "hopper_dq_short"."""
    operation = "fused" if kernel.operation is Operation.FUSED_BACKWARD else kernel.operation.value
    if kernel.family == "portable":
        return operation if kernel.operation is Operation.FORWARD else f"backward_{operation}"
    size = "" if kernel.length_class is LengthClass.LONG else f"_{kernel.length_class}"
    return f"{kernel.family}_{operation}{size}"


def find_entry(architecture: Architecture, kernel: KernelId, head_dim: int, dtype: str) -> Entry:
    """Return the names of the entry that serves `kernel` for `head_dim` and `dtype`."""
    return Entry(architecture.name, width(dtype), kernel_name(kernel), str(entry_head_dim(head_dim)))


def as_tables(entry: Entry, config: TileConfig) -> dict:
    """Return the contents of a file that has `config` at `entry`."""
    return {entry.architecture: {entry.width: {entry.kernel: {entry.head_dim: asdict(config)}}}}


def read_config(
    path: str, entry: Entry, known: KnownNames, exceeds: Callable[[TileConfig], str | None]
) -> TileConfig | None:
    """Return the tiles that the file has at `entry`, or None.

    `exceeds` names the budget that a configuration exceeds, or returns None. Raises `ValueError` for a name that would
    never be looked up, and for tiles that cannot run.
    """
    tables = _read(path, known)
    for name in entry:
        if name not in tables:
            return None
        tables = tables[name]
    where = f"{path}: {' '.join(entry)}"
    config = _make_config(where, tables)
    if budget := exceeds(config):
        raise ValueError(f"{where}: {config} needs {budget}")
    return config


def check_file(path: str, known: KnownNames) -> None:
    """Raise `ValueError` for a file with a name that would never be looked up or a wrong `TileConfig`, or `OSError`."""
    for architecture, widths in _read(path, known).items():
        for width_name, kernels in widths.items():
            for kernel, head_dims in kernels.items():
                for head_dim, fields in head_dims.items():
                    _make_config(f"{path}: {architecture} {width_name} {kernel} {head_dim}", fields)


def _make_config(where: str, fields: dict) -> TileConfig:
    try:
        return TileConfig(**fields)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error


@functools.cache
def _read(path: str, known: KnownNames) -> dict:
    with open(path, encoding="utf-8") as file:
        tables = json.load(file)
    levels = [
        ("architecture", known.architectures),
        ("width", tuple(WIDTHS.values())),
        ("kernel", known.kernels),
        ("head_dim", tuple(map(str, HEAD_DIMS))),
    ]
    _check_names(path, tables, levels)
    return tables


def _check_names(path: str, tables: dict, levels: list[tuple[str, tuple[str, ...]]]) -> None:
    """Raise `ValueError` for a name in the nested `tables` that is none of its level's."""
    if not levels:
        return
    (level, names), *rest = levels
    for name, inner in tables.items():
        if name not in names:
            raise ValueError(f"{path}: expected {level} {', '.join(names)}, got {name!r}")
        _check_names(path, inner, rest)
