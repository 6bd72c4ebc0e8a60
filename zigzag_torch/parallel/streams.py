"""The GPU streams on which parts of one pass run side by side; a CPU runs the parts in turn."""

import contextlib
import functools
from typing import Any, NamedTuple

import torch


class Streams(NamedTuple):
    """The caller's `current` stream and two side streams.

    Both side streams first wait for the caller's stream; when the pass ends, the caller's stream waits for both.

    Kernels run on `current` and `side`, so that the first programs of one kernel start while the last programs of
    another are running. `transfers` copies and sends with high priority: at equal priority a copy would wait until all
    programs of a large kernel have started. Collectives on `transfers` are synchronous calls, because asynchronous
    ones would run on a stream of their group.
    """

    current: Any
    side: Any
    transfers: Any


class _InTurn:
    """The stream of a CPU, where each operation is complete before the next one begins."""

    def wait_stream(self, stream) -> None:
        pass


def streams_of(device: torch.device) -> Streams:
    """Return the streams for a pass that is called on the current stream of `device`."""
    if device.type != "cuda":
        return Streams(_InTurn(), _InTurn(), _InTurn())
    current = torch.cuda.current_stream(device)
    return Streams(current, *_beside(current))


@functools.cache
def _beside(current: torch.cuda.Stream) -> tuple[torch.cuda.Stream, torch.cuda.Stream]:
    # Each current stream has its own pair, because a stream can be in only one captured graph at a time, and different
    # threads may use different current streams.
    return torch.cuda.Stream(current.device), torch.cuda.Stream(current.device, priority=-1)


def on(stream: Any) -> contextlib.AbstractContextManager:
    """Return a context in which `stream` is the current one of its device."""
    return torch.cuda.stream(stream) if isinstance(stream, torch.cuda.Stream) else contextlib.nullcontext()
