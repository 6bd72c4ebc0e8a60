"""The speeds of a machine, and the time that transfers take at these speeds."""

import math
from dataclasses import dataclass

from ..checks import check_int, python_value


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The speeds of one GPU, in FLOP/s, bytes/s and seconds; the defaults are for H100s in nodes of eight.

    `forward_rate`, `backward_rate` and `dkdv_share` were measured on an H100 at head_dim 128 (README,
    docs/log/kernels.md), and `hbm` with a copy on the device. The other values are assumptions. `nvlink` and `network`
    are the share that collectives are expected to reach of 450 GB/s NVLink and 50 GB/s InfiniBand NDR. The latencies
    are the ones with which NCCL predicts the time of its own rings (src/graph/tuning.cc). Raises `ValueError` for a
    speed that is not positive, a negative latency, or a `dkdv_share` that is not from 0 to 1.
    """

    forward_rate: float = 513e12
    backward_rate: float = 385e12
    dkdv_share: float = 0.6  # share of the backward time: 4 products at 525 TFLOP/s, and 3 products of dQ at 597
    hbm: float = 3.0e12
    memory: float = 80e9  # bytes
    node: int = 8  # number of GPUs that NVLink connects
    nvlink: float = 330e9  # in one direction
    network: float = 45e9  # in one direction
    call_latency: float = 8.4e-6
    nvlink_latency: float = 3.4e-6  # for each hop
    network_latency: float = 14e-6  # for each hop

    def __post_init__(self):
        check_int("node", self.node, 1)
        for name in ("forward_rate", "backward_rate", "hbm", "memory", "nvlink", "network"):
            if not 0 < _number(name, getattr(self, name)) < math.inf:
                raise ValueError(f"{name}: expected a positive finite number, got {getattr(self, name)}")
        for name in ("call_latency", "nvlink_latency", "network_latency"):
            if not 0 <= _number(name, getattr(self, name)) < math.inf:
                raise ValueError(f"{name}: expected seconds, 0 or more, got {getattr(self, name)}")
        if not 0 <= _number("dkdv_share", self.dkdv_share) <= 1:
            raise ValueError(f"dkdv_share: expected a number from 0 to 1, got {self.dkdv_share}")

    def _nodes(self, world_size: int) -> int:
        if world_size > self.node and world_size % self.node:
            raise ValueError(f"world_size: expected whole nodes of {self.node} ranks, got {world_size}")
        return -(-world_size // self.node)

    def collective(self, world_size: int, share: float) -> float:
        """Return the seconds of an all-gather or reduce-scatter: every rank gets `share` bytes from every other rank.

        The model is rings through all ranks. All bytes pass the NVLink of each GPU. The bytes from other nodes also
        pass the network adapters of the node, spread evenly over all of them, and at the same time.
        """
        nodes = self._nodes(world_size)
        if world_size == 1:
            return 0.0
        hops = (world_size - nodes) * self.nvlink_latency + (nodes - 1) * self.network_latency
        wire = max((world_size - 1) * share / self.nvlink, (nodes - 1) * share / self.network)
        return self.call_latency + hops + wire

    def neighbours(self, world_size: int, size: float) -> float:
        """Return the seconds in which every rank sends `size` bytes to the previous rank and to the next rank.

        At the border of two nodes, one of the two messages passes a network adapter.
        """
        if world_size == 1:
            return 0.0
        if self._nodes(world_size) == 1:
            return self.call_latency + self.nvlink_latency + 2 * size / self.nvlink
        through_adapter = 2 * size if self.node == 1 else size
        wire = max(2 * size / self.nvlink, through_adapter / self.network)
        return self.call_latency + self.network_latency + wire

    def hop(self, world_size: int, size: float) -> float:
        """Return the seconds in which every rank passes `size` bytes to the next rank of a ring.

        The ring waits for its slowest link: between nodes, that is one network adapter.
        """
        if world_size == 1:
            return 0.0
        if self._nodes(world_size) == 1:
            return self.call_latency + self.nvlink_latency + size / self.nvlink
        return self.call_latency + self.network_latency + size / self.network


def _number(name: str, x) -> float:
    x = python_value(x)
    if isinstance(x, bool) or not isinstance(x, int | float):
        raise ValueError(f"{name}: expected a number, got {x!r}")
    return x
