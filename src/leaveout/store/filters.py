"""Filters: SQL conditions over id, unit, text and the metadata fields, compiled where they can do no harm.

A condition is text from outside. It is first compiled against an empty table, and then runs under an authorizer that
allows reading the catalogue's rows and a list of functions; a clock stops it. SQLite looks at the clock between its own
steps, not inside one call of a function, so the values that a function can be given are bounded instead (from Python
3.11 on, which can set SQLite's limits).
"""

from __future__ import annotations

import re
import sqlite3
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import closing

from leaveout.store.catalogue import visible

_FILTER_SECONDS = 10
_FILTER_CHARACTERS = 1_000_000
_FILTER_BYTES = 100_000_000  # the longest value an expression may build
_PATTERN_BYTES = 1_000  # of LIKE and GLOB, whose cost is that of the text times the pattern
_FUNCTIONS = {
    *("abs", "max", "min", "round", "coalesce", "ifnull", "iif", "nullif", "typeof"),
    *("glob", "instr", "length", "like", "lower", "ltrim", "replace", "rtrim", "substr", "substring", "trim", "upper"),
    *("date", "datetime", "julianday", "strftime", "time"),
    *("->", "->>", "json_array_length", "json_extract", "json_type"),
}
_TOKEN = re.compile(
    r"""(?P<quoted>'(?:[^']|'')*'|"(?:[^"]|"")*"|`(?:[^`]|``)*`|\[[^\]]*\])"""
    r"""|(?P<bad>--|/\*|[;?:@#$'"`\[\]\0])|(?P<open>\()|(?P<close>\))"""
)


def matching(db: sqlite3.Connection, where: str, fields: list[str], version: int) -> list[int]:
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
        db.setlimit(sqlite3.SQLITE_LIMIT_LIKE_PATTERN_LENGTH, _PATTERN_BYTES)
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


def among(field: str, values: Sequence[str], fields: list[str]) -> str:
    """The condition that a field (or `unit`) as text is one of these values; "" where there is none."""
    column = "unit" if field == "unit" else next(name for name, own in _columns(fields).items() if own == field)
    return f"coalesce(CAST({_name(column)} AS TEXT), '') IN ({', '.join(map(_text, values))})"


def named_in(where: str, fields: list[str]) -> list[str]:
    """The fields, and `unit`, that a condition names."""
    bare = re.sub(r"'(?:[^']|'')*'", "", where)
    names = {_folded(one) for one in (*re.findall(r"[\w.]+", bare), *re.findall(r'"([^"]*)"', bare))}
    return [field or column for column, field in _columns(fields).items() if _folded(column) in names - {"id", "text"}]


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
