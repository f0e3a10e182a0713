"""The store against a dict as model, against crashes at every step, against damage, and against strangers' files."""

import json
import os
import pickle
import re
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test
from safetensors.numpy import load_file

from leaveout.errors import FormatError, MismatchError
from leaveout.store import Record, Store, catalogue, purge, segment
from leaveout.store import reader as reader_module

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


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture(autouse=True)
def small_and_unsynced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small pages, so that a few rows fill several; no waiting for the disk, as nothing here cuts the power."""
    monkeypatch.setattr(reader_module, "_PAGE", 2)
    monkeypatch.setattr(reader_module, "_BATCH", 2)
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    monkeypatch.setattr(catalogue, "SYNCHRONOUS", "OFF")


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("template") / "store"
    with Store.create(path, {"width": 16}) as store:
        put(store, "a", "b", "c", source="web")
        put(store, "d", "e", source="books", year=1999)
        store.put_side("whitening", {"mean": np.arange(3.0), "scale": np.array(2.0)})
        store.set_state("cursor", {"rows": 5})
        store.delete(["b"])
    return path


@pytest.fixture
def filled(path: Path, template: Path) -> Iterator[Store]:
    """Two segments a-c and d-e with b deleted, one side, one state; open for writing."""
    with Store.open(shutil.copytree(template, path), write=True) as store:
        yield store


# Round trip


@pytest.mark.parametrize("shape", [(5,), (5, 3), (5, 2, 1, 3)])
def test_put_keeps_every_dtype_bit_for_bit(path: Path, shape: tuple[int, ...]) -> None:
    raw = np.random.default_rng(0).integers(0, 256, (*shape, 8), np.uint8)
    arrays = {f"of.{name}": raw[..., : np.dtype(name).itemsize].copy().view(name)[..., 0] for name in DTYPES}
    arrays["strided"] = np.arange(20.0).reshape(5, 4)[:, ::2]
    with Store.create(path, {}) as store:
        store.put([record(str(i)) for i in range(5)], arrays)
    (part,) = Store.open(path).segments()
    header = int.from_bytes(part.path.read_bytes()[:8], "little")
    assert (header + 8) % 64 == 0
    for found in (part.arrays(), load_file(part.path)):
        assert found.keys() == arrays.keys()
        for name, array in arrays.items():
            assert found[name].dtype == array.dtype and found[name].shape == array.shape
            assert found[name].tobytes() == array.tobytes(), name
    assert all(not array.flags.writeable and array.flags.aligned for array in part.arrays().values())


def test_reopened_store_is_the_same(filled: Store, path: Path) -> None:
    filled.close()
    for store in (filled, Store.open(path), pickle.loads(pickle.dumps(Store.open(path)))):
        assert contents(store).keys() == {"a", "c", "d", "e"}
        assert (store.settings, store.version, store.n_rows, len(store)) == ({"width": 16}, 5, 5, 4)
        assert store.state("cursor") == {"rows": 5} and store.state("nothing") is None
        side = store.side("whitening") or {}
        assert side["mean"].tolist() == [0, 1, 2] and side["scale"] == 2 and store.side("nothing") is None
        assert [(part.first, part.n_rows) for part in store.segments()] == [(0, 3), (3, 2)]
        assert store.numbers(["e", "a", "e"]).tolist() == [4, 0, 4]
        assert [row.id for row in store.rows([4, 0, 4])] == ["e", "a", "e"]
        assert store.rows([3]) == [record("d", source="books", year=1999)]
        assert store.has(["a", "b", "x"]) == {"a"} and store.check() == []
        assert store.rows([]) == [] and store.numbers([]).tolist() == []


def test_empty_store_round_trips(path: Path) -> None:
    Store.create(path, {}).close()
    store = Store.open(path)
    assert (len(store), store.version, store.segments(), store.ids(), store.check()) == (0, 0, [], [], [])
    assert store.select("id = 'a'").size == 0 and store.numbers([]).size == 0


def test_info_counts(filled: Store, path: Path) -> None:
    info = filled.info()
    assert info.pop("bytes") == sum(file.stat().st_size for file in path.iterdir())
    assert info.pop("created").startswith("20")
    assert info == {
        "rows": 4,
        "deleted": 1,
        "segments": 2,
        "arrays": [
            {"name": "length", "dtype": "int32", "width": [], "rows": 5},
            {"name": "vector", "dtype": "float16", "width": [16], "rows": 5},
        ],
        "sides": ["whitening"],
        "fields": ["source", "year"],
        "version": 5,
        "format": 1,
    }


def test_side_is_replaced_and_its_old_file_removed(filled: Store, path: Path) -> None:
    old, reader = {file.name for file in path.glob("*.safetensors")}, Store.open(path)
    filled.put_side("whitening", {"mean": np.zeros(2, np.int8)})
    assert (filled.side("whitening") or {}).keys() == {"mean"}
    assert len(old - {file.name for file in path.glob("*.safetensors")}) == 1
    with pytest.raises(MismatchError, match=r"replaced since the store was opened \(call refresh\)"):
        reader.side("whitening")
    reader.refresh()
    assert (reader.side("whitening") or {})["mean"].tolist() == [0, 0] and reader.check() == []


def test_files_get_the_umask(path: Path) -> None:
    before = os.umask(0o002)
    try:
        with Store.create(path, {}) as store:
            put(store, "a")
    finally:
        os.umask(before)
    assert {stat.S_IMODE(file.stat().st_mode) for file in path.iterdir()} == {0o664}


GOOD = np.zeros((2, 1), np.float32)
REFUSED_PUTS = {
    "no rows": (ValueError, "put needs 1 to", [], {"x": GOOD[:0]}),
    "no arrays": (ValueError, "at least one array", [record("x"), record("y")], {}),
    "too short": (ValueError, r"'x' has shape \[1, 1\] for 2 records", [record("x"), record("y")], {"x": GOOD[:1]}),
    "no width": (ValueError, "each axis must be at least 1", [record("x"), record("y")], {"x": np.zeros((2, 0))}),
    "complex": (ValueError, "dtype complex128", [record("x"), record("y")], {"x": np.zeros(2, complex)}),
    "big-endian": (ValueError, "dtype >f4", [record("x"), record("y")], {"x": GOOD.astype(">f4")}),
    "array name": (ValueError, "array name '../x'", [record("x"), record("y")], {"../x": GOOD}),
    "twice": (FormatError, "'x' comes twice", [record("x"), record("x")], {"x": GOOD}),
    "already there": (FormatError, "'a' is in the store already", [record("x"), record("a")], {"x": GOOD}),
    "nested": (FormatError, "row 'x': metadata field 'f' is list", [record("x", f=[1]), record("y")], {"x": GOOD}),
    "nul": (FormatError, "metadata field", [record("x", **{"a\0b": 1}), record("y")], {"x": GOOD}),
    "nan": (FormatError, "'x' cannot be stored", [record("x", f=float("nan")), record("y")], {"x": GOOD}),
    "surrogate": (FormatError, "'x' cannot be stored", [record("x", "\ud800"), record("y")], {"x": GOOD}),
    "many fields": (
        FormatError,
        "more than 256 metadata fields",
        [record("x", **{f"f{i}": 1 for i in range(255)}), record("y")],
        {"x": GOOD},
    ),
}


@pytest.mark.parametrize(("error", "match", "records", "arrays"), REFUSED_PUTS.values(), ids=REFUSED_PUTS)
def test_refused_put_writes_nothing(
    filled: Store, error: type, match: str, records: list[Record], arrays: dict[str, np.ndarray]
) -> None:
    before = bytes_of(filled.path)
    with pytest.raises(error, match=match):
        filled.put(records, arrays)
    assert bytes_of(filled.path) == before
    put(filled, "after")
    assert filled.check() == []


def test_unknown_rows_are_named(filled: Store) -> None:
    for wanted, match in (([5], "there is no row 5"), ([-1], "there is no row -1"), ([0, 1], "row 1 was deleted")):
        with pytest.raises(ValueError, match=match):
            filled.rows(wanted)
    with pytest.raises(ValueError, match="no row has the id 'b'"):
        filled.numbers(["a", "b"])
    with pytest.raises(TypeError, match="must be integers, not float64"):
        filled.rows([0.5])


def test_create_refuses_what_is_there(filled: Store, path: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other/file").touch()
    filled.close()
    for place, match in (
        (path, "already holds a store"),
        (tmp_path / "other", "not empty"),
        (tmp_path / "other/file", "is a file"),
    ):
        with pytest.raises(FormatError, match=match):
            Store.create(place, {})
    with pytest.raises(TypeError, match="must be a dict, not list"):
        Store.create(tmp_path / "new", [])
    assert not (tmp_path / "new").exists()


# Versions


def test_delete_hides_a_row_at_once_and_its_id_can_come_back(filled: Store) -> None:
    assert filled.delete(["a", "x", "b"]) == 1 and filled.delete(["a"]) == 0
    assert filled.version == 6 and contents(filled).keys() == {"c", "d", "e"}
    assert filled.select("id IN ('a', 'c')").tolist() == [2]
    put(filled, "b", "a")
    assert list(contents(filled)) == ["c", "d", "e", "b", "a"]
    filled.delete(["a"])
    filled.purge()
    assert list(contents(filled)) == ["c", "d", "e", "b"] and filled.check() == []


def test_reader_sees_one_version(filled: Store, path: Path) -> None:
    reader, before = Store.open(path), contents(filled)
    stream = reader.iter_rows()
    assert next(stream).id == "a"
    filled.delete(["a", "e"])
    put(filled, "a", "f", new_field=1)
    assert contents(reader) == before and reader.select("text LIKE 'the%'").size == 4 and reader.numbers(["a"]) == [0]
    assert [row.id for row in stream] == ["c", "d", "e"]
    with pytest.raises(ValueError, match="unknown column"):
        reader.select("new_field = 1")
    reader.refresh()
    assert contents(reader) == contents(filled) and reader.select("new_field = 1").tolist() == [5, 6]


def test_reader_of_a_purged_store_is_told(filled: Store, path: Path) -> None:
    reader = Store.open(path)
    first, stream, old_stream = reader.segments()[0], reader.iter_rows(), reader.iter_rows()
    assert next(old_stream).id == "a"
    opened, kept = first.arrays()["vector"], first.arrays()["vector"].tobytes()
    filled.purge()
    assert opened.tobytes() == kept
    use: list[Callable[[], object]] = [
        first.arrays, first.live, lambda: reader.rows([0]), lambda: next(stream), lambda: reader.numbers(["a"]),
        lambda: reader.select("1"), reader.ids, lambda: reader.has(["a"]),
    ]  # fmt: skip
    for call in use:
        with pytest.raises(MismatchError, match="purged"):
            call()
    reader.refresh()
    assert contents(reader) == contents(filled)
    with pytest.raises(MismatchError, match="purged"):
        list(old_stream)


def test_threads_share_a_reader_while_a_writer_works(filled: Store, path: Path) -> None:
    failures: list[BaseException] = []

    def read() -> None:
        try:
            for _ in range(30):
                reader = Store.open(path)
                assert contents(reader).keys() >= {"a", "c", "d", "e"}
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=read) for _ in range(2)]
    for thread in threads:
        thread.start()
    for number in range(20):
        put(filled, f"new {number}")
    for thread in threads:
        thread.join()
    assert not failures and len(contents(filled)) == 24


# The writer's lock

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
import test_store
store = test_store.Store.create(sys.argv[1], {})
for n in range(10**6):
    test_store.put(store, f"{n}.0", f"{n}.1", f"{n}.2")
    if n % 3 == 2:
        store.delete([f"{n - 1}.0"])
    print(n, flush=True)
"""


