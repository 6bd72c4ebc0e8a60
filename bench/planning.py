"""Launches that are planned with different environment variables, side by side in one process."""

import contextlib
import os

from tests.support.planners import RememberingPlanner
from zigzag_kernels import plan


class Planning(contextlib.ExitStack):
    """A context in which the variables of `environment` are set, with the launches that are planned under them.

    Each context has its own planner. So entering it again needs no planning, and a timed call finds its launches in the
    cache, as in training.
    """

    def __init__(self, **environment: str):
        super().__init__()
        self.environment = environment
        self.planner = RememberingPlanner()

    def __enter__(self):
        for name, value in self.environment.items():  # no more than these: other threads read the environment too
            self.callback(_restore, name, os.environ.get(name))
            os.environ[name] = value
        self.enter_context(plan.use_planner(self.planner))
        return self

    @property
    def takes_hopper_kernels(self) -> bool:
        """Return whether a kernel for Hopper has been planned so far."""
        return any(kernel.family == "hopper" for kernel in self.planner.kernels)


def _restore(name: str, value: str | None) -> None:
    if value is None:
        del os.environ[name]
    else:
        os.environ[name] = value
