"""Tasks in worker processes, here or on a Ray cluster: ordered results, bounded memory, the numbers of one process.

A worker is set up once (`start` builds its state, a loaded model for example), runs one torch thread, and then turns
tasks into results. With one worker everything runs in this process, and torch's thread settings are left alone.
A worker that dies loses only the task it was at, which another one repeats. Processes of this machine end when the
results are closed, and within two seconds when their parent ends in whatever way.
"""

from __future__ import annotations

import importlib.util
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, get_args

from leaveout.errors import LeaveoutError, UnsupportedError, choices, require_whole
from leaveout.executor.workers import Worker, process_worker, ray_worker

__all__ = ["Backend", "refuse_crew", "run_tasks"]

Task = TypeVar("Task")
Result = TypeVar("Result")
Backend = Literal["processes", "ray"]

REPEATS = 2  # of a task whose worker died
QUEUED = 2  # tasks of a worker: one that it works on and one that waits, so that it never idles


def run_tasks(
    tasks: Iterable[Task],
    work: Callable[[Any, Task], Result],
    start: Callable[[], Any],
    workers: int = 1,
    backend: Backend = "processes",
) -> Generator[Result, None, None]:
    """Results of `work(state, task)` in the order of the tasks; `state` is what `start()` gave in that process.

    `backend`: `processes` of this machine, or actors, one CPU each, of the Ray cluster that this process has joined or
    that RAY_ADDRESS names, else of a new one on this machine. Actors need the same packages and see the same files;
    `ray` takes one even for one worker.
    At most 2 * workers tasks are read ahead. Close the results (`contextlib.closing`) where an error may come between
    them: it stops the workers. In workers, `work` and `start` must be picklable.
    Raises: ValueError for workers < 1 or an unknown backend; UnsupportedError if ray is not installed; LeaveoutError
    naming the task (counted from 1) whose worker died three times.
    """
    refuse_crew(workers, backend)
    if workers == 1 and backend == "processes":
        state = start()
        for task in tasks:
            yield work(state, task)
        return
    with (process_worker if backend == "processes" else ray_worker)(start, work) as hire:
        crew = _Crew(hire, workers)
        try:
            yield from crew.results(tasks)
        finally:
            crew.stop()


def refuse_crew(workers: int, backend: str) -> None:
    """Raises: ValueError for workers < 1 or an unknown backend."""
    require_whole("workers", workers, 1)
    if backend not in get_args(Backend):
        raise ValueError(f"backend is {backend!r}: {choices(backend, get_args(Backend))}.")
    if backend == "ray" and importlib.util.find_spec("ray") is None:
        raise UnsupportedError("the backend ray needs the package ray: pip install 'leaveout[ray]'")


@dataclass(eq=False)
class _Job:
    """A task that was read and whose result was not handed on yet."""

    number: int
    task: Any
    deaths: int = 0  # of workers that were at it
    result: Future[Any] = field(default_factory=Future)
    done: bool = False  # set in one place only, as a future may change at any time


@dataclass(eq=False)
class _Member:
    """A worker and its jobs in order: it works on the first."""

    worker: Worker
    jobs: list[_Job] = field(default_factory=list)
    ready: bool = False

    @property
    def futures(self) -> list[Future[Any]]:
        """What it owes: results, or to be ready."""
        return [job.result for job in self.jobs] if self.ready else [self.worker.started]


class _Crew:
    """Workers that share out jobs; a dead one is replaced, and its jobs go to whoever is ready first."""

    def __init__(self, hire: Callable[[], Worker], workers: int) -> None:
        self.hire = hire
        self.members = [_Member(hire()) for _ in range(workers)]
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
        member.worker, member.jobs, member.ready = self.hire(), [], False

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
