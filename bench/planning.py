"""Launches planned under settings of the environment, those of several settings side by side in one process."""

import contextlib
import functools
import os
from unittest import mock

from zigzag_kernels import hopper, plan


class Planning(contextlib.ExitStack):
    """Within it the variables of `environment` are set, and launches are those planned under them.

    The plan of a problem is made once, when it is first seen, and kept; this keeps plans of its own, so that entering
    and leaving costs no planning, and a timed call finds its launches as one in training does.
    """

    def __init__(self, **environment: str):
        super().__init__()
        self.environment = environment
        self.launches: list[plan.Launch] = []
        makers = {name: x for name, x in vars(plan).items() if "_launch" in name and hasattr(x, "cache_info")}
        self._makers = {name: self._remembering(x.__wrapped__) for name, x in makers.items()}

    def _remembering(self, maker):
        @functools.cache
        def make(*arguments):
            made = maker(*arguments)
            self.launches += made if isinstance(made, tuple) else (made,)
            return made

        return make

    def __enter__(self):
        for name, value in self.environment.items():  # no more than these: other threads read the environment too
            self.callback(_restore, name, os.environ.get(name))
            os.environ[name] = value
        self.enter_context(mock.patch.multiple(plan, **self._makers))
        return self

    @property
    def takes_hopper_kernels(self) -> bool:
        """Whether any launch planned so far is of a kernel written for Hopper."""
        return any(launch.kernel.fn.__module__.startswith(hopper.__name__) for launch in self.launches)


def _restore(name: str, value: str | None) -> None:
    if value is None:
        del os.environ[name]
    else:
        os.environ[name] = value
