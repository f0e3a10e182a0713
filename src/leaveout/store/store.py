"""A store: rows with arrays, text and metadata in a directory of immutable segments and one SQLite catalogue.

One transaction is one version. One writer at a time; any number of readers, each of which sees the version at which it
was opened or last refreshed. A store knows nothing about models: its settings are an opaque JSON object.

Row numbers: 0, 1, 2, ... in the order of `put`, tombstoned rows included. They change only by `purge`.
"""

from __future__ import annotations

import json
import os
import weakref
from collections import Counter
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from sqlite3 import Connection
from typing import Any

import numpy as np

import leaveout.store.catalogue as catalogue
import leaveout.store.check as check
import leaveout.store.filters as filters
import leaveout.store.purge as purge
import leaveout.store.segment as segment
from leaveout.errors import FormatError, LeaveoutError, MismatchError, choices, meant
from leaveout.files import TEMPORARY, sync
from leaveout.store.catalogue import (
    CATALOGUE,
    COLUMNS,
    MAX_FIELDS,
    MAX_ROWS,
    PROOF,
    SHIFT,
    SOURCE,
    Record,
    deserialized,
    serialized,
)
from leaveout.store.segment import NAME, Segment, file_name
from leaveout.store.snapshot import Snapshot

Choose = Callable[[list[Record]], Sequence[Record | None]]