def test_killed_writer_loses_no_committed_row_and_leaves_no_lock(path: Path) -> None:
    command = [sys.executable, "-c", PUT_FOREVER, str(path), str(Path(__file__).parent)]
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


def test_reader_rolls_back_what_a_killed_writer_left(filled: Store, path: Path) -> None:
    filled.close()
    before = contents(filled)
    assert run(DIE_IN_COMMIT, path).returncode == -signal.SIGKILL
    assert (path / "catalogue.sqlite-journal").stat().st_size > 512
    reader = Store.open(path)
    assert contents(reader) == before and reader.info()["fields"] == ["source", "year"] and reader.check() == []


# Crashes at every step


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
    assert events == ["sync file", "rename", "sync directory", "commit at level 3"]


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


# Purge

LONG = " ".join(f"word{n * n}" for n in range(2_000))  # over several pages of SQLite


def test_purge_removes_text_and_vector_from_all_files(path: Path) -> None:
    secret, arrays = "a secret of 26 characters!", vectors(["gone", "live", "long"], 300)
    with Store.create(path, {}) as store:
        texts = {"gone": secret, "live": "nothing of interest", "long": LONG}
        store.put([record(id, text, **{f"field of {id}": f"meta of {id}"}) for id, text in texts.items()], arrays)
        planted = [secret, LONG[500:900], LONG[-300:], "meta of gone", "field of gone", "hash of gone", "unit of long"]
        planted = [text.encode() for text in planted] + [arrays["vector"][0].tobytes(), arrays["vector"][2].tobytes()]
        store.delete(["gone", "long"])
        assert all(piece in bytes_of(path) for piece in planted)
        assert store.purge() == {"rows": 2, "segments": 1, "files": 1}
        assert not any(piece in bytes_of(path) for piece in planted)
        assert arrays["vector"][1].tobytes() in bytes_of(path) and b"nothing of interest" in bytes_of(path)
        with catalogue.reading(path) as db:
            assert db.execute("PRAGMA freelist_count").fetchone() == (0,)
        assert store.n_rows == 1 and store.purge() == {"rows": 0, "segments": 0, "files": 0}
        assert store.numbers(["live"]) == [0] and store.check() == []
        store.delete(["live"])
        assert store.purge()["rows"] == 1 and store.segments() == [] and not list(path.glob("*.safetensors"))


