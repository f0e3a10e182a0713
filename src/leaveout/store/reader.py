"""Reading a store at one version: a snapshot of its segments and tombstones, and queries that see no newer version."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from sqlite3 import Connection
from typing import Any

import numpy as np

from leaveout.errors import FormatError, LeaveoutError, MismatchError
from leaveout.store import catalogue
from leaveout.store.catalogue import CATALOGUE, SHIFT
from leaveout.store.segment import BLOCK, HASH, NAME, TEMPORARY, Segment

MAX_ROWS = 1 << 31  # of one segment, and versions of one store

_POSITION = (1 << SHIFT) - 1
_SCALARS = (str, int, float, type(None))
_JSON = json.JSONEncoder(ensure_ascii=False, allow_nan=False)
_BATCH = 500  # values in one SQL list, below the limit of old SQLite versions
_PAGE = 2_000  # rows read in one transaction while streaming
_RECORD = "rows.id, rows.unit, contents.text, rows.meta, contents.content_hash, contents.extra, contents.checksum"
_FROM = "rows JOIN contents ON contents.key = rows.key"


@dataclass(frozen=True)
class Record:
    """One row's entry in the catalogue. meta: field -> string, number, bool or None. extra: a small JSON object."""

    id: str
    text: str
    unit: str
    meta: dict[str, Any] = field(default_factory=dict)
    content_hash: str = ""
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Snapshot:
    """One version: what the table `store` says, the metadata fields, and the segments in order."""

    entries: dict[str, Any]
    fields: list[str]
    segments: list[Segment]
    sides: dict[str, Segment]

    @property
    def version(self) -> int:
        return self.entries["version"]

    @property
    def files(self) -> list[Segment]:
        return [*self.segments, *self.sides.values()]

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

    def __init__(self, path: Path) -> None:
        self.path = path
        self._snapshot = load(path)

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
        """Moves to the newest version."""
        self._snapshot = load(self.path)

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
        found = {key: rest for key, *rest in self._fetch(f"rows.key, {_RECORD}", keys, catalogue.visible(self.version))}
        for key, number in zip(keys, wanted, strict=True):
            if key not in found:
                raise ValueError(f"row {number} was deleted")
        return [_record(found[key]) for key in keys]

    def numbers(self, ids: Collection[str]) -> np.ndarray:
        """Row numbers [ids] of live rows; ValueError names an id that has none."""
        found = dict(self._lookup(ids))
        for missing in (id for id in ids if id not in found):
            raise ValueError(f"no row has the id {missing!r}")
        return self._snapshot.numbers([found[id] for id in ids])

    def has(self, ids: Collection[str]) -> set[str]:
        """Those of the ids that a live row has."""
        return {id for id, _ in self._lookup(ids)}

    def ids(self) -> list[str]:
        """Ids of the live rows in order. Cost: memory for all of them."""
        return [id for _, id in self._stream("rows.id", "rows", catalogue.visible(self.version))]

    def iter_rows(self) -> Iterator[Record]:
        """The live rows in order, read a page at a time."""
        for _, *rest in self._stream(_RECORD, _FROM, catalogue.visible(self.version)):
            yield _record(rest)

    def select(self, where: str) -> np.ndarray:
        """Numbers, ascending, of the live rows that satisfy an SQL condition over id, unit, text and metadata fields.

        A field whose name is taken (a field "text", or "Year" after "year") is called "meta.text".
        Raises: ValueError if it is not one plain condition, names an unknown column or takes over 10 s.
        """
        with self._reading() as db:
            return self._snapshot.numbers(catalogue.select(db, where, self._snapshot.fields, self.version))

    def check(self) -> list[str]:
        """Everything that is wrong with the newest version on disk; [] if nothing is.

        Cost: reads all. Run it while no writer is at work: a file that is just being written looks like an orphan.
        """
        try:
            newest = Reader(self.path)
            snapshot = newest._snapshot
            with catalogue.reading(self.path) as db:
                found = [f"{CATALOGUE}: {text}" for (text,) in db.execute("PRAGMA integrity_check") if text != "ok"]
                found += _count_problems(db, snapshot)
            found += _damaged_records(newest._stream(_RECORD, _FROM, "TRUE"))
        except (LeaveoutError, OSError) as error:
            return [str(error)]
        if snapshot.entries["purging"]:
            found.append("a purge was stopped before its end; open the store for writing once")
        found += [problem for part in snapshot.files for problem in part.problems()]
        strays = orphans(self.path, snapshot)
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

    def _texts(self, part: Segment) -> list[str]:
        """Texts of the deleted rows of a segment."""
        keys = [(part.id << SHIFT) + position for position in part.tombstones.tolist()]
        return [text for (text,) in self._fetch("contents.text", keys, "TRUE")]

    def _live_bytes(self) -> Iterator[bytes]:
        """What the catalogue holds of live rows; the byte 255 between strings, so that none is found across two."""
        found = bytearray()
        for _, *strings in self._stream(_RECORD, _FROM, catalogue.visible(self.version)):
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
                found += db.execute(f"SELECT {columns} FROM {_FROM} WHERE rows.key IN ({wanted}) AND {condition}")
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
                page = db.execute(f"{query} ORDER BY rows.key LIMIT {_PAGE}").fetchall()
            yield from page


