"""The speeds that predictions rest on, and how long transfers take at them."""

import math
from dataclasses import dataclass

from ..checks import check_int, python_value


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Speeds, in SI units a GPU and direction; the defaults are an H100 cluster with nodes of eight.

    Measured on an H100 at head_dim 128 (README, docs/log/kernels.md): `forward_rate`, `backward_rate`, `dkdv_share`;
    `hbm` is a device copy. All else is assumed: of nominally 450 GB/s NVLink and 50 GB/s InfiniBand NDR, what
    collectives may be expected to reach; latencies by which NCCL (src/graph/tuning.cc) predicts its own rings. Raises
    `ValueError` unless speeds are positive, latencies not negative, and `dkdv_share` is a share.
    """

    forward_rate: float = 513e12
    backward_rate: float = 385e12
    dkdv_share: float = 0.6  # of the backward time: 4 products at 525 TFLOP/s, 3 of dQ at 597
    hbm: float = 3.0e12
    memory: float = 80e9
    node: int = 8  # ranks of the group that NVLink joins
    nvlink: float = 330e9
    network: float = 45e9
    call_latency: float = 8.4e-6
    nvlink_latency: float = 3.4e-6  # a hop
    network_latency: float = 14e-6

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
        """Return the seconds in which every rank gets `share` bytes of every other: an all-gather or reduce-scatter.

        Everything passes the NVLink of each GPU; what comes from other nodes is spread over the adapters of all GPUs of
        the node and passes each adapter once. Both go on at the same time, in rings through all ranks.
        """
        nodes = self._nodes(world_size)
        if world_size == 1:
            return 0.0
        hops = (world_size - nodes) * self.nvlink_latency + (nodes - 1) * self.network_latency
        wire = max((world_size - 1) * share / self.nvlink, (nodes - 1) * share / self.network)
        return self.call_latency + hops + wire

    def neighbours(self, world_size: int, size: float) -> float:
        """Return the seconds in which every rank sends `size` bytes to the rank before it and to the next one.

        At the border of two nodes one of both passes an adapter.
        """
        if world_size == 1:
            return 0.0
        if self._nodes(world_size) == 1:
            return self.call_latency + self.nvlink_latency + 2 * size / self.nvlink
        through_adapter = 2 * size if self.node == 1 else size
        wire = max(2 * size / self.nvlink, through_adapter / self.network)
        return self.call_latency + self.network_latency + wire

    def hop(self, world_size: int, size: float) -> float:
        """Return the seconds in which every rank passes `size` bytes on.

        The ring waits for its slowest link, one adapter.
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
