"""A store as plain files that any program can read, and back: safetensors files, rows.jsonl, manifest.json.

docs/reference/format.md has the layout. An export from a stranger is data: names are compared with the two forms that an export
gives, links are not followed, and sizes, counts and hashes are checked before anything is read into memory.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from leaveout.errors import FormatError, MismatchError
from leaveout.store import segment
from leaveout.store.catalogue import MAX_ROWS
from leaveout.store.record import Record
from leaveout.store.segment import BLOCK, HASH, TEMPORARY, Segment

if TYPE_CHECKING:
    from leaveout.store.reader import Reader

MANIFEST = "manifest.json"
ROWS = "rows.jsonl"
FORMAT = "leaveout export"
VERSION = 2

_NAME = re.compile(r"(rows|side)-\d{5,9}\.safetensors")
_MAX_MANIFEST = 64 << 20
_MAX_LINE = 256 << 20
_NO_ROWS = np.empty(0, np.int64)

Parts = tuple[list[Record], dict[str, np.ndarray]]


def write(store: Reader, directory: Path) -> dict[str, int]:
    """Exports a store; counts of rows, files and sides."""
    directory.mkdir(parents=True, exist_ok=True)
    ours = {ROWS, ROWS + TEMPORARY, MANIFEST + TEMPORARY}  # of an export that was killed
    strange = [
        entry.name
        for entry in directory.iterdir()
        if entry.name not in ours and not _NAME.fullmatch(entry.name.removesuffix(TEMPORARY))
    ]
    if strange:
        raise FormatError(f"{directory} is not empty: it holds {strange[0]!r}; choose another directory")
    for entry in directory.iterdir():
        entry.unlink()
    parts = [part for part in store.segments() if part.tombstones.size < part.n_rows]
    files = [_copy(part, directory / f"rows-{number:05d}.safetensors") for number, part in enumerate(parts, 1)]
    sides = [
        {"side": name, **_copy(part, directory / f"side-{number:05d}.safetensors")}
        for number, (name, part) in enumerate(store._snapshot.sides.items(), 1)
    ]
    n_bytes, hashes = segment.write_pieces(directory / ROWS, _lines(store, files))
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "settings": store.settings,
        "states": store._states(),
        "files": files,
        "sides": sides,
        "rows": {"name": ROWS, "rows": len(store), "bytes": n_bytes, "xxh3": hashes.hex()},
    }
    text = json.dumps(manifest, indent=1, ensure_ascii=False).encode()
    segment.write_pieces(directory / MANIFEST, [text])  # last: without it the export is not complete
    return {"rows": len(store), "files": len(files), "sides": len(sides)}


def _copy(part: Segment, file: Path) -> dict[str, Any]:
    """Writes the live rows of a segment; its line in the manifest."""
    for problem in part.problems():
        raise FormatError(f"{problem}; nothing was exported")
    live = part.live()
    n_bytes, hashes = segment.write(file, part.arrays(), live)
    n_rows = part.n_rows - part.tombstones.size
    return {"name": file.name, "rows": n_rows, "bytes": n_bytes, "xxh3": hashes.hex()}


def _lines(store: Reader, files: list[dict[str, Any]]) -> Iterator[bytes]:
    """The lines of rows.jsonl, about 4 MiB at a time."""
    records, gathered = store.iter_rows(), bytearray()
    for file in files:
        for row in range(file["rows"]):
            record = next(records, None)
            if record is None:
                raise FormatError(f"{store.path} lacks rows that its segments have; run check")
            line = {"id": record.id, "text": record.text, "unit": record.unit, "meta": record.meta}
            line |= {"content_hash": record.content_hash, "extra": record.extra, "raw": record.raw}
            line |= {"file": file["name"], "row": row}
            gathered += json.dumps(line, ensure_ascii=False, allow_nan=False).encode() + b"\n"
            if len(gathered) > BLOCK:
                yield bytes(gathered)
                gathered.clear()
    yield bytes(gathered)


@dataclass(frozen=True)
class Export:
    """An export whose manifest was checked."""

    path: Path
    settings: dict[str, Any]
    states: dict[str, Any]
    _files: list[Segment]
    _sides: dict[str, Segment]
    _rows: Segment

    @classmethod
    def open(cls, path: Path) -> Export:
        """The export in a directory.

        Raises: FormatError if it is none, is not complete, or describes what cannot be.
        """
        try:
            with segment.opened_plainly(path / MANIFEST) as fd, os.fdopen(os.dup(fd), "rb") as file:
                text = file.read(_MAX_MANIFEST + 1)
        except MismatchError:
            text = f"{path} has no {MANIFEST}: it is no export, or one that was killed before its end"
            raise FormatError(f"{text}; export the store again") from None
        try:
            if len(text) > _MAX_MANIFEST:
                raise ValueError("length")
            found = json.loads(text.decode())
            if (found["format"], found["version"]) != (FORMAT, VERSION):
                reason = f"is not of a {FORMAT} of version {VERSION}"
                raise FormatError(f"{path / MANIFEST} {reason}; export the store again")
            files = [_described(path, line, "rows") for line in found["files"]]
            sides = {line["side"]: _described(path, line, "side") for line in found["sides"]}
            rows = _described(path, found["rows"], ROWS)
            sound = (
                all(isinstance(found[name], dict) for name in ("settings", "states"))
                and all(isinstance(name, str) for name in sides)
                and len(sides) == len(found["sides"])
                and len({part.name for part in files}) == len(files)
                and rows.n_rows == sum(part.n_rows for part in files)
            )
            if not sound:
                raise ValueError("counts")
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            raise FormatError(f"{path / MANIFEST} is damaged or was changed; export the store again") from None
        return cls(path, found["settings"], found["states"], files, sides, rows)

    def sides(self) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
        for name, part in self._sides.items():
            yield name, part.arrays()

    def missing_parts(self, store: Reader) -> Iterator[Parts]:
        """Records and arrays of each file of rows that a store of an import that was killed does not hold yet.

        Memory: the records of one file.
        Raises: FormatError if the store is of something else, or for a damaged file or line.
        """
        held = [(part.n_rows, part.n_bytes, part.hashes) for part in store.segments()]
        wanted = [(part.n_rows, part.n_bytes, part.hashes) for part in self._files]
        if store.settings != self.settings or held != wanted[: len(held)] or len(store) != store.n_rows:
            raise FormatError(f"{store.path} already holds another store; choose another directory")
        for problem in self._rows.damaged_blocks():
            raise FormatError(f"{problem}; export the store again")
        with segment.opened_plainly(self._rows.path) as fd, os.fdopen(os.dup(fd), "rb") as lines:
            for number, part in enumerate(self._files):
                arrays = part.arrays()  # verified, and so are its counts, before memory is taken for the rows
                if number < len(held):
                    for _ in range(part.n_rows):
                        _line(lines)
                else:
                    yield [_record(_line(lines), part.name, row) for row in range(part.n_rows)], arrays
            if lines.read(1):
                raise FormatError(f"{self._rows.path} has more lines than the manifest says; export the store again")


def _described(path: Path, line: dict[str, Any], kind: str) -> Segment:
    """A file of the manifest; ValueError if it cannot be."""
    name, n_rows, n_bytes, hashes = line["name"], line.get("rows", 0), line["bytes"], bytes.fromhex(line["xxh3"])
    sound = (
        (name == ROWS if kind == ROWS else bool(_NAME.fullmatch(name)) and name.startswith(kind))
        and type(n_rows) is int
        and type(n_bytes) is int
        and (1 if kind == "rows" else 0) <= n_rows < MAX_ROWS
        and 0 <= n_bytes < 2**62
        and len(hashes) == HASH * -(-n_bytes // BLOCK)
    )
    if not sound:
        raise ValueError(name)
    return Segment(0, path / name, 0, n_rows, n_bytes, hashes, _NO_ROWS, kind != "rows", set())


def _line(lines: BinaryIO) -> bytes:
    line = lines.readline(_MAX_LINE)
    if not line.endswith(b"\n"):
        raise FormatError(f"{ROWS} ends too early or has a line of over {_MAX_LINE} bytes; export the store again")
    return line


def _record(line: bytes, file: str, row: int) -> Record:
    """The record of a line that must be of this row of this file."""
    try:
        found = json.loads(line.decode())
        if (found["file"], found["row"]) != (file, row):
            raise ValueError("order")
        texts = [found[name] for name in ("id", "text", "unit", "content_hash", "raw")]
        meta, extra = found["meta"], found["extra"]
        if not all(isinstance(text, str) for text in texts) or not all(isinstance(x, dict) for x in (meta, extra)):
            raise ValueError("types")
    except (ValueError, TypeError, KeyError, RecursionError):
        raise FormatError(f"{ROWS} has no sound line for row {row} of {file}; export the store again") from None
    id, text, unit, content_hash, raw = texts
    return Record(id, text, unit, meta, content_hash, extra, raw)
