"""One writer at a time, and a store at the old version or at the new one, whenever the writer dies."""

import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from leaveout.errors import MismatchError
from leaveout.store import Store, catalogue

from .stores import DIE_IN_COMMIT, SYNCHRONOUS, Killed, Steps, bytes_of, contents, put, run

OPEN_FOR_WRITING = """
import sys
from leaveout.store import Store
try:
    Store.open(sys.argv[1], write=True)
    print("got it")
except Exception as error:
    print(type(error).__name__, error)
"""


def test_second_writer_is_refused_at_once(filled: Store, path: Path) -> None:
    filled.purge()  # scans the directory, which must not drop the lock
    with pytest.raises(MismatchError, match="is being written by another writer; wait until"):
        Store.open(path, write=True)
    assert "MismatchError" in run(OPEN_FOR_WRITING, path).stdout
    filled.close()
    assert run(OPEN_FOR_WRITING, path).stdout == "got it\n"
    for store in (filled, Store.open(path)):
        with pytest.raises(ValueError, match="open for reading only"):
            put(store, "x")
    Store.open(path, write=True)  # dropped without close
    Store.open(path, write=True).close()


PUT_FOREVER = """
import sys
sys.path.insert(0, sys.argv[2])
from store import stores
store = stores.Store.create(sys.argv[1], {})
for n in range(10**6):
    stores.put(store, f"{n}.0", f"{n}.1", f"{n}.2")
    if n % 3 == 2:
        store.delete([f"{n - 1}.0"])
    print(n, flush=True)
"""


def test_killed_writer_loses_no_committed_row_and_leaves_no_lock(path: Path) -> None:
    command = [sys.executable, "-c", PUT_FOREVER, str(path), str(Path(__file__).parents[1])]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        done = [int(process.stdout.readline()) for _ in range(20)][-1]
        process.send_signal(signal.SIGKILL)
        done = max([done, *map(int, re.findall(r"(\d+)\n", process.stdout.read()))])
    contents(Store.open(path))
    with Store.open(path, write=True) as store:
        deleted = {f"{n - 1}.0" for n in range(2, done + 1, 3)}
        assert contents(store).keys() >= {f"{n}.{k}" for n in range(done + 1) for k in range(3)} - deleted
        assert store.n_rows % 3 == 0 and store.n_rows // 3 - done in (1, 2) and store.check() == []
        put(store, "new")


def test_reader_rolls_back_what_a_killed_writer_left(filled: Store, path: Path) -> None:
    filled.close()
    before = contents(filled)
    assert run(DIE_IN_COMMIT, path).returncode == -signal.SIGKILL
    assert (path / "catalogue.sqlite-journal").stat().st_size > 512
    reader = Store.open(path)
    assert contents(reader) == before and reader.info()["fields"] == ["source", "year"] and reader.check() == []


def test_put_is_on_disk_before_it_is_committed(filled: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    names = {os.stat(filled.path).st_ino: "directory"}
    monkeypatch.setattr(catalogue, "SYNCHRONOUS", SYNCHRONOUS)
    monkeypatch.setattr(os, "fsync", lambda fd: events.append(f"sync {names.get(os.fstat(fd).st_ino, 'file')}"))
    rename, commit = os.replace, catalogue.set_entry
    monkeypatch.setattr(os, "replace", lambda *paths: events.append("rename") or rename(*paths))

    def recorded(db: sqlite3.Connection, *values: object) -> None:
        events.append(f"commit at level {db.execute('PRAGMA synchronous').fetchone()[0]}")
        commit(db, *values)

    monkeypatch.setattr(catalogue, "set_entry", recorded)
    put(filled, "x")
    assert events[:3] == ["sync file", "rename", "sync directory"] and set(events[3:]) == {"commit at level 3"}


def test_failed_transaction_closes_the_writer(filled: Store, path: Path) -> None:
    def full(*values: object) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(catalogue, "set_entry", full)
        with pytest.raises(OSError, match=r"catalogue\.sqlite cannot be read or written \(database or disk is full\)"):
            put(filled, "x")
    with pytest.raises(ValueError, match="open for reading only"):
        put(filled, "y")
    with Store.open(path, write=True) as store:
        assert contents(store).keys() == {"a", "c", "d", "e"} and store.check() == []


WRITES: dict[str, Callable[[Store], object]] = {
    "put": lambda store: put(store, "f", "g", colour="red"),
    "put_side": lambda store: store.put_side("whitening", {"mean": np.zeros(1)}),
    "set_state": lambda store: store.set_state("cursor", 7),
    "delete": lambda store: store.delete(["a", "d"]),
    "purge": lambda store: store.purge(),
}


def state(store: Store) -> tuple[object, ...]:
    sides = {name: array.tolist() for name, array in (store.side("whitening") or {}).items()}
    return contents(store), sides, store.state("cursor"), store.n_rows, store.info()["fields"]


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("name", WRITES)
def test_crash_at_any_step_leaves_the_old_version_or_the_new(
    filled: Store, path: Path, tmp_path: Path, name: str, after: bool
) -> None:
    filled.close()
    shutil.copytree(path, tmp_path / "done")
    with Store.open(tmp_path / "done", write=True) as store:
        WRITES[name](store)
        outcomes = [state(filled), state(store)]
    reached = set()
    for die_at in range(1, 100):
        copy = shutil.copytree(path, tmp_path / str(die_at))
        with Store.open(copy, write=True) as store, pytest.MonkeyPatch.context() as patch:
            steps = Steps(patch, die_at, after)
            try:
                WRITES[name](store)
            except Killed:
                assert steps.seen >= die_at
        if steps.seen < die_at:
            break
        reached.add(outcomes.index(state(Store.open(copy))))
        with Store.open(copy, write=True) as store:
            assert store.check() == [] and not list(copy.glob("*.tmp")) and state(store) in outcomes
            if state(store) == outcomes[0]:
                WRITES[name](store)
            assert state(store) == outcomes[1]
            if name == "purge":
                assert b"the text of b" not in bytes_of(copy)
                proof = store.state("purge")
                assert (proof["rows"], proof["segments"], proof["problem"]) == (1, 1, None) and proof["files"] >= 1
    assert die_at > 2 and after in reached


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_crash_in_create_can_be_repeated(tmp_path: Path, after: bool) -> None:
    for die_at in range(1, 20):
        place = tmp_path / str(die_at)
        with pytest.MonkeyPatch.context() as patch:
            steps = Steps(patch, die_at, after)
            with suppress(Killed):
                Store.create(place, {"a": 1}).close()
        if steps.seen < die_at:
            break
        store = Store.open(place) if (place / "catalogue.sqlite").exists() else Store.create(place, {"a": 1})
        store.close()
        assert store.settings == {"a": 1} and store.check() == [] and not list(place.glob("*.tmp*"))
    assert die_at > 3