def test_purge_killed_before_its_end_is_finished_at_the_next_open(
    filled: Store, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(catalogue, "vacuum", lambda path: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        filled.purge()
    assert b"the text of b" not in bytes_of(path)  # zeros, even before the catalogue is rewritten
    assert "a purge was stopped before its end; open the store for writing once" in filled.check()
    filled.close()
    monkeypatch.undo()
    with Store.open(path, write=True) as store:
        assert store.check() == [] and contents(store).keys() == {"a", "c", "d", "e"}


def test_purge_lets_live_copies_be(path: Path) -> None:
    same = {"vector": np.tile(np.arange(64, dtype=np.float32), (3, 1))}
    with Store.create(path, {}) as store:
        texts = {"a": "the very same text", "b": "the very same text", "c": "once more: the very same text, and more"}
        store.put([record(id, text) for id, text in texts.items()], same)
        store.put([record("d", quotes="the very same text")], {"vector": same["vector"][:1]})
        store.delete(["a", "c"])
        assert store.purge()["rows"] == 2
        store.delete(["b"])
        assert store.purge()["rows"] == 1 and store.ids() == ["d"] and store.check() == []


@pytest.mark.parametrize("what", ["text", "vector"])
def test_purge_reports_bytes_that_remain(filled: Store, path: Path, what: str) -> None:
    copied = b"the text of b" + b"!" * 9 if what == "text" else vectors(["b"])["vector"].tobytes()
    filled.put([record("t", "the text of b!!!!!!!!!")], vectors(["t"]))
    (path / "notes").mkdir()
    (path / "notes/copy.bin").write_bytes(b"x" * 101 + copied)
    filled.delete(["t"])
    with pytest.raises(FormatError, match=r"notes/copy.bin still holds bytes of them; remove this file"):
        filled.purge()
    assert filled.check() == [] and filled.n_rows == 4


def test_purge_refuses_a_segment_that_is_not_the_live_rows(filled: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    write = segment.write
    before = contents(filled)
    monkeypatch.setattr(segment, "write", lambda path, arrays, keep: write(path, arrays, np.roll(keep, 1)))
    with pytest.raises(FormatError, match="is not the live rows of"):
        filled.purge()
    assert contents(filled) == before


def test_purge_does_not_carry_damage_over(filled: Store) -> None:
    flip(filled.segments()[0].path, -1)
    with pytest.raises(FormatError, match="is damaged; nothing was purged"):
        filled.purge()
    assert filled.version == 5 and filled.n_rows == 5


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_traces_are_found_like_substrings(data: st.DataObject) -> None:
    pieces = data.draw(st.lists(st.binary(min_size=16, max_size=128), min_size=1, max_size=5))
    parts = st.one_of(
        st.binary(max_size=30), st.sampled_from(pieces), st.sampled_from(pieces).map(lambda piece: piece[:-1])
    )
    haystack = b"".join(data.draw(st.lists(parts, max_size=20)))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(haystack)), max_size=4)))
    chunks = [haystack[a:b] for a, b in zip([0, *cuts], [*cuts, len(haystack)], strict=True)]
    for piece in pieces:
        traces = purge.Traces()
        for other in pieces:
            traces.add(other, variety=2)
        alone = purge.Traces()
        alone.add(piece, variety=2)
        known = alone.found([piece])
        assert (known <= traces.found(chunks)) == (piece in haystack or not known)


