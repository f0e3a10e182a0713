"""Everything that a page, a program or an agent may ask of an index and a run, answered as plain JSON values.

Conventions: nothing here knows of HTTP or threads. What needs a model (`ask`, `explain`, `what_if`) is called by one thread
at a time; the rest only reads files and may be called by any.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from leaveout.corpus import Contrast, Row
from leaveout.corpus.rows import asked_row, commonest
from leaveout.deletion.predict import meanings_told, reach, sentence
from leaveout.deletion.run import TrainingRun
from leaveout.errors import FormatError, UnsupportedError, choices
from leaveout.readout.explain import explain_rows, text_starts
from leaveout.readout.index import Index
from leaveout.readout.opened import shown_text
from leaveout.readout.search import LOOKED_AT, Hit, told, usual_best, usual_scores
from leaveout.store import Record, Store
from leaveout.training.examples import as_row
from leaveout.training.queries import Query
from leaveout.web.requests import Ask, Explain, Question, WhatIf
from leaveout.words import index_sentences, pairs_of_words, passage, run_sentences, strongest

SHOWN = 20_000  # characters of a row in a list; `row` gives all
UNITS = 300  # that are listed at once
POINTS = 11  # of a curve, from 0 to 100 %
CURVES = 4  # queries, and sets, whose curves are drawn


@dataclass(frozen=True)
class Unit:
    """What a run leaves out together: its name, its examples, and whether any of them is in a step."""

    name: str
    examples: int
    trained: bool


@dataclass
class RunExamples:
    """The examples of a run, so that rows of an index can be met: by id and content, or by content alone."""

    by_id: dict[str, tuple[str, str]] = field(default_factory=dict)  # id -> content hash, unit
    by_content: dict[str, str] = field(default_factory=dict)  # content hash -> unit
    units: dict[str, Unit] = field(default_factory=dict)

    @classmethod
    def of(cls, records: Iterable[Record], untrained: Sequence[str]) -> RunExamples:
        """Those of a run's store; `untrained`: the units that are in no step."""
        found, counts = cls(), Counter[str]()
        for record in records:
            found.by_id[record.id] = record.content_hash, record.unit
            if record.content_hash:
                found.by_content.setdefault(record.content_hash, record.unit)
            counts[record.unit] += 1
        never = set(untrained)
        found.units = {name: Unit(name, count, name not in never) for name, count in counts.items()}
        return found

    def meet(self, record: Record) -> dict[str, Any]:
        """Which unit of the run holds a row of the index; `unit` is null, with the reason in `note`, where none does."""
        content, unit = self.by_id.get(record.id, ("", ""))
        if not unit or content != record.content_hash:
            other = bool(unit)
            unit = self.by_content.get(record.content_hash, "")
            if not unit:
                why = "the run has another text under this id" if other else "the run was not trained on this row"
                return {"unit": None, "note": why}
        found = self.units[unit]
        note = None if found.trained else "the run has this row, but no step of its training saw it"
        return {"unit": unit, "examples": found.examples, "note": note}


