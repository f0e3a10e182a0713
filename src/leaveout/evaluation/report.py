"""What an evaluation found: one line a method, with intervals over queries."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from leaveout.metrics import Interval, NoiseCeiling, bootstrap_interval, difference_interval

Metric = Literal["lds", "qld", "leave_one_out"]


@dataclass(frozen=True)
class Judged:
    """One method: lds [query], qld [removal query] in nats, leave_one_out [query]; nan where undefined, None where not asked.

    cpu_seconds: what the scores cost, None for scores that were given.
    """

    method: str
    lds: np.ndarray
    qld: np.ndarray | None = None
    leave_one_out: np.ndarray | None = None
    cpu_seconds: float | None = None


@dataclass(frozen=True)
class Report:
    """All methods, and what they were judged with.

    subsets: retrainings behind the LDS; removal_queries: the queries of the QLD; removed_units: units it removes for each
    """

    judged: tuple[Judged, ...]
    queries: tuple[str, ...]
    subsets: int
    removal_queries: tuple[str, ...]
    removed_units: int
    ceiling: NoiseCeiling | None = None
    seed: int = 0
    level: float = 0.95

    def interval(self, method: str, metric: Metric = "lds") -> Interval | None:
        """Mean over the queries where the metric is defined, and its interval; None if it is defined for none."""
        values = self._values(method, metric)
        known = None if values is None else values[np.isfinite(values)]
        return None if known is None or not len(known) else bootstrap_interval(known, self.seed, self.level)

    def difference(self, first: str, second: str, metric: Metric = "lds") -> Interval | None:
        """Mean of first - second over the same queries, and its interval; queries where one is undefined are left out."""
        one, other = self._values(first, metric), self._values(second, metric)
        if one is None or other is None:
            return None
        both = np.isfinite(one) & np.isfinite(other)
        return difference_interval(one[both], other[both], self.seed, self.level) if both.any() else None

    def _values(self, method: str, metric: Metric) -> np.ndarray | None:
        found = [judged for judged in self.judged if judged.method == method]
        if not found:
            names = ", ".join(judged.method for judged in self.judged)
            raise ValueError(f"{method!r} was not judged: there are {names}")
        return getattr(found[0], metric)

    def lines(self) -> Iterator[dict[str, Any]]:
        """One dictionary a method for JSON, the best LDS first; `undefined`: queries without an LDS."""
        ceiling = None if self.ceiling is None else self.ceiling.ceiling.mean
        for judged in self._ranked():
            yield {
                "method": judged.method,
                **{metric: self._shown(judged.method, metric) for metric in ("lds", "qld", "leave_one_out")},
                "undefined": int(np.isnan(judged.lds).sum()),
                "ceiling": ceiling,
                "cpu_seconds": judged.cpu_seconds,
            }

    def table(self) -> tuple[list[str], list[tuple[str, ...]]]:
        """Headers and rows of text, the best LDS first."""
        headers = ["method", "LDS", "QLD (nats)", "leave-one-out", "CPU s"]
        rows = []
        for judged in self._ranked():
            cells = [_cell(self.interval(judged.method, metric)) for metric in ("lds", "qld", "leave_one_out")]
            missing = int(np.isnan(judged.lds).sum())
            cells[0] += f", {missing} queries undefined" if missing else ""
            rows.append((judged.method, *cells, "" if judged.cpu_seconds is None else f"{judged.cpu_seconds:.1f}"))
        return headers, rows

    def notes(self) -> list[str]:
        """What the numbers mean, for under the table."""
        interval = f"[{self.level:.0%} interval over queries]"
        out = [f"LDS: rank correlation over {self.subsets} retrained subsets, {len(self.queries)} queries {interval}."]
        if self.ceiling is not None:
            out.append(f"Noise ceiling of the LDS: {_cell(self.ceiling.ceiling)}.")
        if self.removal_queries:
            out.append(
                f"QLD: rise of the query's loss without its top {self.removed_units} units over that without as many "
                f"random ones, {len(self.removal_queries)} queries."
            )
        return out

    def _ranked(self) -> list[Judged]:
        def height(judged: Judged) -> float:
            found = self.interval(judged.method)
            return -2.0 if found is None else found.mean

        return sorted(self.judged, key=height, reverse=True)

    def _shown(self, method: str, metric: Metric) -> dict[str, float] | None:
        found = self.interval(method, metric)
        return None if found is None else found._asdict()


def _cell(found: Interval | None) -> str:
    return "" if found is None else f"{found.mean:.3f} [{found.low:.3f}, {found.high:.3f}]"
