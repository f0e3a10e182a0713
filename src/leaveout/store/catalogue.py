"""The SQLite side of a store: its tables, safe opening, the writer's lock, and its digests.

Connections live for one operation only, so that a store can be forked, pickled and used from several threads. A
catalogue from a stranger is data: it is opened only if it is a plain SQLite file with exactly our tables, and if no
journal beside it can make SQLite touch another file.
"""

from __future__ import annotations

import itertools
import json
import os
import sqlite3
import stat
from collections.abc import Generator, Iterable, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import xxhash

from leaveout.errors import FormatError, LeaveoutError, MismatchError
from leaveout.files import replacing

FORMAT = 3
CATALOGUE = "catalogue.sqlite"
LOCK = "writer.lock"
SYNCHRONOUS = "EXTRA"  # FULL, and the directory too: a commit outlives a power cut
SCHEMA = (
    "CREATE TABLE store (key TEXT PRIMARY KEY, value TEXT NOT NULL, checksum BLOB NOT NULL)",
    "CREATE TABLE segments (segment INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, side TEXT UNIQUE,"
    " n_rows INTEGER NOT NULL, n_bytes INTEGER NOT NULL, hashes BLOB NOT NULL)",
    "CREATE TABLE rows (key INTEGER PRIMARY KEY, id TEXT NOT NULL, unit TEXT NOT NULL, deleted INTEGER NOT NULL,"
    " meta TEXT NOT NULL, UNIQUE (id, deleted))",
    "CREATE TABLE contents (key INTEGER PRIMARY KEY, content_hash TEXT NOT NULL, extra TEXT NOT NULL,"
    " checksum BLOB NOT NULL, text TEXT NOT NULL, raw TEXT NOT NULL)",
    "CREATE TABLE fields (field INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE)",
    "CREATE INDEX tombstones ON rows (deleted) WHERE deleted > 0",
)
MAX_ROWS = 1 << 31  # of one segment, and versions of one store
MAX_FIELDS = 256  # different metadata fields of one store
SHIFT = 32  # key of a row = number of its segment << 32 | position in it
PROOF = "state.purge"  # the entry that holds the result of the last purge
COLUMNS = "rows.id, rows.unit, contents.text, rows.meta, contents.content_hash, contents.extra, contents.raw, contents.checksum"
SOURCE = "rows JOIN contents ON contents.key = rows.key"

_APPLICATION = int.from_bytes(b"lvot", "big")
_BUSY_SECONDS = 30
_CACHE_KB = 32_768  # of pages while writing: ids come in any order, and their index must stay in memory
_LINES = 64  # of one INSERT
_SUPER_JOURNAL = bytes.fromhex("d9d505f920a163d7")  # ends a journal that names another file, which SQLite may delete
_SCALARS = (str, int, float, type(None))
_JSON = json.JSONEncoder(ensure_ascii=False, allow_nan=False)
_C_JSON: Any = json.encoder.c_make_encoder and json.encoder.c_make_encoder(  # type: ignore[attr-defined]
    None, _JSON.default, json.encoder.encode_basestring, None, ": ", ", ", False, False, False
)


@dataclass(frozen=True)
class Record:
    """One row's entry in the catalogue. meta: field -> string, number, bool or None. extra: a small JSON object. raw: the
    row as it came, a JSON object as text; "" where there was none.
    """

    id: str
    text: str
    unit: str
    meta: dict[str, Any] = field(default_factory=dict[str, Any])
    content_hash: str = ""
    extra: dict[str, Any] = field(default_factory=dict[str, Any])
    raw: str = ""

    @property
    def row(self) -> dict[str, Any]:
        """The row as it came, with all its fields; types that JSON lacks in ISO form."""
        return json.loads(self.raw) if self.raw else {}


def serialized(record: Record) -> tuple[str, str, str, str, str, str, str, bytes]:
    """A record as the catalogue's strings: id, unit, text, meta, content hash, extra, raw; and their checksum.

    Raises: FormatError if it is not valid Unicode and JSON.
    """
    meta_of: dict[Any, Any] = record.meta  # callers may have no type checker
    for name, value in meta_of.items():
        if not isinstance(name, str) or "\0" in name or not isinstance(value, _SCALARS):
            text = f"row {record.id!r}: metadata field {name!r} is {type(value).__name__}"
            raise FormatError(f"{text}; fields have plain names, and are strings, numbers, bools or None")
    try:
        meta, extra = _encoded(record.meta), _encoded(record.extra)
        strings = (record.id, record.unit, record.text, meta, record.content_hash, extra, record.raw)
        return *strings, checksum(*strings)
    except (TypeError, ValueError, AttributeError, RecursionError) as error:
        raise FormatError(f"row {record.id!r} cannot be stored: {error}") from None


