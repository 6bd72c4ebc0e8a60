"""The JSON file of `ZIGZAG_KERNEL_CONFIG`, whose entries replace entries of the tile tables.

The file nests architecture, width of the input type, kernel and head_dim around the fields of a `TileConfig`:
`{"sm_90": {"16-bit": {"forward": {"128": {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 3}}}}}`.
A kernel has a name, such as "backward_dq", only in this file; elsewhere it is a `KernelId`.
"""

import functools
import json
from collections.abc import Callable
from dataclasses import MISSING, asdict, fields
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

    `exceeds(config)` says in words which limit a configuration exceeds, or returns None. Raises `ValueError` for a
    name in the file that no kernel would look up, and for tiles that cannot run.
    """
    tables = _read(path, known)
    for name in entry:
        if name not in tables:
            return None
        tables = tables[name]
    where = f"{VARIABLE}: {path}: {' '.join(entry)}"
    config = _tile_config(where, tables)
    if budget := exceeds(config):
        raise ValueError(f"{where}: {config} needs {budget}")
    return config


def check_file(path: str, known: KnownNames) -> None:
    """Raise `ValueError` for a file with an invalid `TileConfig`, or a name that no kernel would look up."""
    _read(path, known)


@functools.cache
def _read(path: str, known: KnownNames) -> dict:
    where = f"{VARIABLE}: {path}"
    try:
        with open(path, encoding="utf-8") as file:
            tables = json.load(file, object_pairs_hook=functools.partial(_without_repeats, where))
    except OSError as error:
        raise ValueError(f"{where}: expected a file that can be read, got {error.strerror}") from error
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{where}: expected JSON, got: {error}") from error
    levels = [
        ("architecture", known.architectures),
        ("width", tuple(WIDTHS.values())),
        ("kernel", known.kernels),
        ("head_dim", tuple(map(str, HEAD_DIMS))),
    ]
    _check_entries(where, tables, levels)
    return tables


def _without_repeats(where: str, pairs: list[tuple[str, object]]) -> dict:
    names = [name for name, _ in pairs]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{where}: expected every name once in its place, got {name!r} twice")
    return dict(pairs)


def _check_entries(where: str, tables, levels: list[tuple[str, tuple[str, ...]]]) -> None:
    """Raise `ValueError` for an unknown name at any level of the nested `tables`, and for wrong tiles."""
    if not levels:
        _tile_config(where, tables)
        return
    (level, names), *rest = levels
    if not isinstance(tables, dict):
        raise ValueError(f"{where}: expected an object of {level} names, got {tables!r}")
    for name, inner in tables.items():
        if name not in names:
            raise ValueError(f"{where}: expected {level} {', '.join(names)}, got {name!r}")
        _check_entries(f"{where}: {name}", inner, rest)


def _tile_config(where: str, entry) -> TileConfig:
    """Return the `TileConfig` of one entry; `ValueError` for unknown fields or invalid values."""
    if not isinstance(entry, dict):
        raise ValueError(f"{where}: expected an object with the fields of tiles, got {entry!r}")
    for field in fields(TileConfig):
        if field.name not in entry and field.default is MISSING:
            raise ValueError(f"{where}: expected a field {field.name}, got {', '.join(entry) or 'none'}")
    for name in entry:
        if name not in (known := [field.name for field in fields(TileConfig)]):
            raise ValueError(f"{where}: expected the fields {', '.join(known)}, got {name!r}")
    try:
        return TileConfig(**entry)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
