"""Reading a store at one version: a snapshot of its segments and tombstones, and queries that see no newer version."""

from __future__ import annotations

import itertools
import json
import os
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from sqlite3 import Connection
from typing import Any

import numpy as np

from leaveout.errors import FormatError, LeaveoutError, MismatchError, meant
from leaveout.store import catalogue, check, export, filters
from leaveout.store.catalogue import CATALOGUE, MAX_ROWS, SHIFT
from leaveout.store.record import COLUMNS, SOURCE, Record, deserialized
from leaveout.store.segment import BLOCK, HASH, NAME, TEMPORARY, Segment

PROOF = "purge"  # the state that holds the result of the last purge
_POSITION = (1 << SHIFT) - 1
_BATCH = 500  # values in one SQL list, below the limit of old SQLite versions
_PAGE = 2_000  # rows read in one transaction while streaming


@dataclass(frozen=True)
class Snapshot:
    """One version: what the table `store` says, the metadata fields, and the segments in order.

    traces: pieces of the purged rows that an unfinished purge still has to look for.
    """

    entries: dict[str, Any]
    fields: list[str]
    segments: list[Segment]
    sides: dict[str, Segment]
    traces: Segment | None

    @property
    def version(self) -> int:
        return self.entries["version"]

    @property
    def files(self) -> list[Segment]:
        return [*self.segments, *self.sides.values(), *([self.traces] if self.traces else [])]

    def numbers(self, keys: Sequence[int]) -> np.ndarray:
        """Row numbers of catalogue keys."""
        found = np.array(keys, np.int64)
        ids, firsts = self._starts()
        if not np.isin(found >> SHIFT, ids).all():
            raise FormatError(f"{CATALOGUE} has rows of a segment that does not exist; restore it from a copy")
        return firsts[np.searchsorted(ids, found >> SHIFT)] + (found & _POSITION) if found.size else found

    def keys(self, numbers: np.ndarray) -> list[int]:
        """Catalogue keys of row numbers."""
        ids, firsts = self._starts()
        part = np.searchsorted(firsts, numbers, side="right") - 1
        return ((ids[part] << SHIFT) + numbers - firsts[part]).tolist()

    def _starts(self) -> tuple[np.ndarray, np.ndarray]:
        pairs = np.array([(part.id, part.first) for part in self.segments], np.int64).reshape(-1, 2)
        return pairs[:, 0], pairs[:, 1]


