"""Tiles for float32 inputs on every GPU, chosen to fit registers and shared memory, and not measured."""

from ..modes import Operation
from .config import KernelId, up_to

TILES = {
    KernelId("portable", Operation.FORWARD): up_to((64, 32, 4, 2), (32, 32, 4, 2), (32, 16, 4, 1)),
    KernelId("portable", Operation.DKDV): up_to((32, 32, 4, 1), (16, 32, 4, 1), (16, 16, 4, 1)),
    KernelId("portable", Operation.DQ): up_to((32, 32, 4, 1), (32, 16, 4, 1), (16, 16, 4, 1)),
}
