"""Tasks in several processes: the tasks of a wave are prepared side by side, and then measured in turn."""

import contextlib
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from typing import Any


def in_waves(
    tasks: Sequence, processes: int, prepare: Callable, measure: Callable, initializer: Callable | None = None
) -> Iterator[tuple[Any, Any]]:
    """Yield (task, result of `measure(task)`, or the exception that it or `prepare(task)` raised) in order.

    Compiling takes most of the time and all cores can share it, but a measurement wants the GPU for itself. A wave has
    a task for each process; `measure` runs in the process in which `prepare` did, once all of the wave are prepared. A
    single process is this one, in which `initializer` is not called.
    """
    if processes == 1:
        for task in tasks:
            yield task, _result(lambda task=task: (prepare(task), measure(task))[1])
        return
    context = multiprocessing.get_context("spawn")
    with contextlib.ExitStack() as stack:

        def start():
            return stack.enter_context(ProcessPoolExecutor(1, context, initializer))

        pools = [start() for _ in range(processes)]
        for first in range(0, len(tasks), processes):
            wave = tasks[first : first + processes]
            prepared = [pool.submit(prepare, task) for pool, task in zip(pools, wave, strict=False)]
            wait(prepared)
            for i, (task, future) in enumerate(zip(wave, prepared, strict=True)):
                result = _result(lambda i=i, task=task, future=future: _measured(pools[i], measure, task, future))
                if isinstance(result, Exception):  # a process that ended, perhaps, serves no other task
                    pools[i] = start()
                yield task, result


def _measured(pool: ProcessPoolExecutor, measure: Callable, task, prepared):
    prepared.result()
    return pool.submit(measure, task).result()


def _result(call: Callable):
    try:
        return call()
    except Exception as error:  # of whatever library: one task of many
        return error
