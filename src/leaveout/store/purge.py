"""A purge: segments written anew, and the proof that no file of the store still holds bytes of the purged rows.

Two parts. A rewritten segment must equal, byte for byte, the rows of the old one that are live; the others never held a
purged row. All other files, the catalogue included, are scanned at every byte for pieces of the purged rows' texts and
vectors; a piece that a live row also holds proves nothing and is let pass.
"""

from __future__ import annotations

import os
from array import array
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from sqlite3 import Connection
from typing import BinaryIO

import numpy as np
import xxhash

import leaveout.store.catalogue as catalogue
import leaveout.store.segment as segment
from leaveout.errors import FormatError
from leaveout.store.catalogue import COLUMNS, SHIFT, SOURCE
from leaveout.store.segment import BLOCK, Segment
from leaveout.store.snapshot import Snapshot

PIECE = 128  # bytes; one piece in 32 straddles two pages of the catalogue and cannot be seen there, four never all do
SHORTEST = 16  # bytes; a shorter text or vector is found by chance
_PIECES = 4  # of one text or vector, spread evenly
_MIX = np.uint64(0x9E3779B97F4A7C15)
_SLOT_BITS = 20
_PIECE = np.dtype([("anchor", np.uint64), ("offset", np.uint16), ("length", np.uint16), ("digest", np.uint64)])


