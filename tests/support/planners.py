"""A planner that remembers what it planned, for tests and benchmarks that ask which kernels ran."""

from zigzag_kernels.plan import Launch, Planned, Planner
from zigzag_kernels.tiles.config import KernelId


class RememberingPlanner(Planner):
    """Plans everything once, under the environment of its first call, and keeps it in `planned`."""

    def __init__(self):
        super().__init__(size=None)
        self.planned: list[Planned] = []

    def make(self, make, *arguments):
        made = super().make(make, *arguments)
        self.planned += [made] if isinstance(made, Planned) else made
        return made

    @property
    def launches(self) -> list[Launch]:
        """All launches planned so far."""
        return [launch for planned in self.planned for launch in planned.launches]

    @property
    def functions(self) -> set[str]:
        """Return the names of the attention kernels that were launched, without kernels that all families share."""
        kernels = [planned for planned in self.planned if planned.kernel]
        return {launch.kernel.fn.__name__ for planned in kernels for launch in planned.launches}

    @property
    def kernels(self) -> set[KernelId]:
        """The kernels that served so far."""
        return {planned.kernel for planned in self.planned if planned.kernel}