class Reader:
    """The reading half of `Store`. It holds no connection or file: it can be forked, pickled and shared by threads."""

    def __init__(self, path: Path, verify: bool = False) -> None:
        self.path = path
        self._verified: set[str] | None = set() if verify else None
        self.refresh()

    def __len__(self) -> int:
        return self.n_rows - sum(part.tombstones.size for part in self.segments())

    @property
    def settings(self) -> dict[str, Any]:
        return json.loads(json.dumps(self._snapshot.entries["settings"]))

    @property
    def version(self) -> int:
        """Number of committed transactions."""
        return self._snapshot.version

    @property
    def n_rows(self) -> int:
        """Number of rows, tombstoned ones included."""
        return sum(part.n_rows for part in self.segments())

    def refresh(self) -> None:
        """Moves to the newest version; a store that was opened with `verify` checks its whole catalogue again."""
        self._reload()
        if self._verified is not None:
            for problem in check.catalogue_problems(self):
                raise FormatError(problem)

    def segments(self) -> list[Segment]:
        """In order of row numbers."""
        return list(self._snapshot.segments)

    def side(self, name: str) -> dict[str, np.ndarray] | None:
        """The arrays put under a name, memory-mapped; None when there are none."""
        found = self._snapshot.sides.get(name)
        return found.arrays() if found else None

    def state(self, key: str) -> Any:
        """The JSON value set under a key; None when there is none."""
        return json.loads(json.dumps(self._snapshot.entries.get(f"state.{key}")))

    def export(self, directory: str | os.PathLike[str]) -> dict[str, int]:
        """Writes the live rows, sides and states as plain files into a new or empty directory; counts of what it wrote.

        safetensors files, rows.jsonl and manifest.json (docs/reference/format.md); `Store.from_export` reads them. A directory
        that a killed export left is written again.
        Raises: FormatError if the directory holds anything else, or a segment is damaged.
        """
        return export.write(self, Path(directory))

    def rows(self, numbers: Sequence[int] | np.ndarray) -> list[Record]:
        """Entries of live rows by row number, in the given order.

        Raises: ValueError for a number that no row or a deleted row has, FormatError for an entry that is damaged.
        """
        wanted = np.asarray(numbers if len(numbers) else np.empty(0, np.int64))
        if wanted.dtype.kind not in "iu":
            raise TypeError(f"row numbers must be integers, not {wanted.dtype}")
        for number in wanted[(wanted < 0) | (wanted >= self.n_rows)]:
            raise ValueError(f"there is no row {number}: the store has {self.n_rows} rows, counted from 0")
        keys = self._snapshot.keys(wanted.astype(np.int64))
        found = {key: rest for key, *rest in self._fetch(f"rows.key, {COLUMNS}", keys, catalogue.visible(self.version))}
        for key, number in zip(keys, wanted, strict=True):
            if key not in found:
                raise ValueError(f"row {number} was deleted")
        return [deserialized(found[key]) for key in keys]

    def numbers(self, ids: Collection[str]) -> np.ndarray:
        """Row numbers [ids] of live rows; ValueError names an id that has none."""
        found = dict(self._lookup(ids))
        for missing in (id for id in ids if id not in found):
            near = meant(missing, (record.id for record in self.iter_rows()))
            raise ValueError(f"no row has the id {missing!r}: {near}give the id of a row that is there")
        return self._snapshot.numbers([found[id] for id in ids])

    def has(self, ids: Collection[str]) -> set[str]:
        """Those of the ids that a live row has."""
        return {id for id, _ in self._lookup(ids)}

    def ids(self) -> list[str]:
        """Ids of the live rows in order. Cost: memory for all of them."""
        return [id for _, id in self._stream("rows.id", "rows", catalogue.visible(self.version))]

    def iter_rows(self) -> Iterator[Record]:
        """The live rows in order, read a page at a time."""
        for _, *rest in self._stream(COLUMNS, SOURCE, catalogue.visible(self.version)):
            yield deserialized(rest)

    def select(self, where: str) -> np.ndarray:
        """Numbers, ascending, of the live rows that satisfy an SQL condition over id, unit, text and metadata fields.

        A field whose name is taken (a field "text", or "Year" after "year") is called "meta.text".
        Raises: ValueError if it is not one plain condition, names an unknown column or takes over 10 s.
        """
        with self._reading() as db:
            return self._snapshot.numbers(filters.select(db, where, self._snapshot.fields, self.version))

    def count(self, name: str) -> dict[str, int]:
        """How many live rows have each value of a field of `extra`, most first; rows without it are left out."""
        values = "json_extract(contents.extra, ?)"
        where = f"{catalogue.visible(self.version)} AND {values} IS NOT NULL"
        with self._reading() as db:
            query = f"SELECT {values}, count(*) FROM {SOURCE} WHERE {where} GROUP BY 1 ORDER BY 2 DESC, 1"
            return dict(db.execute(query, (f"$.{name}",) * 2).fetchall())

    def check(self) -> list[str]:
        """Everything that is wrong with the newest version on disk; [] if nothing is.

        Cost: reads all. Run it while no writer is at work: a file that is just being written looks like an orphan.
        """
        try:
            newest = Reader(self.path)
            found = list(check.catalogue_problems(newest))
            snapshot = newest._snapshot
            if snapshot.entries["purging"] is not False:
                problem = (newest.state(PROOF) or {}).get("problem")
                text = "the last purge is not proved" if problem else "a purge was stopped before its end"
                found.append(f"{text}; open the store for writing once" + (f": {problem}" if problem else ""))
            found += [problem for part in snapshot.files for problem in part.problems()]
            strays = orphans(self.path, snapshot)
        except (LeaveoutError, OSError) as error:
            return [str(error)]
        return found + [f"{file.name} belongs to no version; open the store for writing once" for file in strays]

    def info(self) -> dict[str, Any]:
        """Counts, bytes, arrays (dtype, shape of one row as `width`, number of rows), fields and versions."""
        arrays: Counter[tuple[str, str, tuple[int, ...]]] = Counter()
        for part in self.segments():
            for name, (dtype, shape, _) in part.layout().items():
                arrays[name, dtype.name, shape[1:]] += part.n_rows
        n_bytes = sum(part.n_bytes for part in self._snapshot.files)
        return {
            "rows": len(self),
            "deleted": self.n_rows - len(self),
            "segments": len(self.segments()),
            "bytes": n_bytes + (self.path / CATALOGUE).stat().st_size,
            "arrays": [{"name": n, "dtype": d, "width": list(w), "rows": count} for (n, d, w), count in arrays.items()],
            "sides": sorted(self._snapshot.sides),
            "fields": list(self._snapshot.fields),
            "version": self.version,
            "format": catalogue.FORMAT,
            "created": self._snapshot.entries["created"],
        }

    def _states(self) -> dict[str, Any]:
        """The values that were set, by their keys."""
        prefix = "state."
        entries = self._snapshot.entries.items()
        return {k.removeprefix(prefix): v for k, v in entries if k.startswith(prefix) and k != prefix + PROOF}

    def _reload(self) -> None:
        self._snapshot = load(self.path, self._verified)

    def _texts(self, part: Segment) -> list[str]:
        """Texts of the deleted rows of a segment, and the rows as they came."""
        keys = [(part.id << SHIFT) + position for position in part.tombstones.tolist()]
        return [text for pair in self._fetch("contents.text, contents.raw", keys, "TRUE") for text in pair]

    def _live_bytes(self) -> Iterator[bytes]:
        """What the catalogue holds of live rows; the byte 255 between strings, so that none is found across two."""
        found = bytearray()
        for _, *strings in self._stream(COLUMNS, SOURCE, catalogue.visible(self.version)):
            found += b"".join(string.encode() + b"\xff" for string in strings[:-1])
            if len(found) > BLOCK:
                yield bytes(found)
                found.clear()
        yield bytes(found)

    @contextmanager
    def _reading(self, version: int | None = None) -> Iterator[Connection]:
        """A read transaction, refused if row numbers have changed since a version, by default the snapshot's."""
        with catalogue.reading(self.path) as db:
            if catalogue.entries(db)["purged"] > (self.version if version is None else version):
                raise MismatchError(f"{self.path} was purged since it was opened; call refresh() or open it again")
            yield db

    def _fetch(self, columns: str, keys: Sequence[int], condition: str) -> list[tuple[Any, ...]]:
        """Columns of the rows with these keys, in any order."""
        found = []
        with self._reading() as db:
            for start in range(0, len(keys), _BATCH):
                wanted = ",".join(map(str, keys[start : start + _BATCH]))
                found += db.execute(f"SELECT {columns} FROM {SOURCE} WHERE rows.key IN ({wanted}) AND {condition}")
        return found

    def _lookup(self, ids: Collection[str]) -> list[tuple[str, int]]:
        """Id and key of those ids that are live."""
        wanted, found = list(ids), []
        with self._reading() as db:
            for start in range(0, len(wanted), _BATCH):
                batch = wanted[start : start + _BATCH]
                marks = ",".join("?" * len(batch))
                query = f"SELECT id, key FROM rows WHERE id IN ({marks}) AND {catalogue.visible(self.version)}"
                found += db.execute(query, batch)
        return found

    def _stream(self, columns: str, source: str, condition: str) -> Iterator[tuple[Any, ...]]:
        """Key and columns of rows in order; each page is a transaction of its own, so that a writer need not wait."""
        version = self.version
        page: list[tuple[Any, ...]] = [(-1,)]
        while page:
            query = f"SELECT rows.key, {columns} FROM {source} WHERE rows.key > {page[-1][0]} AND {condition}"
            with self._reading(version) as db:
                found = db.execute(f"{query} ORDER BY rows.key LIMIT {_PAGE}").fetchall()
            if any(one[0] >= other[0] for one, other in itertools.pairwise([page[-1], *found])):
                raise FormatError(f"{CATALOGUE} has rows out of order; restore it from a copy")
            page = found
            yield from page


