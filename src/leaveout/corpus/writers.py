"""Rows out: JSON lines, CSV, Parquet or Arrow, by the name of a file; and as a table of Arrow."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from leaveout.errors import FormatError, UnsupportedError, choices, needs
from leaveout.files import replacing

WRITTEN = (".jsonl", ".csv", ".parquet", ".arrow")
Rows = Sequence[Mapping[str, Any]]


def require_written(path: Path) -> None:
    """Raises: UnsupportedError if rows cannot be written to a file of this name."""
    if path.suffix not in WRITTEN:
        raise UnsupportedError(f"{path} is not a file that rows are written to: {choices(path.suffix, WRITTEN)}.")
    if path.suffix in (".parquet", ".arrow"):
        needs("pyarrow", f"A file of {path.suffix}", extra="data")


def write_rows(path: Path, rows: Rows) -> None:
    """Writes rows in the form that the file's name asks for; a file that is there is replaced once the new one is whole.

    A table has a column for each field that a row has, in the order in which they appear, empty where a row lacks it.
    In CSV lists and objects are JSON.
    Raises: as `require_written`; FormatError for a field that Arrow cannot hold, such as one of numbers and texts.
    """
    require_written(path)
    with replacing(path) as part:
        if path.suffix == ".jsonl":
            with part.open("w", encoding="utf-8") as file:
                file.writelines(_json(row) + "\n" for row in rows)
        elif path.suffix == ".csv":
            with part.open("w", encoding="utf-8", newline="") as file:
                writer = csv.DictWriter(file, fields_of_all(rows), lineterminator="\n")
                writer.writeheader()
                writer.writerows({name: _cell(value) for name, value in row.items()} for row in rows)
        else:
            write_table(part, arrow_table(rows), path.suffix)


def write_table(path: Path, table: Any, suffix: str) -> None:
    """Writes a table of Arrow as .parquet or .arrow."""
    if suffix == ".parquet":
        needs("pyarrow.parquet", "Parquet", extra="data").write_table(table, path)
        return
    pyarrow: Any = needs("pyarrow", "Arrow", extra="data")
    with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)


def arrow_table(rows: Rows) -> Any:
    """The rows as a `pyarrow.Table`. Raises: as `write_rows`."""
    pyarrow: Any = needs("pyarrow", "A table of Arrow", extra="data")
    columns: dict[str, Any] = {}
    for name in fields_of_all(rows):
        try:
            columns[name] = pyarrow.array([row.get(name) for row in rows])
        except (pyarrow.ArrowException, OverflowError) as error:
            raise FormatError(
                f"The field `{name}` has values of several kinds, which Arrow and Parquet cannot hold ({error}): write "
                "JSON lines."
            ) from None
    return pyarrow.table(columns)


def fields_of_all(rows: Rows) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row))


def _cell(value: Any) -> Any:
    return _json(value) if isinstance(value, Mapping | list | tuple) else value


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)
