"""Tile sizes as data: one table per architecture, chosen by one function and checked by one `fits()`.

Which table a GPU uses: sm_90 for 9.0 and 10.x, sm_86 (little shared memory) for 8.6, 8.9 and 12.x, sm_80 for the rest.
The 16-bit entries of sm_90 were measured (`docs/kernels.md`), all others are chosen by budget and not measured. The
"hopper_" kernels are those of `hopper/`: the rows that a program owns (keys, in dK/dV) are shared by warpgroups of 64,
and num_warps counts one of these.

`ZIGZAG_KERNEL_CONFIG=file.json`, read when a problem is first seen, replaces entries, in the shape of `_TABLES` with
`Config` fields as objects:
`{"sm_90": {"16-bit": {"forward": {"128": {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 3}}}}}`.
"""

import functools
import json
import os
from dataclasses import dataclass, fields

from .checks import DTYPE_BYTES, MAX_BLOCK
from .modes import Backend

OVERRIDE_VARIABLE = "ZIGZAG_KERNEL_CONFIG"
HOPPER_KERNELS = (
    "hopper_dkdv",
    "hopper_dkdv_short",
    "hopper_fused",
    *(f"hopper_{name}{size}" for name in ("forward", "dq") for size in ("", "_few", "_short")),
)
KERNELS = ("forward", "backward_dkdv", "backward_dq", *HOPPER_KERNELS)
WIDTHS = {2: "16-bit", 4: "32-bit"}
HEAD_DIMS = (64, 128, 256)  # an entry serves every head_dim up to its own, above the one before
# Largest dynamic shared memory of one block, in bytes (CUDA programming guide, technical specifications).
SHARED_MEMORY = {"sm_80": 163 * 1024, "sm_86": 99 * 1024, "sm_90": 227 * 1024}
REGISTERS_PER_THREAD = 255
WARPGROUPS = {"forward": 4, "dkdv": 3, "dq": 3, "fused": 2}  # at most; the registers of each are in the kernels


@dataclass(frozen=True)
class Config:
    """Tile and launch parameters of one kernel: query rows and keys a step, warps a program, pipeline depth, and
    how many tiles of one head run side by side before those of the next head (0: as the plan has it); with
    heads_together, a program of a kernel of `hopper/` takes one tile of up to so many KV heads, one after the other."""

    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    num_stages: int
    tiles_together: int = 0
    heads_together: int = 1

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, int) or value < (field.name != "tiles_together"):
                raise ValueError(f"{field.name}: expected a positive int, got {value!r}")
        for name in ("BLOCK_M", "BLOCK_N"):
            value = getattr(self, name)
            if value < 16 or value > MAX_BLOCK or value % 16:
                raise ValueError(f"{name}: expected a multiple of 16 from 16 to {MAX_BLOCK}, got {value}")
        if self.num_warps not in (1, 2, 4, 8, 16):
            raise ValueError(f"num_warps: expected 1, 2, 4, 8 or 16, got {self.num_warps}")


def _up_to(*rows: tuple) -> dict[int, Config]:
    """`HEAD_DIMS`, as far as there are rows, with the fields of their `Config`."""
    return {head_dim: Config(*row) for head_dim, row in zip(HEAD_DIMS, rows, strict=False)}


