"""The SQLite side of a store: its tables, safe opening, the writer's lock, and filters written in SQL.

Connections live for one operation only, so that a store can be forked, pickled and used from several threads. A
catalogue from a stranger is data: it is opened only if it is a plain SQLite file with exactly our tables, and if no
journal beside it can make SQLite touch another file.
"""

from __future__ import annotations

import json
import os
import re
import sqlite3
import stat
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import xxhash

from leaveout.errors import FormatError, LeaveoutError, MismatchError
from leaveout.store.segment import TEMPORARY, sync_directory

FORMAT = 1
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
    " checksum BLOB NOT NULL, text TEXT NOT NULL)",
    "CREATE TABLE fields (field INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE)",
    "CREATE INDEX tombstones ON rows (deleted) WHERE deleted > 0",
)
SHIFT = 32  # key of a row = number of its segment << 32 | position in it

_APPLICATION = int.from_bytes(b"lvot", "big")
_BUSY_SECONDS = 30
_FILTER_SECONDS = 10
_FILTER_CHARACTERS = 1_000_000
_FILTER_BYTES = 100_000_000  # the longest value an expression may build
_SUPER_JOURNAL = bytes.fromhex("d9d505f920a163d7")  # ends a journal that names another file, which SQLite may delete
_FUNCTIONS = {"abs", "max", "min", "round", "coalesce", "ifnull", "iif", "nullif", "typeof"}
_FUNCTIONS |= {"glob", "instr", "length", "like", "lower", "ltrim", "replace", "rtrim", "substr", "substring", "trim"}
_FUNCTIONS |= {"upper", "date", "datetime", "julianday", "strftime", "time"}
_FUNCTIONS |= {"->", "->>", "json_array_length", "json_extract", "json_type"}
_TOKEN = re.compile(
    r"""(?P<quoted>'(?:[^']|'')*'|"(?:[^"]|"")*"|`(?:[^`]|``)*`|\[[^\]]*\])"""
    r"""|(?P<bad>--|/\*|[;?:@#$'"`\[\]\0])|(?P<open>\()|(?P<close>\))"""
)


def create(directory: Path, entries: dict[str, Any]) -> None:
    """Writes a new catalogue; the name appears only once it is complete."""
    temporary = directory / (CATALOGUE + TEMPORARY)
    for leftover in (temporary, temporary.with_name(temporary.name + "-journal")):
        leftover.unlink(missing_ok=True)
    open(temporary, "xb").close()  # SQLite would not give it the user's umask
    with _explained(directory), closing(_connect(temporary, "rw")) as db:
        db.execute(f"PRAGMA synchronous = {SYNCHRONOUS}")
        db.execute(f"PRAGMA application_id = {_APPLICATION}")
        db.execute(f"PRAGMA user_version = {FORMAT}")
        db.execute("BEGIN")
        for statement in SCHEMA:
            db.execute(statement)
        for key, value in entries.items():
            set_entry(db, key, value)
        db.execute("COMMIT")
    os.replace(temporary, directory / CATALOGUE)
    sync_directory(directory)


def inspect(directory: Path) -> None:
    """Refuses a directory whose catalogue is not one of ours or of another format version."""
    path = directory / CATALOGUE
    if not os.path.lexists(path):
        raise FormatError(f"{directory} is not a store: it has no {CATALOGUE}")
    with reading(directory) as db:
        if db.execute("PRAGMA application_id").fetchone()[0] != _APPLICATION:
            raise FormatError(f"{path} is an SQLite file of another program, not a catalogue")
        if (version := db.execute("PRAGMA user_version").fetchone()[0]) != FORMAT:
            text = f"{directory} has format version {version}, but this leaveout reads version {FORMAT}"
            raise FormatError(f"{text}; use the leaveout that wrote it, or build the store again")
        found = {sql for (sql,) in db.execute("SELECT sql FROM sqlite_master")}
        if found != {None, *SCHEMA}:  # None: the indexes of UNIQUE columns
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
def reading(directory: Path) -> Iterator[sqlite3.Connection]:
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
def writing(directory: Path) -> Iterator[sqlite3.Connection]:
    """A connection inside one transaction, committed at the end, rolled back on any error."""
    with _writable(directory) as db:
        db.execute("BEGIN IMMEDIATE")
        try:
            yield db
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
def raw(directory: Path) -> Iterator[BinaryIO]:
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


