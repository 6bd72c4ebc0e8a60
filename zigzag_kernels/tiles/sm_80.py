"""Tiles for compute capability 8.0, and for GPUs without a table; they fit the limits, and were not measured."""

from ..modes import Operation
from . import float32
from .config import Architecture, KernelId, up_to

SM_80 = Architecture(
    name="sm_80",
    targets=("",),
    measured_on=(),
    shared_memory=163 * 1024,  # CUDA programming guide, technical specifications, as in the other tables
    operands_from_registers=False,
    sums_apart=False,
    tiles={
        "16-bit": {
            KernelId("portable", Operation.FORWARD): up_to((128, 64, 4, 3), (128, 64, 8, 3), (64, 32, 8, 2)),
            KernelId("portable", Operation.DKDV): up_to((64, 64, 4, 2), (64, 64, 8, 2), (32, 64, 8, 1)),
            KernelId("portable", Operation.DQ): up_to((64, 64, 4, 2), (64, 64, 8, 2), (64, 32, 8, 1)),
        },
        "32-bit": float32.TILES,
    },
)
