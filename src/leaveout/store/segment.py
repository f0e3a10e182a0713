"""One segment: an immutable file of arrays in safetensors layout, hashed by blocks when written, read by memory map.

The first axis of an array is the row, except in side segments. docs/reference/format.md has the layout. The header of a file is
never trusted: lengths, dtypes, shapes and offsets are checked in Python integers before any array is made.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import re
import stat
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import xxhash

from leaveout.errors import FormatError, MismatchError
from leaveout.files import replacing

BLOCK = 4 << 20  # bytes under one xxh3-64 hash
HASH = 8  # bytes of one hash
DTYPES = {
    code: np.dtype(f"<{code[0].lower()}{int(code[1:]) // 8}")
    for code in ("F16", "F32", "F64", "I8", "I16", "I32", "I64", "U8", "U16", "U32", "U64")
}
NAME = re.compile(r"(\d{8,10})-(\d{8,10})\.safetensors")  # of a file: number of the segment, version that wrote it

_CODES = {dtype: code for code, dtype in DTYPES.items()}
_ARRAY_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,99}")
_ALIGN = 64
_MAX_HEADER = 1 << 20
_MAX_AXES = 16

Layout = dict[str, tuple[np.dtype[Any], tuple[int, ...], int]]  # name -> dtype, shape, first byte in the file


@dataclass(frozen=True, eq=False)
class Segment:
    """What the catalogue says about one segment file; `arrays` opens it.

    first: global number of its first row. tombstones: positions of its deleted rows, ascending. verified: names of the
    files whose hashes were compared since the store was opened, None if they are not to be.
    """

    id: int
    path: Path
    first: int
    n_rows: int
    n_bytes: int
    hashes: bytes
    tombstones: np.ndarray
    is_side: bool = False
    verified: set[str] | None = None

    @property
    def name(self) -> str:
        return self.path.name

    def arrays(self) -> dict[str, np.ndarray]:
        """Name -> read-only view [rows, ...] of the memory-mapped file, tombstoned rows included.

        Raises: MismatchError if the file is gone (purged since the snapshot was taken), FormatError if it is damaged.
        """
        self._verify()
        with self._opened() as fd:
            layout = self._layout(fd)
            mapped = mmap.mmap(fd, self.n_bytes, access=mmap.ACCESS_READ)
        return {name: np.ndarray(shape, dtype, mapped, offset) for name, (dtype, shape, offset) in layout.items()}

    def layout(self) -> Layout:
        """Name -> dtype, shape and first byte of every array, from the checked header."""
        self._verify()
        with self._opened() as fd:
            return self._layout(fd)

    def live(self) -> np.ndarray | None:
        """Mask [rows] of the rows that are not deleted; None when no row is."""
        if not self.tombstones.size:
            return None
        self.layout()  # a wrong number of rows is found here, before memory is taken for it
        mask = np.ones(self.n_rows, bool)
        mask[self.tombstones] = False
        return mask

    def problems(self) -> list[str]:
        """What is wrong with the file: missing, length, header, and every block whose hash differs.

        Cost: reads the whole file, 4 MiB at a time.
        """
        found: list[str] = []
        try:
            found += self._damaged_blocks()
            with self._opened() as fd:
                self._layout(fd)
        except (FormatError, MismatchError) as error:
            found.append(str(error))
        return found

    def _verify(self) -> None:
        """Compares the hashes of the file, once after the store was opened with `verify`."""
        if self.verified is not None and self.name not in self.verified:
            for problem in self._damaged_blocks():
                raise FormatError(f"{problem}; restore the file from a copy")
            self.verified.add(self.name)

    def _damaged_blocks(self) -> Iterator[str]:
        """The blocks whose hash differs."""
        with self._opened() as fd:
            for number, digest in enumerate(_block_hashes(fd)):
                if digest != self.hashes[number * HASH : (number + 1) * HASH]:
                    yield f"{self.name}: block {number} (from byte {number * BLOCK}) is damaged"

    @contextmanager
    def _opened(self) -> Generator[int]:
        """A descriptor of the file, once it is known to be a plain file, no link, pipe or device, of the right size."""
        try:
            fd = os.open(self.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError:
            text = f"{self.name} is not there: purged or replaced since the store was opened (call refresh), or lost"
            raise MismatchError(f"{text} (run check)") from None
        except OSError as error:
            raise FormatError(f"{self.name} cannot be read as a plain file ({error.strerror})") from None
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise FormatError(f"{self.name} is not a plain file")
            if (n_bytes := os.fstat(fd).st_size) != self.n_bytes:
                text = f"{self.name} has {n_bytes} bytes but the catalogue says {self.n_bytes}"
                raise FormatError(f"{text}; restore the file from a copy")
            yield fd
        finally:
            os.close(fd)

    def _layout(self, fd: int) -> Layout:
        try:
            layout = _parse_header(fd, self.n_bytes)
        except (ValueError, RecursionError) as error:
            raise FormatError(f"{self.name} has a bad header ({error}); restore the file from a copy") from None
        for name, (_, shape, _) in layout.items():
            if not self.is_side and shape[:1] != (self.n_rows,):
                text = f"{self.name}: array {name!r} has shape {list(shape)}"
                raise FormatError(f"{text} but the catalogue says {self.n_rows} rows")
        return layout


def file_name(segment: int, version: int) -> str:
    """The name of the file of a segment as written by one version."""
    return f"{segment:08d}-{version:08d}.safetensors"


def write(path: Path, arrays: Mapping[str, np.ndarray], keep: np.ndarray | None = None) -> tuple[int, bytes]:
    """Writes a segment file (the rows in the mask `keep`, or all); its size in bytes and block hashes.

    Guarantee: the name appears only once all bytes are on disk; memory stays at a few MiB beyond the arrays.
    Raises: ValueError for names, dtypes or shapes that a segment cannot hold.
    """
    arrays = _in_order(arrays)
    n_kept = None if keep is None else int(np.count_nonzero(keep))
    shapes = {n: a.shape if n_kept is None else (n_kept, *a.shape[1:]) for n, a in arrays.items()}
    header = _header({name: (arrays[name].dtype, shape) for name, shape in shapes.items()})
    with replacing(path) as temporary, open(temporary, "xb") as file:  # not mkstemp: the file gets the user's umask
        hashes = _write_hashed(file, _bytes_of(header, arrays, keep))
        n_bytes = file.tell()
    return n_bytes, hashes


def _in_order(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The arrays by falling item size, so that each starts at a multiple of it without gaps; checked."""
    if not arrays:
        raise ValueError("a segment needs at least one array")
    for name, array in arrays.items():
        if not _ARRAY_NAME.fullmatch(name):
            raise ValueError(f"array name {name!r} is not letters, digits, '_', '.', '-' (at most 100)")
        if array.dtype not in _CODES:
            raise ValueError(f"array {name!r} has dtype {array.dtype}, but a segment holds {', '.join(DTYPES)}")
        if not array.size or array.ndim > _MAX_AXES:
            text = f"array {name!r} has shape {list(array.shape)}"
            raise ValueError(f"{text}; each axis must be at least 1 long, with at most {_MAX_AXES} axes")
    return dict(sorted(arrays.items(), key=lambda item: (-item[1].itemsize, item[0])))


