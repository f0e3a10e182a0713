"""Tasks in worker processes give the same results, in order, and fail with a sentence."""

from __future__ import annotations

import os

import pytest

from leaveout.errors import FormatError, LeaveoutError
from leaveout.executor import run_tasks


def start():
    return 100


def add(state, task):
    return state + task


def add_and_tell(state, task):
    return state + task, os.getpid()


def die(state, task):
    os._exit(3)


def refuse(state, task):
    raise FormatError(f"task {task} is bad")


def test_one_worker_is_this_process():
    assert list(run_tasks(range(9), add_and_tell, start, 1)) == [(100 + task, os.getpid()) for task in range(9)]


def test_more_workers_are_other_processes_and_keep_the_order():
    results = list(run_tasks(range(9), add_and_tell, start, 2))
    assert [number for number, _ in results] == list(range(100, 109))
    assert os.getpid() not in {process for _, process in results}


def test_tasks_are_read_ahead_only_a_little():
    taken = []

    def tasks():
        for number in range(50):
            taken.append(number)
            yield number

    results = run_tasks(tasks(), add, start, 2)
    next(results)
    assert len(taken) <= 4
    results.close()


def test_an_error_of_a_task_comes_through_as_it_is():
    with pytest.raises(FormatError, match="task 0 is bad"):
        list(run_tasks(range(3), refuse, start, 2))


def test_a_dead_worker_is_told():
    with pytest.raises(LeaveoutError, match=r"worker process died .* run the same command again"):
        list(run_tasks(range(3), die, start, 2))


def test_no_workers_is_refused():
    with pytest.raises(ValueError, match="workers is 0: give 1 or more"):
        list(run_tasks([1], add, start, 0))
