"""Files of rows, each streamed as places and raw values: JSONL, JSON, CSV, TSV, plain text and Parquet."""

# Values of rows come from outside: isinstance narrows Any to containers of unknown values.
# pyright: reportUnknownVariableType=false, reportUnknownMemberType=false, reportUnknownArgumentType=false

from __future__ import annotations

import codecs
import csv
import gzip
import json
import re
import zlib
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain, groupby
from pathlib import Path
from typing import Any, Literal, get_args

from leaveout.corpus.rows import TEXTS, BadRow, kind_of
from leaveout.errors import FormatError, needs

TextRows = Literal["paragraph", "line", "file"]
TEXT_ROWS = get_args(TextRows)
PLAIN = (".txt", ".md")
KINDS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", *PLAIN, ".parquet")
"""How files of rows end; all but Parquet may have .gz behind it."""
Read = Iterable[tuple[str, Any]]
"""The place of each row and its raw value, or why it has none (a BadRow)."""
CHATS = ("messages", "tools", "prompt", "completion", "response", "conversations", "conversation", "chosen", "rejected")
"""Fields that hold messages, or may."""
_BATCH = 256  # Arrow rows that become Python objects at a time
_NUMBER = re.compile(r"-?(0|[1-9]\d*)(\.\d+)?([eE][-+]?\d+)?")  # as JSON has them
_DELIMITERS = ",;\t"


def kind_of_file(path: Path) -> str | None:
    """Which of `KINDS` a file is, by its name; None if it is none."""
    name = path.name.lower()
    plain = name.removesuffix(".gz")
    return next((kind for kind in KINDS if plain.endswith(kind) and (plain == name or kind != ".parquet")), None)


def reader_of(path: Path, name: str, texts: Collection[str], text_rows: TextRows) -> tuple[Any, Any] | None:
    """What reads a file, and what counts its rows; None for an unknown kind.

    name: what its places are called; texts: the columns that hold texts, whatever their cells look like
    """
    kind = kind_of_file(path)
    if kind == ".parquet":
        needs("pyarrow.parquet", "Parquet", extra="data")
        return partial(_parquet, path, name), partial(_parquet_count, path)
    if kind in (".jsonl", ".ndjson"):
        return partial(_jsonl, path, name), partial(counted, partial(_lines, path))
    read: Callable[[], Read]
    if kind == ".json":
        read = partial(_json, path, name)
    elif kind in (".csv", ".tsv"):
        read = partial(_table, path, name, TEXTS.union(texts), "\t" if kind == ".tsv" else None)
    elif kind is not None:
        read = partial(_text, path, name, text_rows)
    else:
        return None
    return read, partial(counted, read)


def counted(read: Callable[[], Iterable[Any]]) -> int:
    return sum(1 for _ in read())


def numbered(name: str, rows: Iterable[Any]) -> Iterator[tuple[str, Any]]:
    return ((f"{name}, row {number}", row) for number, row in enumerate(rows, 1))


@contextmanager
def _opened(path: Path) -> Generator[Any]:
    """The file, unpacked or as Parquet; damage is a FormatError at whatever moment it shows."""
    opener: Any = partial(open, mode="rb")
    damage: tuple[type[Exception], ...] = ()
    if path.suffix.lower() == ".gz":
        opener, damage = gzip.open, (EOFError, zlib.error, gzip.BadGzipFile)
    if path.suffix.lower() == ".parquet":
        # with its defaults pyarrow holds a whole row group: 123 MB instead of 3 MB for a group of 120 MB, and slower
        opener = partial(
            needs("pyarrow.parquet", "Parquet", extra="data").ParquetFile, pre_buffer=False, buffer_size=2**16
        )
        damage = (needs("pyarrow", "Parquet", extra="data").ArrowException, OSError)
    try:
        with opener(path) as file:
            yield file
    except damage as error:
        if isinstance(error, OSError) and error.errno:  # the system's own errors say enough
            raise
        raise FormatError(f"{path.name} is cut off or damaged ({error}), copy or write it again") from error


