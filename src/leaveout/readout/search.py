"""How a search is answered: exactly or from a short list, row by row or with alike rows counted as one.

Conventions: a group or a set of near-duplicates is represented by its best row, whose score is the group's. A sum over a
group would grow with its size and so rank sources by how many rows they have, and needs memory for every group; the
best row needs that of k groups only, whatever the corpus.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, get_args

import numpy as np
from torch import Tensor

from leaveout.corpus.writers import arrow_table
from leaveout.errors import FormatError, UnsupportedError, choices, needs, require_whole
from leaveout.executor import Crew
from leaveout.readout.controls import BEST, Controls, controls_of, other_answers
from leaveout.readout.forms import Form
from leaveout.readout.opened import EncodedQueries, OpenIndex, QueryRow
from leaveout.readout.rerank import RERANKED, Refinement, Reranking
from leaveout.readout.scan import Best, Length, Scanners, at_resolution, check_length
from leaveout.readout.shortlist import SearchPlan, plan_search

PAGE = 256  # rows whose entries are read at a time
VECTORS = 32  # rows whose vectors are read at a time: of the widest preset, 16 MiB


@dataclass(frozen=True)
class Hit:
    """One found row. `score` > 0: training on it lowers the query's loss, so removing it raises the loss."""

    rank: int
    id: str
    score: float
    text: str
    meta: dict[str, Any] = field(default_factory=dict)
    row: dict[str, Any] = field(default_factory=dict)  # as it came, with all its fields


class Hits(list[Hit]):
    """The hits of one query, best first; `controls`: whether anything but the query explains them, where that was asked."""

    controls: Controls | None = None

    def records(self) -> list[dict[str, Any]]:
        """Rank, score, id and text of each hit, and its fields; one that is called as these gets `row_` before its name."""
        own = ("rank", "score", "id", "text")
        return [
            {name: getattr(hit, name) for name in own}
            | {f"row_{name}" if name in own else name: value for name, value in hit.meta.items()}
            for hit in self
        ]

    def to_arrow(self) -> Any:
        """The `records` as a `pyarrow.Table`."""
        return arrow_table(self.records())

    def to_pandas(self) -> Any:
        """The `records` as a `pandas.DataFrame`."""
        return needs("pandas", "A DataFrame", pip="pandas").DataFrame(self.records())

    def to_dataset(self) -> Any:
        """The rows themselves, as they came, with their scores, as a `datasets.Dataset`."""
        return needs("datasets", "A Dataset", extra="data").Dataset(arrow_table(self.rows()))

    def rows(self) -> list[dict[str, Any]]:
        """The rows as they came, best first, each with its `score` (`leaveout_score` where they have a field of that name).

        Raises: FormatError if they have both.
        """
        taken = {name for hit in self for name in hit.row}
        name = next((name for name in ("score", "leaveout_score") if name not in taken), None)
        if name is None:
            raise FormatError(
                "The rows have the fields `score` and `leaveout_score`: rename one of them and index them again."
            )
        return [{**hit.row, name: hit.score} for hit in self]


@dataclass(frozen=True)
class SearchOptions:
    """What a search may do besides ranking all rows exactly.

    length, prompt_weight   how a row's length counts, and its prompt: see `Index.search`
    shortlist    rows that are scored exactly, the best by their short form; None: as many as held 95 % of the best ten
                 when the index was built
    exact        True: all rows are scored exactly
    reencode     rows, the best so far, that are encoded anew from their texts, so that their scores have no rounding
    rerank       rows, the best so far, that are scored through the whole model: see `rerank`; needs queries as texts or rows
    refine       what is known of the run that trained the model, by which queries are refined; then `rerank` is 100 if not given
    group_by     field, or `unit`: one hit per value, its best row; rows without the field are one group
    unique       True: of rows with the same content only the best; a number: of rows whose signatures have a cosine
                 above it, too
    workers      of the scan, and `backend`: `threads`, or actors of a `ray` cluster;
                 the hits do not depend on them
    """

    length: Length = "cosine"
    shortlist: int | None = None
    exact: bool = False
    reencode: int = 0
    rerank: int = 0
    refine: Refinement | None = None
    group_by: str | None = None
    unique: bool | float = False
    workers: int = 1
    backend: Scanners = "threads"
    prompt_weight: float | None = None

    def __post_init__(self) -> None:
        check_length(self.length)
        if self.shortlist is not None:
            require_whole("shortlist", self.shortlist, 1)
            if self.exact:
                raise ValueError("shortlist and exact both say which rows are scored exactly: give one of them.")
        require_whole("reencode", self.reencode, 0)
        require_whole("rerank", self.rerank, 0)
        if self.refine is not None and not isinstance(self.refine, Refinement):
            raise TypeError(f"refine is {self.refine!r}: give a Refinement, such as Refinement(rates=0.05).")
        if self.refine is not None and not self.rerank:
            object.__setattr__(self, "rerank", RERANKED)
        if self.rerank and self.reencode:
            raise ValueError("reencode and rerank both say how the best rows are scored once more: give one of them.")
        if self.backend not in get_args(Scanners):
            raise ValueError(f"backend is {self.backend!r}: {choices(self.backend, get_args(Scanners))}.")
        if self.group_by is not None and self.unique:
            raise ValueError("group_by and unique both say which rows count as one: give one of them.")
        if not isinstance(self.unique, (bool, float)) or (self.unique is not True and not 0 <= self.unique < 1):
            raise ValueError(f"unique is {self.unique!r}: give True, or a cosine between 0 and 1.")


