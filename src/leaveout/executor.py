"""Tasks in worker processes, here or on a Ray cluster: ordered results, bounded memory, the numbers of one process.

A worker is set up once (`start` builds its state, a loaded model for example), runs one torch thread, and then turns
tasks into results. With one worker everything runs in this process, and torch's thread settings are left alone.
A worker that dies loses only the task it was at, which another one repeats. Processes of this machine end when the
results are closed, and within two seconds when their parent ends in whatever way.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any, Literal, Protocol, TypeVar, get_args

from leaveout.errors import LeaveoutError, choices, needs, require_whole

Task = TypeVar("Task")
Result = TypeVar("Result")
Backend = Literal["processes", "ray"]

REPEATS = 2  # of a task whose worker died
QUEUED = 2  # tasks of a worker: one that it works on and one that waits, so that it never idles


@dataclass(frozen=True)
class Crew:
    """Who does some work, which changes none of its numbers. Raises: as `run_tasks`, for what it cannot be.

    workers   processes, one torch thread each
    backend   where they run: `processes` of this machine, or actors of a `ray` cluster
    progress  a bar on stderr
    """

    workers: int = 1
    backend: Backend = "processes"
    progress: bool = False

    def __post_init__(self) -> None:
        require_whole("workers", self.workers, 1)
        if self.backend not in get_args(Backend):
            raise ValueError(f"backend is {self.backend!r}: {choices(self.backend, get_args(Backend))}.")
        if self.backend == "ray":
            needs("ray", "The backend ray", extra="ray")


def run_tasks(
    tasks: Iterable[Task],
    work: Callable[[Any, Task], Result],
    start: Callable[[], Any],
    workers: int = 1,
    backend: Backend = "processes",
    gpus: bool = False,
) -> Generator[Result, None, None]:
    """Results of `work(state, task)` in the order of the tasks; `state` is what `start()` gave in that process.

    `backend`: `processes` of this machine, or actors, one CPU each, of the Ray cluster that this process has joined or
    that RAY_ADDRESS names, else of a new one on this machine. Actors need the same packages and see the same files;
    `ray` takes one even for one worker. `gpus`: an actor asks for a GPU, too. A worker process finds its number, from 0, in
    the variable LEAVEOUT_WORKER (see `leaveout.models.find_device`).
    At most 2 * workers tasks are read ahead. Close the results (`contextlib.closing`) where an error may come between
    them: it stops the workers. In workers, `work` and `start` must be picklable.
    Raises: ValueError for workers < 1 or an unknown backend; UnsupportedError if ray is not installed; LeaveoutError
    naming the task (counted from 1) whose worker died three times.
    """
    Crew(workers, backend)
    if workers == 1 and backend == "processes":
        state = start()
        for task in tasks:
            yield work(state, task)
        return
    with _process_worker(start, work) if backend == "processes" else _ray_worker(start, work, gpus) as hire:
        crew = _Hired(hire, workers)
        try:
            yield from crew.results(tasks)
        finally:
            crew.stop()


@dataclass(eq=False)
class _Job:
    """A task that was read and whose result was not handed on yet."""

    number: int
    task: Any
    deaths: int = 0  # of workers that were at it
    result: Future[Any] = field(default_factory=Future[Any])
    done: bool = False  # set in one place only, as a future may change at any time


@dataclass(eq=False)
class _Member:
    """A worker and its jobs in order: it works on the first."""

    worker: _Worker
    number: int
    jobs: list[_Job] = field(default_factory=list[_Job])
    ready: bool = False

    @property
    def futures(self) -> list[Future[Any]]:
        """What it owes: results, or to be ready."""
        return [job.result for job in self.jobs] if self.ready else [self.worker.started]


class _Hired:
    """Workers that share out jobs; a dead one is replaced, and its jobs go to whoever is ready first."""

    def __init__(self, hire: Hire, workers: int) -> None:
        self.hire = hire
        self.members = [_Member(hire(number), number) for number in range(workers)]
        self.window = QUEUED * workers
        self.todo: deque[_Job] = deque()
        self.false_starts = 0  # workers in a row that died before they took a task

    def results(self, tasks: Iterable[Any]) -> Iterator[Any]:
        source, jobs = enumerate(tasks, start=1), deque[_Job]()
        more = True
        while more or jobs:
            while more and len(jobs) < self.window:
                number, task = next(source, (0, None))
                if more := number > 0:
                    jobs.append(_Job(number, task))
                    self.todo.append(jobs[-1])
            for member in self.members:
                self._settle(member)
            self._hand_out()
            if jobs and jobs[0].done:
                yield jobs.popleft().result.result()
            elif jobs:
                owed = [future for member in self.members for future in member.futures]
                wait(owed, return_when=FIRST_COMPLETED)

    def _settle(self, member: _Member) -> None:
        """Looks once at what a worker has done, and replaces it if it is dead."""
        done = {future for future in member.futures if future.done()}
        lost = {future for future in done if member.worker.lost(future)}
        for job in member.jobs:
            job.done = job.result in done - lost
        if any(job.done for job in member.jobs):
            self.false_starts = 0
        member.jobs = [job for job in member.jobs if not job.done]
        if lost:
            self._replace(member, lost.pop().exception())
        elif member.worker.started in done:
            member.worker.started.result()  # an error of `start` comes through as it is
            member.ready = True

    def _replace(self, member: _Member, death: BaseException | None) -> None:
        jobs = member.jobs
        if jobs:  # it worked on the first
            jobs[0].deaths += 1
        else:
            self.false_starts += 1
        if (jobs and jobs[0].deaths > REPEATS) or self.false_starts > REPEATS:
            what = f"at task {jobs[0].number}" if jobs else "while it started"
            raise LeaveoutError(
                f"A worker process died {what} {REPEATS + 1} times (out of memory, killed, or without a package): "
                "run the same command again to resume, with fewer --workers if memory was short."
            ) from death
        member.worker.stop()
        self.todo.extendleft(reversed(jobs))
        member.worker, member.jobs, member.ready = self.hire(member.number), [], False

    def _hand_out(self) -> None:
        """Gives the next jobs to those with the least to do."""
        while self.todo:
            free = (member for member in self.members if member.ready and len(member.jobs) < QUEUED)
            member = min(free, key=lambda member: len(member.jobs), default=None)
            if member is None:
                return
            job = self.todo.popleft()
            job.result = member.worker.submit(job.task)
            member.jobs.append(job)

    def stop(self) -> None:
        for member in self.members:
            member.worker.stop()


# --- one worker: a process of this machine, or an actor of a Ray cluster; the same few lines run in both ---


_STATE: dict[str, Any] = {}  # of this worker process: what to do, and what `start` built


class _Worker(Protocol):
    """Runs tasks one after the other in a process of its own."""

    started: Future[Any]

    def submit(self, task: Any) -> Future[Any]: ...
    def lost(self, result: Future[Any]) -> bool:
        """Whether a finished future says that the worker, not the task, failed."""
        ...

    def stop(self) -> None: ...


Hire = Callable[[int], _Worker]  # by the number of the worker


@contextmanager
def _process_worker(start: Callable[[], Any], work: Callable[[Any, Any], Any]) -> Generator[Hire, None, None]:
    """What makes a worker process of this machine."""
    yield lambda number: _Process(start, work, number)


@contextmanager
def _ray_worker(start: Callable[[], Any], work: Callable[[Any, Any], Any], gpus: bool) -> Generator[Hire, None, None]:
    """What makes an actor of the Ray cluster that this process or RAY_ADDRESS names, or of a new one on this machine.

    Ray's own search for a running cluster is not used: it waits two minutes for one that has gone.
    """
    ray = needs("ray", "The backend ray", extra="ray")
    connects = not ray.is_initialized()
    if connects:
        ray.init(os.environ.get("RAY_ADDRESS", "local"), logging_level=logging.WARNING, log_to_driver=False)
    try:
        yield lambda _: _Actor(ray, start, work, gpus)
    finally:
        if connects:
            ray.shutdown()


class _Lifeline:
    """A pipe that a parent holds open; the process that it is sent to ends when nobody holds it any more.

    The process watches from the moment it is unpickled on, before anything that comes after it is imported.
    """

    def __init__(self) -> None:
        self.reader, self.writer = multiprocessing.get_context("spawn").Pipe(duplex=False)

    def __reduce__(self) -> tuple[Any, ...]:
        return _watch, (self.reader, os.getpid())

    def cut(self) -> None:
        """Ends the process, whatever it is at."""
        self.writer.close()
        self.reader.close()


def _watch(line: Connection, parent: int) -> None:
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
    def __init__(self, start: Callable[[], Any], work: Callable[[Any, Any], Any], number: int) -> None:
        self.line = _Lifeline()
        self.given: list[Future[Any]] = []
        context = multiprocessing.get_context("spawn")
        self.pool = ProcessPoolExecutor(1, context, _set_up_tied, (self.line, start, work, number))
        self.started = self._kept(self.pool.submit(_check_start))

    def _kept(self, result: Future[Any]) -> Future[Any]:
        self.given = [other for other in self.given if not other.done()] + [result]
        return result

    def submit(self, task: Any) -> Future[Any]:
        try:
            return self._kept(self.pool.submit(_run_task, task))
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
    def __init__(self, ray: Any, start: Callable[[], Any], work: Callable[[Any, Any], Any], gpus: bool) -> None:
        self.ray = ray
        options = {"num_cpus": 1, "num_gpus": int(gpus), "max_restarts": 0, "scheduling_strategy": "SPREAD"}
        self.actor = ray.remote(_Remote).options(**options).remote(start, work)
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


class _Remote:
    """The worker on its own machine, as an actor class."""

    def __init__(self, start: Callable[[], Any], work: Callable[[Any, Any], Any]) -> None:
        _set_up(start, work)

    def check(self) -> None:
        _check_start()

    def run(self, task: Any) -> Any:
        return _run_task(task)


def _set_up_tied(line: Any, start: Callable[[], Any], work: Callable[[Any, Any], Any], number: int) -> None:
    """`_set_up` in a process that has watched its lifeline since it was unpickled, as the first of the arguments."""
    os.environ["LEAVEOUT_WORKER"] = str(number)
    _set_up(start, work)


def _set_up(start: Callable[[], Any], work: Callable[[Any, Any], Any]) -> None:
    """Prepares this process; an error of `start` is kept, so that the caller gets it as it is."""
    _one_thread()
    try:
        _STATE.update(work=work, state=start())
    except Exception as error:
        _STATE["error"] = error
    _one_thread()  # for a `start` that was the first to import torch


def _check_start() -> None:
    """Raises: the error of `start`, if it had one."""
    if "error" in _STATE:
        raise _STATE["error"]


def _run_task(task: Any) -> Any:
    """The result of one task."""
    return _STATE["work"](_STATE["state"], task)


def _one_thread() -> None:
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
