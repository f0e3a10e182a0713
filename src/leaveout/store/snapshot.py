"""One version of a store: its segments and tombstones, and queries of the catalogue that see no newer version."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from sqlite3 import Connection
from typing import Any

import numpy as np

import leaveout.store.catalogue as catalogue
from leaveout.errors import FormatError, MismatchError
from leaveout.files import TEMPORARY
from leaveout.store.catalogue import CATALOGUE, COLUMNS, MAX_ROWS, SHIFT, SOURCE, Record, deserialized
from leaveout.store.segment import BLOCK, HASH, NAME, Segment

POSITION = (1 << SHIFT) - 1  # the part of a row's key that is its position in the segment

_BATCH = 500  # values in one SQL list, below the limit of old SQLite versions
_PAGE = 2_000  # rows read in one transaction while streaming


@dataclass(frozen=True)
class Snapshot:
    """What the table `store` says, the metadata fields, and the segments in order, at one version.

    It holds no connection or file: it can be forked, pickled and shared by threads. Its queries are refused once a
    purge has changed the row numbers.

    traces: pieces of the purged rows that an unfinished purge still has to look for.
    """

    path: Path
    entries: dict[str, Any]
    fields: list[str]
    segments: list[Segment]
    sides: dict[str, Segment]
    traces: Segment | None

    @classmethod
    def load(cls, path: Path, verified: set[str] | None = None) -> Snapshot:
        """The newest version, every value checked, and the digests of all that is read here; verified: see Segment."""
        with catalogue.reading(path) as db:
            entries = catalogue.entries(db)
            fields = [name for (name,) in db.execute("SELECT name FROM fields ORDER BY field")]
            columns = "segment, name, side, n_rows, n_bytes, hashes"
            described = db.execute(f"SELECT {columns} FROM segments ORDER BY segment").fetchall()
            dead, deleted = _tombstones(db)
            tables = catalogue.digest_of_tables(db)
        segments: list[Segment] = []
        sides: dict[str, Segment] = {}
        first = 0
        for line in described:
            number, name, side, n_rows, n_bytes, hashes = line
            if not _is_sound(line, entries["version"]):
                raise FormatError(f"{path / CATALOGUE} describes segment {number} wrongly; restore it from a copy")
            begin, end = np.searchsorted(dead, [number << SHIFT, (number + 1) << SHIFT])
            tombstones = dead[begin:end] & POSITION
            part = Segment(number, path / name, first, n_rows, n_bytes, hashes, tombstones, side is not None, verified)
            if tombstones.size and tombstones[-1] >= n_rows:
                raise FormatError(
                    f"{path / CATALOGUE} has deleted rows beyond segment {number}; restore it from a copy"
                )
            if side is None:
                segments.append(part)
                first += n_rows
            else:
                sides[side] = part
        traces = _traces(path, entries)
        digests = entries["digests"]
        if tables != digests["tables"] or not all(isinstance(name, str) for name in fields):
            text = f"{path / CATALOGUE} is damaged: segments, fields or entries differ"
            raise FormatError(f"{text}; restore it from a copy")
        if catalogue.digest_of_pairs(dead, deleted) != digests["tombstones"]:
            raise FormatError(f"{path / CATALOGUE} is damaged: its tombstones differ; restore it from a copy")
        return cls(path, entries, fields, segments, sides, traces)

    @property
    def version(self) -> int:
        return self.entries["version"]

    @property
    def n_rows(self) -> int:
        """Number of rows, tombstoned ones included."""
        return sum(part.n_rows for part in self.segments)

    @property
    def files(self) -> list[Segment]:
        return [*self.segments, *self.sides.values(), *([self.traces] if self.traces else [])]

    def strays(self) -> list[Path]:
        """Files with names that the store gives, which this version does not list."""
        named = {file for file in self.path.iterdir() if NAME.fullmatch(file.name.removesuffix(TEMPORARY))}
        return sorted(named - {part.path for part in self.files})

    def numbers(self, keys: Sequence[int]) -> np.ndarray:
        """Row numbers of catalogue keys."""
        found = np.array(keys, np.int64)
        ids, firsts = self._starts()
        if not np.isin(found >> SHIFT, ids).all():
            raise FormatError(f"{CATALOGUE} has rows of a segment that does not exist; restore it from a copy")
        return firsts[np.searchsorted(ids, found >> SHIFT)] + (found & POSITION) if found.size else found

    def keys(self, numbers: np.ndarray) -> list[int]:
        """Catalogue keys of row numbers."""
        ids, firsts = self._starts()
        part = np.searchsorted(firsts, numbers, side="right") - 1
        return ((ids[part] << SHIFT) + numbers - firsts[part]).tolist()

    def _starts(self) -> tuple[np.ndarray, np.ndarray]:
        ids, firsts = ([part.id for part in self.segments], [part.first for part in self.segments])
        return np.array(ids, np.int64), np.array(firsts, np.int64)

    @contextmanager
    def reading(self) -> Generator[Connection]:
        """A read transaction, refused if row numbers have changed since this version."""
        with catalogue.reading(self.path) as db:
            if catalogue.entries(db)["purged"] > self.version:
                raise MismatchError(f"{self.path} was purged since it was opened; call refresh() or open it again")
            yield db

    def fetch(self, columns: str, keys: Sequence[int], condition: str) -> list[tuple[Any, ...]]:
        """Columns of the rows with these keys, in any order."""
        found: list[tuple[Any, ...]] = []
        with self.reading() as db:
            for start in range(0, len(keys), _BATCH):
                wanted = ",".join(map(str, keys[start : start + _BATCH]))
                found += db.execute(f"SELECT {columns} FROM {SOURCE} WHERE rows.key IN ({wanted}) AND {condition}")
        return found

    def lookup(self, ids: Collection[str]) -> list[tuple[str, int]]:
        """Id and key of those ids that are live."""
        wanted = list(ids)
        found: list[tuple[str, int]] = []
        with self.reading() as db:
            for start in range(0, len(wanted), _BATCH):
                batch = wanted[start : start + _BATCH]
                marks = ",".join("?" * len(batch))
                query = f"SELECT id, key FROM rows WHERE id IN ({marks}) AND {catalogue.visible(self.version)}"
                found += db.execute(query, batch)
        return found

    def stream(self, columns: str, source: str, condition: str) -> Iterator[tuple[Any, ...]]:
        """Key and columns of rows in order; each page is a transaction of its own, so that a writer need not wait."""
        page: list[tuple[Any, ...]] = [(-1,)]
        more = True
        while more:
            query = f"SELECT rows.key, {columns} FROM {source} WHERE rows.key > {page[-1][0]} AND {condition}"
            with self.reading() as db:
                found = db.execute(f"{query} ORDER BY rows.key LIMIT {_PAGE}").fetchall()
            if any(one[0] >= other[0] for one, other in itertools.pairwise([page[-1], *found])):
                raise FormatError(f"{CATALOGUE} has rows out of order; restore it from a copy")
            page, more = found, len(found) == _PAGE
            yield from page

    def records(self) -> Iterator[Record]:
        """The entries of the live rows in order, read a page at a time."""
        for _, *strings in self.stream(COLUMNS, SOURCE, catalogue.visible(self.version)):
            yield deserialized(strings)


def _tombstones(db: Connection) -> tuple[np.ndarray, np.ndarray]:
    """Keys, ascending, of the deleted rows, and the versions that deleted them; 16 bytes of memory for each."""
    lines = db.execute("SELECT key, deleted FROM rows WHERE deleted > 0")
    try:
        found = np.fromiter(lines, np.dtype((np.int64, 2)))
    except (TypeError, ValueError, OverflowError):
        raise FormatError(f"{CATALOGUE} has tombstones that are no versions; restore it from a copy") from None
    found = found[np.argsort(found[:, 0])]
    return found[:, 0], found[:, 1]


def _traces(path: Path, entries: dict[str, Any]) -> Segment | None:
    """The file that an unfinished purge has left to find the purged rows by, if there is one."""
    purging: dict[str, Any] = entries["purging"] or {}
    described: Any = purging.get("traces")
    if described is None:
        return None
    try:
        name, n_bytes, hashes = described["name"], described["bytes"], bytes.fromhex(described["xxh3"])
        number = int(name[:8])
    except (TypeError, ValueError, KeyError):
        number, name, n_bytes, hashes = 0, "", 0, b""
    if not _is_sound((number, name, "traces", 0, n_bytes, hashes), entries["version"]):
        raise FormatError(f"{path / CATALOGUE} describes its purge wrongly; restore it from a copy")
    return Segment(number, path / name, 0, 0, n_bytes, hashes, np.empty(0, np.int64), is_side=True)


def _is_sound(line: tuple[Any, ...], version: int) -> bool:
    """Whether a line of the table `segments` can be true."""
    number, name, side, n_rows, n_bytes, hashes = line
    match = NAME.fullmatch(name) if isinstance(name, str) else None
    return (
        match is not None
        and int(match[1]) == number
        and 1 <= number <= int(match[2]) <= version < MAX_ROWS
        and type(n_rows) is int
        and 0 <= n_rows < MAX_ROWS
        and (n_rows > 0 if side is None else n_rows == 0 and isinstance(side, str))
        and type(n_bytes) is int
        and isinstance(hashes, bytes)
        and len(hashes) == HASH * -(-n_bytes // BLOCK)
    )
