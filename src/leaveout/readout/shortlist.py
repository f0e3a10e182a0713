"""The short list of a search: how long it is, what it costs, and how many of the best rows it holds.

The short form of rows gives estimates of all scores; the best rows by them, the list, are scored exactly. How many of the
best ten a list of some length holds is measured when an index is built, with rows of the corpus as queries. Queries of
another kind may do worse, and a table says nothing about lists that are shorter, by share, than its shortest.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, get_args

import numpy as np

from leaveout.readout.opened import OpenIndex, spread
from leaveout.readout.scan import Length, counted, ranking

QUERIES, BEST = 64, 10
ROWS, ROWS_ANEW = 2000, 256  # rows they are scored with: stored ones, or such that are encoded anew
LISTS = (10, 20, 50, 100, 200, 500, 1000)
WANTED = 0.95  # recall that a list should have where nobody says how long it is
LEAST = 1000  # rows of an index that are worth a short list


@dataclass(frozen=True)
class Recall:
    """Shares of the best 10 of `rows` rows that lists of these lengths hold, mean over `queries` rows of the corpus."""

    rows: int
    queries: int
    lists: tuple[int, ...]
    recall: tuple[float, ...]

    def at(self, share: float) -> float | None:
        """That of a list of this share of the rows: of the longest measured one that is no longer; None below all."""
        known = [found for length, found in zip(self.lists, self.recall, strict=True) if length <= share * self.rows]
        return known[-1] if known else None

    def share(self) -> float:
        """Of the shortest list that holds enough; 1 where none does."""
        enough = (n for n, found in zip(self.lists, self.recall, strict=True) if found >= WANTED)
        return next(enough, self.rows) / self.rows


@dataclass(frozen=True)
class SearchPlan:
    """What a search does: `print` it.

    considered  rows that are ranked at all
    shortlist   rows whose scores are exact, chosen by the short form; None: all are
    recall      share of the best 10 that a list like this held (see `Recall`); None: not measured
    anew        rows that are encoded anew from their texts, a forward pass each
    bytes       that are read
    reranked    rows of each query that are scored through the whole model, two forward passes each
    """

    considered: int
    shortlist: int | None
    recall: float | None
    anew: int
    bytes: int
    reranked: int = 0

    def __str__(self) -> str:
        read = f"{self.bytes / 2**20:,.1f} MiB read"
        again = f", {self.anew:,} encoded anew by the model" if self.anew else ""
        again += f", {self.reranked:,} scored through the whole model" if self.reranked else ""
        if self.shortlist is None:
            return f"All {self.considered:,} rows are scored exactly ({read}{again})."
        held = "how many of the best rows such a list holds was not measured"
        if self.recall is not None:
            held = (
                f"lists of this share held {self.recall:.0%} of the best 10 for rows of the corpus; others may do worse"
            )
        chosen = f"The {self.shortlist:,} best of {self.considered:,} rows by their short form are scored exactly"
        return f"{chosen} ({read}{again}): {held}."


def plan_search(
    index: OpenIndex, considered: int, length: Length, shortlist: int | None, exact: bool, reencode: int
) -> SearchPlan:
    """How `considered` rows are searched; `shortlist` None: a list that held 95 % in the test at build."""
    table = recall_of(index, length)
    share = 0.05 if table is None else table.share()
    listed = max(math.ceil(share * considered), BEST * 20) if shortlist is None else shortlist
    short, long = (
        0 if codec is None else index.settings.sides * codec.row_bytes for codec in (index.short, index.long)
    )
    small = shortlist is None and considered < LEAST
    if exact or index.short is None or small or listed >= considered:
        anew = considered if index.long is None else min(reencode, considered)
        return SearchPlan(considered, None, None, anew, considered * long)
    recall = None if table is None else table.at(listed / considered)
    anew = listed if index.long is None else min(reencode, listed)
    return SearchPlan(considered, listed, recall, anew, considered * short + listed * long)


# ---------------------------------------------------------------- the table


def recall_of(index: OpenIndex, length: Length) -> Recall | None:
    """The table that was measured at build."""
    facts = index.store.state("recall")
    return None if facts is None else _recall(facts[length])


def _recall(facts: dict[str, Any]) -> Recall:
    return Recall(facts["rows"], facts["queries"], tuple(facts["lists"]), tuple(facts["recall"]))


def worst(tables: list[dict[str, Any] | None]) -> dict[str, Any] | None:
    """Of indexes that become one: the tables of those which need the longest list, None where one has none."""
    known = [table for table in tables if table is not None]
    if len(known) < len(tables):
        return None

    def need(table: dict[str, Any]) -> tuple[float, float]:
        return _recall(table).share(), -sum(table["recall"]) / len(table["recall"])

    return {length: max((table[length] for table in known), key=need) for length in known[0]}


def measured_recall(index: OpenIndex) -> dict[str, Any] | None:
    """The table of an index for each way to count lengths, in JSON types; None for one too small to need it, or without a
    short form.

    Cost: 64 forward passes and two scans of at most 2,000 rows; without a long form, 256 forward passes more.
    """
    if index.short is None or len(index) < LEAST:
        return None
    rows = index.spread_rows(ROWS if index.long is not None else ROWS_ANEW)
    asked = spread(len(rows), QUERIES)
    vectors = index.encoded_anew(rows[asked])
    products: list[tuple[np.ndarray, ...]] = []  # of each side: exact ones, estimates, and lengths of rows
    for side, own in index.apart(vectors):
        short = np.concatenate([scores for _, scores in index.scan_short(own, rows, length="product")])
        products.append((index.scores_of(own, rows, length="product"), short, index.lengths_of(rows, side)))
    tables = {}
    for length in get_args(Length):
        scales = index.scales(vectors, length, None).numpy()
        full, estimated = (
            np.sum([counted(side[which], side[2], length) * by for side, by in zip(products, scales, strict=True)], 0).T
            for which in (0, 1)
        )
        tables[length] = asdict(_measured(full, estimated, asked))
    return tables


def _measured(exact: np.ndarray, short: np.ndarray, asked: np.ndarray) -> Recall:
    """The table of scores [query, row], the queries being the rows `asked`."""
    n_rows = exact.shape[1]
    lists = tuple(n for n in LISTS if n < n_rows)
    found = np.zeros(len(lists))
    for best, estimated, own in zip(exact.copy(), short.copy(), asked, strict=True):
        best[own] = estimated[own] = -np.inf  # a row is no answer to itself
        place = np.empty(n_rows, np.int64)
        place[ranking(estimated)] = np.arange(n_rows)
        found += (place[ranking(best)[:BEST], None] < np.array(lists)).mean(0)
    return Recall(n_rows, len(asked), lists, tuple((found / len(asked)).round(4).tolist()))