def _encoded(value: dict[str, Any]) -> str:
    """JSON; `_JSON.encode` makes a new encoder at every call, which doubles its cost."""
    return "".join(_C_JSON(value, 0)) if _C_JSON else _JSON.encode(value)


def deserialized(strings: Sequence[Any]) -> Record:
    """A record from the columns COLUMNS and the checksum.

    Raises: FormatError if the checksum is not that of the strings, or they are not JSON.
    """
    id, unit, text, meta, content_hash, extra, raw, digest = strings
    if not all(isinstance(part, str) for part in strings[:-1]) or checksum(*strings[:-1]) != digest:
        raise FormatError(f"the catalogue's entry of row {id!r} is damaged; restore {CATALOGUE} from a copy")
    try:
        found: list[Any] = [json.loads(meta), json.loads(extra)]
    except (ValueError, RecursionError):
        found = [None]
    if not all(isinstance(value, dict) for value in found):
        raise FormatError(f"the catalogue's entry of row {id!r} is not JSON; restore {CATALOGUE} from a copy")
    return Record(id, text, unit, found[0], content_hash, found[1], raw)


def create(directory: Path, entries: dict[str, Any]) -> None:
    """Writes a new catalogue; the name appears only once it is complete."""
    with _explained(directory), replacing(directory / CATALOGUE) as temporary:
        temporary.with_name(temporary.name + "-journal").unlink(missing_ok=True)  # of a creation that was killed
        open(temporary, "xb").close()  # SQLite would not give it the user's umask
        with closing(_connect(temporary, "rw")) as db:
            db.execute(f"PRAGMA synchronous = {SYNCHRONOUS}")
            db.execute(f"PRAGMA application_id = {_APPLICATION}")
            db.execute(f"PRAGMA user_version = {FORMAT}")
            db.execute("BEGIN")
            for statement in SCHEMA:
                db.execute(statement)
            for key, value in entries.items():
                set_entry(db, key, value)
            set_entry(db, "digests", {"rows": 0, "tombstones": 0})
            _seal(db)
            db.execute("COMMIT")


def inspect(directory: Path) -> None:
    """Refuses a directory whose catalogue is not one of ours or of another format version."""
    path = directory / CATALOGUE
    if not os.path.lexists(path):
        raise FormatError(f"{directory} is not a store: it has no {CATALOGUE}")
    with reading(directory) as db:
        inspect_tables(directory, db)


def inspect_tables(directory: Path, db: sqlite3.Connection) -> None:
    """Refuses an open catalogue that is not one of ours or of another format version."""
    path = directory / CATALOGUE
    if db.execute("PRAGMA application_id").fetchone()[0] != _APPLICATION:
        raise FormatError(f"{path} is an SQLite file of another program, not a catalogue")
    if (version := db.execute("PRAGMA user_version").fetchone()[0]) != FORMAT:
        text = f"{directory} has format version {version}, but this leaveout reads version {FORMAT}"
        raise FormatError(f"{text}; use the leaveout that wrote it, or build the store again")
    found = {(table, sql) for table, sql in db.execute("SELECT tbl_name, sql FROM sqlite_master")}
    tables = {(sql.split()[4 if sql.startswith("CREATE INDEX") else 2], sql) for sql in SCHEMA}
    # None: the indexes of UNIQUE columns
    if found != tables | {(table, None) for table in ("store", "segments", "rows", "fields")}:
        raise FormatError(f"{path} does not have the tables of format version {FORMAT}; restore it from a copy")


def lock(directory: Path) -> sqlite3.Connection:
    """The writer's lock, held until the connection is closed or the process ends, however it ends.

    An SQLite lock: the system drops it with the process, and forked children do not inherit it as they would a flock.
    """
    path = directory / LOCK
    if os.path.lexists(path):
        if not _is_plain(path) or path.stat().st_size or os.path.lexists(f"{path}-journal"):
            raise FormatError(f"{path} is not an empty plain file; remove it")
    else:
        open(path, "ab").close()
    db = sqlite3.connect(path, timeout=0, isolation_level=None, check_same_thread=False)
    try:
        db.execute("PRAGMA journal_mode = MEMORY")  # no journal file that a crash could leave
        db.execute("BEGIN EXCLUSIVE")
    except sqlite3.Error as error:
        db.close()
        if "locked" not in str(error):
            raise _explanation(path, str(error)) from error
        text = f"{directory} is being written by another writer"
        raise MismatchError(f"{text}; wait until it has finished, or open the store for reading") from None
    return db


@contextmanager
def reading(directory: Path) -> Generator[sqlite3.Connection]:
    """A connection that can only read, inside one read transaction."""
    path = directory / CATALOGUE
    with _explained(directory):
        _refuse_foreign(path)
        if os.path.lexists(f"{path}-journal"):  # of a writer at work, or of a killed one: then this read rolls it back
            with closing(_connect(path, "rw")) as db:
                db.execute("SELECT count(*) FROM sqlite_master").fetchone()
        with closing(_connect(path, "ro")) as db:
            db.execute("PRAGMA query_only = ON")
            db.execute("BEGIN")
            yield db