class Store:
    """Rows with arrays, text and metadata in a directory; `create` or `open` it, and `close` it or use it in a `with`.

    Each writing method is one transaction, after which the store is at the new version. If a transaction fails, the
    store is closed for writing; it is at the old version, and opening it again tidies up. A store that is open for
    reading holds no connection or file: it can be forked, pickled and shared by threads.
    """

    def __init__(self, path: Path, lock: Connection | None = None, verify: bool = False) -> None:
        self.path = path
        self._verified: set[str] | None = set() if verify else None
        self.refresh()
        self._lock, self._owner = lock, os.getpid()
        self._release = weakref.finalize(self, lock.close) if lock else None

    @classmethod
    def create(cls, path: str | os.PathLike[str], settings: dict[str, Any]) -> Store:
        """A new, empty store in a new or empty directory, open for writing.

        Raises: FormatError if the directory holds a store or anything else.
        """
        path = Path(path)
        if not isinstance(settings, dict):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"settings must be a dict, not {type(settings).__name__}")
        json.dumps(settings, allow_nan=False)
        if path.exists() and not path.is_dir():
            raise FormatError(f"{path} is a file; choose another directory")
        path.mkdir(parents=True, exist_ok=True)
        sync(path.parent)
        begun = CATALOGUE + TEMPORARY  # a creation that was killed leaves these behind
        strange = {entry.name for entry in path.iterdir()} - {catalogue.LOCK, begun, f"{begun}-journal"}
        if strange and CATALOGUE not in strange:
            raise FormatError(f"{path} is not empty; choose another directory")
        lock = catalogue.lock(path)
        try:
            if os.path.lexists(path / CATALOGUE):
                raise FormatError(f"{path} already holds a store; open it, or choose another directory")
            now = datetime.now(timezone.utc).isoformat(timespec="seconds")
            first = {"settings": settings, "created": now, "version": 0, "purged": 0, "purging": False}
            catalogue.create(path, first)
            return cls(path, lock)
        except BaseException:
            lock.close()
            raise

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, write: bool = False, verify: bool = False) -> Store:
        """The store in a directory at its newest version; `write` takes the writer's lock and tidies up after crashes.

        verify: the whole catalogue is checked now, and every segment file against its hashes when it is first read.
        Without it a flipped bit of a vector, an id or a metadata field is found by `check` only.
        Raises: FormatError if it is no store, is damaged or has another format version; MismatchError if it has a
        writer already, in this process or any other.
        """
        path = Path(path)
        catalogue.inspect(path)
        if not write:
            return cls(path, verify=verify)
        lock = catalogue.lock(path)
        try:
            store = cls(path, lock, verify)
            store._tidy()
            return store
        except BaseException:
            lock.close()
            raise

    def close(self) -> None:
        """Gives up the writer's lock; a closed store can still be read."""
        if self._release:
            self._release()
        self._lock = None

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ------------------------------------------------------------ reading

    def __len__(self) -> int:
        """Number of live rows."""
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
        return self._snapshot.n_rows

    def refresh(self) -> None:
        """Moves to the newest version; a store that was opened with `verify` checks its whole catalogue again."""
        self._reload()
        if self._verified is not None:
            for problem in check.catalogue_problems(self._snapshot):
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
        lines = self._snapshot.fetch(f"rows.key, {COLUMNS}", keys, catalogue.visible(self.version))
        found = {key: rest for key, *rest in lines}
        for key, number in zip(keys, wanted, strict=True):
            if key not in found:
                raise ValueError(f"row {number} was deleted")
        return [deserialized(found[key]) for key in keys]

    def live_rows(self, part: Segment) -> tuple[list[Record], np.ndarray]:
        """Entries of the live rows of a segment of this store, and their positions in it [live rows]."""
        live = part.live()
        positions = np.arange(part.n_rows) if live is None else np.flatnonzero(live)
        return self.rows(part.first + positions), positions

    def numbers(self, ids: Collection[str]) -> np.ndarray:
        """Row numbers [ids] of live rows; ValueError names an id that has none, TypeError what is no text."""
        given: Collection[Any] = ids
        for wrong in (id for id in given if not isinstance(id, str)):
            raise TypeError(f"an id is {wrong!r}: give the text that names one row")
        found = dict(self._snapshot.lookup(ids))
        for missing in (id for id in ids if id not in found):
            near = meant(missing, (record.id for record in self.iter_rows()))
            raise ValueError(f"no row has the id {missing!r}: {near}give the id of a row that is there")
        return self._snapshot.numbers([found[id] for id in ids])

    def has(self, ids: Collection[str]) -> set[str]:
        """Those of the ids that a live row has."""
        return {id for id, _ in self._snapshot.lookup(ids)}

    def ids(self) -> list[str]:
        """Ids of the live rows in order. Cost: memory for all of them."""
        return [id for _, id in self._snapshot.stream("rows.id", "rows", catalogue.visible(self.version))]

    def iter_rows(self) -> Iterator[Record]:
        """The live rows in order, read a page at a time."""
        return self._snapshot.records()

    def numbers_where(self, where: str) -> np.ndarray:
        """Numbers, ascending, of the live rows that satisfy an SQL condition over id, unit, text and metadata fields.

        A field whose name is taken (a field "text", or "Year" after "year") is called "meta.text".
        Raises: ValueError if it is not one plain condition, names an unknown column or takes over 10 s.
        """
        with self._snapshot.reading() as db:
            return self._snapshot.numbers(filters.matching(db, where, self._snapshot.fields, self.version))

    def unmatched(self, where: str, called: str = "row") -> str:
        """That nothing satisfies a condition, as a sentence that also says which values the fields have that it names."""
        named = filters.named_in(where, self._snapshot.fields)
        has = "; ".join(f"{field} has {_values(self.tally(field))}" for field in named)
        return f"No {called} satisfies {where!r}{has and ': '}{has}."

    def count(self, name: str) -> dict[str, int]:
        """How many live rows have each value of a field of `extra`, most first; rows without it are left out."""
        values = "json_extract(contents.extra, ?)"
        where = f"{catalogue.visible(self.version)} AND {values} IS NOT NULL"
        with self._snapshot.reading() as db:
            query = f"SELECT {values}, count(*) FROM {SOURCE} WHERE {where} GROUP BY 1 ORDER BY 2 DESC, 1"
            return dict(db.execute(query, (f"$.{name}",) * 2).fetchall())

    def tally(self, field: str) -> dict[str, int]:
        """How many live rows have each value of a metadata field (or `unit`) as text, most first; "" where there is none.

        Raises: ValueError for a field that no row has.
        """
        self._require_field(field)
        value, given = "rows.unit", ()
        if field != "unit":
            value, given = "(SELECT value FROM json_each(rows.meta) WHERE json_each.key = ?)", (field,)
        query = f"SELECT coalesce(CAST({value} AS TEXT), ''), count(*) FROM rows"
        with self._snapshot.reading() as db:
            found = db.execute(f"{query} WHERE {catalogue.visible(self.version)} GROUP BY 1 ORDER BY 2 DESC, 1", given)
            return dict(found.fetchall())

    def among(self, field: str, values: Sequence[str]) -> str:
        """The SQL condition for rows whose value of a field is one of these, as `tally` names them."""
        self._require_field(field)
        return filters.among(field, values, self._snapshot.fields)

    def _require_field(self, name: str) -> None:
        if name not in (known := ["unit", *self._snapshot.fields]):
            raise ValueError(f"there is no field {name!r}: {choices(name, known)}")

    def check(self) -> list[str]:
        """Everything that is wrong with the newest version on disk; [] if nothing is.

        Cost: reads all. Run it while no writer is at work: a file that is just being written looks like an orphan.
        """
        return check.problems(self.path)

    def info(self) -> dict[str, Any]:
        """Counts, bytes, arrays (dtype, shape of one row as `width`, number of rows), fields and versions."""
        arrays: Counter[tuple[str, str, tuple[int, ...]]] = Counter()
        for part in self.segments():
            for name, (dtype, shape, _) in part.layout().items():
                arrays[name, str(dtype), shape[1:]] += part.n_rows
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

    # ------------------------------------------------------------ writing

    def put(self, records: Sequence[Record], arrays: Mapping[str, np.ndarray]) -> None:
        """Adds rows as one segment.

        Shapes: arrays name -> [rows, ...], of float16-64, int8-64 or uint8-64.
        Raises: FormatError naming an id that a live row has or that comes twice; then nothing is written.
        """
        self._require_writer()
        if not 1 <= len(records) < MAX_ROWS:
            raise ValueError(f"put needs 1 to {MAX_ROWS - 1} records, not {len(records)}")
        for name, values in arrays.items():
            if values.shape[:1] != (len(records),):
                raise ValueError(f"array {name!r} has shape {list(values.shape)} for {len(records)} records")
        self._add(records, arrays)

    def take(self, other: Store, part: Segment, choose: Choose | None = None) -> int:
        """Adds the live rows of a segment of another store, as one segment; how many it added.

        choose: for the entries of the live rows the entries to add them under, None for a row to leave out. Without it
        the rows whose ids are here are left out.
        Memory: the entries of one segment. Its arrays are copied a few MiB at a time.
        Raises: FormatError naming an id that is here or comes twice; then nothing is written.
        """
        self._require_writer()
        records, positions = other.live_rows(part)
        chosen = list((choose or self._absent)(records))
        keep = np.zeros(part.n_rows, bool)
        keep[positions[[record is not None for record in chosen]]] = True
        if added := [record for record in chosen if record is not None]:
            self._add(added, part.arrays(), keep)
        return len(added)

    def put_side(self, name: str, arrays: Mapping[str, np.ndarray]) -> None:
        """Sets the arrays under a name, which belong to no row; replaces those that were there."""
        self._require_writer()
        if not isinstance(name, str):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"the name must be a string, not {type(name).__name__}")
        replaced = [part for side, part in self._snapshot.sides.items() if side == name]
        number = self.version + 1
        file = self.path / file_name(number, number)
        n_bytes, hashes = segment.write(file, arrays)
        with self._transaction() as db:
            db.execute("DELETE FROM segments WHERE side = ?", (name,))
            db.execute("INSERT INTO segments VALUES (?, ?, ?, 0, ?, ?)", (number, file.name, name, n_bytes, hashes))
        self._remove([part.path for part in replaced])

    def set_state(self, key: str, value: Any) -> None:
        """Sets one small JSON value."""
        self._require_writer()
        if not isinstance(key, str):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"the key must be a string, not {type(key).__name__}")
        if f"state.{key}" == PROOF:
            raise ValueError(f"the state {key!r} is set by purge only; use another key")
        json.dumps(value, allow_nan=False)  # refused here, not in the transaction
        with self._transaction() as db:
            catalogue.set_entry(db, f"state.{key}", value)

    def delete(self, ids: Collection[str]) -> int:
        """Hides rows at once; how many of the ids were live. Their bytes stay until `purge`."""
        self._require_writer()
        keys = sorted({key for _, key in self._snapshot.lookup(ids)})
        if keys:
            number = self.version + 1
            with self._transaction() as db:
                db.executemany("UPDATE rows SET deleted = ? WHERE key = ?", ((number, key) for key in keys))
                added = catalogue.digest_of_pairs(keys, np.full(len(keys), number))
                catalogue.shift_digests(db, tombstones=added)
        return len(keys)

    def purge(self) -> dict[str, int]:
        """Rewrites what holds deleted rows and proves that their bytes are gone; counts of rows, segments and files.

        Row numbers change, and readers must refresh. A purge that was killed after its commit is finished, the scan
        included, by the next open for writing. The result of the scan is the state "purge": `problem` is None, or says
        in which file bytes were found; then each open for writing scans again, until there are none.
        Raises: FormatError if a segment is damaged (then nothing changes), or naming a file in which bytes were found.
        """
        self._require_writer()
        holed = [part for part in self.segments() if part.tombstones.size]
        if not holed:
            return {"rows": 0, "segments": 0, "files": 0}
        number = self.version + 1
        purging: dict[str, Any] = {"rows": sum(part.tombstones.size for part in holed), "segments": len(holed)}
        if arrays := purge.traces_of(self._snapshot, holed).arrays():
            file = self.path / file_name(number, number)
            n_bytes, hashes = segment.write(file, arrays)
            purging["traces"] = {"name": file.name, "bytes": n_bytes, "xxh3": hashes.hex()}
        rewritten = [purge.rewritten(part, number) for part in holed]
        replaced = [part.path for part in [*holed, *([self._snapshot.traces] if self._snapshot.traces else [])]]
        with self._transaction() as db:
            for old, new in zip(holed, rewritten, strict=True):
                purge.put_in_place(db, old, new)
            catalogue.shift_digests(db, tombstones=-self._snapshot.entries["digests"]["tombstones"])
            used = "SELECT DISTINCT json_each.key FROM rows, json_each(rows.meta)"
            db.execute(f"DELETE FROM fields WHERE name NOT IN ({used})")
            catalogue.set_entry(db, "purged", number)
            catalogue.set_entry(db, "purging", purging)
        self._remove(replaced)
        proof = self._finish_purge()
        if proof["problem"]:
            raise FormatError(proof["problem"])
        return {name: proof[name] for name in ("rows", "segments", "files")}

    # ------------------------------------------------------------ how it is written

    def _require_writer(self) -> None:
        if self._lock is None or self._owner != os.getpid():  # a lock does not pass to a forked child
            raise ValueError(f"{self.path} is open for reading only; use Store.open(path, write=True)")

    def _reload(self) -> None:
        self._snapshot = Snapshot.load(self.path, self._verified)

    @contextmanager
    def _transaction(self) -> Generator[Connection]:
        """One version: all of it or nothing."""
        try:
            with catalogue.writing(self.path) as db:
                yield db
                catalogue.set_entry(db, "version", self.version + 1)
            self._reload()
        except BaseException:
            self.close()  # whether the commit was made must be read from the disk again
            raise

    def _add(self, records: Sequence[Record], arrays: Mapping[str, np.ndarray], keep: np.ndarray | None = None) -> None:
        """Adds one segment: of the rows of the arrays that `keep` marks [rows], or of all."""
        lines = [serialized(record) for record in records]
        self._refuse_known([record.id for record in records])
        fields = self._new_fields(records)
        number = self.version + 1
        file = self.path / file_name(number, number)
        n_bytes, hashes = segment.write(file, arrays, keep)
        with self._transaction() as db:
            line = (number, file.name, None, len(records), n_bytes, hashes)
            db.execute("INSERT INTO segments VALUES (?, ?, ?, ?, ?, ?)", line)
            keys = range(number << SHIFT, (number << SHIFT) + len(records))
            checksums = [digest for *_, digest in lines]
            rows = ((key, one[0], one[1], 0, one[3]) for key, one in zip(keys, lines, strict=True))
            catalogue.insert(db, "rows", rows)
            contents = ((key, one[4], one[5], one[7], one[2], one[6]) for key, one in zip(keys, lines, strict=True))
            catalogue.insert(db, "contents", contents)
            db.executemany("INSERT INTO fields (name) VALUES (?)", ((name,) for name in fields))
            added = catalogue.digest_of_pairs(keys, catalogue.as_numbers(checksums))
            catalogue.shift_digests(db, rows=added)

    def _absent(self, records: list[Record]) -> list[Record | None]:
        known = self.has([record.id for record in records])
        return [None if record.id in known else record for record in records]

    def _refuse_known(self, ids: list[str]) -> None:
        for id in (id for id, count in Counter(ids).items() if count > 1):
            raise FormatError(f"the id {id!r} comes twice; give every row its own")
        for id in self.has(ids):
            raise FormatError(f"the id {id!r} is in the store already; delete that row first, or leave this one out")

    def _new_fields(self, records: Sequence[Record]) -> list[str]:
        """Metadata fields that the store does not know yet, by first appearance."""
        known = dict.fromkeys(self._snapshot.fields)
        names = known | dict.fromkeys(name for record in records for name in record.meta)
        if len(names) > MAX_FIELDS:
            raise FormatError(f"the rows have more than {MAX_FIELDS} metadata fields; put rare ones into `extra`")
        return list(names)[len(known) :]

    def _remove(self, files: list[Path]) -> None:
        for file in files:
            file.unlink(missing_ok=True)
        if files:
            sync(self.path)

    def _tidy(self) -> None:
        """Removes what a killed writer left: temporary files, segments of no version, an unfinished purge."""
        strays = self._snapshot.strays()
        for file in strays:
            match = NAME.fullmatch(file.name)
            if match and int(match[2]) > self.version + 1:
                text = f"{file} is newer than the catalogue, which is at version {self.version}"
                raise MismatchError(f"{text}; restore the {CATALOGUE} that belongs to it")
        self._remove(strays)
        if self._snapshot.entries["purging"] is not False:
            self._finish_purge()

    def _finish_purge(self) -> dict[str, Any]:
        """Rewrites the catalogue and proves the purge; the proof, which is also recorded."""
        catalogue.vacuum(self.path)
        purging, left = self._snapshot.entries["purging"], self._snapshot.traces
        proof = {"version": self._snapshot.entries["purged"], "rows": purging["rows"], "segments": purging["segments"]}
        proof |= {"files": 0, "problem": None}
        try:
            proof["files"] = purge.prove_absent(self._snapshot)
        except LeaveoutError as error:
            proof["problem"] = str(error)
        with catalogue.writing(self.path) as db:
            catalogue.set_entry(db, PROOF, proof)
            if not proof["problem"]:
                catalogue.set_entry(db, "purging", False)
        self._reload()
        if left and not proof["problem"]:
            self._remove([left.path])
        return proof


def _values(counts: Mapping[str, int], most: int = 6) -> str:
    """The commonest values of a field, those of `Store.tally`."""
    shown = [repr(f"{value[:39]}…" if len(value) > 40 else value) if value else "none" for value in list(counts)[:most]]
    return ", ".join(shown) + (f" and {len(counts) - most:,} more" if len(counts) > most else "")