# Check


DAMAGES: dict[str, tuple[str, Callable[[Path], object]]] = {
    "data": (r"block 0 \(from byte 0\) is damaged", lambda path: flip(path / "00000001-00000001.safetensors", -1)),
    "header": ("block 0 .* is damaged", lambda path: flip(path / "00000001-00000001.safetensors", 40)),
    "header length": ("bad header", lambda path: flip(path / "00000001-00000001.safetensors", 5)),
    "side": ("00000003-00000003.safetensors: block 0", lambda path: flip(path / "00000003-00000003.safetensors", -1)),
    "shorter": (r"bytes but the catalogue says", lambda path: os.truncate(path / "00000001-00000001.safetensors", 99)),
    "missing": ("is not there: .*lost", lambda path: (path / "00000001-00000001.safetensors").unlink()),
    "orphan": ("belongs to no version", lambda path: (path / "00000006-00000006.safetensors").touch()),
    "temporary": ("belongs to no version", lambda path: (path / "00000006-00000006.safetensors.tmp").touch()),
    "text": (r"entry of row 'a' is damaged; restore .* \(key 4294967296\)", sql("UPDATE contents SET text = upper(text)")),
    "settings": ("entry 'settings' of the catalogue is damaged", sql("UPDATE store SET value = '{}' WHERE key = 'settings'")),
    "row": ("segment 1 has 3 rows but the catalogue lists 2", sql("DELETE FROM rows WHERE id = 'b'")),
    "contents": ("1 rows of table rows are not in table contents", sql("DELETE FROM contents WHERE text LIKE '%of b'")),
    "future": ("1 rows were deleted in a version that does not exist", sql("UPDATE rows SET deleted = 99 WHERE id = 'a'")),
    "hashes": ("is damaged", sql("UPDATE segments SET hashes = zeroblob(8) WHERE segment = 2")),
    "page": ("catalogue.sqlite is damaged", overwritten(4096, b"\xff" * 4096)),
    "no catalogue": ("catalogue.sqlite cannot be read", lambda path: (path / "catalogue.sqlite").unlink()),
    "purge": ("a purge was stopped", entry("purging", "true")),
}  # fmt: skip


