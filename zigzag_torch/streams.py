"""The streams of a GPU on which the parts of one operator run side by side. On a CPU they run in turn."""

import contextlib
import functools
from typing import Any, NamedTuple

import torch


class Streams(NamedTuple):
    """The caller's `current` stream and two beside it. They begin by waiting for it, and it ends by waiting for them.

    Kernels are launched on `current` and `side`: while the last programs of one end, the first of another start.
    `transfers` copies and sends with high priority. Programs of equal priority start in the order in which their
    kernels could, so that a copy would wait until all those of a large kernel have started. Collectives on it are not
    asynchronous: those would move to a stream of their process group.
    """

    current: Any
    side: Any
    transfers: Any


class _InTurn:
    """A CPU's stream: what it was given is done when the next is given to any."""

    def wait_stream(self, stream) -> None:
        pass


def streams_of(device: torch.device) -> Streams:
    """Those of the stream that is current on `device`."""
    if device.type != "cuda":
        return Streams(_InTurn(), _InTurn(), _InTurn())
    current = torch.cuda.current_stream(device)
    return Streams(current, *_beside(current))


@functools.cache
def _beside(current: torch.cuda.Stream) -> tuple[torch.cuda.Stream, torch.cuda.Stream]:
    # Not one pair for a device: a stream is in one captured graph at a time, and threads have streams of their own.
    return torch.cuda.Stream(current.device), torch.cuda.Stream(current.device, priority=-1)


def on(stream: Any) -> contextlib.AbstractContextManager:
    """A context in which `stream` is the current one of its device."""
    return torch.cuda.stream(stream) if isinstance(stream, torch.cuda.Stream) else contextlib.nullcontext()
