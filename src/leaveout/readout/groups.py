"""What whole groups of rows do to a query: their scores summed, with an interval, and what is left out when rows stand in for
each other.

A sum takes every row's effect as if the others stayed. Without a whole source nobody is left to teach what its rows shared, and
retraining loses more than the sum says. In the ridge regression that whitened signatures s stand for, the rows S of a group
that leave together do

    q (I - S'S / (n c))^-1 sum of S        by its Gram matrix:  (q S') (I - S S' / (n c))^-1 1        (Woodbury)

n are the rows of the index and c is CURVATURE times the largest eigenvalue of the mean of s s'. By retraining (see
docs/evidence/evaluation.md) this brings the sizes of effects of whole sources nearer to the truth, and ranks sets no better.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from leaveout.errors import choices
from leaveout.readout.opened import EncodedQueries, OpenIndex

CURVATURE = 2.0
"""Chosen by retraining on two banks (benchmarks/coherent_sets.py): 1 would be the eigenvalue itself and overshoots."""
SAMPLE = 256  # rows whose signatures say how long the longest axis is
TOGETHER_MOST = 500  # rows of a group whose Gram matrix is made
BLOCK = 128  # rows that are unpacked at a time
Z95 = 1.96
PAGE = 256  # rows whose catalogue entries are read at a time


@dataclass(frozen=True)
class GroupScore:
    """A group's effect on a query, by responses alone, in the units of `Index.score`. Where `total` > 0, training on the group
    lowers the query's loss.

    name        value of the field; None: rows without it
    total       sum of its rows' scores, and between `low` and `high` 95 % of such sums if its rows were drawn anew from
                where they came; None for a group of one row
    together    the sum where rows stand in for each other, see the head of this file, an axis counting twenty times at most;
                None if not asked for, or if the group has more than 500 rows
    best        id of its best row
    """

    name: Any
    rows: int
    total: float
    low: float | None
    high: float | None
    together: float | None
    best: str

    @property
    def mean(self) -> float:
        return self.total / self.rows


@dataclass
class _Sums:
    """What is summed of one group while rows go by, [queries] each."""

    total: np.ndarray
    squares: np.ndarray
    best: np.ndarray
    best_score: np.ndarray
    rows: int = 0
    numbers: list[int] | None = field(default_factory=list)

    @classmethod
    def none(cls, n: int) -> _Sums:
        return cls(np.zeros(n), np.zeros(n), np.full(n, -1), np.full(n, -np.inf))

    def add(self, numbers: np.ndarray, scores: np.ndarray) -> None:
        """Scores [rows, queries] of rows by number."""
        self.rows += len(numbers)
        self.total += scores.sum(0)
        self.squares += (scores**2).sum(0)
        at = scores.argmax(0)
        top = scores[at, np.arange(len(at))]
        better = top > self.best_score
        self.best[better], self.best_score[better] = numbers[at[better]], top[better]
        if self.numbers is not None:
            self.numbers.extend(numbers.tolist())
            if len(self.numbers) > TOGETHER_MOST:
                self.numbers = None


def group_scores(
    index: OpenIndex, queries: EncodedQueries, by: str, where: str | None, together: bool
) -> list[list[GroupScore]]:
    """The groups of each query, the highest total first: see `Index.group_scores`."""
    store = index.store
    if by != "unit" and by not in (fields := store.info()["fields"]):
        raise ValueError(f"by is {by!r}: {choices(by, ['unit', *fields])}.")
    groups: dict[Hashable, _Sums] = {}
    names: dict[Hashable, Any] = {}
    vectors = index.weighed(queries.vectors, index.scales(queries.vectors, "product", None))
    for numbers, scores in index.scan(vectors, index.numbers_where(where), length="product"):
        for start in range(0, len(numbers), PAGE):
            page, own = numbers[start : start + PAGE], scores[start : start + PAGE].astype(np.float64)
            values = [record.unit if by == "unit" else record.meta.get(by) for record in store.rows(page)]
            keys = [value if isinstance(value, Hashable) else repr(value) for value in values]
            names.update(zip(keys, values, strict=True))
            for key in dict.fromkeys(keys):
                at = np.array([other == key for other in keys])
                groups.setdefault(key, _Sums.none(len(queries))).add(page[at], own[at])
    scale = _scale(index) if together and groups else None
    found = _scored(index, vectors, [(names[key], sums) for key, sums in groups.items()], scale)
    return [sorted(one, key=lambda group: -group.total) for one in found]


def set_scores(
    index: OpenIndex, queries: EncodedQueries, sets: Mapping[str, Collection[str]], together: bool
) -> list[list[GroupScore]]:
    """The sets of each query, in their order: see `Index.set_scores`."""
    if not sets:
        raise ValueError("There is no set: name at least one id.")
    vectors = index.weighed(queries.vectors, index.scales(queries.vectors, "product", None))
    made: list[tuple[str, _Sums]] = []
    for name, ids in sets.items():
        if isinstance(ids, str) or not len(ids):
            raise ValueError(f"The set {name!r} is {ids!r}: give a list of at least one id.")
        numbers = np.unique(index.store.numbers(list(ids)))
        if len(numbers) == len(index):
            raise ValueError(f"The set {name!r} holds all rows: leave something to train on.")
        sums = _Sums.none(len(vectors))
        sums.add(numbers, index.scores_of(vectors, numbers, length="product").astype(np.float64))
        made.append((name, sums))
    return _scored(index, vectors, made, _scale(index) if together else None)


def _scored(
    index: OpenIndex, vectors: Tensor, sets: Sequence[tuple[Any, _Sums]], scale: float | None
) -> list[list[GroupScore]]:
    """Scores [query][set] of what was summed."""
    found: list[list[GroupScore]] = [[] for _ in range(len(vectors))]
    for name, sums in sets:
        joint = None if scale is None or sums.numbers is None else _together(index, vectors, sums.numbers, scale)
        best = [record.id for record in index.store.rows(sums.best)]
        for query, one in enumerate(found):
            total, half = float(sums.total[query]), _half_width(sums, query)
            low, high = (None, None) if half is None else (total - half, total + half)
            both = None if joint is None else float(joint[query])
            one.append(GroupScore(name, sums.rows, total, low, high, both, best[query]))
    return found


def _half_width(sums: _Sums, query: int) -> float | None:
    """Half of the 95 % interval of a sum of independent rows."""
    n = sums.rows
    if n < 2:
        return None
    variance = max(sums.squares[query] - sums.total[query] ** 2 / n, 0.0) / (n - 1)
    return Z95 * math.sqrt(n * variance)


def _gram(index: OpenIndex, numbers: np.ndarray) -> np.ndarray:
    """Inner products [rows, rows] of stored rows by number. Memory: two blocks of unpacked rows beside them."""
    cosines = np.empty((len(numbers), len(numbers)))
    blocks = [slice(start, start + BLOCK) for start in range(0, len(numbers), BLOCK)]
    for at, own in enumerate(blocks):
        rows = _responses(index, numbers[own])
        for other in blocks[: at + 1]:
            columns = rows if other == own else _responses(index, numbers[other])
            cosines[own, other] = index.side_form.products(rows, columns).double().numpy()
            cosines[other, own] = cosines[own, other].T
    lengths = index.lengths_of(numbers).astype(np.float64)
    return cosines * np.outer(lengths, lengths)


def _responses(index: OpenIndex, numbers: np.ndarray) -> Tensor:
    """Stored rows [rows, width] by number, of unit length, without the side of their prompts."""
    rows = index.directions(numbers).chunk(index.settings.sides, 1)[0]
    return index.side_form.divided(rows, index.side_form.lengths(rows).clamp_min(1e-30))


def _scale(index: OpenIndex) -> float:
    """n c of the head of this file."""
    live = index.live_numbers()
    chosen = np.sort(np.random.default_rng(0).permutation(len(live))[:SAMPLE])
    longest = float(np.linalg.eigvalsh(_gram(index, live[chosen]))[-1]) / len(chosen)
    return len(live) * CURVATURE * longest


def _together(index: OpenIndex, vectors: Tensor, numbers: list[int], scale: float) -> np.ndarray:
    """Effects [queries] of rows that leave together."""
    order = np.sort(np.array(numbers))
    values, axes = np.linalg.eigh(_gram(index, order) / scale)
    # a sample's longest axis may be shorter than a group's: beyond 1 - 1/20 an axis counts twenty times at most
    weights = axes @ ((axes.T @ np.ones(len(order))) / (1 - np.minimum(values, 0.95)))
    return weights @ index.scores_of(vectors, order, length="product").astype(np.float64)