def load(path: Path) -> Snapshot:
    """The newest version, every value from the catalogue checked."""
    with catalogue.reading(path) as db:
        entries = catalogue.entries(db)
        fields = [name for (name,) in db.execute("SELECT name FROM fields ORDER BY field")]
        columns = "segment, name, side, n_rows, n_bytes, hashes"
        described = db.execute(f"SELECT {columns} FROM segments ORDER BY segment").fetchall()
        cursor = db.execute("SELECT key FROM rows WHERE deleted > 0")
        dead = np.sort(np.fromiter((key for (key,) in cursor), np.int64))
    version = entries.get("version")
    if type(version) is not int or not {"settings", "created", "purged", "purging"} <= entries.keys():
        raise FormatError(f"{path / CATALOGUE} lacks entries that every store has; restore it from a copy")
    segments, sides, first = [], {}, 0
    for line in described:
        number, name, side, n_rows, n_bytes, hashes = line
        if not _is_sound(line, version):
            raise FormatError(f"{path / CATALOGUE} describes segment {number} wrongly; restore it from a copy")
        begin, end = np.searchsorted(dead, [number << SHIFT, (number + 1) << SHIFT])
        tombstones = dead[begin:end] & _POSITION
        part = Segment(number, path / name, first, n_rows, n_bytes, hashes, tombstones, is_side=side is not None)
        if tombstones.size and tombstones[-1] >= n_rows:
            raise FormatError(f"{path / CATALOGUE} has deleted rows beyond segment {number}; restore it from a copy")
        if side is None:
            segments.append(part)
            first += n_rows
        else:
            sides[side] = part
    return Snapshot(entries, fields, segments, sides)


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


def serialized(record: Record) -> tuple[str, ...]:
    """A record as the catalogue's strings: id, unit, text, meta, content hash, extra.

    Raises: FormatError if it is not valid Unicode and JSON.
    """
    for name, value in record.meta.items():
        if not isinstance(name, str) or "\0" in name or not isinstance(value, _SCALARS):
            text = f"row {record.id!r}: metadata field {name!r} is {type(value).__name__}"
            raise FormatError(f"{text}; fields have plain names, and are strings, numbers, bools or None")
    try:
        meta, extra = _JSON.encode(record.meta), _JSON.encode(record.extra)
        strings = (record.id, record.unit, record.text, meta, record.content_hash, extra)
        "".join(strings).encode()
    except (TypeError, ValueError, AttributeError) as error:
        raise FormatError(f"row {record.id!r} cannot be stored: {error}") from None
    return strings


def _record(strings: Sequence[Any]) -> Record:
    """A record from the columns _RECORD."""
    id, unit, text, meta, content_hash, extra, digest = strings
    if not all(isinstance(part, str) for part in strings[:-1]) or catalogue.checksum(*strings[:-1]) != digest:
        raise FormatError(f"the catalogue's entry of row {id!r} is damaged; restore {CATALOGUE} from a copy")
    try:
        return Record(id, text, unit, json.loads(meta), content_hash, json.loads(extra))
    except (ValueError, RecursionError):
        raise FormatError(f"the catalogue's entry of row {id!r} is not JSON; restore {CATALOGUE} from a copy") from None


def _damaged_records(rows: Iterator[tuple[Any, ...]]) -> Iterator[str]:
    for key, *strings in rows:
        try:
            _record(strings)
        except FormatError as error:
            yield f"{error} (key {key})"


def _count_problems(db: Connection, snapshot: Snapshot) -> list[str]:
    """Rows that no segment has, segments without their rows, rows without contents."""
    counts = f"SELECT key >> {SHIFT}, count(*), min(key & {_POSITION}), max(key & {_POSITION}) FROM rows GROUP BY 1"
    found = {number: rest for number, *rest in db.execute(counts)}
    wanted = {part.id: [part.n_rows, 0, part.n_rows - 1] for part in snapshot.segments}
    problems = [
        f"segment {number} has {wanted.get(number, [0])[0]} rows but the catalogue lists {found.get(number, [0])[0]}"
        for number in sorted(found.keys() | wanted.keys())
        if found.get(number) != wanted.get(number)
    ]
    for one, other in (("rows", "contents"), ("contents", "rows")):
        query = f"SELECT count(*) FROM {one} WHERE key NOT IN (SELECT key FROM {other})"
        if count := db.execute(query).fetchone()[0]:
            problems.append(f"{count} rows of table {one} are not in table {other}")
    query = f"SELECT count(*) FROM rows WHERE deleted NOT BETWEEN 0 AND {snapshot.version}"
    if count := db.execute(query).fetchone()[0]:
        problems.append(f"{count} rows were deleted in a version that does not exist")
    return problems
