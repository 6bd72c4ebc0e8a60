"""The streams of a GPU on which parts of one pass run side by side. On a CPU they run in turn."""

import contextlib
import functools
from typing import Any, NamedTuple

import torch


class Streams(NamedTuple):
    """The caller's `current` stream and two side streams.

    Both side streams first wait for the caller's stream; when the pass ends, the caller's stream waits for both.

    Kernels are launched on `current` and `side`, so that the first programs of one start while the last of another end.
    `transfers` copies and sends with high priority: at equal priority a copy would wait until all programs of a large
    kernel have started. Collectives on it are synchronous, as asynchronous ones move to a stream of their group.
    """

    current: Any
    side: Any
    transfers: Any


class _InTurn:
    """A stream of a CPU, where each operation is complete before the next is given to any stream."""

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
    # Not one pair for each device: a stream is in one captured graph at a time, and threads have their own streams.
    return torch.cuda.Stream(current.device), torch.cuda.Stream(current.device, priority=-1)


def on(stream: Any) -> contextlib.AbstractContextManager:
    """Return a context in which `stream` is the current one of its device."""
    return torch.cuda.stream(stream) if isinstance(stream, torch.cuda.Stream) else contextlib.nullcontext()
