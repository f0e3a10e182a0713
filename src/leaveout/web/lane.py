"""Who works: one thread for all that needs a model, and one process at a time for retrainings.

The thread is one lane with a queue of limited length: answers come in the order of the questions, memory holds one of them,
and what only reads files does not wait for it. A question whose asker has gone is left out.
"""

from __future__ import annotations

import asyncio
import itertools
import multiprocessing
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

from leaveout.deletion.predict import Verification, meanings_told
from leaveout.deletion.run import TrainingRun
from leaveout.errors import LeaveoutError, MismatchError
from leaveout.training.queries import Query
from leaveout.web.workbench import predicted
from leaveout.words import retrained_told

Answer = TypeVar("Answer")

QUEUE = 200  # questions that may wait
JOBS = 4  # retrainings that may wait
KEPT = 50  # finished jobs that are remembered
TRIES = 5  # of a retraining, while somebody else writes the bank
EXPECTED = (LeaveoutError, ValueError, TypeError, OSError)
"""Errors whose message is for the one who asked."""


class Busy(LeaveoutError):
    """Too much waits already."""


class Lane:
    """One thread that answers questions in order."""

    def __init__(self, most: int = QUEUE) -> None:
        self._pool = ThreadPoolExecutor(1, "lane")
        self._most, self.waiting = most, 0

    async def run(self, work: Callable[..., Answer], *given: Any) -> Answer:
        """What the work gives, once its turn has come. Raises: Busy if too many wait."""
        if self.waiting >= self._most:
            raise Busy(f"{self.waiting} questions wait already: try again in a moment.")
        self.waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._pool, work, *given)
        finally:
            self.waiting -= 1

    def close(self) -> None:
        """Ends the thread once it has answered what it is at."""
        self._pool.shutdown(wait=False, cancel_futures=True)


@dataclass
class Job:
    """A check by retraining: the queries and sets of a what-if, and what became of it."""

    id: str
    queries: Sequence[Query]
    sets: list[list[str]]
    meaning: str | None = None  # of "without", as it was asked
    state: str = "waiting"  # waiting, running, done, failed, stopped
    done: int = 0
    lines: list[dict[str, Any]] = field(default_factory=list)
    problem: str | None = None
    began: float | None = None
    ended: float | None = None
    process: Any = None

    def facts(self) -> dict[str, Any]:
        """The job as plain JSON values; `done` of `total` sets are retrained."""
        until = self.ended or time.monotonic()
        return {
            "id": self.id, "state": self.state, "done": self.done, "total": len(self.sets),
            "seconds": None if self.began is None else round(until - self.began, 1),
            "queries": [query.name for query in self.queries], "sets": self.sets,
            "lines": self.lines, "outcome": retrained_told(self.lines) if self.lines else None,
            "means": " ".join(meanings_told(self.lines)), "problem": self.problem,
        }  # fmt: skip


class Jobs:
    """Retrainings in a process of their own, one after the other, so that questions are answered meanwhile."""

    def __init__(self, path: Path, device: str = "cpu") -> None:
        self._path, self._device = path, device
        self._jobs: dict[str, Job] = {}
        self._queue: deque[Job] = deque()
        self._changed = threading.Condition()
        self._numbers = itertools.count(1)
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="jobs", daemon=True)
        self._thread.start()

    def add(self, queries: Sequence[Query], sets: list[list[str]], meaning: str | None = None) -> Job:
        """A new job. Raises: Busy if too many wait."""
        with self._changed:
            if len(self._queue) >= JOBS:
                raise Busy(f"{len(self._queue)} retrainings wait already: stop one of them, or wait.")
            job = Job(str(next(self._numbers)), queries, sets, meaning)
            self._jobs[job.id] = job
            finished = [old for old in self._jobs.values() if old.ended is not None]
            for old in finished[: max(0, len(finished) - KEPT)]:
                del self._jobs[old.id]
            self._queue.append(job)
            self._changed.notify()
        return job

    def all(self) -> list[Job]:
        """The jobs that are remembered, the newest first."""
        with self._changed:
            return list(self._jobs.values())[::-1]

    def find(self, id: str) -> Job | None:
        """A job by its id; None if it is not remembered."""
        with self._changed:
            return self._jobs.get(id)

    def stop(self, job: Job) -> None:
        """Stops a job that is not finished; what it has retrained is kept in the run."""
        with self._changed:
            if job.ended is not None:
                return
            job.state, job.ended = "stopped", time.monotonic()
            if job in self._queue:
                self._queue.remove(job)
            if job.process is not None:
                job.process.terminate()

    def close(self) -> None:
        """Stops everything."""
        for job in self.all():
            self.stop(job)
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(10)

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._closed)
                if self._closed:
                    return
                job = self._queue.popleft()
                here, there = multiprocessing.get_context("spawn").Pipe(duplex=False)
                job.state, job.began = "running", time.monotonic()
                job.process = multiprocessing.get_context("spawn").Process(
                    target=_retrain,
                    args=(there, self._path, job.queries, job.sets, job.meaning, self._device),
                    daemon=True,
                )
                job.process.start()
                there.close()
            self._follow(job, here)

    def _follow(self, job: Job, here: Connection) -> None:
        """Takes in what the process of a job tells, until it ends."""
        while job.ended is None:
            told: Any
            try:
                kind, told = here.recv()
            except (EOFError, OSError):
                kind, told = "failed", "The process that retrained has died: is there enough memory?"
            with self._changed:
                if job.ended is not None:
                    break
                if kind == "set":
                    job.done += 1
                    job.lines += told
                    continue
                job.state, job.ended = kind, time.monotonic()
                job.problem = told
        here.close()
        job.process.join()


def _retrain(
    there: Connection, path: Path, queries: Sequence[Query], sets: list[list[str]], meaning: str | None, device: str
) -> None:
    """Retrains a run without each set and tells what came out, in a process of its own."""
    import torch

    torch.set_num_threads(1)
    try:
        run = TrainingRun.open(path, device=device)
        for one in sets:
            there.send(("set", [*map(predicted, _verified(run, queries, one, meaning).lines())]))
        there.send(("done", None))
    except EXPECTED as error:
        there.send(("failed", " ".join(str(error).split())))


def _verified(run: TrainingRun, queries: Sequence[Query], one: list[str], meaning: str | None) -> Verification:
    """Retrains without a set; while somebody else writes the bank, such as a prediction of the page, it waits."""
    for _ in range(TRIES - 1):
        try:
            return run.verify(queries, [one], meaning=meaning)
        except MismatchError:
            time.sleep(1)
    return run.verify(queries, [one], meaning=meaning)
