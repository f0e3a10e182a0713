"""Sign bits of signatures: 1/48 of the bytes of 24,576 float16 numbers, searched by counting bits.

A row's bits are the signs of a randomised Hadamard transform of its stored form. Two vectors at the angle a differ in a
share of about a / pi of the bits, so that `length * cos(pi * differing / bits)` estimates the product with a query of
unit length. The bits of an index are a store of their own in IDX/simhash, one array per segment of the index: they can
be thrown away and made again.

Source: Charikar 2002 (signs of random projections); Ailon and Chazelle 2006 (the transform).
"""

from __future__ import annotations

import functools
import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from leaveout.errors import MismatchError, UnsupportedError
from leaveout.readout.projection import Hadamard
from leaveout.readout.search import Best, Segment, over_segments, positions_of
from leaveout.readout.storage import blocks
from leaveout.readout.storage import width as stored_width
from leaveout.store import Store

FOLDER = "simhash"
BITS = 8192
BLOCK = (
    2**19
)  # bytes of sign bits that are compared at a time; 2 MiB, out of the cache of a core, take 1.4 times as long


@dataclass(frozen=True)
class SignBits:
    """Turns vectors [rows, width] into sign bits [rows, bits / 64] uint64; several transforms where one is too narrow."""

    transforms: tuple[Hadamard, ...]

    @classmethod
    def make(cls, width: int, bits: int, seed: int) -> SignBits:
        """Raises: ValueError if bits is no positive multiple of 64."""
        if bits < 64 or bits % 64:
            raise ValueError(f"bits is {bits}: give a multiple of 64.")
        padded = 1 << max(width - 1, 1).bit_length()
        sizes = [min(padded, bits - done) for done in range(0, bits, padded)]
        return cls(tuple(Hadamard.make(width, size, seed, f"simhash/{at}") for at, size in enumerate(sizes)))

    def __call__(self, vectors: Tensor) -> np.ndarray:
        signs = np.concatenate([(transform(vectors) >= 0).numpy() for transform in self.transforms], 1)
        return np.packbits(signs, axis=1).view(np.uint64)


def update(index: Store, bits: int = BITS, seed: int = 0) -> None:
    """Makes the sign bits of the segments that have none; all anew after a purge or with other settings.

    Memory: 16 MiB of transformed rows, and the bits of one segment.
    """
    width = stored_width(index.segments()[0].arrays())
    settings, place = {"kind": FOLDER, "width": width, "bits": bits, "seed": seed}, index.path / FOLDER
    names = {segment.name for segment in index.segments()}
    if place.exists() and not _is_part(place, settings, names):
        shutil.rmtree(place)
    make = SignBits.make(width, bits, seed)
    with Store.open(place, write=True) if place.exists() else Store.create(place, settings) as store:
        there = set(store.info()["sides"])
        for segment in index.segments():
            if segment.name not in there:
                store.put_side(segment.name, _signed(segment, make))


def _is_part(place: Path, settings: dict[str, object], names: set[str]) -> bool:
    store = Store.open(place)
    return store.settings == settings and set(store.info()["sides"]) <= names


def _signed(segment: Segment, make: SignBits) -> dict[str, np.ndarray]:
    lengths, bits = [], []
    for rows in blocks(segment.arrays(), 16 * 2**20 // (8 * make.transforms[0].padded)):
        lengths.append(rows.norm(dim=1).numpy())
        bits.append(make(rows))
    return {"bits": np.concatenate(bits), "length": np.concatenate(lengths)}


def prepared(index: Store) -> Store:
    """The sign bits of all rows. Raises: as `shortlist`."""
    if not hasattr(np, "bitwise_count"):
        raise UnsupportedError("simhash counts bits with numpy 2: pip install 'numpy>=2'.")
    place = index.path / FOLDER
    store = Store.open(place) if place.exists() else None
    if store is None or not {segment.name for segment in index.segments()} <= set(store.info()["sides"]):
        raise MismatchError(
            f"Some rows of {index.path} have no sign bits yet: call prepare('simhash') (`leaveout prepare`)."
        )
    return store


def shortlist(
    index: Store, vectors: Tensor, n: int, wanted: np.ndarray | None = None, workers: int = 1
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Per query: ascending numbers of the n rows with the highest estimated scores, and these estimates.

    Shapes: vectors [queries, width].
    Raises: MismatchError if rows have no sign bits yet; UnsupportedError for numpy 1.
    """
    store, segments = prepared(index), index.segments()
    settings = store.settings
    queries = SignBits.make(settings["width"], settings["bits"], settings["seed"])(vectors)
    best = Best(len(vectors), n)
    work = functools.partial(_compared, store, queries, wanted)
    for numbers, scores in over_segments(work, segments, workers):
        best.add(numbers, scores)
    for numbers, scores, length in zip(best.numbers, best.scores, vectors.norm(dim=1).numpy(), strict=True):
        order = np.argsort(numbers)
        yield numbers[order], scores[order] * length


def _compared(
    store: Store, queries: np.ndarray, wanted: np.ndarray | None, segment: Segment
) -> tuple[np.ndarray, np.ndarray] | None:
    """Numbers and estimated products [rows, queries] with unit-length queries."""
    positions = positions_of(segment, wanted)
    if positions is not None and not positions.size:
        return None
    arrays = store.side(segment.name)
    assert arrays is not None
    positions = np.arange(segment.n_rows) if positions is None else positions
    whole = len(positions) == segment.n_rows
    bits = arrays["bits"] if whole else arrays["bits"][positions]
    angle = np.float32(math.pi / (64 * bits.shape[1])) * differing(bits, queries)
    return segment.first + positions, np.cos(angle) * arrays["length"][positions, None]


def differing(bits: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """Numbers of differing bits [rows, queries] float32, of bits [rows, words] and queries [queries, words] uint64."""
    counts = np.empty((len(bits), len(queries)), np.float32)
    step = max(1, BLOCK // (8 * bits.shape[1]))
    both = np.empty((min(step, len(bits)), bits.shape[1]), np.uint64)
    ones = np.empty(both.shape, np.uint8)
    for start in range(0, len(bits), step):
        block = bits[start : start + step]
        for query, word in enumerate(queries):
            np.bitwise_xor(block, word, out=both[: len(block)])
            np.bitwise_count(both[: len(block)], out=ones[: len(block)])
            counts[start : start + step, query] = ones[: len(block)].sum(1, dtype=np.uint32)
    return counts


def remove(path: Path) -> None:
    """Removes the sign bits of an index, if it has any."""
    shutil.rmtree(path / FOLDER, ignore_errors=True)
