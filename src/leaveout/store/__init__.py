"""The one on-disk format: a directory of immutable segments and one SQLite catalogue (docs/reference/format.md).

One transaction is one version. One writer at a time; any number of readers, each of which sees the version at which it
was opened or last refreshed. A store knows nothing about models: its settings are an opaque JSON object.

Row numbers: 0, 1, 2, ... in the order of `put`, tombstoned rows included. They change only by `purge`.
"""

from __future__ import annotations

import json
import os
import weakref
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from sqlite3 import Connection
from typing import Any

import numpy as np

from leaveout.errors import FormatError, LeaveoutError, MismatchError
from leaveout.store import catalogue, export, merge, purge, segment
from leaveout.store.catalogue import CATALOGUE, MAX_FIELDS, MAX_ROWS, SHIFT
from leaveout.store.reader import PROOF, Reader, orphans
from leaveout.store.record import Record, serialized
from leaveout.store.segment import NAME, TEMPORARY, Segment, file_name, sync_directory

__all__ = ["Record", "Segment", "Store"]


class Store(Reader):
    """Rows with arrays, text and metadata in a directory; `create` or `open` it, and `close` it or use it in a `with`.

    Each writing method is one transaction, after which the store is at the new version. If a transaction fails, the
    store is closed for writing; it is at the old version, and opening it again tidies up.
    """

    def __init__(self, path: Path, lock: Connection | None = None, verify: bool = False) -> None:
        super().__init__(path, verify)
        self._lock, self._owner = lock, os.getpid()
        self._release = weakref.finalize(self, lock.close) if lock else None

    @classmethod
    def create(cls, path: str | os.PathLike[str], settings: dict[str, Any]) -> Store:
        """A new, empty store in a new or empty directory, open for writing.

        Raises: FormatError if the directory holds a store or anything else.
        """
        path = Path(path)
        if not isinstance(settings, dict):
            raise TypeError(f"settings must be a dict, not {type(settings).__name__}")
        json.dumps(settings, allow_nan=False)
        if path.exists() and not path.is_dir():
            raise FormatError(f"{path} is a file; choose another directory")
        path.mkdir(parents=True, exist_ok=True)
        sync_directory(path.parent)
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

    @classmethod
    def from_export(cls, path: str | os.PathLike[str], directory: str | os.PathLike[str]) -> Store:
        """A new store of what `export` wrote into a directory, open for writing; killed, the same call goes on.

        Raises: FormatError if the directory is no complete export, or the path holds a store of anything else.
        """
        exported = export.Export.open(Path(directory))
        begun = os.path.lexists(Path(path) / CATALOGUE)
        store = cls.open(path, write=True) if begun else cls.create(path, exported.settings)
        try:
            for records, arrays in exported.missing_parts(store):
                store.put(records, arrays)
            store._add_absent(exported.sides(), exported.states)
            return store
        except BaseException:
            store.close()
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

    def merge(self, other: str | os.PathLike[str]) -> dict[str, int]:
        """Adds the live rows of another store with equal settings, segment by segment; counts of what was done.

        A row whose id is live here already is skipped if text, content hash and arrays are equal; its unit, metadata
        and `extra` stay as they are here. Sides and states that are absent here are copied, states that are here stay.
        Each segment is one transaction: killed, the same call finishes. Memory: the catalogue entries of one segment.
        Raises: MismatchError for other settings, or a side that differs from that here; FormatError if the other store
        is damaged, or naming an id whose rows differ: then nothing is written. MismatchError if the other store is
        purged meanwhile.
        """
        self._require_writer()
        there = Store.open(other, verify=True)
        if os.path.samefile(self.path, there.path):
            raise ValueError(f"{other} is the store itself; give another one")
        merge.refuse_unequal(self, there)
        counts = {"rows": 0, "skipped": 0, "segments": 0}
        for part in there.segments():
            fresh, n_known = merge.fresh_rows(self, there, part)
            counts["skipped"] += n_known
            if n_fresh := int(fresh.sum()):
                self._add(there.rows(part.first + np.flatnonzero(fresh)), part.arrays(), fresh)
                counts["rows"] += n_fresh
                counts["segments"] += 1
        sides = ((name, part.arrays()) for name, part in there._snapshot.sides.items())
        return counts | self._add_absent(sides, there._states())

    def put_side(self, name: str, arrays: Mapping[str, np.ndarray]) -> None:
        """Sets the arrays under a name, which belong to no row; replaces those that were there."""
        self._require_writer()
        if not isinstance(name, str):
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
        if not isinstance(key, str):
            raise TypeError(f"the key must be a string, not {type(key).__name__}")
        if key == PROOF:
            raise ValueError(f"the state {PROOF!r} is set by purge only; use another key")
        json.dumps(value, allow_nan=False)  # refused here, not in the transaction
        with self._transaction() as db:
            catalogue.set_entry(db, f"state.{key}", value)

    def delete(self, ids: Collection[str]) -> int:
        """Hides rows at once; how many of the ids were live. Their bytes stay until `purge`."""
        self._require_writer()
        keys = sorted({key for _, key in self._lookup(ids)})
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
        if arrays := self._traces(holed).arrays():
            file = self.path / file_name(number, number)
            n_bytes, hashes = segment.write(file, arrays)
            purging["traces"] = {"name": file.name, "bytes": n_bytes, "xxh3": hashes.hex()}
        rewritten = [self._rewrite(part) for part in holed]
        replaced = [part.path for part in [*holed, *([self._snapshot.traces] if self._snapshot.traces else [])]]
        with self._transaction() as db:
            for old, new in zip(holed, rewritten, strict=True):
                _replace(db, old, new)
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

    def _require_writer(self) -> None:
        if self._lock is None or self._owner != os.getpid():  # a lock does not pass to a forked child
            raise ValueError(f"{self.path} is open for reading only; use Store.open(path, write=True)")

    @contextmanager
    def _transaction(self) -> Iterator[Connection]:
        """One version: all of it or nothing."""
        try:
            with catalogue.writing(self.path) as db:
                yield db
                catalogue.set_entry(db, "version", self.version + 1)
            self._reload()
        except BaseException:
            self.close()  # whether the commit was made must be read from the disk again
            raise

    def _tidy(self) -> None:
        """Removes what a killed writer left: temporary files, segments of no version, an unfinished purge."""
        strays = orphans(self.path, self._snapshot)
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
            traces = purge.Traces()
            if left:
                traces.add_arrays(left.arrays())
            proof["files"] = purge.prove_absent(self.path, traces, self._snapshot.files, self._live_bytes())
        except LeaveoutError as error:
            proof["problem"] = str(error)
        with catalogue.writing(self.path) as db:
            catalogue.set_entry(db, f"state.{PROOF}", proof)
            if not proof["problem"]:
                catalogue.set_entry(db, "purging", False)
        self._reload()
        if left and not proof["problem"]:
            self._remove([left.path])
        return proof

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

    def _add_absent(
        self, sides: Iterable[tuple[str, Mapping[str, np.ndarray]]], states: Mapping[str, Any]
    ) -> dict[str, int]:
        """Sets the sides and states that are not there yet; how many of each."""
        counts = {"sides": 0, "states": 0}
        for name, arrays in sides:
            if name not in self._snapshot.sides:
                self.put_side(name, arrays)
                counts["sides"] += 1
        for key, value in states.items():
            if key not in self._states():
                self.set_state(key, value)
                counts["states"] += 1
        return counts

    def _remove(self, files: list[Path]) -> None:
        for file in files:
            file.unlink(missing_ok=True)
        if files:
            sync_directory(self.path)

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

    def _traces(self, holed: list[Segment]) -> purge.Traces:
        """Pieces of the texts, raw rows and vectors of the deleted rows."""
        traces = purge.Traces()
        if self._snapshot.traces:  # of an earlier purge that is not proved yet
            traces.add_arrays(self._snapshot.traces.arrays())
        for part in holed:
            if problems := part.problems():
                raise FormatError(f"{problems[0]}; nothing was purged")
            purge.add_vectors(traces, part)
            purge.add_texts(traces, self._texts(part))
        return traces

    def _rewrite(self, old: Segment) -> Segment | None:
        """The segment without its deleted rows, proved to be that; None if no row is left."""
        live = old.live()
        if live is None or not live.any():
            return None
        file = self.path / file_name(old.id, self.version + 1)
        n_bytes, hashes = segment.write(file, old.arrays(), live)
        n_rows, none = int(live.sum()), old.tombstones[:0]
        rest = replace(old, path=file, n_rows=n_rows, n_bytes=n_bytes, hashes=hashes, tombstones=none)
        purge.prove_rewritten(old, rest)
        return rest


def _replace(db: Connection, old: Segment, new: Segment | None) -> None:
    """Puts a rewritten segment in the place of the old one, and moves its rows together."""
    base, live = old.id << SHIFT, old.live()
    before = catalogue.digest_of_rows(db, base, base + (1 << SHIFT))
    dead = [(base + position,) for position in old.tombstones.tolist()]
    kept = [] if live is None else np.flatnonzero(live).tolist()
    moved = [(base + to, base + at) for to, at in enumerate(kept) if to != at]
    for table in ("rows", "contents"):
        db.executemany(f"DELETE FROM {table} WHERE key = ?", dead)
        db.executemany(f"UPDATE {table} SET key = ? WHERE key = ?", moved)
    if new is None:
        db.execute("DELETE FROM segments WHERE segment = ?", (old.id,))
    else:
        values = (new.name, new.n_rows, new.n_bytes, new.hashes, new.id)
        db.execute("UPDATE segments SET name = ?, n_rows = ?, n_bytes = ?, hashes = ? WHERE segment = ?", values)
    after = catalogue.digest_of_rows(db, base, base + (1 << SHIFT))
    catalogue.shift_digests(db, rows=after - before)
