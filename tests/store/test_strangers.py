"""A store from a stranger is refused with one sentence, and nothing outside its directory is touched."""

import json
import os
import re
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path

import pytest
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from leaveout.errors import FormatError, LeaveoutError
from leaveout.store import Store, catalogue

from .stores import DIE_IN_COMMIT, SUPER_JOURNAL, described, edit, entry, overwritten, put, run, sql


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
    "version": ("has format version 4, but this leaveout reads version 3; use", sql("PRAGMA user_version = 4")),
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


def use(path: Path, write: bool, verify: bool) -> None:
    """Everything that a store can be asked."""
    with Store.open(path, write=write, verify=verify) as store:
        ids = store.ids()
        store.numbers(ids), list(store.iter_rows()), store.rows(range(min(9, store.n_rows)))
        store.info(), store.side("whitening"), store.state("cursor"), store.has(ids), store.numbers_where("year > 1")
        for part in store.segments():
            part.live(), part.arrays()
        if write:
            put(store, "one", "two")
            store.delete(ids[:1])
            store.purge()


@settings(
    deadline=None, max_examples=150, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_changed_bytes_are_used_or_refused(template: Path, tmp_path: Path, data: st.DataObject) -> None:
    """Of the catalogue, the headers of segments, or a journal: no error but ours, and nothing beside the store."""
    path = tmp_path / "store"
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(template, path)
    name = data.draw(st.sampled_from(["catalogue.sqlite", "00000001-00000001.safetensors", "catalogue.sqlite-journal"]))
    content = bytearray((path / name).read_bytes() if (path / name).exists() else b"")
    end = min(len(content), 400) if name.endswith(".safetensors") else len(content)
    for _ in range(data.draw(st.integers(1, 5))):
        at = data.draw(st.integers(0, end))
        content[at : at + data.draw(st.integers(0, 8))] = data.draw(st.binary(max_size=8))
    (path / name).write_bytes(content)
    if data.draw(st.booleans()) and name.endswith(".safetensors"):  # well described, so that the header is parsed
        with suppress(sqlite3.Error):
            edit(path, "UPDATE segments SET n_bytes = ?, hashes = ? WHERE segment = 1", len(content), hashed(content))
    with suppress(LeaveoutError, ValueError):
        use(path, data.draw(st.booleans()), data.draw(st.booleans()))
    with suppress(LeaveoutError):
        assert isinstance(Store.open(path).check(), list)
    assert {entry.name for entry in tmp_path.iterdir()} == {"store"}


def hashed(content: bytes | bytearray) -> bytes:
    return xxhash.xxh3_64_digest(bytes(content))


@settings(
    deadline=None, max_examples=150, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_any_value_in_the_catalogue_is_used_or_refused(template: Path, tmp_path: Path, data: st.DataObject) -> None:
    """A hostile catalogue with sound digests of its small tables."""
    path = tmp_path / "store"
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(template, path)
    columns = ["segments.name", "segments.side", "segments.n_rows", "segments.n_bytes", "segments.hashes"]
    columns += ["rows.key", "rows.id", "rows.unit", "rows.deleted", "rows.meta", "contents.text", "contents.extra"]
    columns += ["contents.checksum", "contents.content_hash", "fields.name", "store.value", "store.checksum"]
    table, column = data.draw(st.sampled_from(columns)).split(".")
    values = (
        st.integers(-(2**63), 2**63 - 1)
        | st.integers(-3, 9)
        | st.floats()
        | st.text(max_size=9)
        | st.binary(max_size=9)
    )
    odd = st.sampled_from(["../x", "/etc/passwd", "[" * 9_999, '{"a": NaN}', "9" * 5_000, "null", "{}", "true", "-1"])
    key = data.draw(st.sampled_from(["", " WHERE rowid = 1", " WHERE rowid = 4294967296", " WHERE rowid = 3"]))
    with suppress(sqlite3.Error, TypeError, ValueError, RecursionError):  # of the preparation, not of the store
        value = data.draw(values | odd)
        edit(path, f"UPDATE OR REPLACE {table} SET {column} = ?{key}", value)
        if table == "store" and isinstance(value, str):
            with closing(sqlite3.connect(path / catalogue.CATALOGUE, isolation_level=None)) as db:
                for name, text in db.execute("SELECT key, value FROM store").fetchall():
                    db.execute("UPDATE store SET checksum = ? WHERE key = ?", (catalogue.checksum(name, text), name))
    with suppress(LeaveoutError, ValueError):
        use(path, data.draw(st.booleans()), data.draw(st.booleans()))
    with suppress(LeaveoutError):
        assert isinstance(Store.open(path).check(), list)
    assert {entry.name for entry in tmp_path.iterdir()} == {"store"}