class Workbench:
    """An index, and perhaps a run whose queries may be asked, opened once.

    queries  those that the page offers by name
    """

    def __init__(
        self, index: Index, run: str | Path | None = None, queries: Sequence[Query] = (), device: str = "cpu"
    ) -> None:
        self.index, self.path = index, None if run is None else Path(run)
        self.form = commonest(index.forms)  # one pass over the catalogue, not one a question
        self.queries = {query.name: query for query in queries}
        self.run: TrainingRun | None = None
        self.run_problem: str | None = None
        self.examples = RunExamples()
        self._usual: tuple[int, float | None] | None = None
        if self.path is not None:
            try:
                self.run = TrainingRun.open(self.path, device=device)
            except UnsupportedError as problem:  # of a run that was trained from Python
                self.run_problem = str(problem)
            untrained = () if self.run is None else self.run.recipe.untrained_units()
            self.examples = RunExamples.of(Store.open(self.path / "examples").iter_rows(), untrained)

    # ---------------------------------------------------------------- what there is

    def index_facts(self) -> dict[str, Any]:
        """Sizes, settings, model and notes of the index."""
        facts = self.index.info()
        return {"path": str(self.index.path), **facts, "sentences": index_sentences(facts)}

    def check(self) -> dict[str, Any]:
        """What is wrong with the files of the index and the run. Cost: reads all of them."""
        problems = self.index.check()
        if self.path is not None:
            for part in filter(Path.is_dir, (self.path / "examples", self.path / "bank")):
                problems += [f"{part.name} of the run: {found}" for found in Store.open(part).check()]
        return {"problems": problems}

    def run_facts(self) -> dict[str, Any] | None:
        """Sizes, measurements and notes of the run; None without one."""
        if self.path is None:
            return None
        facts: dict[str, Any] = {"path": str(self.path), "problem": self.run_problem}
        facts |= {"units": len(self.examples.units), "examples": len(self.examples.by_id)}
        if self.run is not None:
            recipe, measured = self.run.recipe, self.run.bank.info()
            facts |= {"kind": recipe.kind, "steps": len(recipe.batches()), "optimizer": recipe.optimizer.name}
            facts |= {"measurements": measured["measurements"], "cpu_seconds": measured["cpu_seconds"]}
            facts["notes"] = [*self.run.notes, *measured.get("notes", [])]
            facts["sentences"] = run_sentences({**facts, "never_trained_on": recipe.untrained_units()})
        return facts

    def units(self, find: str) -> dict[str, Any]:
        """The run's units whose names hold a text: `of` so many the first ones."""
        found = [vars(unit) for name, unit in self.examples.units.items() if find in name]
        return {"units": found[:UNITS], "of": len(found)}

    def query_list(self) -> list[dict[str, Any]]:
        """The run's queries: name, measure, and prompt and answer where they are such rows."""
        return [
            {"name": name, "measure": str(query.measure), **_sides(query.row)} for name, query in self.queries.items()
        ]

    def sources(self, name: str) -> dict[str, Any]:
        """How many rows have each value of a field, most first."""
        return {"field": name, "rows": self.index.sources(name)}

    def row(self, id: str) -> dict[str, Any]:
        """A row in full: its text, its fields as they came, and the unit of the run that holds it."""
        record = self.index.records([id])[0]
        return {**self._record(record), "text": shown_text(record), "row": record.row}

    # ---------------------------------------------------------------- asking the index

    def question(self, asked: Question) -> Any:
        """The query of an index: a row, or a contrast of two."""
        form = asked.form or (None if asked.prompt is None else self.form)
        row = asked_row(asked.answer, asked.prompt, form)
        return row if asked.against is None else Contrast(row, asked_row(asked.against, asked.prompt, form))

    def ask(self, asked: Ask) -> dict[str, Any]:
        """The rows that push the answer up most, and down most; of a contrast those for either side."""
        began = time.monotonic()
        self.index.store.refresh()
        encoded = self.index.encode([self.question(asked)])
        where = self._where(asked)
        depth = max(asked.k, LOOKED_AT)
        found = self.index.search(self.index.both_ways(encoded), depth, where, group_by=asked.group_by)
        best = max((abs(hit.score) for hits in found for hit in hits[:1]), default=0.0) or 1.0
        up, down = (
            self._hits([hit for hit in hits[: asked.k] if hit.score > 0], sign, best)
            for hits, sign in zip(found, (1, -1), strict=True)
        )
        opposite = 0.0 if asked.against is not None else max((hit.score for hit in found[1][:1]), default=0.0)
        wanted = self.index.numbers_where(where)
        usual = usual_scores(self.index, encoded, self.usual(), "cosine")[0]
        return {
            "asked": encoded.texts[0],
            "verdict": told(self.index, found[0], max(opposite, 0.0), usual),
            "usual": usual or None,
            "up": up,
            "down": down,
            "considered": len(self.index) if wanted is None else len(wanted),
            "seconds": round(time.monotonic() - began, 3),
        }

    def usual(self) -> float | None:
        """What the best row usually scores for another text (see `usual_best`), found anew when rows come or go."""
        if self._usual is None or self._usual[0] != len(self.index):
            self._usual = len(self.index), usual_best(self.index)
        return self._usual[1]

    def explain(self, asked: Explain) -> dict[str, Any]:
        """Words of the answer and of rows, what their pairs add to the scores, and each answer word's share in them.

        Of a contrast the words of the other answer follow those of the answer, which are the `first` ones.
        """
        query = self.question(asked)
        rows, answer, first, total = [], [], 0, np.zeros(0)
        starts = text_starts(self.index, query)
        for found in explain_rows(self.index, query, list(asked.ids)):
            texts, words, pairs = pairs_of_words(found.query_tokens, found.row_tokens, found.pairs, starts)
            answer, first = [word for text in texts for word in text], len(texts[0])
            weights, by_answer = pairs.sum(0), pairs.sum(1)
            total = by_answer if not len(total) else total + by_answer
            start, end = passage(weights)
            rows.append({
                "id": found.id, "score": found.score, "words": words, "weights": _short(weights),
                "answer_weights": _short(by_answer), "pairs": strongest(pairs), "passage": [start, end],
            })  # fmt: skip
        whole = float(np.abs(total).sum()) or 1.0
        return {"answer": answer, "first": first, "shares": _short(total / whole), "rows": rows}

    def controls(self, asked: Ask) -> dict[str, Any]:
        """Whether length or a text search, which know nothing of the model's answer, explain the rows that `ask` finds."""
        found = self.index.search([self.question(asked)], asked.k, self._where(asked), controls=True)[0].controls
        assert found is not None
        return found.facts()

    def groups(self, asked: Ask) -> dict[str, Any]:
        """What whole groups of rows, the values of `group_by`, add up to, with 95 % intervals."""
        if asked.group_by is None:
            raise ValueError("Say in group_by which field, or `unit`, makes the groups.")
        found = self.index.group_scores([self.question(asked)], asked.group_by, self._where(asked))[0]
        return {"by": asked.group_by, "groups": [vars(group) for group in found]}

    def _where(self, asked: Ask) -> str | None:
        parts = [] if asked.where is None or not asked.where.strip() else [f"({asked.where})"]
        if asked.only is not None:
            parts.append(self.index.among(asked.field or "unit", asked.only))
        return " AND ".join(parts) or None

    def _hits(self, hits: Sequence[Hit], sign: int, best: float) -> list[dict[str, Any]]:
        records = self.index.records([hit.id for hit in hits])
        return [
            {
                **self._record(record), "rank": hit.rank, "score": sign * hit.score, "share": sign * hit.score / best,
                "text": hit.text[:SHOWN], "cut": len(hit.text) > SHOWN,
            }
            for hit, record in zip(hits, records, strict=True)
        ]  # fmt: skip

    def _record(self, record: Record) -> dict[str, Any]:
        met = None if self.path is None else self.examples.meet(record)
        return {"id": record.id, "unit": record.unit, "fields": record.meta, "run": met}

    # ---------------------------------------------------------------- asking the run

    def require_run(self) -> TrainingRun:
        """The run. Raises: UnsupportedError if there is none, or if it cannot be predicted from here."""
        if self.run is None:
            raise UnsupportedError(
                self.run_problem or "There is no run here: start the page with one, `leaveout serve IDX RUN`."
            )
        return self.run

    def asked_of_run(self, asked: WhatIf) -> list[Query]:
        """The queries of a request: named ones, and the question beside them."""
        run = self.require_run()
        found = []
        for name in asked.queries or []:
            if name not in self.queries:
                raise FormatError(f"There is no query {name!r}: {choices(name, self.queries)}.")
            found.append(self.queries[name])
        if asked.answer is not None:
            sides = [run.recipe.ask(asked.prompt, text) for text in (asked.answer, asked.against) if text is not None]
            found.append(Query(sides[0] if len(sides) == 1 else Contrast(*sides)))
        if not found:
            raise FormatError("There is no query: give an answer, or names of the run's queries.")
        return found

    def what_if(self, asked: WhatIf) -> dict[str, Any]:
        """Each query's value without each set, with its 95 % interval and a sentence; and curves, if they are wanted."""
        run, queries = self.require_run(), self.asked_of_run(asked)
        found = run.predict(queries, asked.sets, meaning=asked.meaning)
        lines = [*map(predicted, found.lines())]
        curves = []
        if asked.curve:
            for curve in run.curve(queries[:CURVES], asked.sets[:CURVES], points=POINTS, meaning=asked.meaning):
                low, high = curve.prediction.interval()
                for row, query in enumerate(queries[:CURVES]):
                    curves.append({
                        "query": query.name, "without": curve.without, "shares": curve.shares.tolist(),
                        "predicted": curve.prediction.mean[row].tolist(),
                        "low": _finite(low[row]), "high": _finite(high[row]),
                    })  # fmt: skip
        means = " ".join(meanings_told(lines))
        return {"lines": lines, "curves": curves, "estimator": found.estimator, "means": means}


def predicted(line: dict[str, Any]) -> dict[str, Any]:
    """A line of a prediction (`Prediction.lines`) with the ends of its interval and a sentence."""
    half = reach(line)
    ends = {"low": None, "high": None} if half is None else {
        "low": line["predicted"] - half, "high": line["predicted"] + half
    }  # fmt: skip
    return {**line, **ends, "sentence": sentence(line)}


def _sides(given: Any) -> dict[str, Any]:
    """Prompt and answer of a query that is a text or a prompt and its response; of others nothing."""
    if not isinstance(given, (str, dict, Row)):
        return {}
    row = as_row(given)
    if row.form not in ("text", "prompt"):
        return {}
    ((start, end),) = row.responses
    return {"prompt": row.text[:start] or None, "answer": row.text[start:end]}


def _short(values: np.ndarray) -> list[float]:
    """Numbers with four digits, which is what a page shows."""
    return [float(f"{value:.4g}") for value in values]


def _finite(values: np.ndarray) -> list[float | None]:
    return [float(value) if math.isfinite(value) else None for value in values]
