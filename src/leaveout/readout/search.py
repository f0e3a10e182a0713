"""How a search is answered: exactly or from a short list, row by row or with alike rows counted as one.

Conventions: a group or a set of near-duplicates is represented by its best row, whose score is the group's. A sum over a
group would grow with its size and so rank sources by how many rows they have, and needs memory for every group; the
best row needs that of k groups only, whatever the corpus.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, get_args

import numpy as np
from torch import Tensor

from leaveout.corpus.writers import arrow_table
from leaveout.errors import FormatError, UnsupportedError, choices, needs, require_whole
from leaveout.executor import Crew
from leaveout.files import replacing
from leaveout.readout.controls import BEST, Controls, controls_of, other_answers
from leaveout.readout.forms import Form
from leaveout.readout.opened import EncodedQueries, OpenIndex, QueryRow, shown_text
from leaveout.readout.rerank import RERANKED, Refinement, Reranking
from leaveout.readout.scan import Best, BestGroups, Length, Scanners, check_length
from leaveout.readout.shortlist import LEAST as SMALL
from leaveout.readout.shortlist import SearchPlan, plan_search
from leaveout.words import shared_words, standing_out, verdict

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
    step_error: float | None = None
    """Of scores through the whole model: how much they change, relative to their size, when their step doubles."""
    unmatched: str | None = None
    """Where no row satisfies `where`: that, and which values there are."""

    def best(self, k: int) -> Hits:
        """The first k, with what is known of all."""
        kept = Hits(self[:k])
        kept.controls, kept.step_error, kept.unmatched = self.controls, self.step_error, self.unmatched
        return kept

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
    if where is not None and wanted is not None and not len(wanted):
        none = Hits()
        none.unmatched = index.store.unmatched(where)
        return [none for _ in index.encode(queries).texts]
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
    groups = _groups(index, options)
    checked = controls_of(index, queries, named, ids, wanted, options.length, options.prompt_weight, groups)
    for hits, own in zip(found, checked, strict=True):
        hits.controls = own
    return [hits.best(k) for hits in found]


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
        found = zip(best.numbers, best.scores, strict=True)
        return [hits(index, *one, ranking and ranking.error(n)) for n, one in enumerate(found)]
    depth = 4 * k
    while True:  # deeper and deeper, until k rows are left that are not alike
        best = _ranked(index, encoded, depth, wanted, options, ranking)
        kept = [distinct(rows, k, options.unique, index.directions, index.form) for rows in best.numbers]
        if all(len(one) == k or len(rows) < depth for one, rows in zip(kept, best.numbers, strict=True)):
            found = zip(best.numbers, best.scores, kept, strict=True)
            return [
                hits(index, rows[one], scores[one], ranking and ranking.error(n))
                for n, (rows, scores, one) in enumerate(found)
            ]
        depth *= 4


LOOKED_AT = 50  # of the best rows, to say how many stand out, and rows of the index that show which words are common
USUAL = 24  # rows of an index that are asked themselves, to say what the best row usually scores
LEAST = 50  # rows of an index: among fewer, the best other row says little
SEARCHED = 50_000  # rows that are searched for them at most, and for each so many that are scored exactly:
CANDIDATES = 20
KEPT = "usual.json"  # beside the rows of an index


def usual_best(index: OpenIndex, options: SearchOptions = SearchOptions()) -> float | None:  # frozen
    """What the best row scores for other rows, were they queries of length one: texts about something else mostly score less.

    Rows of the index, evenly apart, are asked; of the scores of each one's best other row the median counts. None for an index
    of less than 50 rows, for scores through the whole model, which have another unit, and where a model whose layers are
    streamed would have to encode rows anew.
    Cost: a scan of the short forms of at most 50,000 rows, evenly apart, for 24 queries, and 20 exact scores each, about 4 CPU
    seconds, once: of an index that is searched by lists it is kept in a file beside the rows until rows come or go. Without
    long forms the short ones decide, which finds a little more. Of a larger index the usual is that of those rows, a little
    less.
    """
    if len(index) < LEAST or options.rerank or (index.long is None and index.readout.stream is not None):
        return None
    if len(index) <= SMALL:
        return _usual_best(index, options)
    file, asked = index.path / KEPT, f"{options.length}, prompts {options.prompt_weight}"
    rows = {"version": index.store.version, "rows": len(index), "fingerprint": index.fingerprint}
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):  # there is none, or of another form
        kept = json.loads(file.read_text(encoding="utf-8"))
        rows = kept if {name: kept[name] for name in rows} == rows else rows
    if asked not in rows:
        rows[asked] = _usual_best(index, options)
        with contextlib.suppress(OSError), replacing(file) as temporary:  # an index may be read only
            temporary.write_text(json.dumps(rows) + "\n", encoding="utf-8")
    return rows[asked]


def _usual_best(index: OpenIndex, options: SearchOptions) -> float | None:
    length, weight = options.length, options.prompt_weight
    crew: tuple[int, Scanners] = (options.workers, options.backend)
    numbers, groups = index.spread_rows(USUAL), _groups(index, SearchOptions(unique=True))
    assert groups is not None
    searched = None if len(index) <= SEARCHED else np.union1d(numbers, index.spread_rows(SEARCHED))
    vectors = index.directions(numbers)
    vectors = index.weighed(vectors, index.scales(vectors, length, weight))
    best = BestGroups(len(numbers), 2, groups)
    if index.long is None:
        _add(best, index.scan_short(vectors, searched, *crew, length=length), None)
    else:
        lists = None
        if index.short is not None and len(index) > SMALL:
            found = index.scan_short(vectors, searched, *crew, length=length)
            lists = _best(found, len(numbers), CANDIDATES, None, groups, 2)
        _add(best, index.scan(vectors, _either(lists, searched), *crew, length=length), lists)
    found = zip(groups(numbers), best.numbers, best.scores, strict=True)
    others = [
        [float(s) for group, s in zip(groups(rows), scores, strict=True) if group != own] for own, rows, scores in found
    ]
    usual = float(np.median([scores[0] if scores else 0.0 for scores in others]))
    return usual if usual > 0 else None


def usual_scores(index: OpenIndex, queries: EncodedQueries, usual: float | None, length: Length) -> list[float]:
    """That (see `usual_best`) in the unit of each query's scores; 0 where it is unknown."""
    if usual is None or (length == "cosine" and index.settings.sides == 2):
        return [usual or 0.0] * len(queries)  # those scores do not grow with the length of a query, see `scales`
    return [usual * float(size) for size in index.form.lengths(queries.vectors)]