@contextmanager
def writing(directory: Path) -> Generator[sqlite3.Connection]:
    """A connection inside one transaction, committed at the end, rolled back on any error."""
    with _writable(directory) as db:
        db.execute("BEGIN IMMEDIATE")
        try:
            yield db
            _seal(db)
            db.execute("COMMIT")
        except BaseException:
            if db.in_transaction:
                db.execute("ROLLBACK")
            raise


def vacuum(directory: Path) -> None:
    """Rewrites the catalogue so that nothing of removed rows stays in it."""
    with _writable(directory) as db:
        db.execute("VACUUM")


@contextmanager
def raw(directory: Path) -> Generator[BinaryIO]:
    """The catalogue as a plain file.

    Closing it drops all locks that this process has on it (a rule of POSIX), so it is closed when nobody has any.
    """
    file = open(directory / CATALOGUE, "rb")  # noqa: SIM115
    try:
        yield file
    finally:
        with _writable(directory) as db:
            db.execute("BEGIN EXCLUSIVE")
            file.close()


def insert(db: sqlite3.Connection, table: str, lines: Iterable[tuple[Any, ...]]) -> None:
    """Adds lines to a table, many with one statement: a third less CPU time than `executemany`."""
    rest = iter(lines)
    while batch := list(itertools.islice(rest, _LINES)):
        marks = ",".join([f"({','.join('?' * len(batch[0]))})"] * len(batch))
        db.execute(f"INSERT INTO {table} VALUES {marks}", list(itertools.chain.from_iterable(batch)))


def set_entry(db: sqlite3.Connection, key: str, value: Any) -> None:
    """Sets one entry of the table `store` to a JSON value."""
    text = json.dumps(value, allow_nan=False)
    db.execute("INSERT OR REPLACE INTO store VALUES (?, ?, ?)", (key, text, checksum(key, text)))


def entries(db: sqlite3.Connection) -> dict[str, Any]:
    """The table `store`, its checksums and the types of what every store has checked."""
    found: dict[str, Any] = {}
    for key, text, digest in db.execute("SELECT key, value, checksum FROM store"):
        if not isinstance(key, str) or not isinstance(text, str) or checksum(key, text) != digest:
            raise FormatError(f"entry {key!r} of the catalogue is damaged; restore {CATALOGUE} from a copy")
        try:
            found[key] = json.loads(text)
        except (ValueError, RecursionError):
            raise FormatError(f"entry {key!r} of the catalogue is not JSON; restore {CATALOGUE} from a copy") from None
    digests: dict[str, Any] = found["digests"] if isinstance(found.get("digests"), dict) else {}
    numbers = (found.get("version"), found.get("purged"))
    sound = (
        all(type(number) is int and 0 <= number < MAX_ROWS for number in numbers)
        and isinstance(found.get("settings"), dict)
        and isinstance(found.get("created"), str)
        and (found.get("purging") is False or isinstance(found.get("purging"), dict))
        and all(type(digests.get(name)) is int for name in ("rows", "tombstones"))
        and isinstance(digests.get("tables"), str)
    )
    if not sound:
        raise FormatError(f"the catalogue lacks entries that every store has; restore {CATALOGUE} from a copy")
    return found


def shift_digests(db: sqlite3.Connection, *, rows: int = 0, tombstones: int = 0) -> None:
    """Adds to the digests of the rows and of the tombstones, inside a transaction."""
    digests = entries(db)["digests"]
    digests["rows"] = (digests["rows"] + rows) % 2**64
    digests["tombstones"] = (digests["tombstones"] + tombstones) % 2**64
    set_entry(db, "digests", digests)


def digest_of_pairs(keys: Sequence[int] | np.ndarray, values: np.ndarray) -> int:
    """Sum modulo 2^64 of f(f(key) + value), which does not depend on order and can be added to and taken from.

    f is the finaliser of splitmix64. Shapes: keys [pairs], values [pairs] of 64 bits.
    """
    mixed = _finalised(_finalised(np.asarray(keys, np.int64).astype(np.uint64)) + values.astype(np.uint64))
    return int(mixed.sum(dtype=np.uint64))


def digest_of_rows(db: sqlite3.Connection, first: int, end: int) -> int:
    """Digest of the checksums of the rows with these keys."""
    pairs = db.execute("SELECT key, checksum FROM contents WHERE key >= ? AND key < ?", (first, end)).fetchall()
    checksums = [digest for _, digest in pairs]
    if not all(isinstance(digest, bytes) and len(digest) == 8 for digest in checksums):
        raise FormatError(f"{CATALOGUE} holds a checksum that is none; restore it from a copy")
    return digest_of_pairs([key for key, _ in pairs], as_numbers(checksums))


