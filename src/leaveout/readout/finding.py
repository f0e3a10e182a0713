"""How a search is answered: exactly or from a short list, row by row or rolled up."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
from torch import Tensor

from leaveout.errors import UnsupportedError, choices
from leaveout.executor import refuse_crew
from leaveout.readout import ann, simhash
from leaveout.readout.queries import Queries
from leaveout.readout.rollup import BestGroups, distinct
from leaveout.readout.search import Best, Scanners, scan

if TYPE_CHECKING:
    from leaveout.readout.index import Index

Approximation = Literal["simhash", "faiss"]


@dataclass(frozen=True)
class SearchOptions:
    """What a search may do besides ranking all rows exactly.

    approximate  `simhash` or `faiss`: a short list from the side file that `Index.prepare` made, instead of a full scan
    rescore      length of that list, whose rows then get exact scores; 0: the scores stay estimates
    group_by     field, or `unit`: one hit per value, its best row; rows without the field are one group
    unique       True: of rows with the same content only the best; a number: of rows whose signatures have a cosine
                 above it, too
    workers      of the scan, and `backend`: `threads`, or actors of a `ray` cluster (a short list is made by threads);
                 the hits do not depend on them
    """

    approximate: Approximation | None = None
    rescore: int = 200
    group_by: str | None = None
    unique: bool | float = False
    workers: int = 1
    backend: Scanners = "threads"

    def __post_init__(self) -> None:
        if self.approximate not in (None, *get_args(Approximation)):
            raise ValueError(
                f"approximate is {self.approximate!r}: {choices(self.approximate, get_args(Approximation))}."
            )
        if self.backend not in get_args(Scanners):
            raise ValueError(f"backend is {self.backend!r}: {choices(self.backend, get_args(Scanners))}.")
        if self.rescore < 0:
            raise ValueError(f"rescore is {self.rescore}: give 0 or more.")
        if self.group_by is not None and self.unique:
            raise ValueError("group_by and unique both say which rows count as one: give one of them.")
        if not isinstance(self.unique, (bool, float)) or (self.unique is not True and not 0 <= self.unique < 1):
            raise ValueError(f"unique is {self.unique!r}: give True, or a cosine between 0 and 1.")


def prepare(index: Index, kind: Approximation, bits: int) -> None:
    """Makes or completes the side file of an approximation. Raises: UnsupportedError for low-rank rows."""
    if kind not in get_args(Approximation):
        raise ValueError(f"There is no approximation {kind!r}: {choices(kind, get_args(Approximation))}.")
    _refuse_low_rank(index)
    if kind == "simhash":
        simhash.update(index.store, bits, index.settings.seed)
    else:
        ann.update(index.store, index.settings.seed)


def refuse(index: Index, options: SearchOptions) -> None:
    """Raises: ValueError or UnsupportedError for options that this index or this environment does not have."""
    _groups(index, options)
    refuse_crew(options.workers, "ray" if options.backend == "ray" else "processes")
    if options.approximate is not None:
        _refuse_low_rank(index)
        (simhash if options.approximate == "simhash" else ann).prepared(index.store)


def find(
    index: Index, queries: Queries, k: int, wanted: np.ndarray | None, options: SearchOptions
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Per query: the numbers of the rows found, best first, and their scores."""
    if isinstance(options.unique, bool):
        best = _ranked(index, queries, k, wanted, options)
        return list(zip(best.numbers, best.scores, strict=True))
    depth = 4 * k
    while True:  # deeper and deeper, until k rows are left that are not alike
        best = _ranked(index, queries, depth, wanted, options)
        kept = [distinct(rows, k, options.unique, index.directions, index.product) for rows in best.numbers]
        if all(len(one) == k or len(rows) < depth for one, rows in zip(kept, best.numbers, strict=True)):
            return [(rows[one], s[one]) for rows, s, one in zip(best.numbers, best.scores, kept, strict=True)]
        depth *= 4


def _ranked(index: Index, queries: Queries, k: int, wanted: np.ndarray | None, options: SearchOptions) -> Best:
    groups = _groups(index, options)
    best = Best(len(queries), k) if groups is None else BestGroups(len(queries), k, groups)
    if options.approximate is None:
        product = index.product(queries.vectors)
        for numbers, scores in scan(index.store.segments(), product, wanted, options.workers, options.backend):
            best.add(numbers, scores)
        return best
    _refuse_low_rank(index)
    n = max(k, options.rescore)
    if options.approximate == "simhash":
        lists = list(simhash.shortlist(index.store, queries.vectors, n, wanted, options.workers))
    else:
        lists = list(ann.shortlist(index.store, queries.vectors, n, wanted))
    exact = _exact(index, queries.vectors, [numbers for numbers, _ in lists], options) if options.rescore else None
    for query, (numbers, estimates) in enumerate(lists):
        best.add_one(query, numbers, estimates if exact is None else exact[query])
    return best


def _exact(index: Index, vectors: Tensor, lists: list[np.ndarray], options: SearchOptions) -> list[np.ndarray]:
    """Exact scores of every query's own list."""
    union = np.unique(np.concatenate(lists))
    parts = scan(index.store.segments(), index.product(vectors), union, options.workers, options.backend)
    found = [part for _, part in parts]
    scores = np.concatenate(found) if found else np.empty((0, len(vectors)), np.float32)
    return [scores[np.searchsorted(union, numbers), query] for query, numbers in enumerate(lists)]


def _groups(index: Index, options: SearchOptions) -> Callable[[np.ndarray], list[Hashable]] | None:
    """A function from row numbers to what says that rows count as one."""
    store, name = index.store, options.group_by
    if options.unique is True:
        return lambda numbers: [record.content_hash for record in store.rows(numbers)]
    if name is None:
        return None
    if name == "unit":
        return lambda numbers: [record.unit for record in store.rows(numbers)]
    if name not in (fields := store.info()["fields"]):
        raise ValueError(f"group_by is {name!r}: {choices(name, ['unit', *fields])}.")
    return lambda numbers: [record.meta.get(name) for record in store.rows(numbers)]


def _refuse_low_rank(index: Index) -> None:
    if index.low_rank is not None:
        raise UnsupportedError(
            "The rows of this index are stored by singular triples, which have no flat vector to approximate: "
            "search it exactly, or build it with the preset paper or similarity, or with rank=None."
        )