def _all_lines(file: Iterable[bytes]) -> Iterator[bytes]:
    """The lines of a file without the byte order mark of UTF-8; only a newline ends one."""
    for number, line in enumerate(file):
        yield line if number else line.removeprefix(codecs.BOM_UTF8)


# ---------------------------------------------------------------- JSON


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines that are not blank, with their numbers from 1."""
    with _opened(path) as file:
        for number, line in enumerate(_all_lines(file), 1):
            if line.strip():
                yield number, line.rstrip()


def _jsonl(path: Path, name: str) -> Iterator[tuple[str, Any]]:
    for number, line in _lines(path):
        try:
            raw = _loads(line)
            if isinstance(raw, str):
                raw = BadRow('is text, not an object with fields, write {"text": ...}')
        except BadRow as bad:
            raw = bad
        yield f"{name}, line {number}", raw


def _json(path: Path, name: str) -> Iterator[tuple[str, Any]]:
    with _opened(path) as file:
        data = file.read()
    try:
        rows = _loads(data.removeprefix(codecs.BOM_UTF8))
        if not isinstance(rows, list):
            raise BadRow(f"is {kind_of(rows)}, not a list of rows")
    except BadRow as bad:
        raise FormatError(f"{name} {bad}; if it has one row a line, name it .jsonl") from None
    return numbered(name, rows)


def _loads(data: bytes) -> Any:
    try:
        return json.loads(data.decode(), object_pairs_hook=_object)
    except UnicodeDecodeError as error:
        raise _no_utf8(error) from None
    except json.JSONDecodeError as error:
        raise BadRow(f"is not valid JSON ({error.msg} at character {error.pos + 1})") from None
    except (ValueError, RecursionError) as error:
        raise BadRow(f"is not valid JSON ({error})") from None


def _no_utf8(error: UnicodeDecodeError) -> BadRow:
    return BadRow(f"is not valid UTF-8 (byte {error.start + 1} is {error.object[error.start]:#04x})")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise BadRow("is not valid JSON (an object has the same field twice)")
    return fields


# ---------------------------------------------------------------- tables of text


def _table(path: Path, name: str, texts: Collection[str], delimiter: str | None) -> Iterator[tuple[str, Any]]:
    """The rows of CSV or TSV below its header. Between cells of CSV stands whichever of , ; and tab the header has most.

    Raises: FormatError for a header that names no columns, or a quote that is never closed: no row after it can be told.
    """
    csv.field_size_limit(2**31 - 1)  # a cell may be a whole book
    with _opened(path) as file:
        lines = (line.decode(errors="surrogateescape") for line in _all_lines(file))
        first = next(lines, "")
        between = delimiter or max(_DELIMITERS, key=first.count)
        reader = csv.reader(chain([first], lines), delimiter=between, strict=True)
        records = _records(reader, name)
        header: list[str] = []
        for number, cells in records:
            if not header:
                header = _header(cells, name)
            else:
                raw = cells if isinstance(cells, BadRow) else _fields(header, cells, texts)
                yield f"{name}, line {number}", raw


def _records(reader: Any, name: str) -> Iterator[tuple[int, list[str] | BadRow]]:
    """The records that are not blank, with the lines that they begin at."""
    while True:
        number = reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            if "unexpected end" in str(error):
                raise FormatError(
                    f"{name}, line {number}: a quote is opened that nothing closes, so that no row after it can be told: "
                    'close it, or write a quote that is meant as one as "" in a quoted cell'
                ) from None
            yield number, BadRow(f"is not valid CSV ({error}), quote the cell and double the quotes in it")
            continue
        if cells is None:
            return
        if cells:
            yield number, cells


def _header(cells: list[str] | BadRow, name: str) -> list[str]:
    try:
        if isinstance(cells, BadRow):
            raise cells
        _refuse_other_encoding(cells)
        if len(set(cells)) < len(cells):
            twice = next(cell for cell in cells if cells.count(cell) > 1)
            raise BadRow(f"names the column {twice!r} twice, give every column a name of its own")
    except BadRow as bad:
        raise FormatError(f"{name}: its header {bad}") from None
    return cells


def _fields(header: Sequence[str], cells: Sequence[str], texts: Collection[str]) -> Any:
    try:
        _refuse_other_encoding(cells)
    except BadRow as bad:
        return bad
    if len(cells) != len(header):
        return BadRow(
            f"has {len(cells)} cells, but the header names {len(header)} columns: quote cells that hold the sign between "
            "cells, a quote or a line end"
        )
    return {name: cell if name in texts else _value(cell) for name, cell in zip(header, cells, strict=True)}


def _refuse_other_encoding(cells: Sequence[str]) -> None:
    try:
        "".join(cells).encode()
    except UnicodeEncodeError as error:
        byte = ord(error.object[error.start]) & 0xFF
        raise BadRow(f"is not valid UTF-8 (it has the byte {byte:#04x}), save the file as UTF-8") from None


def _value(cell: str) -> Any:
    """A cell that is a number as JSON writes it, within 64 bits, as that number, an empty one as null; others as text."""
    if not cell or not _NUMBER.fullmatch(cell):
        return cell or None
    number = json.loads(cell)
    return number if -(2**63) <= number < 2**63 else cell


# ---------------------------------------------------------------- plain text


def _text(path: Path, name: str, rows: TextRows) -> Iterator[tuple[str, Any]]:
    """A row for each paragraph (lines that are not blank), each line that is not blank, or the file."""
    with _opened(path) as file:
        lines = enumerate((line.rstrip(b"\r\n") for line in _all_lines(file)), 1)
        if rows == "file":
            groups: Iterable[list[tuple[int, bytes]]] = [[*lines] or [(1, b"")]]
        else:
            blocks = (list(group) for filled, group in groupby(lines, lambda line: bool(line[1].strip())) if filled)
            groups = blocks if rows == "paragraph" else ([line] for block in blocks for line in block)
        for group in groups:
            raw: Any
            try:
                raw = {"text": b"\n".join(line for _, line in group).decode(), "file": name}
            except UnicodeDecodeError as error:
                raw = _no_utf8(error)
            yield f"{name}, line {group[0][0]}", raw


# ---------------------------------------------------------------- Arrow


def arrow_rows(name: str, read: Callable[[], Iterable[Any]]) -> Iterator[tuple[str, Any]]:
    """The rows of Arrow batches, numbered."""
    rows = chain.from_iterable(map(_python_rows, read()))
    return numbered(name, map(without_padding, rows))


def dataset_rows(name: str, dataset: Any) -> Iterator[tuple[str, Any]]:
    return arrow_rows(name, partial(dataset.with_format("arrow").iter, batch_size=_BATCH))


def without_padding(row: Any) -> Any:
    """The row without the nulls that Arrow puts into chats for each field that only other objects have."""
    if not isinstance(row, dict):
        return row
    return {name: _dense(value) if name in CHATS else value for name, value in row.items()}


def _dense(value: Any) -> Any:
    if isinstance(value, list):
        return [_dense(item) for item in value]
    if isinstance(value, dict):
        return {name: _dense(item) for name, item in value.items() if item is not None}
    return value


def _python_rows(batch: Any) -> list[Any]:
    try:
        return batch.to_pylist()
    except ValueError as error:  # a value that Python cannot hold, such as text that is not UTF-8
        if batch.num_rows == 1:
            return [BadRow(f"cannot be read ({error})")]
        return [row for index in range(batch.num_rows) for row in _python_rows(batch.slice(index, 1))]


def _parquet(path: Path, name: str) -> Iterator[tuple[str, Any]]:
    return arrow_rows(name, partial(_parquet_batches, path))


def _parquet_batches(path: Path) -> Iterator[Any]:
    with _opened(path) as file:
        yield from file.iter_batches(batch_size=_BATCH)


def _parquet_count(path: Path) -> int:
    with _opened(path) as file:
        return file.metadata.num_rows
