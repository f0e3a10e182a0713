"""Tasks in worker processes give the same results, in order, survive a death, and fail with a sentence."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from leaveout.errors import FormatError, LeaveoutError, UnsupportedError
from leaveout.executor import run_tasks


def start():
    return 100


def bad_start():
    raise FormatError("the model is bad")


def dying_start():
    os._exit(3)


def add(state, task):
    return state + task


def add_and_tell(state, task):
    return state + task, os.getpid()


def die_at(number, place, times, state, task):
    """Ends the process at one task, so many times; `place` holds one file per death."""
    deaths = len(list(Path(place).iterdir()))
    if task == number and deaths < times:
        (Path(place) / str(deaths)).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return state + task, os.getpid()


def refuse(state, task):
    raise FormatError(f"task {task} is bad")


def test_one_worker_is_this_process():
    assert list(run_tasks(range(9), add_and_tell, start, 1)) == [(100 + task, os.getpid()) for task in range(9)]


def test_more_workers_are_other_processes_and_keep_the_order():
    results = list(run_tasks(range(9), add_and_tell, start, 2))
    assert [number for number, _ in results] == list(range(100, 109))
    assert os.getpid() not in {process for _, process in results}


def test_no_tasks_are_no_results():
    assert list(run_tasks([], add, start, 2)) == []


@pytest.mark.parametrize("workers", [2, 3])
def test_tasks_are_read_ahead_only_a_little(workers):
    taken, given = [], 0

    def tasks():
        for number in range(12):
            taken.append(number)
            yield number

    for _ in run_tasks(tasks(), add, start, workers):
        given += 1
        assert len(taken) - given < 2 * workers
    assert given == 12


def test_results_that_are_not_wanted_stop_the_workers():
    results = run_tasks(range(50), add, start, 2)
    assert next(results) == 100
    results.close()
    with pytest.raises(StopIteration):
        next(results)


def test_an_error_of_a_task_or_of_the_start_comes_through_as_it_is():
    with pytest.raises(FormatError, match="task 0 is bad"):
        list(run_tasks(range(3), refuse, start, 2))
    with pytest.raises(FormatError, match="the model is bad"):
        list(run_tasks(range(3), add, bad_start, 2))


@pytest.mark.parametrize("times", [1, 2])
def test_a_dead_worker_loses_only_its_task(times, tmp_path):
    results = list(run_tasks(range(9), functools.partial(die_at, 4, str(tmp_path), times), start, 2))
    assert [number for number, _ in results] == list(range(100, 109))
    assert len(list(tmp_path.iterdir())) == times
    assert len({process for _, process in results}) <= 2 + times


def test_a_task_that_kills_three_workers_is_named(tmp_path):
    work = functools.partial(die_at, 4, str(tmp_path), 99)
    results, sentence = [], r"worker process died at task 5 3 times .* run the same command again"
    with pytest.raises(LeaveoutError, match=sentence):
        results.extend(run_tasks(range(9), work, start, 2))
    assert len(list(tmp_path.iterdir())) == 3


def test_workers_that_die_at_their_start_are_told():
    with pytest.raises(LeaveoutError, match=r"worker process died while it started 3 times"):
        list(run_tasks(range(3), add, dying_start, 2))


def test_wrong_arguments_are_refused(monkeypatch):
    with pytest.raises(ValueError, match="workers is 0: give a whole number of at least 1"):
        list(run_tasks([1], add, start, 0))
    with pytest.raises(ValueError, match="backend is 'dask': give one of processes, ray"):
        list(run_tasks([1], add, start, 2, "dask"))  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UnsupportedError, match=r"needs the package ray: pip install 'leaveout\[ray\]'"):
        list(run_tasks([1], add, start, 2, "ray"))


CLUSTER = """
import functools, sys
import ray
from ray.cluster_utils import Cluster
from leaveout.errors import FormatError
from leaveout.executor import run_tasks
from test_executor import add_and_tell, bad_start, die_at, refuse, start, where_am_i

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
nodes = [cluster.add_node(num_cpus=1), cluster.add_node(num_cpus=1)]
ray.init(address=cluster.address, log_to_driver=False)

assert [n for n, _ in run_tasks(range(9), add_and_tell, start, 2, "ray")] == list(range(100, 109))
assert [n for n, _ in run_tasks(range(3), add_and_tell, start, 1, "ray")] == list(range(100, 103))
died = list(run_tasks(range(9), functools.partial(die_at, 4, sys.argv[1], 2), start, 2, "ray"))
assert [n for n, _ in died] == list(range(100, 109)), died
for work, begin, sentence in ((refuse, start, "task 0 is bad"), (add_and_tell, bad_start, "the model is bad")):
    try:
        list(run_tasks(range(3), work, begin, 2, "ray"))
    except FormatError as error:
        assert type(error) is FormatError and str(error) == sentence, error
    else:
        raise AssertionError(sentence)

results, alive = [], True  # a node goes while both are at work
for result in run_tasks(range(100), where_am_i, start, 2, "ray"):
    results.append(result)
    if alive and len({node for _, node in results}) == 2:
        cluster.remove_node(nodes[1], allow_graceful=False)
        alive = False
assert [n for n, _ in results] == list(range(100, 200)), results
assert not alive and len({node for _, node in results[-4:]}) == 1, results
print("fine")
"""


def where_am_i(state, task):
    import ray

    time.sleep(0.1)
    return state + task, ray.get_runtime_context().get_node_id()


@pytest.mark.ray
def test_ray_gives_the_same_and_survives_a_node(tmp_path):
    """Two nodes of one CPU each, in a process of their own because Ray leaves threads and files open."""
    pytest.importorskip("ray", reason="ray is not installed")
    command = [sys.executable, "-c", CLUSTER, str(tmp_path)]
    ended = subprocess.run(
        command,
        check=False,
        env={
            **os.environ,
            "RAY_AUTH_MODE": "disabled",
            "RAY_worker_niceness": "0",
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)]),
        },
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ended.returncode == 0 and "fine" in ended.stdout, ended.stdout + ended.stderr
