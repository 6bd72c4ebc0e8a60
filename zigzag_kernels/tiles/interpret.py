"""Tiles for Triton's interpreter: small, so that short tests fill several, and not square, to expose mixed-up axes."""

from ..modes import Backend, Operation
from .config import HEAD_DIMS, Architecture, KernelId, up_to

TILES = {
    KernelId("portable", operation): up_to(*[config] * len(HEAD_DIMS))
    for operation, config in {
        Operation.FORWARD: (32, 16, 1, 1, 2),
        Operation.DKDV: (16, 32, 1, 1),
        Operation.DQ: (32, 16, 1, 1),
    }.items()
}
INTERPRET = Architecture(
    name=Backend.INTERPRET,
    targets=(Backend.INTERPRET,),
    measured_on=(Backend.INTERPRET,),
    shared_memory=2**31 - 1,  # a CPU has no such limit
    operands_from_registers=True,
    sums_apart=True,  # as on sm_90, so that tests run the same launches
    tiles={"16-bit": TILES, "32-bit": TILES},
)
