"""Small stores, ways to look at all that they hold, and ways to damage them."""

import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from leaveout.store import Record, Store, catalogue, segment

SYNCHRONOUS = catalogue.SYNCHRONOUS
SUPER_JOURNAL = bytes.fromhex("d9d505f920a163d7")
DTYPES = [dtype.name for dtype in segment.DTYPES.values()]


def record(id: str, text: str | None = None, /, **meta: object) -> Record:
    return Record(id, text or f"the text of {id}", f"unit of {id}", meta, f"hash of {id}", {"spans": [[0, len(id)]]})


def vectors(ids: list[str], width: int = 16) -> dict[str, np.ndarray]:
    """Arrays that depend on nothing but the ids."""
    rows = [np.random.default_rng(list(id.encode())).standard_normal(width).astype(np.float16) for id in ids]
    return {"vector": np.array(rows), "length": np.array([len(id) for id in ids], np.int32)}


def put(store: Store, *ids: str, **meta: object) -> None:
    store.put([record(id, **meta) for id in ids], vectors(list(ids)))


def contents(store: Store) -> dict[str, tuple[Record, bytes]]:
    """Id -> record and vector of every live row, by way of the segments."""
    found = {}
    for part in store.segments():
        arrays, live = part.arrays(), part.live()
        positions = np.flatnonzero(np.ones(part.n_rows, bool) if live is None else live)
        for position, row in zip(positions, store.rows(part.first + positions), strict=True):
            found[row.id] = row, arrays["vector"][position].tobytes()
    assert store.ids() == list(found) == [row.id for row in store.iter_rows()] and len(store) == len(found)
    return found


def expected(*ids: str) -> dict[str, tuple[Record, bytes]]:
    return {id: (record(id), vectors([id])["vector"][0].tobytes()) for id in ids}


def bytes_of(path: Path) -> bytes:
    """All bytes of all files below a directory, with a mark between them."""
    return b"\0END\0".join(file.read_bytes() for file in sorted(path.rglob("*")) if file.name != catalogue.LOCK)


def edit(path: Path, statement: str, *values: object) -> None:
    """Changes the catalogue behind the store's back."""
    with closing(sqlite3.connect(path / catalogue.CATALOGUE, isolation_level=None)) as db:
        db.execute(statement, values)
        catalogue._seal(db)


def sql(statement: str) -> Callable[[Path], None]:
    return lambda path: edit(path, statement)


def described(column: str, value: object) -> Callable[[Path], None]:
    """Says something else about the first segment."""
    return lambda path: edit(path, f"UPDATE segments SET {column} = ? WHERE segment = 1", value)


def entry(key: str, text: str) -> Callable[[Path], None]:
    """Sets an entry of the table `store`, with the right checksum."""
    return lambda path: edit(
        path, "INSERT OR REPLACE INTO store VALUES (?, ?, ?)", key, text, catalogue.checksum(key, text)
    )


def overwritten(at: int, data: bytes) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        with open(path / "catalogue.sqlite", "r+b") as file:
            file.seek(at)
            file.write(data)

    return change


def flip(file: Path, at: int) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


def run(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


DIE_IN_COMMIT = """
import os, signal, sys
from leaveout.store import catalogue
from leaveout.store import Store
store = Store.open(sys.argv[1], write=True)
with catalogue.writing(store.path) as db:
    db.execute("PRAGMA cache_size = 1")  # pages reach the disk before the commit
    db.executemany("INSERT INTO fields (name) VALUES (?)", ((f"{n:0500}",) for n in range(100)))
    db.execute("DELETE FROM rows")
    os.kill(os.getpid(), signal.SIGKILL)
"""


class Killed(BaseException):
    pass


class Steps:
    """Counts the steps that reach the disk, and dies before or after one of them."""

    def __init__(self, patch: pytest.MonkeyPatch, die_at: int, after: bool) -> None:
        self.seen, self.die_at, self.after = 0, die_at, after
        for owner, name in ((os, "fsync"), (os, "replace"), (Store, "_remove"), (os, "mkdir")):
            patch.setattr(owner, name, self.step(getattr(owner, name)))

        class Dying(sqlite3.Connection):
            def execute(connection, sql: str, *values: object) -> sqlite3.Cursor:
                method = super().execute
                is_step = sql in ("COMMIT", "VACUUM") or sql.startswith("BEGIN I")
                return (self.step(method) if is_step else method)(sql, *values)

        connect = sqlite3.connect
        patch.setattr(sqlite3, "connect", lambda *args, **options: connect(*args, factory=Dying, **options))

    def step(self, method: Callable) -> Callable:
        def stepped(*args: object, **options: object) -> object:
            self.seen += 1
            dies = self.seen == self.die_at
            if dies and not self.after:
                raise Killed
            result = method(*args, **options)
            if dies:
                raise Killed
            return result

        return stepped
