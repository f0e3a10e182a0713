"""The proof of a purge: that no file of the store still holds bytes of the purged rows.

Two parts. A rewritten segment must equal, byte for byte, the rows of the old one that are live; the others never held a
purged row. All other files, the catalogue included, are scanned at every byte for pieces of the purged rows' texts and
vectors; a piece that a live row also holds proves nothing and is let pass.
"""

from __future__ import annotations

import os
from array import array
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np
import xxhash

from leaveout.errors import FormatError
from leaveout.store import catalogue
from leaveout.store.segment import BLOCK, Segment

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


def add_vectors(traces: Traces, segment: Segment) -> None:
    """Adds the bytes of every tombstoned row of every array."""
    for values in segment.arrays().values():
        for position in segment.tombstones:
            traces.add(values[position].tobytes(), variety=8)  # sparse vectors look like the empty parts of any file


def add_texts(traces: Traces, texts: Iterable[str]) -> None:
    for text in texts:
        traces.add(text.encode(), variety=2)


def prove_rewritten(old: Segment, new: Segment) -> None:
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


def prove_absent(directory: Path, traces: Traces, segments: list[Segment], live: Iterator[bytes]) -> int:
    """Scans every file but the catalogued segments; how many were scanned.

    live: the catalogue's bytes of the live rows.
    Raises: FormatError that names a file with bytes of a purged row that no live row has.
    """
    listed = {segment.path for segment in segments}
    hits = {}
    files = [file for file in _files(directory) if file not in listed]
    for file in files:
        is_catalogue = file == directory / catalogue.CATALOGUE
        with catalogue.raw(directory) if is_catalogue else open(file, "rb") as opened:
            hits[file] = traces.found(_chunks(opened))
    remaining = set().union(*hits.values())
    if remaining:
        remaining -= traces.found(live)
    for segment in segments if remaining else ():
        with open(segment.path, "rb") as opened:
            remaining -= traces.found(_chunks(opened))
    for file, found in hits.items():
        if found & remaining:
            text = f"the rows are purged from the store, but {file} still holds bytes of them"
            raise FormatError(f"{text}; remove this file if it is not part of the store, else report this")
    return len(files)


def _files(directory: Path) -> Iterator[Path]:
    """Plain files below a directory; the empty one of the writer's lock is not opened, which would drop the lock."""
    for folder, _, names in os.walk(directory):
        for file in (Path(folder, name) for name in names):
            if file.is_file() and not file.is_symlink() and file != directory / catalogue.LOCK:
                yield file


def _chunks(file: BinaryIO) -> Iterator[bytes]:
    while chunk := file.read(BLOCK):
        yield chunk
