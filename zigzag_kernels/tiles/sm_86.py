"""Tiles for compute capability 8.6, 8.9 and 12.x, with little shared memory; they fit it, and were not measured."""

from ..modes import Operation
from . import float32
from .config import Architecture, KernelId, up_to

SM_86 = Architecture(
    name="sm_86",
    targets=("8.6", "8.9", "12."),
    measured_on=(),
    shared_memory=99 * 1024,
    operands_from_registers=False,
    sums_apart=False,
    tiles={
        "16-bit": {
            KernelId("portable", Operation.FORWARD): up_to((128, 64, 4, 2), (128, 32, 8, 2), (64, 32, 8, 1)),
            KernelId("portable", Operation.DKDV): up_to((64, 64, 4, 1), (32, 64, 8, 1), (16, 32, 8, 1)),
            KernelId("portable", Operation.DQ): up_to((64, 64, 4, 1), (64, 32, 8, 1), (32, 32, 8, 1)),
        },
        "32-bit": float32.TILES,
    },
)
