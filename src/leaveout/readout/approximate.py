"""Short lists of rows without a full scan, from a side file that `prepare` makes of an index with flat rows.

`SimHash` keeps sign bits of signatures, `Faiss` (extra `ann`) inverted lists. Either lies in a folder of the index, can be
thrown away and made again, and holds traces of rows that are purged, so that a purge removes it.
"""

from __future__ import annotations

import functools
import json
import math
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import numpy as np
from torch import Tensor

from leaveout.errors import MismatchError, UnsupportedError, choices, needs
from leaveout.projection import Hadamard
from leaveout.readout.codec import Codec
from leaveout.readout.scan import Best, over_segments, positions_of
from leaveout.store import Segment, Store

Approximation = Literal["simhash", "faiss"]

BITS = 8192  # sign bits of a row
# Bytes of sign bits that are compared at a time; 2 MiB, out of the cache of a core, take 1.4 times as long.
BLOCK = 2**19
WIDTH = 1024  # numbers of a projected row in inverted lists
SHARE = 8  # one inverted list in so many is read,
FEWEST = 16  # but not fewer than these
TRAINED = 64  # rows per list that k-means sees, and fewest rows per list
MAX_LISTS = 4096


@dataclass(frozen=True)
class Shortlists(ABC):
    """Short lists of one index: of its store, whose rows have this codec; random numbers follow from the seed."""

    index: Store
    codec: Codec
    seed: int = 0

    folder: ClassVar[str]

    @property
    def place(self) -> Path:
        return self.index.path / self.folder

    @abstractmethod
    def prepare(self, bits: int) -> None:
        """Makes the side file, or adds the rows that it lacks. Raises: UnsupportedError without the package it needs."""

    @abstractmethod
    def refuse_unprepared(self) -> object:
        """Raises: MismatchError if the side file is not of the present rows; UnsupportedError without the package."""

    @abstractmethod
    def shortlist(
        self, vectors: Tensor, n: int, wanted: np.ndarray | None = None, workers: int = 1
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Per query: ascending numbers of about the n rows with the highest estimated scores, and these estimates.

        Shapes: vectors [queries, width]; wanted: ascending row numbers to restrict to.
        Raises: as `refuse_unprepared`.
        """


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


class SimHash(Shortlists):
    """Sign bits of signatures: 1/48 of the bytes of 24,576 float16 numbers, searched by counting bits.

    A row's bits are the signs of a randomised Hadamard transform of its stored form. Two vectors at the angle a differ in a
    share of about a / pi of the bits, so that `length * cos(pi * differing / bits)` estimates the product with a query of
    unit length. The bits are a store of their own, one array per segment of the index.

    Source: Charikar 2002 (signs of random projections); Ailon and Chazelle 2006 (the transform).
    """

    folder = "simhash"

    def prepare(self, bits: int = BITS) -> None:
        """Makes the sign bits of the segments that have none; all anew after a purge or with other settings.

        Memory: 16 MiB of transformed rows, and the bits of one segment.
        """
        settings = {"kind": self.folder, "width": self.codec.width, "bits": bits, "seed": self.seed}
        names = {segment.name for segment in self.index.segments()}
        if self.place.exists() and not _is_part(self.place, settings, names):
            shutil.rmtree(self.place)
        make = SignBits.make(self.codec.width, bits, self.seed)
        there = self.place.exists()
        with Store.open(self.place, write=True) if there else Store.create(self.place, settings) as store:
            done = set(store.info()["sides"])
            for segment in self.index.segments():
                if segment.name not in done:
                    store.put_side(segment.name, self._signed(segment, make))

    def _signed(self, segment: Segment, make: SignBits) -> dict[str, np.ndarray]:
        lengths, bits = [], []
        for rows in self.codec.blocks(segment.arrays(), 16 * 2**20 // (8 * make.transforms[0].padded)):
            lengths.append(rows.norm(dim=1).numpy())
            bits.append(make(rows))
        return {"bits": np.concatenate(bits), "length": np.concatenate(lengths)}

    def refuse_unprepared(self) -> Store:
        store = Store.open(self.place) if self.place.exists() else None
        if store is None or not {segment.name for segment in self.index.segments()} <= set(store.info()["sides"]):
            raise MismatchError(
                f"Some rows of {self.index.path} have no sign bits yet: call prepare('simhash') (`leaveout prepare`)."
            )
        return store

    def shortlist(
        self, vectors: Tensor, n: int, wanted: np.ndarray | None = None, workers: int = 1
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        store = self.refuse_unprepared()
        settings = store.settings
        queries = SignBits.make(settings["width"], settings["bits"], settings["seed"])(vectors)
        best = Best(len(vectors), n)
        work = functools.partial(_compared, store, queries, wanted)
        for numbers, scores in over_segments(work, self.index.segments(), workers):
            best.add(numbers, scores)
        for numbers, scores, length in zip(best.numbers, best.scores, vectors.norm(dim=1).numpy(), strict=True):
            order = np.argsort(numbers)
            yield numbers[order], scores[order] * length


def _is_part(place: Path, settings: dict[str, object], names: set[str]) -> bool:
    store = Store.open(place)
    return store.settings == settings and set(store.info()["sides"]) <= names


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


class Faiss(Shortlists):
    """Inverted lists over projected rows, of which a search reads a share.

    Rows are projected to 1,024 numbers by a randomised Hadamard transform, shared out to about sqrt(rows) lists by k-means
    and kept in 8 bits a number.
    Memory: making it holds 1 KiB a row, the only part of an index that grows with its rows; searching maps the file.
    """

    folder = "ann"

    def prepare(self, bits: int = BITS) -> None:
        """Makes the lists of all rows, tombstoned ones included; they have no sign bits."""
        faiss, index = _faiss(), self.index
        lists = max(1, min(MAX_LISTS, math.isqrt(index.n_rows), index.n_rows // TRAINED))
        project = _projection(self.codec.width, self.seed)
        made = faiss.index_factory(len(project.outputs), f"IVF{lists},SQ8", faiss.METRIC_INNER_PRODUCT)
        made.train(self._sample(project, TRAINED * lists))
        for segment in index.segments():
            start = segment.first
            for rows in self.codec.blocks(segment.arrays(), 256):
                made.add_with_ids(project(rows).numpy(), np.arange(start, start + len(rows)))
                start += len(rows)
        shutil.rmtree(self.place, ignore_errors=True)
        self.place.mkdir()
        faiss.write_index(made, str(self.place / "rows.faiss"))
        facts = {"segments": [segment.name for segment in index.segments()], "seed": self.seed}
        (self.place / "facts.json").write_text(json.dumps(facts))  # last: without it the file is not used

    def _sample(self, project: Hadamard, n: int) -> np.ndarray:
        """Projected rows [at most n, width] drawn at random, in order."""
        n_rows = self.index.n_rows
        chosen = np.sort(np.random.default_rng(self.seed).choice(n_rows, min(n, n_rows), replace=False))
        found = []
        for segment in self.index.segments():
            low, high = np.searchsorted(chosen, [segment.first, segment.first + segment.n_rows])
            arrays, at = segment.arrays(), chosen[low:high] - segment.first
            some = {name: values[at] for name, values in arrays.items()}
            found += [project(rows).numpy() for rows in self.codec.blocks(some, 256)]
        return np.concatenate(found)

    def refuse_unprepared(self) -> dict[str, Any]:
        _faiss()
        facts = self.place / "facts.json"
        known = json.loads(facts.read_text()) if facts.exists() else {}
        if known.get("segments") != [segment.name for segment in self.index.segments()]:
            raise MismatchError(
                f"{self.index.path} has no FAISS index of its present rows: call prepare('faiss') (`leaveout prepare`)."
            )
        return known

    def shortlist(
        self, vectors: Tensor, n: int, wanted: np.ndarray | None = None, workers: int = 1
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        faiss, facts = _faiss(), self.refuse_unprepared()
        found = faiss.read_index(str(self.place / "rows.faiss"), faiss.IO_FLAG_MMAP)
        options: dict[str, Any] = {"nprobe": min(found.nlist, max(FEWEST, found.nlist // SHARE))}
        if wanted is not None or any(segment.tombstones.size for segment in self.index.segments()):
            options["sel"] = faiss.IDSelectorBatch(self._allowed(wanted))
        project = _projection(vectors.shape[1], facts["seed"])
        scores, numbers = found.search(project(vectors).numpy(), n, params=faiss.SearchParametersIVF(**options))
        for query in range(len(vectors)):
            there = numbers[query] >= 0
            order = np.argsort(numbers[query][there])
            yield numbers[query][there][order], scores[query][there][order]

    def _allowed(self, wanted: np.ndarray | None) -> np.ndarray:
        parts = []
        for segment in self.index.segments():
            positions = positions_of(segment, wanted)
            parts.append(segment.first + (np.arange(segment.n_rows) if positions is None else positions))
        return np.concatenate(parts)


def _faiss() -> Any:
    return needs("faiss", "This approximation", extra="ann")


def _projection(width: int, seed: int) -> Hadamard:
    return Hadamard.make(width, min(WIDTH, 1 << max(width - 1, 1).bit_length()), seed, "ann")


# ---------------------------------------------------------------- by name

APPROXIMATIONS: dict[Approximation, type[Shortlists]] = {"simhash": SimHash, "faiss": Faiss}


def shortlists(kind: Approximation, index: Store, codec: Codec, seed: int) -> Shortlists:
    """The short lists of an index by the name of their kind.

    Raises: ValueError for an unknown name; UnsupportedError for rows that are not flat.
    """
    if kind not in APPROXIMATIONS:
        raise ValueError(f"There is no approximation {kind!r}: {choices(kind, get_args(Approximation))}.")
    if codec.form != "flat":
        raise UnsupportedError(
            "The rows of this index are stored by singular triples, which have no flat vector to approximate: "
            "search it exactly, or build it with the preset paper or similarity, or with rank=None."
        )
    return APPROXIMATIONS[kind](index, codec, seed)


def remove_shortlists(index: Path) -> None:
    """Removes the side files of an index, if it has any."""
    for kind in APPROXIMATIONS.values():
        shutil.rmtree(index / kind.folder, ignore_errors=True)