@pytest.mark.parametrize(("match", "damage"), DAMAGES.values(), ids=DAMAGES)
def test_check_reports(filled: Store, path: Path, match: str, damage: Callable[[Path], object]) -> None:
    assert filled.check() == []
    damage(path)
    problems = filled.check()
    assert any(re.search(match, problem) for problem in problems), problems
    filled.close()


def test_check_finds_a_flip_in_each_block(path: Path) -> None:
    with Store.create(path, {}) as store:
        store.put([record("a")], {"x": np.zeros((1, 2 * segment.BLOCK + 999), np.int8)})
    for at, block in ((segment.BLOCK - 1, 0), (segment.BLOCK, 1), (-1, 2)):
        flip(path / "00000001-00000001.safetensors", at)
        assert [problem.split(": ")[1] for problem in store.check()] == [
            f"block {block} (from byte {block * segment.BLOCK}) is damaged"
        ]
        flip(path / "00000001-00000001.safetensors", at)


def test_open_for_writing_tidies_up_but_never_past_the_catalogue(filled: Store, path: Path) -> None:
    filled.close()
    leftovers = ["00000006-00000006.safetensors", "00000006-00000006.safetensors.tmp", "00000001-00000004.safetensors"]
    for name in leftovers:
        (path / name).touch()
    (path / "config.yaml").touch()
    Store.open(path, write=True).close()
    assert not any((path / name).exists() for name in leftovers) and (path / "config.yaml").exists()
    (path / "00000007-00000007.safetensors").touch()
    with pytest.raises(MismatchError, match="newer than the catalogue, which is at version 5; restore"):
        Store.open(path, write=True)
    assert (path / "00000007-00000007.safetensors").exists()


# Filters

ODD = [
    "text",
    "ID",
    "Year",
    "year",
    "where",
    "select",
    "a.b",
    'say "it"',
    "it's",
    "",
    " ",
    "é",
    "rowid",
    "leaveout key",
    "$",
    "a\\b",
    "live",
]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Store:
    with Store.create(tmp_path_factory.mktemp("filters") / "store", {}) as store:
        sources = ["web", "books", None, "web"]
        rows = [record(f"r{n}", source=source, year=2000 + n, flag=n > 1) for n, source in enumerate(sources)]
        store.put(
            [*rows, record("odd", 'it\'s; -- (a) "text"', **{name: n for n, name in enumerate(ODD)})],
            vectors([*"abcde"]),
        )
        store.delete(["r3"])
    return store


CONDITIONS = {
    "source = 'web'": [0],
    "source IS NULL and id like 'r%'": [2],
    "year BETWEEN 2001 AND 2002": [1, 2],
    'YEAR > 2000 or "Year" < 100': [1, 2, 4],
    "flag": [2],
    "not flag and unit = 'unit of r1'": [1],
    "id in ('r0', 'r3', 'odd')": [0, 4],
    "lower(upper(text)) = 'the text of r2'": [2],
    "text = 'it''s; -- (a) \"text\"'": [4],
    "(coalesce(year, 0) % 2 = 0) and (id || '!' != 'r0!')": [2],
    "case when year > 2001 then 1 else 0 end": [2],
    "instr(text, ';') > 0 -- ".removesuffix(" -- "): [4],
    "1": [0, 1, 2, 4],
    "NULL": [],
}


@pytest.mark.parametrize("where", CONDITIONS)
def test_select_finds_live_rows(library: Store, where: str) -> None:
    found = library.select(where)
    assert found.dtype == np.int64 and found.tolist() == CONDITIONS[where]


@pytest.mark.parametrize("name", ODD)
def test_select_knows_odd_field_names(library: Store, name: str) -> None:
    column = {"text": "meta.text", "ID": "meta.ID", "Year": "meta.Year", "leaveout key": "meta.leaveout key"}.get(
        name, name
    )
    column = '"' + column.replace('"', '""') + '"'
    assert library.select(f"{column} = {ODD.index(name)}").tolist() == [4]