def as_numbers(checksums: Sequence[bytes]) -> np.ndarray:
    """Checksums of 8 bytes as numbers [checksums] uint64."""
    return np.frombuffer(b"".join(checksums), ">u8")


def digest_of_tables(db: sqlite3.Connection) -> str:
    """xxh3-64 of all lines of the tables that are small: `store` without the digests, `segments` and `fields`."""
    hasher = xxhash.xxh3_64()
    for query in (
        "SELECT key, value FROM store WHERE key <> 'digests' ORDER BY key",
        "SELECT segment, name, side, n_rows, n_bytes, hashes FROM segments ORDER BY segment",
        "SELECT field, name FROM fields ORDER BY field",
    ):
        for line in db.execute(query):
            hasher.update(json.dumps(line, default=bytes.hex).encode() + b"\n")
    return hasher.hexdigest()


def _finalised(numbers: np.ndarray) -> np.ndarray:
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return numbers ^ (numbers >> np.uint64(31))


def _seal(db: sqlite3.Connection) -> None:
    """Brings the digest of the small tables up to date, before a commit."""
    found = db.execute("SELECT value FROM store WHERE key = 'digests'").fetchone()
    digests: dict[str, Any] = json.loads(found[0]) if found else {}
    set_entry(db, "digests", {**digests, "tables": digest_of_tables(db)})


def checksum(*parts: str) -> bytes:
    """xxh3-64 of the parts in UTF-8, with the byte 255 between them, which UTF-8 never holds."""
    return xxhash.xxh3_64_digest(b"\xff".join(map(str.encode, parts)))


def visible(version: int) -> str:
    """The SQL condition for the rows seen at a version: the segment is not newer, the tombstone, if there is one, is.

    The number of a segment is the version that made it.
    """
    return f"rows.key < {(version + 1) << SHIFT} AND (rows.deleted = 0 OR rows.deleted > {version})"


def _connect(path: Path, mode: str) -> sqlite3.Connection:
    uri = f"{path.absolute().as_uri()}?mode={mode}"
    db = sqlite3.connect(uri, uri=True, timeout=_BUSY_SECONDS, isolation_level=None)
    db.execute("PRAGMA trusted_schema = OFF")
    db.execute("PRAGMA cell_size_check = ON")
    return db


@contextmanager
def _writable(directory: Path) -> Generator[sqlite3.Connection]:
    with _explained(directory):
        _refuse_foreign(directory / CATALOGUE)
        with closing(_connect(directory / CATALOGUE, "rw")) as db:
            db.execute("PRAGMA journal_mode = DELETE")
            db.execute(f"PRAGMA synchronous = {SYNCHRONOUS}")
            db.execute("PRAGMA secure_delete = ON")
            db.execute(f"PRAGMA cache_size = -{_CACHE_KB}")
            yield db


def _refuse_foreign(path: Path) -> None:
    """Refuses what would make SQLite open anything but this plain file and its own journal.

    The catalogue itself is not opened here: closing it would drop the locks that other threads have through SQLite.
    """
    journal = Path(f"{path}-journal")
    if os.path.lexists(f"{path}-wal") or os.path.lexists(f"{path}-shm"):
        raise FormatError(f"{path} has a write-ahead log, which a store never makes; restore the store from a copy")
    for file in (path, journal):
        if os.path.lexists(file) and not _is_plain(file):
            raise FormatError(f"{file} is not a plain file; restore the store from a copy")
    try:
        with open(journal, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - len(_SUPER_JOURNAL)))
            foreign = file.read() == _SUPER_JOURNAL
    except FileNotFoundError:
        return
    if foreign:
        raise FormatError(f"{journal} names another file, which the journal of a store never does; remove it")


def _is_plain(path: Path) -> bool:
    try:
        return stat.S_ISREG(os.lstat(path).st_mode)
    except FileNotFoundError:  # a journal may vanish at any time
        return True


@contextmanager
def _explained(directory: Path) -> Generator[None]:
    """Turns an error of SQLite into one sentence that says what to do."""
    try:
        yield
    except (sqlite3.Error, UnicodeDecodeError) as error:  # a damaged name makes a message that is not UTF-8
        raise _explanation(directory, str(error)) from error


def _explanation(directory: Path, text: str) -> LeaveoutError | OSError:
    if "locked" in text:
        return MismatchError(f"{directory / CATALOGUE} stayed locked for {_BUSY_SECONDS} s; try again later")
    if any(word in text for word in ("full", "I/O", "readonly", "unable to open")):
        return OSError(f"{directory / CATALOGUE} cannot be read or written ({text}); check disk and permissions")
    return FormatError(f"{directory / CATALOGUE} is damaged ({text}); restore it from a copy")