class Traces:
    """Pieces of purged rows; 20 bytes of memory per piece.

    Each has an anchor of 8 bytes. At every offset the 8 bytes are looked up in a table of hashed anchors, then among
    the anchors, and then the whole piece is compared by its hash.
    """

    def __init__(self) -> None:
        self._columns = (array("Q"), array("H"), array("H"), array("Q"))  # as in _PIECE

    def add(self, data: bytes, variety: int) -> None:
        """Adds pieces of a text or vector that have at least so many different bytes."""
        if len(data) < SHORTEST:
            return
        length = min(PIECE, len(data))
        for start in {round(start) for start in np.linspace(0, len(data) - length, _PIECES)}:
            piece = data[start : start + length]
            if len(set(piece)) < variety:
                continue
            # The most varied 8 bytes: zeros and spaces are everywhere, and each place would have to be looked at.
            offset = max(range(0, length - 7, 8), key=lambda at: len(set(piece[at : at + 8])))
            anchor = int.from_bytes(piece[offset : offset + 8], "little")
            values = (anchor, offset, length, xxhash.xxh3_64_intdigest(piece))
            for column, value in zip(self._columns, values, strict=True):
                column.append(value)

    def arrays(self) -> dict[str, np.ndarray]:
        """The pieces as arrays of a segment, {} if there are none."""
        names = _PIECE.names or ()
        return {name: np.array(column) for name, column in zip(names, self._columns, strict=True) if column}

    def add_arrays(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Adds pieces that `arrays` gave."""
        for name, column in zip(_PIECE.names or (), self._columns, strict=True):
            column.frombytes(arrays[name].astype(column.typecode).tobytes())

    def found(self, chunks: Iterable[bytes]) -> set[int]:
        """Digests of the pieces that occur in a stream of bytes, also across its chunks.

        Cost: about 5 s of CPU per GB.
        """
        left = np.empty(len(self._columns[0]), _PIECE)
        for name, column in zip(_PIECE.names or (), self._columns, strict=True):
            left[name] = column
        left = np.unique(left)  # ascending by anchor
        hits: set[int] = set()
        tail = b""
        for chunk in chunks if left.size else ():
            data = tail + chunk
            tail = data[-PIECE:]
            if new := _pieces_in(data, left):
                hits |= new
                left = left[~np.isin(left["digest"], np.array(list(new), np.uint64))]
        return hits


def _pieces_in(data: bytes, pieces: np.ndarray) -> set[int]:
    """Digests of the pieces that occur in data."""
    slots = np.zeros(1 << _SLOT_BITS, bool)
    slots[_slot(pieces["anchor"])] = True
    # Pieces cut at the same place around the same anchor, a common phrase, form a group that is hashed once.
    groups, starts = np.unique(pieces[["anchor", "offset", "length"]], return_index=True)
    forms, bounds = groups[["offset", "length"]].tolist(), [*starts.tolist(), len(pieces)]
    digests = pieces["digest"].tolist()
    hits: set[int] = set()
    for shift in range(8):
        words = np.frombuffer(data[shift : shift + (len(data) - shift) // 8 * 8], "<u8")
        near = np.flatnonzero(slots[_slot(words)])
        first, last = (np.searchsorted(groups["anchor"], words[near], side) for side in ("left", "right"))
        known = first < last
        places = (near[known] * 8 + shift).tolist()
        for at, begin, end in zip(places, first[known].tolist(), last[known].tolist(), strict=True):
            for group in range(begin, end):
                offset, length = forms[group]
                digest = xxhash.xxh3_64_intdigest(data[max(0, at - offset) : at - offset + length])
                found = bisect_left(digests, digest, bounds[group], bounds[group + 1])
                if found < bounds[group + 1] and digests[found] == digest:
                    hits.add(digest)
    return hits


def _slot(words: np.ndarray) -> np.ndarray:
    return (words * _MIX) >> np.uint64(64 - _SLOT_BITS)


def traces_of(snapshot: Snapshot, holed: list[Segment]) -> Traces:
    """Pieces of the texts, raw rows and vectors of the deleted rows of some segments.

    Raises: FormatError if one of the segments is damaged.
    """
    traces = Traces()
    if snapshot.traces:  # of an earlier purge that is not proved yet
        traces.add_arrays(snapshot.traces.arrays())
    for part in holed:
        if problems := part.problems():
            raise FormatError(f"{problems[0]}; nothing was purged")
        for values in part.arrays().values():
            for position in part.tombstones:
                traces.add(
                    values[position].tobytes(), variety=8
                )  # sparse vectors look like the empty parts of any file
        keys = [(part.id << SHIFT) + position for position in part.tombstones.tolist()]
        for texts in snapshot.fetch("contents.text, contents.raw", keys, "TRUE"):
            for text in texts:
                traces.add(text.encode(), variety=2)
    return traces


def rewritten(old: Segment, version: int) -> Segment | None:
    """The segment without its deleted rows, written by a version and proved to be that; None if no row is left."""
    live = old.live()
    if live is None or not live.any():
        return None
    file = old.path.with_name(segment.file_name(old.id, version))
    n_bytes, hashes = segment.write(file, old.arrays(), live)
    n_rows, none = int(live.sum()), old.tombstones[:0]
    rest = replace(old, path=file, n_rows=n_rows, n_bytes=n_bytes, hashes=hashes, tombstones=none)
    _prove_rewritten(old, rest)
    return rest


def _prove_rewritten(old: Segment, new: Segment) -> None:
    """Refuses a new segment that is not exactly the live rows of the old one."""
    live, before, after = old.live(), old.arrays(), new.arrays()
    kept = np.arange(old.n_rows) if live is None else np.flatnonzero(live)
    same = before.keys() == after.keys() and len(kept) == new.n_rows and not new.problems()
    for name in before if same else ():
        step = max(1, BLOCK // before[name][0].nbytes)
        for start in range(0, len(kept), step):
            same &= before[name][kept[start : start + step]].tobytes() == after[name][start : start + step].tobytes()
    if not same:
        raise FormatError(f"{new.name} is not the live rows of {old.name}; nothing was purged, check the disk")


def put_in_place(db: Connection, old: Segment, new: Segment | None) -> None:
    """Lists a rewritten segment in the place of the old one, and moves its rows together."""
    base, live = old.id << SHIFT, old.live()
    before = catalogue.digest_of_rows(db, base, base + (1 << SHIFT))
    dead = [(base + position,) for position in old.tombstones.tolist()]
    kept: list[int] = [] if live is None else np.flatnonzero(live).tolist()
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


def prove_absent(snapshot: Snapshot) -> int:
    """Scans every file but the segments for the traces of an unfinished purge; how many were scanned.

    Raises: FormatError that names a file with bytes of a purged row that no live row has.
    """
    traces = Traces()
    if snapshot.traces:
        traces.add_arrays(snapshot.traces.arrays())
    listed = {part.path for part in snapshot.files}
    hits: dict[Path, set[int]] = {}
    files = [file for file in _files(snapshot.path) if file not in listed]
    for file in files:
        is_catalogue = file == snapshot.path / catalogue.CATALOGUE
        with catalogue.raw(snapshot.path) if is_catalogue else open(file, "rb") as opened:
            hits[file] = traces.found(_chunks(opened))
    remaining = set[int]().union(*hits.values())
    if remaining:
        remaining -= traces.found(_live_bytes(snapshot))
    for part in snapshot.files if remaining else ():
        with open(part.path, "rb") as opened:
            remaining -= traces.found(_chunks(opened))
    for file, found in hits.items():
        if found & remaining:
            text = f"the rows are purged from the store, but {file} still holds bytes of them"
            raise FormatError(f"{text}; remove this file if it is not part of the store, else report this")
    return len(files)


def _live_bytes(snapshot: Snapshot) -> Iterator[bytes]:
    """What the catalogue holds of live rows; the byte 255 between strings, so that none is found across two."""
    found = bytearray()
    for _, *strings in snapshot.stream(COLUMNS, SOURCE, catalogue.visible(snapshot.version)):
        found += b"".join(string.encode() + b"\xff" for string in strings[:-1])
        if len(found) > BLOCK:
            yield bytes(found)
            found.clear()
    yield bytes(found)


def _files(directory: Path) -> Iterator[Path]:
    """Plain files below a directory; the empty one of the writer's lock is not opened, which would drop the lock."""
    for folder, _, names in os.walk(directory):
        for file in (Path(folder, name) for name in names):
            if file.is_file() and not file.is_symlink() and file != directory / catalogue.LOCK:
                yield file


def _chunks(file: BinaryIO) -> Iterator[bytes]:
    while chunk := file.read(BLOCK):
        yield chunk