REFUSED_CONDITIONS = {
    "1) OR (1": r"has '\)' at character 2",
    "deleted > 0": 'unknown column .*deleted.*the columns are "id", "unit", "text", "source"',
    "\"sorce\" = 'web'": "unknown column 'sorce'; the columns are",
    "rowid_ = 1": "unknown column",
    "_rowid_ = 1": "unknown column",
    "sqlite_master.sql = 1": "unknown column",
    "rows.deleted = 0": "unknown column",
    "live.id = 'r0'": "unknown column",
    "1; DROP TABLE rows": "has ';'",
    "1 -- x": "has '--'",
    "1 /* x */": r"has '/\*'",
    "'open": 'has "\'"',
    "(1": "unbalanced parentheses",
    "id = ?": r"has '\?'",
    "id = :end": "has ':'",
    "1 \0": "has '.x00'",
    "": "must be an SQL condition",
    "id =": "refused .*syntax error",
    "EXISTS (SELECT 1)": "not authorized",
    "id IN (SELECT id FROM rows)": "refused",
    "id IN (VALUES ('r0'))": "refused",
    "id IN row": "refused",
    "id IN rows": "refused",
    "id IN pragma_table_info('rows')": "refused",
    "1 UNION SELECT 1": "refused",
    "1 ORDER BY 1": "refused",
    "load_extension('x')": "load_extension",
    "readfile('/etc/passwd')": "readfile",
    "writefile('x', 'y')": "writefile",
    "randomblob(1000000000) = 1": "randomblob",
    "count(*) > 0": "count",
    "row_number() OVER () > 0": "row_number",
    "id MATCH 'x'": "refused",
    "abs(-9223372036854775808)": "cannot be evaluated: integer overflow",
}


@pytest.mark.parametrize("where", REFUSED_CONDITIONS)
def test_select_refuses(library: Store, where: str) -> None:
    with pytest.raises(ValueError, match=REFUSED_CONDITIONS[where]) as caught:
        library.select(where)
    assert type(caught.value) is ValueError and "\n" not in str(caught.value)


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.sampled_from(
            ["id", "(", ")", "'", '"', "OR", "1", "=", "--", ";", "SELECT", "FROM rows", "IN", "deleted", "[", "`", ","]
        ),
        max_size=8,
    )
)
def test_select_never_shows_a_deleted_row(library: Store, words: list[str]) -> None:
    with suppress(ValueError):
        assert 3 not in library.select(" ".join(words))


def test_select_stops_an_endless_condition(filled: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalogue, "_FILTER_SECONDS", 0)
    many = " AND ".join(["length(text) > 1"] * 900)
    filled.put([record(f"n{n}") for n in range(500)], {"x": np.zeros(500, np.int8)})
    with pytest.raises(ValueError, match="took more than 0 s; use a simpler"):
        filled.select(many)


# Strangers' files


def with_header(header: object, length: int | None = None) -> Callable[[Path], None]:
    """Puts a header, a JSON value or bytes, before 64 bytes of data of the first segment, in a consistent store."""

    def change(path: Path) -> None:
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        data = (len(text) if length is None else length).to_bytes(8, "little") + text + bytes(64)
        (path / "00000001-00000001.safetensors").write_bytes(data)
        edit(path, "UPDATE segments SET n_bytes = ? WHERE segment = 1", len(data))

    return change


def with_array(**changes: object) -> Callable[[Path], None]:
    return with_header({"x": {"dtype": "U8", "shape": [3, 1], "data_offsets": [0, 3], **changes}})


def with_link(path: Path) -> None:
    shutil.move(path / "00000001-00000001.safetensors", path.parent / "outside")
    (path / "00000001-00000001.safetensors").symlink_to(path.parent / "outside")


def with_fifo(path: Path) -> None:
    (path / "00000001-00000001.safetensors").unlink()
    os.mkfifo(path / "00000001-00000001.safetensors")


EVIL_SEGMENTS: dict[str, tuple[str, Callable[[Path], None]]] = {
    "link": ("cannot be read as a plain file", with_link),
    "fifo": ("is not a plain file", with_fifo),
    "huge header": ("bad header .length 9223372036854775807", with_header(b"{}", 2**63 - 1)),
    "header beyond file": ("bad header .length 99", with_header(b"{}", 99)),
    "long header": ("bad header .length 1048578", with_header(b"{}" + b" " * (1 << 20))),
    "no header": ("bad header .length 0", with_header(b"{}", 0)),
    "not JSON": ("bad header", with_header(b"\xff\xfe")),
    "deep JSON": ("bad header", with_header(b"[" * 500_000)),
    "huge number": ("bad header", with_header(b"1" * 500_000)),
    "list": ("no arrays", with_header([])),
    "empty": ("no arrays", with_header({})),
    "entry": ("array name 'x'", with_header({"x": 1})),
    "array name": ("array name '../x'", with_header({"../x": {}})),
    "dtype": ("dtype or shape", with_array(dtype="O")),
    "overflow": ("not where its shape says", with_array(shape=[3, 2**62, 2**62])),
    "negative": ("dtype or shape", with_array(shape=[-3, -1])),
    "many axes": ("dtype or shape", with_array(shape=[3] + [1] * 99)),
    "shape of strings": ("dtype or shape", with_array(shape=["3"])),
    "offsets": ("not where its shape says", with_array(data_offsets=[-3, 0])),
    "gap": ("not where its shape says", with_array(data_offsets=[1, 4])),
    "rest": ("arrays of 3 bytes in 64", with_array()),
    "rows": ("has shape .4, 16. but the catalogue says 3 rows", with_array(shape=[4, 16], data_offsets=[0, 64])),
}


