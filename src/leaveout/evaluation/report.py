"""What an evaluation found: one line a method, with intervals over queries."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from leaveout.metrics import Interval, NoiseCeiling, bootstrap_interval, difference_interval
from leaveout.tables import Table, Tabular

Metric = Literal[
    "lds", "qld", "leave_one_out", "tail_patch_nats", "tail_patch", "changed", "average_precision", "precision", "recall",
    "auprc",
]  # fmt: skip
COLUMNS: dict[Metric, tuple[str, str]] = {
    "lds": ("LDS", ".3f"),
    "qld": ("QLD (nats)", ".3f"),
    "leave_one_out": ("leave-one-out", ".3f"),
    "tail_patch_nats": ("tail-patch (nats)", ".3f"),
    "tail_patch": ("tail-patch (probability)", ".2g"),
    "changed": ("answers changed", ".2f"),
    "average_precision": ("AP", ".3f"),
    "precision": ("P@{top}", ".3f"),
    "recall": ("recall@{top}", ".3f"),
    "auprc": ("auPRC@{top}", ".3f"),
}
"""Metric -> header and number format, in the order of the table."""


@dataclass(frozen=True)
class Judged:
    """One method: each metric [query], nan where it is undefined, None where it was not asked.

    qld               [removal query] in nats
    lds_by_seed       LDS [query] against each of the two data orders alone
    tail_patch        rise of the answer's probability; tail_patch_nats: of its logarithm
    changed           [query of the brittleness] 1.0 where a removal that was tried changed the answer, else 0.0
    cpu_seconds       what the scores cost, None for scores that were given
    """

    method: str
    lds: np.ndarray | None = None
    qld: np.ndarray | None = None
    leave_one_out: np.ndarray | None = None
    cpu_seconds: float | None = None
    lds_by_seed: tuple[np.ndarray, ...] = ()
    tail_patch: np.ndarray | None = None
    tail_patch_nats: np.ndarray | None = None
    changed: np.ndarray | None = None
    average_precision: np.ndarray | None = None
    precision: np.ndarray | None = None
    recall: np.ndarray | None = None
    auprc: np.ndarray | None = None


@dataclass(frozen=True)
class Brittleness:
    """How many top units must be removed until an answer changes.

    sizes     numbers of units that were removed, ascending
    queries   those that removals were made for, of `answered` that the model trained on everything answers
    smallest  method -> the smallest size that changes the answer [query], inf where none does
    """

    sizes: tuple[int, ...]
    queries: tuple[str, ...]
    answered: int
    smallest: Mapping[str, np.ndarray] = field(default_factory=dict)

    def changed(self, method: str) -> np.ndarray | None:
        """1.0 where a removal that was tried changed the answer [query], else 0.0; None for a method without removals."""
        return np.isfinite(self.smallest[method]) * 1.0 if method in self.smallest else None


@dataclass(frozen=True)
class Report(Tabular):
    """All methods, and what they were judged with.

    subsets: retrainings behind the LDS; removal_queries: the queries of the QLD; removed_units: units it removes for each;
    top: k of the tail-patch and of the retrieval metrics; controls: methods that know nothing of what a row taught
    """

    judged: tuple[Judged, ...]
    queries: tuple[str, ...]
    subsets: int
    removal_queries: tuple[str, ...]
    removed_units: int
    ceiling: NoiseCeiling | None = None
    seed: int = 0
    level: float = 0.95
    top: int = 0
    brittleness: Brittleness | None = None
    controls: tuple[str, ...] = ()

    def interval(self, method: str, metric: Metric = "lds") -> Interval | None:
        """Mean over the queries where the metric is defined, and its interval; None if it is defined for none.

        One query alone has no interval: low and high are nan.
        """
        return self._interval(_known(self._values(method, metric)))

    def difference(self, first: str, second: str, metric: Metric = "lds") -> Interval | None:
        """Mean of first - second over the same queries, and its interval; queries where one is undefined are left out."""
        one, other = self._values(first, metric), self._values(second, metric)
        if one is None or other is None:
            return None
        both = np.isfinite(one) & np.isfinite(other)
        if both.sum() == 1:
            return Interval(float((one - other)[both].item()), np.nan, np.nan)
        return difference_interval(one[both], other[both], self.seed, self.level) if both.any() else None

    def _interval(self, known: np.ndarray) -> Interval | None:
        if len(known) == 1:
            return Interval(float(known[0]), np.nan, np.nan)
        return bootstrap_interval(known, self.seed, self.level) if len(known) else None

    def _values(self, method: str, metric: Metric) -> np.ndarray | None:
        found = [judged for judged in self.judged if judged.method == method]
        if not found:
            names = ", ".join(judged.method for judged in self.judged)
            raise ValueError(f"{method!r} was not judged: there are {names}")
        return getattr(found[0], metric)

    def lines(self) -> Iterator[dict[str, Any]]:
        """One dictionary a method for JSON, the best first; null where not measured.

        undefined    queries without an LDS
        lds_by_seed  mean LDS against each data order alone
        brittleness  share of answers changed by removals up to each size
        by_query     metric -> its value for each query that it was measured on, null where it is undefined
        """
        ceiling = None if self.ceiling is None else self.ceiling.ceiling.mean
        for judged in self._ranked():
            yield {
                "method": judged.method,
                **{metric: _shown(self.interval(judged.method, metric)) for metric in COLUMNS},
                "undefined": None if judged.lds is None else int(np.isnan(judged.lds).sum()),
                "ceiling": ceiling,
                "cpu_seconds": judged.cpu_seconds,
                "lds_by_seed": _seed_means(judged),
                "brittleness": self._shares(judged.method),
                "by_query": dict(self._by_query(judged)),
            }

    def _by_query(self, judged: Judged) -> Iterator[tuple[str, list[dict[str, Any]]]]:
        changed = () if self.brittleness is None else self.brittleness.queries
        for metric in COLUMNS:
            values = getattr(judged, metric)
            if values is not None:
                names = {"qld": self.removal_queries, "changed": changed}.get(metric, self.queries)
                shown = [float(value) if np.isfinite(value) else None for value in values]
                yield metric, [{"query": name, "value": value} for name, value in zip(names, shown, strict=True)]

    def _shares(self, method: str) -> dict[str, Any] | None:
        if self.brittleness is None or method not in self.brittleness.smallest:
            return None
        smallest = self.brittleness.smallest[method]
        return {str(size): _shown(self._interval((smallest <= size) * 1.0)) for size in self.brittleness.sizes}

    def table(self) -> Table:
        """A row a method, the best first, with columns of what was measured, and the notes under it."""
        measured = self._measured()
        rows = []
        for judged in self._ranked():
            cells = {m: _cell(self.interval(judged.method, m), COLUMNS[m][1]) for m in measured}
            if judged.lds is not None and (missing := int(np.isnan(judged.lds).sum())):
                cells["lds"] = ", ".join(filter(None, [cells["lds"], f"{missing} queries undefined"]))
            cost = "" if judged.cpu_seconds is None else f"{judged.cpu_seconds:.1f}"
            rows.append((judged.method, *cells.values(), cost))
        headers = ["method", *(COLUMNS[m][0].format(top=self.top) for m in measured), "CPU s"]
        return Table(headers, rows, notes=self.notes())

    def notes(self) -> list[str]:
        """What the numbers mean, for under the table."""
        out = [f"Intervals: {self.level:.0%}, over queries. All but the ceiling are means over queries."]
        if len(self.queries) == 1:
            out = ["One query alone: there are no intervals."]
        if self.subsets:
            out.append(f"LDS: rank correlation over {self.subsets} retrained subsets, {len(self.queries)} queries.")
        if self.ceiling is not None:
            ceiling = self.ceiling.ceiling
            alone = len(self.queries) == 1
            out.append(f"Noise ceiling of the LDS: {f'{ceiling.mean:.3f}' if alone else _cell(ceiling)}.")
        if gaps := [max(means) - min(means) for j in self.judged if (means := _seed_means(j))]:
            out.append(f"Against one data order alone, the LDS of a method differs by at most {max(gaps):.3f}.")
        if self.removal_queries:
            out.append(
                f"QLD: rise of the query's loss without its top {self.removed_units} units over that without as many "
                f"random ones, {len(self.removal_queries)} queries."
            )
        measured = self._measured()
        if "tail_patch" in measured:
            out.append(
                f"Tail-patch: rise of the log of the answer's probability, and of the probability, by one more training "
                f"step on each of the top {self.top} units alone, {len(self.queries)} queries."
            )
        if self.brittleness is not None:
            out.append(self._brittleness_note(self.brittleness))
        if "average_precision" in measured:
            known = _known(self.judged[0].average_precision)
            out.append(
                f"AP, P@{self.top}, recall@{self.top}: of the known relevant units, {len(known)} queries that have some; "
                f"auPRC@{self.top}: AP among the {self.top} best and the {self.top} worst only."
            )
        return out + self._controls_notes()

    def _controls_notes(self) -> list[str]:
        """For each method, the controls that it is not above: where the interval of the difference, of the first metric that
        was measured, begins at 0 or below."""
        metric = (self._measured() or ["lds"])[0]
        out = []
        for name in [judged.method for judged in self.judged if judged.method not in self.controls]:
            apart = {control: self.difference(name, control, metric) for control in self.controls}
            level = [control for control, found in apart.items() if found is not None and found.low <= 0]
            if level:
                out.append(f"By {COLUMNS[metric][0].format(top=self.top)}, {name} is not above {', '.join(level)}.")
        return out

    def _brittleness_note(self, found: Brittleness) -> str:
        if not found.queries:
            return "Answers changed: the model trained on everything gives the answer of no query, so that none can change."
        return (
            f"Answers changed: share of {len(found.queries)} queries whose answer greedy decoding no longer gives after "
            f"removing the top {', '.join(map(str, found.sizes))} units, up to the largest; the model trained on "
            f"everything gives the answers of {found.answered} of {len(self.queries)} queries, and only these count."
        )

    def _measured(self) -> list[Metric]:
        return [metric for metric in COLUMNS if any(getattr(judged, metric) is not None for judged in self.judged)]

    def _ranked(self) -> list[Judged]:
        """By the first metric that was measured."""
        leading: Metric = (self._measured() or ["lds"])[0]

        def height(judged: Judged) -> float:
            found = self.interval(judged.method, leading)
            return -np.inf if found is None else found.mean

        return sorted(self.judged, key=height, reverse=True)


def _known(values: np.ndarray | None) -> np.ndarray:
    return np.zeros(0) if values is None else values[np.isfinite(values)]


def _seed_means(judged: Judged) -> list[float] | None:
    """The mean LDS against each data order, None without two of them or where it is undefined."""
    known = [_known(values) for values in judged.lds_by_seed]
    return [float(values.mean()) for values in known] if known and all(map(len, known)) else None


def _shown(found: Interval | None) -> dict[str, float | None] | None:
    """For JSON, which has no nan."""
    return None if found is None else {k: v if np.isfinite(v) else None for k, v in found._asdict().items()}


def _cell(found: Interval | None, form: str = ".3f") -> str:
    if found is None:
        return ""
    return f"{found.mean:{form}}" + (f" [{found.low:{form}}, {found.high:{form}}]" if np.isfinite(found.low) else "")
