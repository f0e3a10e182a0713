"""Does a hit list answer the query, or would a ranking that knows nothing of it give the same?

Four controls: the length of a row's signature alone (`norm`), the number of its learned tokens alone (`length`), a text search
(`words`, BM25), and the same search with another answer of the same form (`other answer`). Lengths are ranked from either end.

The rule: a control explains a list if more than SHARED of the ten best hits are among its own ten best. Rows that taught one
answer may well have one length, and share its words: length and words explain a list only if, besides, the scores of the
control's own best 100 rows follow its numbers, with a rank correlation of at least CORRELATION. benchmarks/controls.py chose
this on some seeds and judged it on others.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from torch import Tensor

from leaveout.bm25 import Bm25
from leaveout.corpus import Behaviour, Row
from leaveout.corpus.behaviour import terms_of
from leaveout.corpus.rows import answer_of, with_answer
from leaveout.errors import UnsupportedError
from leaveout.metrics import spearman
from leaveout.readout.opened import EncodedQueries, OpenIndex, QueryRow, query_row
from leaveout.readout.scan import Best, BestGroups, Length, lengths_in, positions_of
from leaveout.store import Record
from leaveout.tables import Table, Tabular

CORRELATION, SHARED = 0.8, 5
DEPTH, BEST = 100, 10  # rows of a control that are looked at, and hits
LEAST = 50  # rows of an index: of fewer, ten hits are shared by chance
Groups = Callable[[np.ndarray], Sequence[Hashable]]
PAGE = 1024  # entries of the catalogue that are read at a time


@dataclass(frozen=True)
class Control:
    """One ranking that knows nothing of what is asked, beside the hits of a query.

    name         `norm`, `length`, `words` or `other answer`
    what         in words: what its best rows are
    shared       how many of the ten best hits are among its own ten best
    correlation  rank correlation of its numbers with the scores, over its own best 100; None for `other answer`, and
                 where its numbers are all equal
    best         ids of its own ten best rows
    explains     whether it explains the hits, by the rule above
    """

    name: str
    what: str
    shared: int
    correlation: float | None
    best: tuple[str, ...]

    @property
    def explains(self) -> bool:
        followed = self.correlation is not None and self.correlation >= CORRELATION
        return self.shared > SHARED and (self.name in ("norm", "other answer") or followed)

    def __str__(self) -> str:
        told = f"{self.shared} of the {BEST} best hits are {self.what}"
        return told if self.correlation is None else f"{told}, rank correlation {self.correlation:.2f}"


@dataclass(frozen=True)
class Controls(Tabular):
    """The controls of one query's hits. `note`: what was not looked at."""

    of: tuple[Control, ...]
    note: str = ""

    @property
    def explaining(self) -> list[Control]:
        """Those that explain the hits."""
        return [control for control in self.of if control.explains]

    @property
    def sentence(self) -> str:
        """What they say of the hits."""
        if not self.explaining:
            return "No control explains these hits."
        return f"These hits may say nothing of the query: {'; '.join(map(str, self.explaining))}."

    def facts(self) -> dict[str, Any]:
        """In plain JSON types."""
        of = [{**asdict(control), "explains": control.explains} for control in self.of]
        return {"sentence": self.sentence, "note": self.note, "of": of}

    def table(self) -> Table:
        """A line for each control, and the sentence."""
        lines = [
            (c.what, c.shared, "" if c.correlation is None else c.correlation, "yes" if c.explains else "no")
            for c in self.of
        ]
        head = ["control", f"of {BEST} hits", "rank correlation", "explains them"]
        return Table(head, lines, notes=[note for note in (self.sentence, self.note) if note])


# ---------------------------------------------------------------- another answer


def other_answers(queries: Sequence[QueryRow] | EncodedQueries, given: Sequence[str]) -> list[QueryRow | None]:
    """Each query with another answer: the given one, or that of the next query that has a different one; None: there is none.

    A behaviour holds texts against each other itself.
    Raises: TypeError for queries that are encoded already; ValueError for as many answers as do not fit.
    """
    if isinstance(queries, EncodedQueries):
        raise TypeError("Controls need the words of queries: give their texts or rows, not what `encode` gave.")
    if given and any(isinstance(query, Behaviour) for query in queries):
        raise ValueError("A contrast or behaviour holds other texts against its own already: leave other answers out.")
    if len(given) not in (0, 1, len(queries)):
        raise ValueError(f"There are {len(given)} other answers and {len(queries)} queries: give one, or one for each.")
    rows = [None if isinstance(query, Behaviour) else query_row(query, number) for number, query in enumerate(queries)]
    found: list[QueryRow | None] = []
    for number, row in enumerate(rows):
        answers = [given[number % len(given)]] if given else _others(rows, number)
        different = [answer for answer in answers if row is not None and answer.strip() != answer_of(row).strip()]
        found.append(with_answer(row, different[0]) if row is not None and different else None)
    return found


