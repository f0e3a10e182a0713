"""How far off an estimator is on retrainings that were held out, and what that says of the intervals of other sets.

The error of a predicted effect is taken to have the scale

    sqrt((a std)^2 + (b u effect)^2) * (size / mean size)^c * (coherence / mean coherence)^d

with u the part of the effect that measurements leave open. The four numbers are those of highest likelihood (Student's
distribution, so that one wild set does not rule), held near a prior by a few sets' worth. What is left is a
quantile: that of the held-out errors over their scales, as if a few more sets had been drawn from the same
distribution; sets whose units are alike have one of their own, where there are enough of them. Queries share their sets, and
all of them err on a set together: sets are counted, never pairs.

An estimator that learns from the held-out sets is then surer than the one that was tested. Of that it is believed what a set's
overlap with one of those explains, and of the rest half (in logarithms): two whole sources that were measured do not make
their union known.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from leaveout.deletion.kernels import unit_length
from leaveout.deletion.measurements import Measurements
from leaveout.errors import UnsupportedError

MISSES, MORE = 0.05, 4.0
"""The part of errors that may be larger than the interval, where many sets were held out; it falls by n / (n + MORE)."""
DEGREES, PRIOR_SETS = 4.0, 4.0
"""Degrees of freedom of the errors over their scale, and for how many sets that distribution counts beside the held-out ones."""
MIDDLE, WIDTH = (0.0, -1.2, 0.0, 0.0), (1.0, 1.0, 0.2, 0.2)
"""What is believed of log a, log b, c and d before: middle and standard deviation."""
GRIDS = (np.linspace(-3, 2, 41), np.linspace(-4, 1, 41), np.linspace(-0.8, 0.8, 17), np.linspace(-0.8, 0.8, 17))
SWEEPS = 4
NORMAL = 1.959964
BEYOND = 1.2
"""How much more alike the units of a set may be than those of all held-out sets, before it is outside of what was tested;
the same of the share of a query's help."""
ALIKE, LEAST_GROUP = 2.0, 8
"""How much more than random sets of their size the units of a set have in common to be called alike, and how many held-out
sets it takes, alike or not, for a quantile of their own."""
NARROWER = 0.5
"""Of log a, where it is below 0: few held-out sets are small, and what others say of the deviation alone is half believed."""
TOGETHER = 256


@dataclass(frozen=True)
class Shape:
    """What is known of deletion sets before any query: shares removed [sets], and how alike their units are [sets].

    A coherence of 1: the units have nothing in common; of n: n units are one and the same. alike: whether it is far above
    that of random sets of the size
    """

    size: np.ndarray
    coherence: np.ndarray
    alike: np.ndarray

    @classmethod
    def of(cls, x: np.ndarray, features: np.ndarray | None) -> Shape:
        """features [units, k] of unit length; None: nothing is known of likeness."""
        removed = np.abs(x)
        size = np.maximum(removed.sum(1), 1e-9)
        if features is None:
            return cls(size, np.ones(len(x)), np.zeros(len(x), bool))
        found = ((removed @ features) ** 2).sum(1) / np.maximum((removed**2).sum(1), 1e-18)
        units = len(features)
        cosine = ((features.sum(0) ** 2).sum() / units - 1) / max(1, units - 1)  # of two units, on average
        usual = np.maximum(1.0, 1 + (size - 1) * cosine)
        return cls(size, np.maximum(found, 1.0), found > ALIKE * usual)


@dataclass(frozen=True)
class Calibration:
    """What held-out retrainings say of the standard deviations of one estimator; nothing where there are none.

    kinds     of the held-out sets: how many there are of each
    numbers   log a, log b, c and d of the module
    quantiles  of errors over their scales that the intervals reach to: of sets of any kind, of those whose units are alike
    held      held-out deletion vectors [sets, units] that `fitted` has learned from since, last of all
    """

    kinds: dict[str, int] = field(default_factory=dict)
    numbers: tuple[float, ...] = MIDDLE
    quantiles: tuple[float, float] = (NORMAL, NORMAL)
    fitted: Any = None
    held: np.ndarray | None = None
    features: np.ndarray | None = None
    helps: np.ndarray | None = None
    middle: tuple[float, float] = (0.0, 0.0)
    largest: tuple[float, float, float] = (np.inf, np.inf, np.inf)

    @property
    def sets(self) -> int:
        """How many sets were held out, each with all queries."""
        return sum(self.kinds.values())

    def factor(self, x: np.ndarray, mean: np.ndarray, std: np.ndarray) -> np.ndarray:
        """What the standard deviations of predictions are multiplied by [queries, sets], so that 1.96 of them are 95 %.

        x [sets, units]: deletion vectors; mean, std [queries, sets]: the estimator's own predictions of them
        """
        if not self.sets:
            return np.ones(mean.shape)
        scale = np.exp(_log_scale(self.numbers, *_parts(self, x, mean, std, self._unlearned(x))))
        quantile = np.where(Shape.of(x, self.features).alike, *self.quantiles[::-1])
        return quantile / NORMAL * np.where(std > 0, scale / np.where(std > 0, std, 1.0), 1.0)

    def _unlearned(self, x: np.ndarray) -> np.ndarray | float:
        """How many times wider deviations are [sets] where not all that was learned from held-out sets is believed."""
        before = getattr(self.fitted, "before_last", None)
        if before is None or self.held is None:
            return 1.0
        lengths = np.maximum((x**2).sum(1)[:, None] * (self.held**2).sum(1), 1e-300)
        overlap = ((x @ self.held.T) ** 2 / lengths).max(1)
        surer = before(x, len(self.held)) * np.sqrt(np.clip(1 - overlap, 0, 1))
        return np.sqrt(np.maximum(1.0, surer))

    def outside(self, x: np.ndarray, mean: np.ndarray) -> np.ndarray:
        """Whether a set is larger, more alike, or takes more of a query's help than all that were held out [queries, sets].

        Nowhere where nothing was held out.
        """
        shape = Shape.of(x, self.features)
        size, coherence, share = self.largest
        other = (shape.size > size * (1 + 1e-9)) | (shape.coherence > BEYOND * coherence)
        if self.helps is None:
            return np.broadcast_to(other, mean.shape).copy()
        return other | (self.helps @ np.abs(x).T > BEYOND * share)


