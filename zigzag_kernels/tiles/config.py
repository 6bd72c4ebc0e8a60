"""The types that tile tables are made of: `KernelId`, `TileConfig` and `Architecture`."""

from dataclasses import dataclass, fields

from ..checks import DTYPE_BYTES, MAX_BLOCK
from ..modes import LengthClass, Operation

HEAD_DIMS = (64, 128, 256)
"""An entry is used for every head_dim from above the previous entry up to its own."""
WIDTHS = {2: "16-bit", 4: "32-bit"}
"""Names of the widths of input types, in tables and override files, by bytes."""
REGISTERS_PER_THREAD = 255
"""Registers that one thread can have on every GPU that the kernels support (CUDA programming guide)."""


@dataclass(frozen=True)
class KernelId:
    """The identity of a kernel that has tiles of its own.

    `LengthClass.LONG` also serves the length classes for which its family has no kernel.
    """

    family: str
    operation: Operation
    length_class: LengthClass = LengthClass.LONG


@dataclass(frozen=True)
class TileConfig:
    """Tile and launch parameters of one kernel.

    A step covers `BLOCK_M` query rows and `BLOCK_N` keys, and `num_stages` steps are in flight. `tiles_together` tiles
    of one head run side by side before the tiles of the next head; 0 leaves the order to `plan.grid`. A program takes
    the same tile of up to `heads_together` KV heads, one after the other.
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

    It serves the targets that begin with one of `targets`, unless another architecture names more of their digits.
    """

    name: str
    targets: tuple[str, ...]
    measured_on: tuple[str, ...]  # targets on which its 16-bit entries were measured; others follow from budgets
    shared_memory: int  # bytes that one block can have
    operands_from_registers: bool  # whether matrix instructions take 16-bit operands from registers
    sums_apart: bool  # whether dK and dV are launched apart above heuristics.SUMS_TOGETHER_HEAD_DIM
    tiles: dict[str, Tiles]

    def match(self, target: str) -> int:
        """Return how many characters of `target` this architecture names, or -1 if it does not serve it."""
        return max((len(prefix) for prefix in self.targets if target.startswith(prefix)), default=-1)

    def tiles_of(self, kernel: KernelId, head_dim: int, dtype: str) -> TileConfig | None:
        """Return the entry that serves `head_dim`, or None if `kernel` has none."""
        return self.tiles[width(dtype)].get(kernel, {}).get(entry_head_dim(head_dim))


def width(dtype: str) -> str:
    """Return the name that `dtype` has in tables."""
    return WIDTHS[DTYPE_BYTES[dtype]]


def entry_head_dim(head_dim: int) -> int:
    """Return which of `HEAD_DIMS` serves `head_dim`."""
    return min(dim for dim in HEAD_DIMS if dim >= head_dim)


def up_to(*rows: tuple[int, ...]) -> dict[int, TileConfig]:
    """Return the entries of `HEAD_DIMS`, as far as there are rows, from the fields of their `TileConfig`."""
    return {head_dim: TileConfig(*row) for head_dim, row in zip(HEAD_DIMS, rows, strict=False)}


def block_d(head_dim: int) -> int:
    """Return `head_dim` rounded up to the power of two that tiles have."""
    return max(16, 1 << (head_dim - 1).bit_length())


def not_power_of_two(config: TileConfig, *blocks: str) -> str | None:
    """Return an error text if one of the `blocks` of `config` is not a power of two, otherwise None."""
    for block in blocks:
        if getattr(config, block).bit_count() > 1:
            return f"a power of two as {block}"
    return None
