"""One worker: a process of this machine, or an actor on a Ray cluster; the same few lines run in both.

A process ends as soon as its `Lifeline` is cut: by its parent, or by the parent's death, however that came.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any, Protocol

from leaveout.errors import UnsupportedError

_STATE: dict[str, Any] = {}  # of this worker process: what to do, and what `start` built


class Worker(Protocol):
    """Runs tasks one after the other in a process of its own."""

    started: Future[Any]

    def submit(self, task: Any) -> Future[Any]: ...
    def lost(self, result: Future[Any]) -> bool:
        """Whether a finished future says that the worker, not the task, failed."""
        ...

    def stop(self) -> None: ...


Hire = Callable[[], Worker]


@contextmanager
def process_worker(start: Callable[[], Any], work: Callable[[Any, Any], Any]) -> Iterator[Hire]:
    """What makes a worker process of this machine."""
    yield lambda: _Process(start, work)


@contextmanager
def ray_worker(start: Callable[[], Any], work: Callable[[Any, Any], Any]) -> Iterator[Hire]:
    """What makes an actor of the Ray cluster that this process or RAY_ADDRESS names, or of a new one on this machine.

    Ray's own search for a running cluster is not used: it waits two minutes for one that has gone.

    Raises: UnsupportedError if ray is not installed.
    """
    try:
        import ray  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UnsupportedError("the backend ray needs the package ray: pip install 'leaveout[ray]'") from error
    connects = not ray.is_initialized()
    if connects:
        ray.init(os.environ.get("RAY_ADDRESS", "local"), logging_level=logging.WARNING, log_to_driver=False)
    try:
        yield lambda: _Actor(ray, start, work)
    finally:
        if connects:
            ray.shutdown()


class Lifeline:
    """A pipe that a parent holds open; the process that it is sent to ends when nobody holds it any more.

    The process watches from the moment it is unpickled on, before anything that comes after it is imported.
    """

    def __init__(self) -> None:
        self.reader, self.writer = multiprocessing.get_context("spawn").Pipe(duplex=False)

    def __reduce__(self) -> tuple[Any, ...]:
        return watch, (self.reader, os.getpid())

    def cut(self) -> None:
        """Ends the process, whatever it is at."""
        self.writer.close()
        self.reader.close()


def watch(line: Connection, parent: int) -> None:
    """Ends this process when the line is cut or the parent is gone (the line may live on in other children of it)."""

    def wait() -> None:
        while not line.poll(LOOKS) and os.getppid() == parent:
            pass
        os._exit(1)  # nothing is to be tidied: results are handed over whole, or not at all

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes of a terminal: the parent decides
    threading.Thread(target=wait, daemon=True, name="lifeline").start()


LOOKS = 0.5
"""Seconds between two looks at who the parent is; a cut line is seen at once."""


class _Process:
    def __init__(self, start: Callable[[], Any], work: Callable[[Any, Any], Any]) -> None:
        self.line, self.given = Lifeline(), []
        context = multiprocessing.get_context("spawn")
        self.pool = ProcessPoolExecutor(1, context, _set_up_tied, (self.line, start, work))
        self.started = self._kept(self.pool.submit(check))

    def _kept(self, result: Future[Any]) -> Future[Any]:
        self.given = [other for other in self.given if not other.done()] + [result]
        return result

    def submit(self, task: Any) -> Future[Any]:
        try:
            return self._kept(self.pool.submit(run, task))
        except BrokenProcessPool as error:  # it died just now
            result: Future[Any] = Future()
            result.set_exception(error)
            return result

    def lost(self, result: Future[Any]) -> bool:
        return isinstance(result.exception(), BrokenProcessPool)

    def stop(self) -> None:
        """Ends the process: at once if it is still at something that nobody waits for any more."""
        if not all(result.done() for result in self.given):
            self.line.cut()
        self.pool.shutdown(cancel_futures=True)
        self.line.cut()


class _Actor:
    def __init__(self, ray: Any, start: Callable[[], Any], work: Callable[[Any, Any], Any]) -> None:
        self.ray = ray
        options = {"num_cpus": 1, "max_restarts": 0, "scheduling_strategy": "SPREAD"}
        self.actor = ray.remote(Remote).options(**options).remote(start, work)
        self.started = self._plain(self.actor.check.remote())

    def submit(self, task: Any) -> Future[Any]:
        return self._plain(self.actor.run.remote(task))

    def _plain(self, reference: Any) -> Future[Any]:
        """The result of a call, or its own error without Ray's wrapping."""
        result: Future[Any] = Future()

        def hand_on(found: Future[Any]) -> None:
            error: Any = found.exception()
            if error is None:
                result.set_result(found.result())
            else:
                result.set_exception(error.cause if isinstance(error, self.ray.exceptions.RayTaskError) else error)

        reference.future().add_done_callback(hand_on)
        return result

    def lost(self, result: Future[Any]) -> bool:
        lost = (
            self.ray.exceptions.RayActorError,
            self.ray.exceptions.ObjectLostError,
            self.ray.exceptions.WorkerCrashedError,
        )
        return isinstance(result.exception(), lost)

    def stop(self) -> None:
        self.ray.kill(self.actor)


class Remote:
    """The worker on its own machine, as an actor class."""

    def __init__(self, start: Callable[[], Any], work: Callable[[Any, Any], Any]) -> None:
        set_up(start, work)

    def check(self) -> None:
        check()

    def run(self, task: Any) -> Any:
        return run(task)


def _set_up_tied(line: Any, start: Callable[[], Any], work: Callable[[Any, Any], Any]) -> None:
    """`set_up` in a process that has watched its lifeline since it was unpickled, as the first of the arguments."""
    set_up(start, work)


def set_up(start: Callable[[], Any], work: Callable[[Any, Any], Any]) -> None:
    """Prepares this process; an error of `start` is kept, so that the caller gets it as it is."""
    _one_thread()
    try:
        _STATE.update(work=work, state=start())
    except Exception as error:
        _STATE["error"] = error
    _one_thread()  # for a `start` that was the first to import torch


def check() -> None:
    """Raises: the error of `start`, if it had one."""
    if "error" in _STATE:
        raise _STATE["error"]


def run(task: Any) -> Any:
    """The result of one task."""
    return _STATE["work"](_STATE["state"], task)


def _one_thread() -> None:
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
