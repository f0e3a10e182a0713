"""What is stopped, by whatever signal, stops its workers within two seconds, keeps what was committed, and can go on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from command import run_command
from endless import begin, told
from leaveout import TrainingRun
from leaveout.executor import run_tasks
from test_cli_deletion import write_recipe

pytestmark = pytest.mark.skipif(os.name != "posix", reason="sends signals")

PARENT = """
import sys
from leaveout.executor import run_tasks
from endless import begin, compute

if __name__ == "__main__":
    for result in run_tasks(range(4), compute, begin, 2):
        pass
"""


def facts_of(process):
    """State and parent of a process, None if there is none; from /proc where there is one, as `ps` may not be installed."""
    if Path("/proc/self/stat").exists():
        try:
            fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            return None
        return fields[0], int(fields[1])
    shown = subprocess.run(["ps", "-o", "stat=,ppid=", "-p", str(process)], check=False, capture_output=True, text=True)
    fields = shown.stdout.split()
    return (fields[0][0], int(fields[1])) if fields else None


def alive(process):
    """Whether a process runs; one that ended and that nobody asked after counts as ended."""
    facts = facts_of(process)
    return facts is not None and facts[0] != "Z"


# What a shell in the background, or `nohup`, has the tests ignore is not ignored by the processes that they start.
USUAL_SIGNALS = """
import os, signal, sys
for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
    signal.signal(number, signal.SIG_DFL)
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


def workers_of(parent):
    if Path("/proc/self/stat").exists():
        found = [(int(place.name), place / "cmdline") for place in Path("/proc").iterdir() if place.name.isdecimal()]
        found = [(number, said_by(place)) for number, place in found if (facts_of(number) or (0, 0))[1] == parent.pid]
    else:
        shown = subprocess.run(
            ["ps", "-A", "-ww", "-o", "pid=,ppid=,args="], check=True, capture_output=True, text=True
        )
        lines = [line.split(None, 2) for line in shown.stdout.splitlines()]
        found = [(int(pid), "".join(what)) for pid, of, *what in lines if int(of) == parent.pid]
    return [number for number, command in found if "spawn_main" in command]


def said_by(place):
    try:
        return place.read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):  # it ended meanwhile
        return ""


def started(command, place, **environment):
    paths = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen(
        [sys.executable, "-c", USUAL_SIGNALS, *map(str, command)], env=environment, cwd=place, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def eventually(true, seconds, what):
    until = time.monotonic() + seconds
    while not (found := true()):
        assert time.monotonic() < until, what
        time.sleep(0.02)
    return found


def ended_in_time(workers):
    eventually(lambda: not any(map(alive, workers)), 2.0, f"of {workers} some still compute")


@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM", "SIGHUP", "SIGINT"])
def test_workers_end_with_their_parent(name, tmp_path):
    place = tmp_path / "processes"
    place.mkdir()
    (tmp_path / "parent.py").write_text(PARENT)
    parent = started([tmp_path / "parent.py"], tmp_path, PLACE=str(place))
    workers = eventually(lambda: len(found := list(place.iterdir())) == 2 and found, 60, "two workers start")
    workers = [int(worker.name) for worker in workers]
    assert all(map(alive, workers))
    parent.send_signal(getattr(signal, name))
    parent.wait(timeout=10)
    ended_in_time(workers)
    parent.communicate()


def test_a_worker_that_starts_ends_with_its_parent_too(tmp_path):
    """Nothing of the task is there yet: the parent goes while its workers import."""
    (tmp_path / "parent.py").write_text(PARENT)
    parent = started([tmp_path / "parent.py"], tmp_path, PLACE=str(tmp_path))
    workers = eventually(lambda: len(found := workers_of(parent)) == 2 and found, 60, "two workers start")
    parent.send_signal(signal.SIGKILL)
    parent.communicate()
    ended_in_time(workers)


def test_results_that_are_closed_end_what_is_computed(tmp_path, monkeypatch):
    monkeypatch.setenv("PLACE", str(tmp_path))
    results = run_tasks(range(4), told, begin, 2)
    assert next(results) == 0
    eventually(lambda: list(tmp_path.iterdir()), 60, "a task is begun that nobody will ask for")
    began = time.monotonic()
    results.close()
    assert time.monotonic() - began < 2
    ended_in_time([int(worker.name) for worker in tmp_path.iterdir()])


NAP = """
import time
from leaveout.cli.program import app, main

@app.command()
def nap():
    print("napping", flush=True)
    time.sleep(60)

if __name__ == "__main__":
    main()
"""
SENTENCE = "leaveout: stopped; what was committed stays, and the same command resumes."


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGHUP", 129), ("SIGINT", 130)])
def test_a_signal_is_told_in_one_sentence_and_in_the_exit_code(name, code, tmp_path):
    process = started(["-c", NAP, "nap"], tmp_path)
    assert process.stdout is not None and process.stdout.readline() == "napping\n"
    process.send_signal(getattr(signal, name))
    _, said = process.communicate(timeout=60)
    assert (process.returncode, said.strip()) == (code, SENTENCE)


def test_a_command_that_ignores_a_closed_terminal_goes_on(tmp_path):
    process = started(["-c", "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)" + NAP, "nap"], tmp_path)
    assert process.stdout is not None and process.stdout.readline() == "napping\n"
    process.send_signal(signal.SIGHUP)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=0.5)
    process.kill()
    process.communicate()


def test_a_stopped_command_keeps_what_it_committed_and_goes_on(tmp_path, monkeypatch, capsys):
    recipe = write_recipe(tmp_path)
    recipe.write_text("kind: microgpt\ndata: names.txt\nsteps: 200\n")
    sets = len(np.unique(TrainingRun.train(recipe, tmp_path / "run").design("auto", 24), axis=0))
    command = ["measure", "run", "--retrain", "24", "--memory", "8MB", "--json"]
    process = started(["-m", "leaveout.cli", *command, "--workers", "2"], tmp_path)
    bank = tmp_path / "run" / "bank"
    eventually(lambda: list(bank.glob("*.safetensors")), 120, "something is committed")
    workers = workers_of(process)
    assert len(workers) == 2
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    ended_in_time(workers)
    assert process.returncode == 143
    assert "Traceback" not in said
    assert SENTENCE in said
    kept = len(TrainingRun.open(tmp_path / "run").bank)
    assert 0 < kept < sets
    monkeypatch.chdir(tmp_path)
    code, answer, said = run_command(monkeypatch, capsys, *command)
    assert code == 0, said
    assert json.loads(answer)["added"] == sets - kept