def set_entry(db: sqlite3.Connection, key: str, value: Any) -> None:
    """Sets one entry of the table `store` to a JSON value."""
    text = json.dumps(value, allow_nan=False)
    db.execute("INSERT OR REPLACE INTO store VALUES (?, ?, ?)", (key, text, checksum(key, text)))


def entries(db: sqlite3.Connection) -> dict[str, Any]:
    """The table `store`, its checksums checked."""
    found = {}
    for key, text, digest in db.execute("SELECT key, value, checksum FROM store"):
        if not isinstance(key, str) or not isinstance(text, str) or checksum(key, text) != digest:
            raise FormatError(f"entry {key!r} of the catalogue is damaged; restore {CATALOGUE} from a copy")
        try:
            found[key] = json.loads(text)
        except (ValueError, RecursionError):
            raise FormatError(f"entry {key!r} of the catalogue is not JSON; restore {CATALOGUE} from a copy") from None
    return found


def checksum(*parts: str) -> bytes:
    """xxh3-64 of the parts in UTF-8, with the byte 255 between them, which UTF-8 never holds and "\\udcff" stands for."""
    return xxhash.xxh3_64_digest("\udcff".join(parts).encode("utf-8", "surrogateescape"))


def visible(version: int) -> str:
    """The SQL condition for the rows seen at a version: the segment is not newer, the tombstone, if there is one, is.

    The number of a segment is the version that made it.
    """
    return f"rows.key < {(version + 1) << SHIFT} AND (rows.deleted = 0 OR rows.deleted > {version})"


def select(db: sqlite3.Connection, where: str, fields: list[str], version: int) -> list[int]:
    """Keys of the rows seen at a version that satisfy an SQL expression over id, unit, text and the metadata fields.

    Raises: ValueError if the expression is not one plain condition, names an unknown column or takes over 10 s.
    """
    columns = _columns(fields)
    _refuse_filter(where, list(columns))
    values = {"id": "rows.id", "unit": "rows.unit", "text": "contents.text"}
    for column, field in columns.items():
        values.setdefault(column, f"(SELECT value FROM json_each(rows.meta) WHERE json_each.key = {_text(field)})")
    shown = ", ".join(f"{value} AS {_name(column)}" for column, value in values.items())
    query = (
        f'WITH live AS (SELECT rows.key AS "leaveout key", {shown} FROM rows'
        f" LEFT JOIN contents ON contents.key = rows.key WHERE {visible(version)})"
        f' SELECT "leaveout key" FROM live WHERE (\n{where}\n) ORDER BY 1'
    )
    deadline = time.monotonic() + _FILTER_SECONDS
    if sys.version_info >= (3, 11):
        db.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, _FILTER_BYTES)
    db.execute(
        "SELECT 1 FROM json_each('[]')"
    )  # SQLite declares this table at its first use, which is not allowed below
    db.set_authorizer(_allowing({"rows", "contents", "json_each"}, n_selects=10_000))
    db.set_progress_handler(lambda: time.monotonic() > deadline, 100_000)
    try:
        return [key for (key,) in db.execute(query)]
    except sqlite3.Error as error:
        if "disk image" in str(error):
            raise
        if "interrupted" in str(error):
            raise ValueError(f"where took more than {_FILTER_SECONDS} s; use a simpler expression") from None
        raise ValueError(f"where cannot be evaluated: {error}") from None


