"""The planner, which makes the launches of each problem once and caches them."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from ..launch import Launch
from ..tiles.config import KernelId

CACHED = 1024  # plans; the cache needs a limit, because batches of changing sizes make ever new problems


class Planned(NamedTuple):
    """The launches of one operation, in the order in which they run."""

    kernel: KernelId | None  # None for a kernel that all families share
    launches: tuple[Launch, ...]


NOTHING = Planned(None, ())
"""The launches of an operation whose work another operation does: none."""


class Planner:
    """A cache of plans; environment variables are read when a problem is first seen.

    `plan(make, *arguments)` calls `make(*arguments)` once, and returns its result: a `Planned`, or several of them.
    `cache_clear()` forgets all plans.
    """

    def __init__(self, size: int | None = CACHED):
        self.plan = functools.lru_cache(maxsize=size)(self.make)
        self.cache_clear = self.plan.cache_clear

    def make(self, make: Callable[..., Any], *arguments) -> Any:
        """Return `make(*arguments)`; a subclass may override this method to record the plans that are made."""
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