def _header(forms: Mapping[str, tuple[np.dtype, tuple[int, ...]]]) -> bytes:
    """Length and JSON header, padded with spaces so that the data begin at a multiple of 64 bytes."""
    entries, begin = {}, 0
    for name, (dtype, shape) in forms.items():
        end = begin + dtype.itemsize * math.prod(shape)
        entries[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGN)
    if len(text) > _MAX_HEADER:
        raise ValueError(f"{len(forms)} arrays need a header of {len(text)} bytes, more than {_MAX_HEADER}")
    return len(text).to_bytes(8, "little") + text


def _bytes_of(header: bytes, arrays: Mapping[str, np.ndarray], keep: np.ndarray | None) -> Iterator[bytes | memoryview]:
    """The bytes of a segment file in pieces of about 4 MiB; arrays need not be contiguous."""
    yield header
    for array in arrays.values():
        array = np.atleast_1d(array)
        step = max(1, BLOCK // (array.nbytes // len(array)))
        for start in range(0, len(array), step):
            rows = array[start : start + step]
            rows = np.ascontiguousarray(rows if keep is None else rows[keep[start : start + step]])
            if rows.size:
                yield rows.data.cast("B")


def _write_hashed(file: Any, pieces: Iterable[bytes | memoryview]) -> bytes:
    """Writes the pieces; the hash of every block of 4 MiB, joined."""
    hashes: list[bytes] = []
    hasher, room = xxhash.xxh3_64(), BLOCK
    for piece in pieces:
        file.write(piece)
        while len(piece) >= room:
            hasher.update(piece[:room])
            hashes.append(hasher.digest())
            hasher.reset()
            piece, room = piece[room:], BLOCK
        hasher.update(piece)
        room -= len(piece)
    if room < BLOCK:
        hashes.append(hasher.digest())
    return b"".join(hashes)


def _block_hashes(fd: int) -> Iterator[bytes]:
    offset, block = 0, memoryview(bytearray(BLOCK))  # one buffer: fresh memory for each block doubles the cost
    while n_bytes := os.preadv(fd, [block], offset):
        yield xxhash.xxh3_64_digest(block[:n_bytes])
        offset += n_bytes


def _parse_header(fd: int, n_bytes: int) -> Layout:
    """The arrays that a header describes; ValueError unless they tile the rest of the file exactly."""
    length = int.from_bytes(os.pread(fd, 8, 0), "little")
    if not 2 <= length <= min(_MAX_HEADER, n_bytes - 8):
        raise ValueError(f"length {length} in a file of {n_bytes} bytes")
    found: Any = json.loads(os.pread(fd, length, 8).decode())
    if not isinstance(found, dict) or not found:
        raise ValueError("no arrays")
    header = cast("dict[str, Any]", found)
    layout: Layout = {}
    begin = 0
    for name, described in header.items():
        if not _ARRAY_NAME.fullmatch(name) or not isinstance(described, dict):
            raise ValueError(f"array name {name[:100]!r}")
        entry = cast("dict[str, Any]", described)
        dtype, shape = DTYPES.get(str(entry.get("dtype"))), _shape(entry.get("shape"))
        if dtype is None or shape is None:
            raise ValueError(f"dtype or shape of array {name!r}")
        end = begin + dtype.itemsize * math.prod(shape)
        if entry.get("data_offsets") != [begin, end]:
            raise ValueError(f"array {name!r} is not where its shape says")
        layout[name] = (dtype, shape, 8 + length + begin)
        begin = end
    if begin != n_bytes - 8 - length:
        raise ValueError(f"arrays of {begin} bytes in {n_bytes - 8 - length}")
    return layout


def _shape(axes: Any) -> tuple[int, ...] | None:
    given: list[Any] = cast("list[Any]", axes) if isinstance(axes, list) else [None]
    sound = len(given) <= _MAX_AXES and all(type(n) is int and 0 < n < 2**63 for n in given)
    return tuple(given) if sound else None
