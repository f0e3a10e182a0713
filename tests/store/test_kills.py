"""Processes that are killed, disks that are full, and calls that fail: no committed row is lost, none is there by half."""

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from leaveout.store import Store

from .stores import contents, expected, put, run

WORK = """
import sys
sys.path.insert(0, sys.argv[2])
from store import stores

def say(*words):
    print(*words, flush=True)

with stores.Store.open(sys.argv[1], write=True) as store:
    first = max([int(id.split(".")[0]) for id in store.ids()], default=0) + 1
    for n in range(first, 10**6):
        ids = [f"{n}.{k}" for k in range(5)]
        say("put", *ids)
        stores.put(store, *ids)
        say("done")
        if n % 3 == 0:
            gone = [f"{n}.1", f"{n - 1}.2"]
            say("delete", *gone)
            store.delete(gone)
            say("done")
        if n % 6 == 0:
            say("purge")
            store.purge()
            say("done")
        if n % 5 == 0:
            say("take")
            other = stores.Store.open(sys.argv[3])
            for part in other.segments():
                store.take(other, part)
            say("done")
"""


def follow(lines: list[str], live: set[str], taken: set[str]) -> tuple[set[str], set[str]]:
    """The ids that must be live, and those of the last step, of which nobody knows whether it was committed."""
    open_ids: set[str] = set()
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        name, *ids = line.split()
        changed = taken - live if name == "take" else set(ids)
        if following == "done":
            live = live - changed if name == "delete" else live | changed
        elif name != "done":
            open_ids = changed
    return live, open_ids


def kill_often(path: Path, other: Path, n_kills: int, seed: int) -> None:
    chance, taken = random.Random(seed), set(Store.open(other).ids())
    known: set[str] = set()
    command = [sys.executable, "-c", WORK, str(path), str(Path(__file__).parents[1]), str(other)]
    for _ in range(n_kills):
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            assert process.stdout and process.stderr
            lines = [process.stdout.readline().strip()]
            time.sleep(chance.expovariate(1 / 0.08))
            process.send_signal(signal.SIGKILL)
            lines += re.findall(r"(.*)\n", process.stdout.read())
            assert process.stderr.read() == ""
        must, unsure = follow([line for line in lines if line], known, taken)
        reader = Store.open(path)  # before anything is tidied up
        ids = set(reader.ids())
        assert must - unsure <= ids <= must | unsure
        with Store.open(path, write=True) as store:  # no stale lock
            found = contents(store)
            assert set(found) == ids and store.check() == [] and (store.state("purge") or {}).get("problem") is None
            assert all(row[1] == expected(id)[id][1] for id, row in found.items())
            by_put = Counter(id.split(".")[0] for id in ids & unsure - taken)
            assert set(by_put.values()) <= {5} or len(unsure) == 2  # a put is there with all of its rows
        assert not list(path.glob("*.tmp*"))
        known = ids


@pytest.fixture
def stores_to_kill(tmp_path: Path) -> tuple[Path, Path]:
    Store.create(tmp_path / "store", {}).close()
    with Store.create(tmp_path / "other", {}) as other:
        put(other, *(f"0.{n}" for n in range(40)))
        put(other, *(f"0.{n}" for n in range(40, 60)))
    return tmp_path / "store", tmp_path / "other"


def test_20_kills_lose_nothing(stores_to_kill: tuple[Path, Path]) -> None:
    kill_often(*stores_to_kill, n_kills=20, seed=1)


@pytest.mark.nightly
def test_200_kills_lose_nothing(stores_to_kill: tuple[Path, Path]) -> None:
    for seed in range(10):
        place = shutil.copytree(stores_to_kill[0], stores_to_kill[0].parent / f"store {seed}")
        kill_often(place, stores_to_kill[1], n_kills=20, seed=seed)


FULL_DISK = """
import resource, sys
sys.path.insert(0, sys.argv[2])
import numpy as np
from store import stores
store = stores.Store.open(sys.argv[1], write=True)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[4]), int(sys.argv[4])))
ids = [f"new {n}" for n in range(300)]
try:
    if sys.argv[3] == "put":
        store.put([stores.record(id) for id in ids], {"vector": np.ones((300, 16), np.float16)})
    elif sys.argv[3] == "delete":
        store.delete(store.ids())
    else:
        store.purge()
    print("done")
except OSError as error:
    print("OSError", error)
"""


@pytest.mark.parametrize("step", ["put", "delete", "purge"])
def test_full_disk_is_an_error_that_leaves_the_old_version(filled: Store, path: Path, step: str) -> None:
    put(filled, *(f"row {n}" for n in range(400)))
    filled.delete([f"row {n}" for n in range(0, 400, 3)])
    filled.close()
    before, messages = contents(filled), set()
    for limit in (0, 30_000, 90_000, 1_000_000):
        copy = shutil.copytree(path, path.parent / f"{step} {limit}")
        result = run(FULL_DISK, copy, Path(__file__).parents[1], step, limit)
        assert result.stdout, result.stderr
        messages.add(result.stdout.split()[0])
        after = contents(Store.open(copy))
        with Store.open(copy, write=True) as store:
            assert contents(store) == after and store.check() == [] and not list(copy.glob("*.tmp*"))
            if step == "purge" or result.stdout.startswith("OSError"):
                assert after == before
            elif step == "put":
                assert len(after) == len(before) + 300
            put(store, "works again")
    assert messages == {"OSError", "done"}


@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_failed_call_is_an_error_that_leaves_a_sound_store(
    filled: Store, path: Path, tmp_path: Path, name: str
) -> None:
    filled.close()
    with Store.create(tmp_path / "other", {"width": 16}) as other:
        put(other, "m", "n")
    theirs = Store.open(tmp_path / "other")
    steps = {
        "put": lambda store: store.has(["f"]) or put(store, "f"),
        "put_side": lambda store: store.put_side("whitening", {"mean": np.zeros(1)}),
        "delete": lambda store: store.delete(["a"]),
        "purge": lambda store: store.purge(),
        "take": lambda store: store.take(theirs, theirs.segments()[0]),
    }
    real, n_failed = getattr(os, name), 0
    for step, work in steps.items():
        for fails_at in range(1, 9):
            copy, calls = shutil.copytree(path, tmp_path / f"{step} {fails_at}"), iter(range(1, 100))

            def failing(*values: object, calls=calls, fails_at=fails_at) -> object:
                if next(calls) == fails_at:
                    raise OSError(5, "Input/output error")
                return real(*values)

            with Store.open(copy, write=True) as store, pytest.MonkeyPatch.context() as patch:
                patch.setattr(os, name, failing)
                try:
                    work(store)
                except OSError as error:
                    n_failed += 1
                    assert "Input/output error" in str(error)
            with Store.open(copy, write=True) as store:
                found = set(contents(store))
                assert store.check() == [] and not list(copy.glob("*.tmp"))
                assert {"c", "d", "e"} <= found and (found & {"m", "n"}) in (set(), {"m", "n"})
                work(store)
    assert n_failed >= 5


def test_writer_that_failed_says_so(filled: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "replace", lambda *paths: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        put(filled, "x")
    monkeypatch.undo()
    put(filled, "x")  # nothing was begun in the catalogue: the writer can go on
    assert filled.check() == []