def calibrate(data: Measurements, fitted: Any) -> Calibration:
    """What the held-out retrainings of the data, to which `fitted` was not fitted, say of its standard deviations.

    Nothing without held-out retrainings, or where a standard deviation is unknown.
    """
    held = data.heldout
    if not len(held):
        return Calibration()
    mean, std = fitted.predict(held.x)
    if not np.isfinite(std).all():
        return Calibration()
    kinds = dict(Counter(held.kinds or ("given",) * len(held)))
    features = None if data.features is None else unit_length(data.features)
    helps = _helps(fitted, data.units)
    shape = Shape.of(held.x, features)
    middle = (float(np.log(shape.size).mean()), float(np.log(shape.coherence).mean()))
    found = Calibration(kinds, MIDDLE, fitted=fitted, features=features, helps=helps, middle=middle)
    parts, error = _parts(found, held.x, mean, std), np.abs(held.y.T - mean)
    a, *others = _likeliest(error, parts)
    numbers = (max(a, NARROWER * a), *others)
    ratio = error / np.exp(_log_scale(numbers, *parts))
    share = float((helps @ np.abs(held.x).T).max()) if helps is not None else np.inf
    largest = (float(shape.size.max()), float(shape.coherence.max()), share)
    shared, quantiles = _quantile(ratio), []
    for group in (~shape.alike, shape.alike):
        quantiles.append(_quantile(ratio[:, group]) if group.sum() >= LEAST_GROUP else shared)
    return replace(found, numbers=numbers, quantiles=(quantiles[0], quantiles[1]), largest=largest)


Parts = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def _parts(
    known: Calibration, x: np.ndarray, mean: np.ndarray, std: np.ndarray, wider: np.ndarray | float = 1.0
) -> Parts:
    """Squares of the deviation and of the open part of the effect [queries, sets], logarithms of size and coherence [sets].

    wider: what the deviation and the open part are multiplied by [sets]
    """
    unknown = getattr(known.fitted, "unknown", None)
    left = np.minimum(1.0, np.ones(len(x)) if unknown is None else unknown(x) * wider)
    shape, (size, coherence) = Shape.of(x, known.features), known.middle
    std2 = np.maximum(std * wider, 1e-150) ** 2
    return std2, (left * mean) ** 2, np.log(shape.size) - size, np.log(shape.coherence) - coherence


def _log_scale(
    numbers: tuple[float, ...], std2: np.ndarray, effect2: np.ndarray, size: np.ndarray, coherence: np.ndarray
) -> np.ndarray:
    a, b, c, d = numbers
    return np.log(np.exp(2 * a) * std2 + np.exp(2 * b) * effect2) / 2 + c * size + d * coherence


def _likeliest(error: np.ndarray, parts: Parts) -> tuple[float, ...]:
    """The numbers of highest probability given errors [queries, sets], one after the other on grids."""
    numbers = list(MIDDLE)

    def probability(tried: list[float]) -> float:
        log_scale = _log_scale(tuple(tried), *parts)
        ratio2 = np.exp(2 * (np.log(np.maximum(error, 1e-150)) - log_scale))
        each = -log_scale - (DEGREES + 1) / 2 * np.log1p(ratio2 / DEGREES)
        before = sum(((t - m) / w) ** 2 for t, m, w in zip(tried, MIDDLE, WIDTH, strict=True)) / 2
        return float(each.mean(0).sum() - before)

    for _ in range(SWEEPS):
        for i, grid in enumerate(GRIDS):
            tried = [[*numbers[:i], value, *numbers[i + 1 :]] for value in grid]
            numbers = max(tried, key=probability)
    return tuple(float(n) for n in numbers)


def _quantile(ratio: np.ndarray) -> float:
    """Where so few errors over their scales [queries, sets] lie beyond that a new one does in at most MISSES of the cases."""
    sets = ratio.shape[1]
    sorted_ = np.sort(ratio.ravel())
    tried = np.exp(np.linspace(-2, 6, 1601))
    seen = np.searchsorted(sorted_, tried, side="right") / len(sorted_)
    below = (sets * seen + PRIOR_SETS * _within(tried)) / (sets + PRIOR_SETS)
    enough = below >= 1 - MISSES * sets / (sets + MORE)
    return float(tried[enough.argmax()] if enough.any() else sorted_[-1])


def _within(reach: np.ndarray) -> np.ndarray:
    """Of Student's distribution with four degrees of freedom, the part within so many scales of its middle."""
    u = reach / np.sqrt(1 + reach**2 / DEGREES)
    return 0.75 * u * (1 - u**2 / 12)


def _helps(fitted: Any, units: int) -> np.ndarray | None:
    """The part of a query's whole help that is each unit's [queries, units], by its predicted effect alone.

    None where the estimator cannot say.
    """
    try:
        effects = [fitted.predict(np.eye(units)[i : i + TOGETHER])[0] for i in range(0, units, TOGETHER)]
    except UnsupportedError:
        return None
    found = np.maximum(np.concatenate(effects, 1), 0)
    return found / np.maximum(found.sum(1, keepdims=True), 1e-300)
