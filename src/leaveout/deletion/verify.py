"""Predictions against real retrainings: inside the interval or not, and how good they are in all."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from leaveout.deletion.predict import Prediction
from leaveout.metrics import pearson, spearman


@dataclass(frozen=True)
class Verification:
    """A prediction with its `actual` values, and what they say about it."""

    prediction: Prediction

    @property
    def inside(self) -> np.ndarray:
        """Whether the actual value lies in the 95 % interval [query, set]."""
        low, high = self.prediction.interval()
        actual = self._actual
        return (low <= actual) & (actual <= high)

    @property
    def _actual(self) -> np.ndarray:
        assert self.prediction.actual is not None
        return self.prediction.actual

    @property
    def new(self) -> np.ndarray:
        """Whether a set was not measured before it was predicted [set]; only these prove anything."""
        measured = self.prediction.measured
        return np.ones(len(self.prediction.without), bool) if measured is None else ~measured

    def summary(self) -> dict[str, Any]:
        """Agreement of predicted and actual effects, over the sets that were not measured before.

        pearson, spearman  over deletion sets, mean over queries; None with fewer than 3 sets
        relative_error     median of |predicted - actual| / |actual| over all pairs
        coverage           share of actual values inside the 95 % interval, where it is finite; None if nowhere
        sets, already_measured  how many sets prove something, and how many do not
        """
        new = self.new
        actual, predicted = (self._actual - self.prediction.base)[:, new], self.prediction.effect[:, new]
        known = np.isfinite(self.prediction.std)[:, new]  # an infinite interval covers everything and says nothing
        return {
            **agreement(predicted, actual),
            "coverage": float(self.inside[:, new][known].mean()) if known.any() else None,
            "queries": len(self.prediction.queries),
            "sets": int(new.sum()),
            "already_measured": int((~new).sum()),
        }


def agreement(predicted: np.ndarray, actual: np.ndarray) -> dict[str, float | None]:
    """Pearson and Spearman over sets, mean over queries, and the median relative error; both arrays [query, set]."""
    out: dict[str, float | None] = {"pearson": None, "spearman": None}
    if actual.shape[1] >= 3:
        out["pearson"] = _known_mean(list(pearson(predicted, actual)))
        out["spearman"] = _known_mean(list(spearman(predicted, actual)))
    some = np.abs(actual) > 0
    errors = np.abs(predicted - actual)[some] / np.abs(actual)[some]
    return {**out, "relative_error": float(np.median(errors)) if len(errors) else None}


def _known_mean(values: list[float]) -> float | None:
    known = [v for v in values if math.isfinite(v)]
    return float(np.mean(known)) if known else None