def refuse(index: OpenIndex, k: int, where: str | None, options: SearchOptions) -> np.ndarray | None:
    """Refuses what a search could not do, before its model is loaded; the numbers of the rows of `where`.

    Raises: ValueError, UnsupportedError or MismatchError for what this index or this environment does not have.
    """
    require_whole("k", k, 1)
    index.checked_weight(options.length, options.prompt_weight)
    _groups(index, options)
    Crew(options.workers, "ray" if options.backend == "ray" else "processes")
    if options.shortlist is not None and index.short is None:
        raise UnsupportedError(f"{index.path} has no short form to make a list from: leave shortlist out.")
    if options.shortlist is not None and options.shortlist < k:
        raise ValueError(f"shortlist is {options.shortlist}, k {k}: give a list of at least k rows.")
    return index.numbers_where(where)


def planned(index: OpenIndex, k: int, wanted: np.ndarray | None, options: SearchOptions) -> SearchPlan:
    """What a search for k rows, of the `wanted` ones where not None, is going to do."""
    considered = len(index) if wanted is None else len(wanted)
    anew = max(k, options.reencode) if options.reencode else 0  # hits have scores of one kind
    reranked = max(k, options.rerank) if options.rerank else 0
    plan = plan_search(index, considered, options.length, options.shortlist, options.exact, anew)
    wanted_list = max(k, anew, reranked) if options.shortlist is None else k
    if plan.shortlist is not None and plan.shortlist < wanted_list:
        plan = plan_search(index, considered, options.length, wanted_list, False, anew)
    return replace(plan, reranked=min(reranked, plan.shortlist or considered))


def find(
    index: OpenIndex,
    queries: Sequence[QueryRow] | EncodedQueries,
    k: int,
    where: str | None = None,
    options: SearchOptions = SearchOptions(),  # frozen
    controls: bool | Sequence[str] = False,
) -> list[Hits]:
    """The k best rows of each query, best first: see `Index.search`."""
    wanted = refuse(index, k, where, options)
    if controls is False:
        return _found(index, queries, k, wanted, options)
    if isinstance(controls, str):
        raise TypeError(f"controls is {controls!r}: give True, or a list of other answers.")
    others = other_answers(queries, () if controls is True else controls)
    assert not isinstance(queries, EncodedQueries)
    found = _found(index, queries, max(k, BEST), wanted, options)
    there = [other for other in others if other is not None]
    theirs = iter(_found(index, there, BEST, wanted, options) if there else ())
    ids = [None if other is None else [hit.id for hit in next(theirs)] for other in others]
    named = [[hit.id for hit in hits] for hits in found]
    checked = controls_of(index, queries, named, ids, wanted, options.length, options.prompt_weight)
    return [_kept(hits, k, own) for hits, own in zip(found, checked, strict=True)]


def _kept(hits: Hits, k: int, controls: Controls) -> Hits:
    kept = Hits(hits[:k])
    kept.controls = controls
    return kept