_FLOAT32 = {
    "forward": _up_to((64, 32, 4, 2), (32, 32, 4, 2), (32, 16, 4, 1)),
    "backward_dkdv": _up_to((32, 32, 4, 1), (16, 32, 4, 1), (16, 16, 4, 1)),
    "backward_dq": _up_to((32, 32, 4, 1), (32, 16, 4, 1), (16, 16, 4, 1)),
}
_TABLES: dict[str, dict[str, dict[str, dict[int, Config]]]] = {
    "sm_90": {
        "16-bit": {
            "forward": _up_to((128, 64, 4, 3, 1), (128, 128, 8, 3), (128, 64, 8, 2)),
            "backward_dkdv": _up_to((128, 64, 4, 2), (64, 128, 8, 2), (32, 128, 8, 3)),
            "backward_dq": _up_to((128, 64, 4, 3), (128, 64, 8, 3), (128, 32, 8, 3)),
            "hopper_forward": _up_to((192, 128, 4, 3, 1), (128, 128, 4, 2)),
            "hopper_forward_few": _up_to((256, 64, 4, 4, 1), (128, 128, 4, 2, 1, 2)),
            "hopper_forward_short": _up_to((256, 64, 4, 4, 1), (128, 64, 4, 4, 0, 8)),
            "hopper_dkdv": _up_to((64, 192, 4, 3), (64, 128, 4, 3)),
            "hopper_dkdv_short": _up_to((64, 192, 4, 3), (64, 128, 4, 3, 0, 4)),
            "hopper_fused": _up_to((64, 128, 4, 3), (64, 128, 4, 2)),
            "hopper_dq": _up_to((192, 64, 4, 4), (128, 128, 4, 2)),
            "hopper_dq_few": _up_to((192, 64, 4, 4, 1, 4), (128, 128, 4, 2, 1)),
            "hopper_dq_short": _up_to((192, 64, 4, 4), (128, 64, 4, 4, 0, 8)),
        },
        "32-bit": _FLOAT32,
    },
    "sm_80": {
        "16-bit": {
            "forward": _up_to((128, 64, 4, 3), (128, 64, 8, 3), (64, 32, 8, 2)),
            "backward_dkdv": _up_to((64, 64, 4, 2), (64, 64, 8, 2), (32, 64, 8, 1)),
            "backward_dq": _up_to((64, 64, 4, 2), (64, 64, 8, 2), (64, 32, 8, 1)),
        },
        "32-bit": _FLOAT32,
    },
    "sm_86": {
        "16-bit": {
            "forward": _up_to((128, 64, 4, 2), (128, 32, 8, 2), (64, 32, 8, 1)),
            "backward_dkdv": _up_to((64, 64, 4, 1), (32, 64, 8, 1), (16, 32, 8, 1)),
            "backward_dq": _up_to((64, 64, 4, 1), (64, 32, 8, 1), (32, 32, 8, 1)),
        },
        "32-bit": _FLOAT32,
    },
}
# Small, so that short sequences fill several; not square, so that mixing them up shows.
_INTERPRET = {
    "forward": Config(32, 16, 1, 1, tiles_together=2),
    "backward_dkdv": Config(16, 32, 1, 1),
    "backward_dq": Config(32, 16, 1, 1),
}


def architecture(target: str) -> str:
    """Name of the table that a compute capability such as "8.9" uses."""
    major, minor = (int(part) for part in target.split("."))
    if (major, minor) in ((8, 6), (8, 9)) or major == 12:
        return "sm_86"
    return "sm_90" if major in (9, 10) else "sm_80"


def block_d(head_dim: int) -> int:
    """`head_dim` rounded up to the power of two that tiles have."""
    return max(16, 1 << (head_dim - 1).bit_length())


def owned(kernel: str) -> str:
    """Which size of a tile counts the rows that a program of `kernel`, one of `hopper/`, owns."""
    return "BLOCK_N" if kernel.startswith(("hopper_dkdv", "hopper_fused")) else "BLOCK_M"


def shared_memory(kernel: str, config: Config, head_dim: int, dtype: str, arch: str) -> int:
    """Upper bound of the bytes of shared memory of one program.

    Its own tiles stay, `num_stages` blocks of what it loops over are in flight. Where Hopper's matrix instructions do
    not take operands from registers, scores pass through shared memory, and a block being loaded counts once more.
    """
    size = DTYPE_BYTES[dtype]
    row = block_d(head_dim) * size
    if kernel in HOPPER_KERNELS:
        own, streamed = config.BLOCK_M, config.BLOCK_N
        if owned(kernel) == "BLOCK_N":
            own, streamed = streamed, own
        # What stays and what passes by, barriers, and where each warpgroup's results change their layout.
        stays, passes, other = 2 * row, 2 * row, 1024 + own // 64 * 2048
        if kernel.startswith("hopper_forward"):  # Q; K and V
            stays = row
        elif owned(kernel) == "BLOCK_N":  # K and V; Q, dO and three numbers a row
            passes += 12
        if kernel == "hopper_fused":  # dS of two blocks, and dQ on its way out
            other += streamed * (2 * own * size + block_d(head_dim) * 4)
        return own * stays + config.num_stages * streamed * passes + other
    scores = 0
    if arch != "sm_90" or size == 4:
        scores = max(2 * config.BLOCK_M * config.BLOCK_N * size, min(config.BLOCK_M, config.BLOCK_N) * row)
    if kernel == "backward_dkdv":  # its own K and V; Q, dO and two float32 statistics a row pass by
        return 2 * config.BLOCK_N * row + config.num_stages * config.BLOCK_M * (2 * row + 8) + scores
    own_tiles = 1 if kernel == "forward" else 2  # Q, and dO; K and V pass by
    return own_tiles * config.BLOCK_M * row + config.num_stages * config.BLOCK_N * 2 * row + scores