@pytest.mark.parametrize(("match", "change"), EVIL_SEGMENTS.values(), ids=EVIL_SEGMENTS)
def test_evil_segment_is_refused(filled: Store, path: Path, match: str, change: Callable[[Path], None]) -> None:
    filled.close()
    change(path)
    part = Store.open(path).segments()[0]
    for call in (part.arrays, part.live):
        with pytest.raises(FormatError, match=match):
            call()
    assert any(re.search(match, problem) for problem in part.problems())


def replaced(name: str, make: Callable[[Path], object]) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        (path / name).unlink(missing_ok=True)
        make(path / name)

    return change


def renamed(path: Path) -> None:
    """Damages the name of a table, so that SQLite's message is not UTF-8."""
    data = (path / "catalogue.sqlite").read_bytes()
    (path / "catalogue.sqlite").write_bytes(data.replace(b"TABLE segments", b"TABLE segmen\xf4s"))


EVIL_CATALOGUES: dict[str, tuple[str, Callable[[Path], None]]] = {
    "parent": ("describes segment 1 wrongly", described("name", "../outside")),
    "absolute": ("describes segment 1 wrongly", described("name", "/etc/passwd")),
    "suffix": ("segment 1 wrongly", described("name", "00000001-00000001.safetensors/../x")),
    "newline": ("segment 1 wrongly", described("name", "00000001-00000001.safetensors\n")),
    "name of another": ("segment 1 wrongly", described("name", "00000002-00000003.safetensors")),
    "name of the future": ("segment 1 wrongly", described("name", "00000001-00000009.safetensors")),
    "blob name": ("segment 1 wrongly", described("name", b"\0")),
    "huge count": ("segment 1 wrongly", described("n_rows", 2**63 - 1)),
    "no rows": ("segment 1 wrongly", described("n_rows", 0)),
    "count of text": ("segment 1 wrongly", described("n_rows", "many")),
    "huge file": ("segment 1 wrongly", described("n_bytes", 2**62)),
    "later segment": ("segment 9 wrongly", described("segment", 9)),
    "tombstone": ("deleted rows beyond segment 1", sql("UPDATE rows SET key = key + 99 WHERE id = 'b'")),
    "version": ("has format version 2, but this leaveout reads version 1; use", sql("PRAGMA user_version = 2")),
    "program": ("SQLite file of another program", sql("PRAGMA application_id = 1")),
    "trigger": ("does not have the tables", sql("CREATE TRIGGER t AFTER INSERT ON rows BEGIN DELETE FROM rows; END")),
    "view": ("does not have the tables", sql("CREATE VIEW v AS SELECT load_extension('x')")),
    "no entries": ("lacks entries that every store has", sql("DELETE FROM store WHERE key = 'version'")),
    "version of text": ("lacks entries", entry("version", '"x"')),
    "no JSON": ("entry 'x' of the catalogue is not JSON", entry("x", "[")),
    "missing": ("is not a store: it has no catalogue.sqlite", lambda path: (path / "catalogue.sqlite").unlink()),
    "empty": ("of another program", replaced("catalogue.sqlite", Path.touch)),
    "garbage": ("is damaged .file is not a database", overwritten(0, b"garbage!" * 20)),
    "name": ("is damaged .*malformed database schema|is damaged .*codec", renamed),
    "truncated": ("damaged", lambda path: os.truncate(path / "catalogue.sqlite", 5000)),
    "page": ("damaged", overwritten(4096, b"\xff" * 4096)),
    "directory": ("is not a plain file", replaced("catalogue.sqlite", Path.mkdir)),
    "fifo": ("is not a plain file", replaced("catalogue.sqlite", os.mkfifo)),
    "link": ("is not a plain file", replaced("catalogue.sqlite", lambda file: file.symlink_to("/etc/passwd"))),
    "linked journal": ("is not a plain file", replaced("catalogue.sqlite-journal", lambda file: file.symlink_to("/etc/passwd"))),
    "foreign journal": ("names another file", replaced("catalogue.sqlite-journal", lambda file: file.write_bytes(SUPER_JOURNAL))),
    "log": ("write-ahead log", replaced("catalogue.sqlite-wal", lambda file: file.symlink_to("/etc/passwd"))),
}  # fmt: skip


@pytest.mark.parametrize("write", [False, True], ids=["read", "write"])
@pytest.mark.parametrize(("match", "change"), EVIL_CATALOGUES.values(), ids=EVIL_CATALOGUES)
def test_evil_catalogue_is_refused(
    filled: Store, path: Path, match: str, change: Callable[[Path], None], write: bool
) -> None:
    filled.close()
    segments = {file: file.read_bytes() for file in path.glob("*.safetensors")}
    change(path)
    with pytest.raises(FormatError, match=match) as caught:
        Store.open(path, write=write)
    assert "\n" not in str(caught.value)
    assert {file: file.read_bytes() for file in path.glob("*.safetensors")} == segments