def _found(
    index: OpenIndex,
    queries: Sequence[QueryRow] | EncodedQueries,
    k: int,
    wanted: np.ndarray | None,
    options: SearchOptions,
) -> list[Hits]:
    encoded = index.encode(queries)
    scales = index.scales(encoded.vectors, options.length, options.prompt_weight)
    asked, encoded = encoded.vectors, replace(encoded, vectors=index.weighed(encoded.vectors, scales))
    ranking = None
    if options.rerank:
        if isinstance(queries, EncodedQueries):
            raise TypeError("Queries that are encoded already can't be reranked: give their texts or rows.")
        if planned(index, k, wanted, options).reranked:
            ranking = Reranking(index, queries, options.refine, asked, scales)
    if isinstance(options.unique, bool):
        best = _ranked(index, encoded, k, wanted, options, ranking)
        return [hits(index, *one) for one in zip(best.numbers, best.scores, strict=True)]
    depth = 4 * k
    while True:  # deeper and deeper, until k rows are left that are not alike
        best = _ranked(index, encoded, depth, wanted, options, ranking)
        kept = [distinct(rows, k, options.unique, index.directions, index.form) for rows in best.numbers]
        if all(len(one) == k or len(rows) < depth for one, rows in zip(kept, best.numbers, strict=True)):
            found = zip(best.numbers, best.scores, kept, strict=True)
            return [hits(index, rows[one], scores[one]) for rows, scores, one in found]
        depth *= 4


def hits(index: OpenIndex, numbers: np.ndarray, scores: np.ndarray) -> Hits:
    """Hits of row numbers and their scores, ranked in the given order."""
    records = index.store.rows(numbers)
    columns = index.store.settings.get("columns", {})
    return Hits(
        Hit(rank, record.id, float(score), record.text, record.meta, _as_it_came(record.row, columns))
        for rank, (record, score) in enumerate(zip(records, scores, strict=True), start=1)
    )