def told(index: OpenIndex, found: Hits, opposite: float = 0.0, usual: float = 0.0) -> str:
    """One sentence about the best rows of a query, best first: how many stand out, and which words they share (see `verdict`);
    or that a filter lets none through."""
    if found.unmatched is not None:
        return found.unmatched
    scores = [hit.score for hit in found]
    count = standing_out(scores, usual or opposite)
    best = {hit.id for hit in found[:count]}
    others = [row.text for row in index.store.rows(index.spread_rows(4 * LOOKED_AT)) if row.id not in best]
    return verdict(scores, opposite, usual, shared_words([hit.text for hit in found[:count]], others))


def hits(index: OpenIndex, numbers: np.ndarray, scores: np.ndarray, step_error: float | None = None) -> Hits:
    """Hits of row numbers and their scores, ranked in the given order."""
    records = index.store.rows(numbers)
    columns = index.store.settings.get("columns", {})
    found = Hits(
        Hit(rank, record.id, float(score), shown_text(record), record.meta, _as_it_came(record.row, columns))
        for rank, (record, score) in enumerate(zip(records, scores, strict=True), start=1)
    )
    found.step_error = step_error
    return found


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
    groups = best.groups_of if isinstance(best, BestGroups) and (options.rerank or options.reencode) else None
    lists: list[np.ndarray] | None = None
    if plan.shortlist is not None:
        found = index.scan_short(vectors, wanted, *crew, length=length)
        lists = _best(found, len(queries), plan.shortlist, None, None if options.shortlist else groups, k)
    if ranking is not None:
        found = index.scan(vectors, _either(lists, wanted), *crew, length=length)
        lists = _best(found, len(queries), max(k, options.rerank), lists, groups, k)
        for query, numbers in enumerate(lists):
            best.add_one(query, numbers, ranking.scores(query, numbers, length))
    elif options.reencode and index.long is not None:
        found = index.scan(vectors, _either(lists, wanted), *crew, length=length)
        lists = _best(found, len(queries), max(k, options.reencode), lists, groups, k)
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
    found: Iterator[tuple[np.ndarray, np.ndarray]],
    n_queries: int,
    k: int,
    lists: list[np.ndarray] | None = None,
    groups: Callable[[np.ndarray], Sequence[Hashable]] | None = None,
    n_groups: int = 0,
) -> list[np.ndarray]:
    """Numbers, ascending, of the k best rows of each query, and of the best row of each of its best groups, where there are any:
    so many groups must be left to rank."""
    bests = [Best(n_queries, k), *([] if groups is None else [BestGroups(n_queries, n_groups, groups)])]
    for piece in found:
        for best in bests:
            _add(best, iter([piece]), lists)
    return [np.unique(np.concatenate(numbers)) for numbers in zip(*(best.numbers for best in bests), strict=True)]


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
