"""Tasks in worker processes: ordered results, bounded memory, the same numbers as in one process.

A worker is set up once (`start` builds its state, a loaded model for example), runs one torch thread, and then turns
tasks into results. With one worker everything runs in this process, and torch's thread settings are left alone.
"""

from __future__ import annotations

import multiprocessing
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from leaveout.errors import LeaveoutError

Task = TypeVar("Task")
Result = TypeVar("Result")

_WORKER: dict[str, Any] = {}  # what `start` built, in a worker process


def run_tasks(
    tasks: Iterable[Task], work: Callable[[Any, Task], Result], start: Callable[[], Any], workers: int = 1
) -> Iterator[Result]:
    """Results of `work(state, task)` in the order of the tasks; `state` is what `start()` gave in that process.

    At most 2 * workers tasks are read ahead. With several workers, `work` and `start` must be picklable.
    Raises: ValueError for workers < 1; LeaveoutError if a worker process dies.
    """
    if workers < 1:
        raise ValueError(f"workers is {workers}: give 1 or more.")
    if workers == 1:
        state = start()
        for task in tasks:
            yield work(state, task)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _set_up, (start,)) as pool:
        waiting: deque[Future[Result]] = deque()
        try:
            for task in tasks:
                waiting.append(pool.submit(_run, work, task))
                if len(waiting) >= 2 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool as error:
            raise LeaveoutError(
                "A worker process died (out of memory, or killed): run the same command again to resume, "
                "with fewer --workers if memory was short."
            ) from error
        finally:
            for future in waiting:
                future.cancel()


def _set_up(start: Callable[[], Any]) -> None:
    _one_thread()
    _WORKER["state"] = start()
    _one_thread()  # for a `start` that was the first to import torch


def _one_thread() -> None:
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


def _run(work: Callable[[Any, Task], Result], task: Task) -> Result:
    return work(_WORKER["state"], task)