def _others(rows: Sequence[Row | None], number: int) -> list[str]:
    return [answer_of(row) for row in [*rows[number + 1 :], *rows[:number]] if row is not None]


# ---------------------------------------------------------------- rankings that know nothing of the query


def controls_of(
    index: OpenIndex,
    queries: Sequence[QueryRow],
    found: Sequence[Sequence[str]],
    others: Sequence[Sequence[str] | None],
    wanted: np.ndarray | None,
    length: Length,
    prompt_weight: float | None,
    groups: Groups | None = None,
) -> list[Controls]:
    """Controls of each query, given the ids of its best hits and of those of its other answer.

    groups  where rows count as one: from row numbers to what says so; then groups are compared, each by its best row
    Cost:   two passes over the catalogue, and exact scores of 500 rows a query.
    Memory: a page of the catalogue, and 100 rows a control.
    Raises: UnsupportedError for an index of less than 50 rows.
    """
    considered = len(index) if wanted is None else len(wanted)
    if considered < LEAST:
        raise UnsupportedError(
            f"Controls compare the best {BEST} of at least {LEAST} rows, and {considered} are searched here: leave them out."
        )
    vectors = index.encode(queries).vectors
    vectors = index.weighed(vectors, index.scales(vectors, length, prompt_weight))
    alone, by_words = _ranked(index, [_words(query) for query in queries], wanted, groups)

    def called(ids: Sequence[str]) -> set[Any]:
        """What is counted of the best of a list: rows, or their groups."""
        best = ids[:BEST]
        return set(best if groups is None else groups(index.store.numbers(list(best))))

    made: list[Controls] = []
    for query, (hits, theirs) in enumerate(zip(found, others, strict=True)):
        own = [*alone, ("words", "what a text search finds", by_words, query)]
        of = [
            _control(
                index, name, what, best.numbers[at], best.scores[at], vectors[query : query + 1], hits, length, called
            )
            for name, what, best, at in own
        ]
        if theirs is not None:
            shared = len(called(hits) & called(theirs))
            of.append(Control("other answer", "hits of another answer, too", shared, None, tuple(theirs[:BEST])))
        made.append(Controls(tuple(of), "" if theirs is not None else "There was no other answer to compare with."))
    return made


def _words(query: QueryRow) -> str:
    """What a text search for a query is given: its texts, of a behaviour those that count for it."""
    weights = query.weights or () if isinstance(query, Behaviour) else (1.0,)
    rows = [row for weight, (_, row) in zip(weights, terms_of(query), strict=True) if weight > 0]
    return " ".join(query_row(row, 0).text for row in rows)


Ranked = tuple[str, str, Best, int]  # a control's name, what its best rows are, those of it, and of which query


def _ranked(
    index: OpenIndex, texts: Sequence[str], wanted: np.ndarray | None, groups: Groups | None
) -> tuple[list[Ranked], Best]:
    """The best rows of each control that is the same for all queries, and of the text search."""
    both, by_words = (
        Best(count, DEPTH) if groups is None else BestGroups(count, DEPTH, groups) for count in (3, len(texts))
    )
    search = Bm25(texts)
    for numbers, norms, records in _pages(index, wanted):
        targets = np.array([record.extra["targets"] for record in records], np.float32)
        both.add(numbers, np.stack([norms, targets, -targets], 1))
        search.count(record.text for record in records)
    for numbers, _, records in _pages(index, wanted):
        by_words.add(numbers, search.score([record.text for record in records]))
    called = [
        ("norm", "rows with the longest signatures"),
        ("length", "the longest rows"),
        ("length", "the shortest rows"),
    ]
    return [(name, what, both, at) for at, (name, what) in enumerate(called)], by_words


def _pages(index: OpenIndex, wanted: np.ndarray | None) -> Iterator[tuple[np.ndarray, np.ndarray, list[Record]]]:
    """Numbers, lengths of signatures, and entries of the searched rows, some at a time."""
    for segment in index.store.segments():
        positions = positions_of(segment, wanted)
        positions = np.arange(segment.n_rows) if positions is None else positions
        for start in range(0, len(positions), PAGE):
            piece = positions[start : start + PAGE]
            yield segment.first + piece, lengths_in(segment, piece), index.store.rows(segment.first + piece)


def _control(
    index: OpenIndex,
    name: str,
    what: str,
    numbers: np.ndarray,
    values: np.ndarray,
    vector: Tensor,
    hits: Sequence[str],
    length: Length,
    called: Callable[[Sequence[str]], set[Any]],
) -> Control:
    best = tuple(record.id for record in index.store.rows(numbers[:BEST]))
    scores = index.scores_of(vector, numbers, length=length)[:, 0]
    correlation = float(spearman(values, scores)[0])
    shared = len(called(hits) & called(best))
    return Control(name, what, shared, None if np.isnan(correlation) else correlation, best)
