"""The planner, which makes the launches of each problem once and keeps them."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from ..launch import Launch
from ..tiles.config import KernelId

CACHED = 1024  # batches of changing size make new problems without end


class Planned(NamedTuple):
    """The launches of one operation, in the order in which they run."""

    kernel: KernelId | None  # None for a kernel that all families share
    launches: tuple[Launch, ...]


NOTHING = Planned(None, ())
"""An operation for which nothing is launched, as another does its work."""


class Planner:
    """A cache of plans, each made when its problem is first seen, under the environment of that moment.

    `plan(make, *arguments)` returns what `make(*arguments)` returned then: a `Planned`, or a tuple of several.
    `cache_clear()` forgets all plans.
    """

    def __init__(self, size: int | None = CACHED):
        self.plan = functools.lru_cache(maxsize=size)(self.make)
        self.cache_clear = self.plan.cache_clear

    def make(self, make: Callable[..., Any], *arguments) -> Any:
        """Return `make(*arguments)`; a subclass may take note of it."""
        return make(*arguments)


current = Planner()
"""The planner of all calls; `use_planner` replaces it."""


@contextlib.contextmanager
def use_planner(planner: Planner) -> Iterator[Planner]:
    """Let `planner` plan all calls within the block, also the calls of other threads."""
    global current
    before, current = current, planner
    try:
        yield planner
    finally:
        current = before