def _refuse_filter(where: str, columns: list[str]) -> None:
    """Refuses what is not one plain condition, by compiling it where there is nothing but an empty table."""
    if not where.strip() or len(where) > _FILTER_CHARACTERS:
        raise ValueError(f"where must be an SQL condition of at most {_FILTER_CHARACTERS} characters")
    known = f"the columns are {', '.join(map(_name, columns))}"
    depth = 0
    for token in _TOKEN.finditer(where):
        depth += (token.lastgroup == "open") - (token.lastgroup == "close")
        if token.lastgroup == "bad" or depth < 0:
            text = f"where has {token.group()!r} at character {token.start() + 1}"
            raise ValueError(f"{text}; it must be one condition with balanced quotes and parentheses")
        quoted = token.group()[1:-1].replace('""', '"')
        if token.group()[0] == '"' and _folded(quoted) not in map(_folded, columns):  # SQLite takes it for a string
            raise ValueError(f"where names an unknown column {quoted!r}; {known}")
    if depth:
        raise ValueError("where has unbalanced parentheses")
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as db:
        # Without a rowid: the names rowid and oid mean nothing here, and so are refused.
        db.execute(f"CREATE TABLE row ({', '.join(map(_name, columns))}, PRIMARY KEY (id)) WITHOUT ROWID")
        db.set_authorizer(_allowing({"row"}, n_selects=1))
        try:
            db.execute(f"EXPLAIN SELECT 1 FROM row WHERE (\n{where}\n)")
        except (sqlite3.Error, sqlite3.Warning, UnicodeError) as error:
            if "no such column" in str(error):
                raise ValueError(f"where names an unknown column ({error}); {known}") from None
            allowed = "only columns, values, operators and simple functions are allowed"
            raise ValueError(f"where is refused ({error}); {allowed}") from None


def _allowing(tables: set[str], n_selects: int) -> Callable[..., int]:
    """An authorizer that allows at most so many SELECTs of these tables, and harmless functions."""
    left = n_selects

    def authorize(action: int, first: str | None, second: str | None, *_: str | None) -> int:
        nonlocal left
        left -= action == sqlite3.SQLITE_SELECT
        allowed = (
            (action == sqlite3.SQLITE_SELECT and left >= 0)
            or (action == sqlite3.SQLITE_READ and first in tables)
            or (action == sqlite3.SQLITE_FUNCTION and second in _FUNCTIONS)
        )
        return sqlite3.SQLITE_OK if allowed else sqlite3.SQLITE_DENY

    return authorize


def _columns(fields: list[str]) -> dict[str, str]:
    """Column name in filters -> metadata field; a name that is taken (case ignored) gets "meta." before it."""
    columns = {"id": "", "unit": "", "text": ""}
    taken = {"leaveout key", *columns}
    for field in fields:
        name = field
        while _folded(name) in taken:
            name = f"meta.{name}"
        taken.add(_folded(name))
        columns[name] = field
    return columns


def _folded(name: str) -> str:
    """The name without the case that SQLite ignores, that of ASCII letters."""
    return name.encode().lower().decode()


def _name(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _text(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _connect(path: Path, mode: str) -> sqlite3.Connection:
    uri = f"{path.absolute().as_uri()}?mode={mode}"
    db = sqlite3.connect(uri, uri=True, timeout=_BUSY_SECONDS, isolation_level=None)
    db.execute("PRAGMA trusted_schema = OFF")
    db.execute("PRAGMA cell_size_check = ON")
    return db


@contextmanager
def _writable(directory: Path) -> Iterator[sqlite3.Connection]:
    with _explained(directory):
        _refuse_foreign(directory / CATALOGUE)
        with closing(_connect(directory / CATALOGUE, "rw")) as db:
            db.execute("PRAGMA journal_mode = DELETE")
            db.execute(f"PRAGMA synchronous = {SYNCHRONOUS}")
            db.execute("PRAGMA secure_delete = ON")
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
def _explained(directory: Path) -> Iterator[None]:
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
