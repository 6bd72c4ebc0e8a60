"""The types that tile tables are made of: `KernelId`, `TileConfig` and `Architecture`."""

from dataclasses import dataclass, fields

from ..checks import DTYPE_BYTES, MAX_BLOCK
from ..modes import LengthClass, Operation

HEAD_DIMS = (64, 128, 256)
"""Head dimensions that tables have entries for; the entry of the next larger one is used for all others."""
WIDTHS = {2: "16-bit", 4: "32-bit"}
"""The names of input types in tables and override files, by the bytes of one element."""
REGISTERS_PER_THREAD = 255
"""Registers that one thread can use, on every GPU that the kernels support (CUDA programming guide)."""


@dataclass(frozen=True)
class KernelId:
    """The identity of a kernel that has tiles of its own.

    If a family has no tiles for a length class, its kernel for `LengthClass.LONG` runs problems of that class too.
    """

    family: str
    operation: Operation
    length_class: LengthClass = LengthClass.LONG


@dataclass(frozen=True)
class TileConfig:
    """Tile and launch parameters of one kernel.

    One step of a kernel's loop computes `BLOCK_M` query rows with `BLOCK_N` keys, and the loads of `num_stages` steps
    are in flight. `tiles_together` tiles of one head come before the tiles of the next head; 0 leaves the order to
    `plan.grid`. A program computes the same tile for up to `heads_together` KV heads, one after the other.
    """

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


Tiles = dict[KernelId, dict[int, TileConfig]]
"""Entries of `HEAD_DIMS` by kernel."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Architecture:
    """A generation of GPUs: its limits, and the tiles chosen for it, by width of the input type.

    A target, such as "9.0", uses the architecture with the longest prefix of that target among its `targets`.
    """

    name: str
    targets: tuple[str, ...]
    measured_on: tuple[str, ...]  # targets on which its 16-bit entries were measured; all others fit a budget only
    shared_memory: int  # bytes that one thread block can have
    operands_from_registers: bool  # whether matrix instructions take 16-bit operands from registers
    sums_apart: bool  # whether dK and dV have separate launches above heuristics.SUMS_TOGETHER_HEAD_DIM
    tiles: dict[str, Tiles]

    def match(self, target: str) -> int:
        """Return the length of the longest of `targets` that `target` begins with, or -1 if there is none."""
        return max((len(prefix) for prefix in self.targets if target.startswith(prefix)), default=-1)

    def tiles_of(self, kernel: KernelId, head_dim: int, dtype: str) -> TileConfig | None:
        """Return the tiles of `kernel` for `head_dim`, or None if the table has no entry."""
        return self.tiles[width(dtype)].get(kernel, {}).get(entry_head_dim(head_dim))


def width(dtype: str) -> str:
    """Return the name that `dtype` has in tables."""
    return WIDTHS[DTYPE_BYTES[dtype]]


def entry_head_dim(head_dim: int) -> int:
    """Return the smallest of `HEAD_DIMS` that is at least `head_dim`."""
    return min(dim for dim in HEAD_DIMS if dim >= head_dim)


def up_to(*rows: tuple[int, ...]) -> dict[int, TileConfig]:
    """Return {head_dim: tiles} for the first of `HEAD_DIMS`; each row has the fields of one `TileConfig`."""
    return {head_dim: TileConfig(*row) for head_dim, row in zip(HEAD_DIMS, rows, strict=False)}


def block_d(head_dim: int) -> int:
    """Return the columns of a tile: `head_dim` rounded up to a power of two, at least 16."""
    return max(16, 1 << (head_dim - 1).bit_length())


def not_power_of_two(config: TileConfig, *blocks: str) -> str | None:
    """Return an error text if one of the `blocks` of `config` is not a power of two, otherwise None."""
    for block in blocks:
        if getattr(config, block).bit_count() > 1:
            return f"a power of two as {block}"
    return None