def _as_it_came(row: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """A row with its own names of fields, where `columns` gave it ours."""
    return {columns.get(name, name): value for name, value in row.items()}


def _ranked(
    index: OpenIndex,
    queries: EncodedQueries,
    k: int,
    wanted: np.ndarray | None,
    options: SearchOptions,
    ranking: Reranking | None,
) -> Best:
    """The k best rows or groups; a list that nobody asked for grows until it has as many groups."""
    groups, plan = _groups(index, options), planned(index, k, wanted, options)
    while True:
        best = Best(len(queries), k) if groups is None else BestGroups(len(queries), k, groups)
        _add_exact(best, index, queries, k, wanted, options, plan, ranking)
        asked = options.shortlist is not None or options.reencode or options.rerank
        if plan.shortlist is None or asked or all(len(one) == k for one in best.numbers):
            return best
        plan = plan_search(index, plan.considered, options.length, 4 * plan.shortlist, False, 0)


def _add_exact(
    best: Best,
    index: OpenIndex,
    queries: EncodedQueries,
    k: int,
    wanted: np.ndarray | None,
    options: SearchOptions,
    plan: SearchPlan,
    ranking: Reranking | None,
) -> None:
    """Considers all rows, or those of each query's list, with exact scores: short form, long form, then the model."""
    crew: tuple[int, Scanners] = (options.workers, options.backend)
    vectors, length = queries.vectors, options.length
    lists: list[np.ndarray] | None = None
    if plan.shortlist is not None:
        lists = _best(index.scan_short(vectors, wanted, *crew, length=length), len(queries), plan.shortlist)
    if ranking is not None:
        found = index.scan(vectors, _either(lists, wanted), *crew, length=length)
        lists = _best(found, len(queries), max(k, options.rerank), lists)
        for query, numbers in enumerate(lists):
            best.add_one(query, numbers, ranking.scores(query, numbers, length))
    elif options.reencode and index.long is not None:
        found = index.scan(vectors, _either(lists, wanted), *crew, length=length)
        lists = _best(found, len(queries), max(k, options.reencode), lists)
        _add(best, index.scan_anew(vectors, _either(lists, wanted), length=length), lists)
    else:
        _add(best, index.scan(vectors, _either(lists, wanted), *crew, length=length), lists)


def _either(lists: list[np.ndarray] | None, wanted: np.ndarray | None) -> np.ndarray | None:
    """The numbers, ascending, that a scan needs: those of all lists, where there are any."""
    return wanted if lists is None else np.unique(np.concatenate(lists))


def _add(best: Best, found: Iterator[tuple[np.ndarray, np.ndarray]], lists: list[np.ndarray] | None) -> None:
    """Considers what a scan finds: for each query its own list, where there are any."""
    for numbers, scores in found:
        if lists is None:
            best.add(numbers, scores)
            continue
        for query, own in enumerate(lists):
            at = np.isin(numbers, own, assume_unique=True)
            best.add_one(query, numbers[at], scores[at, query])


def _best(
    found: Iterator[tuple[np.ndarray, np.ndarray]], n_queries: int, k: int, lists: list[np.ndarray] | None = None
) -> list[np.ndarray]:
    """Numbers, ascending, of the k best rows of each query."""
    best = Best(n_queries, k)
    _add(best, found, lists)
    return [np.sort(one) for one in best.numbers]


def _groups(index: OpenIndex, options: SearchOptions) -> Callable[[np.ndarray], list[Hashable]] | None:
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


class BestGroups(Best):
    """The k groups with the highest best rows of each query, each as that row; equal scores (at the
    resolution of ranks) in order of row numbers.

    Cost: one catalogue entry for every row that beats the k-th group of its query so far; with fewer than k groups
    that is every row.
    """

    def __init__(self, n_queries: int, k: int, groups_of: Callable[[np.ndarray], Sequence[Hashable]]) -> None:
        super().__init__(n_queries, k)
        self.groups_of = groups_of
        self.held: list[dict[Hashable, tuple[float, int, float]]] = [{} for _ in range(n_queries)]  # see _consider
        self.known: dict[int, Hashable] = {}  # groups of the rows that are being added

    def add(self, numbers: np.ndarray, scores: np.ndarray) -> None:
        self.known.clear()
        super().add(numbers, scores)

    def add_one(self, query: int, numbers: np.ndarray, scores: np.ndarray) -> None:
        held, rounded = self.held[query], at_resolution(scores)
        order = np.argsort(-rounded, kind="stable")
        for start in range(0, len(order), PAGE):
            page = order[start : start + PAGE]
            if len(held) == self.k and rounded[page[0]] <= self._floor(query)[0]:
                break
            for at, group in zip(page, self._groups(numbers[page]), strict=True):
                self._consider(query, group, (float(rounded[at]), int(numbers[at]), float(scores[at])))
        ranked = sorted(held.values(), key=lambda row: (-row[0], row[1]))
        self.numbers[query] = np.array([number for _, number, _ in ranked], np.int64)
        self.scores[query] = np.array([score for _, _, score in ranked], np.float32)

    def _consider(self, query: int, group: Hashable, row: tuple[float, int, float]) -> None:
        """`row`: score at the resolution of ranks, row number, score."""
        held = self.held[query]
        if group in held:
            if row[0] > held[group][0]:
                held[group] = row
            return
        if len(held) == self.k:
            floor, worst = self._floor(query)
            if row[0] <= floor:
                return
            del held[worst]
        held[group] = row

    def _floor(self, query: int) -> tuple[float, Hashable]:
        """Rounded score and group of the last in the ranking."""
        group, row = min(self.held[query].items(), key=lambda item: (item[1][0], -item[1][1]))
        return row[0], group

    def _groups(self, numbers: np.ndarray) -> list[Hashable]:
        missing = [number for number in numbers.tolist() if number not in self.known]
        if missing:
            self.known.update(zip(missing, self.groups_of(np.array(missing)), strict=True))
        return [self.known[number] for number in numbers.tolist()]


def distinct(
    numbers: np.ndarray,
    k: int,
    threshold: float,
    vectors: Callable[[np.ndarray], Tensor],
    form: Form,
) -> list[int]:
    """Positions of the first k rows of a ranking, passing over each whose cosine with one kept is above the threshold.

    `vectors` gives rows [rows, width] of the form by number, of unit length.
    """
    kept: list[int] = []
    chosen: list[Tensor] = []
    for start in range(0, len(numbers), VECTORS):
        for at, vector in enumerate(vectors(numbers[start : start + VECTORS])[:, None], start=start):
            if all(float(form.products(one, vector)) <= threshold for one in chosen):
                kept.append(at)
                chosen.append(vector)
            if len(kept) == k:
                return kept
    return kept
