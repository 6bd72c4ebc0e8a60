"""Names and times of launches, for torch's profiler, nsys and `profile_report`; nothing is recorded by default."""

import contextlib
import statistics
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable

import torch

from zigzag_kernels.checks import check_flag

_lock = threading.Lock()  # autograd runs the backward pass in other threads
_milliseconds: dict[str, list[float]] = defaultdict(list)
_pending: deque[tuple[str, torch.cuda.Event, torch.cuda.Event]] = deque()
_OFF = contextlib.nullcontext()
_wanted: Callable[[], bool] = bool  # False


def record_while(wanted: Callable[[], bool]) -> None:
    """Name and time the launches for which `wanted()` is true; every launch calls `wanted`."""
    global _wanted
    _wanted = wanted


def is_on() -> bool:
    """Return whether launches are recorded now."""
    return _wanted()


def region(name: str, device: torch.device) -> contextlib.AbstractContextManager:
    """Return the context for the launch of `name` on `device`; it does nothing unless launches are recorded."""
    return _recorded(name, device) if is_on() else _OFF


@contextlib.contextmanager
def _recorded(name: str, device: torch.device):
    label = f"zigzag::{name}"
    if device.type != "cuda":
        with torch.profiler.record_function(label):
            start = time.perf_counter()
            yield
            elapsed = (time.perf_counter() - start) * 1e3
        with _lock:
            _milliseconds[name].append(elapsed)
        return
    with torch.profiler.record_function(label), torch.cuda.nvtx.range(label):
        if torch.cuda.is_current_stream_capturing():  # events of a captured graph have no times
            yield
            return
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        yield
        end.record()
    with _lock:
        _pending.append((name, start, end))
        _collect()


def _collect() -> None:
    """Convert completed events to times, so that events do not accumulate."""
    while _pending and _pending[0][2].query():
        name, start, end = _pending.popleft()
        _milliseconds[name].append(start.elapsed_time(end))


def profile_report(reset: bool = False) -> None:
    """Print calls, total and median time of every kernel launched under ZIGZAG_PROFILE_KERNELS=1, in milliseconds.

    The host waits for the launches to end; `reset` clears the records afterwards. A time on a GPU is measured between
    two events around the launch. It includes the time in which an idle GPU waits for the host, and kernels that run
    side by side both count the time they share. Launches in a captured CUDA graph have names but no times.
    """
    reset = check_flag("reset", reset)
    with _lock:
        for _, _, end in _pending:
            end.synchronize()
        _collect()
        rows = sorted(_milliseconds.items(), key=lambda row: -sum(row[1]))
        width = max((len(name) for name in _milliseconds), default=6)
        print(f"{'kernel':<{width}} {'calls':>8} {'total ms':>12} {'median ms':>12}")
        for name, times in rows:
            print(f"{name:<{width}} {len(times):>8} {sum(times):>12.3f} {statistics.median(times):>12.3f}")
        if reset:
            _milliseconds.clear()
