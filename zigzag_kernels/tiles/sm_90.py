"""Tiles for compute capability 9.0, and for 10.x, which has no table of its own.

The 16-bit entries were measured on H100 and H200 (docs/log/kernels.md and docs/log/hopper.md), never on 10.x.
"""

from ..modes import LengthClass, Operation
from . import float32
from .config import Architecture, KernelId, up_to

FORWARD, DKDV, DQ = Operation.FORWARD, Operation.DKDV, Operation.DQ
FEW_ROWS, SHORT = LengthClass.FEW_ROWS, LengthClass.SHORT

SM_90 = Architecture(
    name="sm_90",
    targets=("9.", "10."),
    measured_on=("9.0",),
    shared_memory=227 * 1024,
    operands_from_registers=True,
    sums_apart=True,
    tiles={
        "16-bit": {
            KernelId("portable", FORWARD): up_to((128, 64, 4, 3, 1), (128, 128, 8, 3), (128, 64, 8, 2)),
            KernelId("portable", DKDV): up_to((128, 64, 4, 2), (64, 128, 8, 2), (32, 128, 8, 3)),
            KernelId("portable", DQ): up_to((128, 64, 4, 3), (128, 64, 8, 3), (128, 32, 8, 3)),
            # In Hopper kernels each warpgroup has 64 rows, or 64 keys in dK/dV; num_warps counts one warpgroup's warps.
            KernelId("hopper", FORWARD): up_to((192, 128, 4, 3, 1), (128, 128, 4, 2), (128, 64, 4, 2)),
            KernelId("hopper", FORWARD, FEW_ROWS): up_to((256, 64, 4, 4, 1), (128, 128, 4, 2, 1, 2), (128, 64, 4, 2)),
            KernelId("hopper", FORWARD, SHORT): up_to((256, 64, 4, 4, 1), (128, 64, 4, 4, 0, 8), (128, 64, 4, 2)),
            KernelId("hopper", DKDV): up_to((64, 192, 4, 3), (64, 128, 4, 3), (64, 64, 4, 2)),
            KernelId("hopper", DKDV, SHORT): up_to((64, 192, 4, 3), (64, 128, 4, 3, 0, 4), (64, 64, 4, 2)),
            KernelId("hopper", Operation.FUSED_BACKWARD): up_to((128, 128, 4, 2), (64, 128, 4, 2)),
            KernelId("hopper", DQ): up_to((192, 64, 4, 4), (128, 128, 4, 2), (128, 64, 4, 3)),
            KernelId("hopper", DQ, FEW_ROWS): up_to((192, 64, 4, 4, 1, 4), (128, 128, 4, 2, 1), (128, 64, 4, 3, 1)),
            KernelId("hopper", DQ, SHORT): up_to((192, 64, 4, 4), (128, 64, 4, 4, 0, 8), (128, 64, 4, 3)),
        },
        "32-bit": float32.TILES,
    },
)