def sums_apart(head_dim: int, dtype: str, target: str) -> bool:
    """Whether `backward_dkdv` is launched for dK and again for dV: together their sums leave no registers for a tile
    that keeps the matrix instructions busy. Measured on sm_90 alone."""
    if head_dim <= 128 or DTYPE_BYTES[dtype] > 2:
        return False
    return target == Backend.INTERPRET or architecture(target) == "sm_90"


def registers(kernel: str, config: Config, head_dim: int, apart: bool) -> int:
    """Registers a thread needs for float32 accumulators and one tile of scores: more than a thread has cannot work."""
    accumulators = (
        block_d(head_dim)
        * {
            "forward": config.BLOCK_M,
            "backward_dkdv": config.BLOCK_N if apart else 2 * config.BLOCK_N,
            "backward_dq": config.BLOCK_M,
        }[kernel]
    )
    return (accumulators + config.BLOCK_M * config.BLOCK_N) // (32 * config.num_warps)


def fits(kernel: str, config: Config, head_dim: int, dtype: str, target: str) -> str | None:
    """None if `config` can run, else the budget that it exceeds, in words."""
    arch = architecture(target)
    need, limit = shared_memory(kernel, config, head_dim, dtype, arch), SHARED_MEMORY[arch]
    if need > limit:
        return f"{need} bytes of shared memory, the GPU has {limit}"
    own = None
    if config.heads_together > 1 and (kernel not in HOPPER_KERNELS or kernel == "hopper_fused"):
        return "1 as heads_together"
    if kernel in HOPPER_KERNELS:
        own = owned(kernel)
        sizes = [64 * groups for groups in range(2, WARPGROUPS[kernel.split("_")[1]] + 1)]
        if getattr(config, own) not in sizes or config.num_warps != 4:
            return f"{own} {' or '.join(map(str, sizes))} and num_warps 4"
        if config.num_stages == 1:  # a block is waited for before the one before it is done with
            return "2 or more as num_stages"
    for name in ("BLOCK_M", "BLOCK_N"):
        if name != own and getattr(config, name).bit_count() > 1:
            return f"a power of two as {name}"
    if own:
        return None
    need = registers(kernel, config, head_dim, sums_apart(head_dim, dtype, target))
    if need > REGISTERS_PER_THREAD:
        return f"{need} registers a thread, the GPU has {REGISTERS_PER_THREAD}"
    return None


@functools.cache
def _overrides(path: str) -> dict:
    with open(path, encoding="utf-8") as file:
        tables = json.load(file)
    known = {"architecture": tuple(_TABLES), "width": tuple(WIDTHS.values()), "kernel": KERNELS}
    _check_names(path, tables, [*known.items(), ("head_dim", tuple(map(str, HEAD_DIMS)))])
    return tables


def _check_names(path: str, tables: dict, levels: list[tuple[str, tuple[str, ...]]]) -> None:
    """`ValueError` for a name in the nested `tables` that would never be looked up."""
    if not levels:
        return
    (level, names), *rest = levels
    for name, inner in tables.items():
        if name not in names:
            raise ValueError(f"{path}: expected {level} {', '.join(names)}, got {name!r}")
        _check_names(path, inner, rest)


def choose_config(kernel: str, head_dim: int, dtype: str, target: str) -> Config:
    """The configuration of `kernel` ("forward", "backward_dkdv" or "backward_dq") on `target`."""
    if target == Backend.INTERPRET:
        return _INTERPRET[kernel]
    arch, width = architecture(target), WIDTHS[DTYPE_BYTES[dtype]]
    up_to = min(dim for dim in HEAD_DIMS if dim >= head_dim)
    path = os.environ.get(OVERRIDE_VARIABLE)
    custom = _overrides(path).get(arch, {}).get(width, {}).get(kernel, {}).get(str(up_to)) if path else None
    if custom is None:
        return _TABLES[arch][width][kernel][up_to]
    where = f"{path}: {arch} {width} {kernel} {up_to}"
    try:
        config = Config(**custom)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error
    if problem := fits(kernel, config, head_dim, dtype, target):
        raise ValueError(f"{where}: {config} needs {problem}")
    return config