def load(path: Path, verified: set[str] | None = None) -> Snapshot:
    """The newest version, every value from the catalogue checked, and the digests of all that is read here."""
    with catalogue.reading(path) as db:
        entries = catalogue.entries(db)
        fields = [name for (name,) in db.execute("SELECT name FROM fields ORDER BY field")]
        columns = "segment, name, side, n_rows, n_bytes, hashes"
        described = db.execute(f"SELECT {columns} FROM segments ORDER BY segment").fetchall()
        dead, deleted = _tombstones(db)
        tables = catalogue.digest_of_tables(db)
    segments, sides, first = [], {}, 0
    for line in described:
        number, name, side, n_rows, n_bytes, hashes = line
        if not _is_sound(line, entries["version"]):
            raise FormatError(f"{path / CATALOGUE} describes segment {number} wrongly; restore it from a copy")
        begin, end = np.searchsorted(dead, [number << SHIFT, (number + 1) << SHIFT])
        tombstones = dead[begin:end] & _POSITION
        part = Segment(number, path / name, first, n_rows, n_bytes, hashes, tombstones, side is not None, verified)
        if tombstones.size and tombstones[-1] >= n_rows:
            raise FormatError(f"{path / CATALOGUE} has deleted rows beyond segment {number}; restore it from a copy")
        if side is None:
            segments.append(part)
            first += n_rows
        else:
            sides[side] = part
    traces = _traces(path, entries)
    digests = entries["digests"]
    if tables != digests["tables"] or not all(isinstance(name, str) for name in fields):
        raise FormatError(f"{path / CATALOGUE} is damaged: segments, fields or entries differ; restore it from a copy")
    if catalogue.digest_of_pairs(dead, deleted) != digests["tombstones"]:
        raise FormatError(f"{path / CATALOGUE} is damaged: its tombstones differ; restore it from a copy")
    return Snapshot(entries, fields, segments, sides, traces)


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
    described = (entries["purging"] or {}).get("traces")
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


def orphans(path: Path, snapshot: Snapshot) -> list[Path]:
    """Files with names that the store gives, which the version does not list."""
    named = {file for file in path.iterdir() if NAME.fullmatch(file.name.removesuffix(TEMPORARY))}
    return sorted(named - {part.path for part in snapshot.files})