def test_super_journal_cannot_delete_a_file(filled: Store, path: Path, tmp_path: Path) -> None:
    """A real hot journal that names another file, which SQLite by itself opens and deletes."""
    filled.close()
    run(DIE_IN_COMMIT, path)
    victim = tmp_path / "victim"
    victim.touch()
    name = str(victim).encode()
    line = (1).to_bytes(4, "big") + name + len(name).to_bytes(4, "big") + (sum(name)).to_bytes(4, "big")
    with open(path / "catalogue.sqlite-journal", "ab") as journal:
        journal.write(line + SUPER_JOURNAL)
    for write in (False, True):
        with pytest.raises(FormatError, match="names another file"):
            Store.open(path, write=write)
    assert victim.exists()


@pytest.mark.parametrize("name", ["writer.lock", "writer.lock-journal"])
def test_evil_lock_is_refused(filled: Store, path: Path, tmp_path: Path, name: str) -> None:
    filled.close()
    (path / name).unlink(missing_ok=True)
    (path / name).symlink_to(tmp_path / "outside")
    with pytest.raises(FormatError, match=r"writer\.lock is not an empty plain file; remove it"):
        Store.open(path, write=True)
    assert not (tmp_path / "outside").exists()


def test_temporary_link_is_not_followed(filled: Store, path: Path, tmp_path: Path) -> None:
    (tmp_path / "outside").write_text("mine")
    (path / "00000006-00000006.safetensors.tmp").symlink_to(tmp_path / "outside")
    put(filled, "x")
    assert (tmp_path / "outside").read_text() == "mine" and filled.check() == []


# Against a model


class AgainstDict(RuleBasedStateMachine):
    """The store must show what a dict shows, in the order of the puts, after any sequence of operations."""

    names = st.lists(
        st.integers(0, 40).map(lambda n: f"row {n}, with a text to find"), min_size=1, max_size=6, unique=True
    )

    def __init__(self) -> None:
        super().__init__()
        self.directory = TEMPORARY[0] / f"{TEMPORARY[0].name}-{len(list(TEMPORARY[0].iterdir()))}"
        self.store = Store.create(self.directory, {})
        self.model: dict[str, tuple[Record, bytes]] = {}
        self.reader, self.seen = Store.open(self.directory), self.model

    def teardown(self) -> None:
        self.store.close()
        assert self.store.check() == []

    @rule(ids=names)
    def put(self, ids: list[str]) -> None:
        if self.model.keys() & set(ids):
            with pytest.raises(FormatError, match="is in the store already"):
                put(self.store, *ids)
        else:
            put(self.store, *ids)
            self.model = self.model | expected(*ids)

    @rule(ids=names)
    def delete(self, ids: list[str]) -> None:
        assert self.store.delete(ids) == len(self.model.keys() & set(ids))
        self.model = {id: row for id, row in self.model.items() if id not in ids}

    @rule()
    def purge(self) -> None:
        purged = self.store.purge()
        if purged["rows"]:
            self.refresh()
        assert self.store.n_rows == len(self.store)
        self.gone = {f"row {n}, with a text to find" for n in range(41)} - self.model.keys()
        data = bytes_of(self.directory)
        assert not any(f"text of {id}".encode() in data for id in self.gone)
        assert not any(vectors([id])["vector"].tobytes() in data for id in self.gone)

    @rule()
    def reopen(self) -> None:
        self.store.close()
        self.store = Store.open(self.directory, write=True)

    @rule()
    def refresh(self) -> None:
        self.reader.refresh()
        self.seen = self.model

    @invariant()
    def same(self) -> None:
        for store, model in ((self.store, self.model), (self.reader, self.seen)):
            assert contents(store) == model and list(contents(store)) == list(model)
            assert store.numbers(list(model)).tolist() == store.select("1").tolist()


TEMPORARY: list[Path] = []


def test_store_is_a_dict(tmp_path: Path) -> None:
    TEMPORARY[:] = [tmp_path]
    run_state_machine_as_test(AgainstDict, settings=settings(deadline=None, max_examples=8, stateful_step_count=25))


# Documentation


def test_documented_snippet_reads_a_store(filled: Store, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (Path(__file__).parents[1] / "docs/format.md").read_text(), re.DOTALL)
    monkeypatch.chdir(path.parent)
    names: dict[str, dict[str, np.ndarray]] = {}
    exec(code, names)
    names["db"].close()
    assert {id: row.tobytes() for id, row in names["vectors"].items()} == {
        id: v for id, (_, v) in contents(filled).items()
    }
