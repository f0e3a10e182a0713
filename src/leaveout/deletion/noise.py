"""How far runs with all data are from each other: the deviation of a run, from a few of them in other orders.

Few runs say little of one query's deviation, and much of all queries together. Variances are shrunk towards a common one by
as much as they are alike (an inverse gamma distribution fitted to their logarithms); how much the common one is worth is
counted by how many queries move by themselves.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import torch

LEAST_REPEATS = 3
"""Runs from which a deviation is taken, at least."""


@dataclass(frozen=True)
class RunNoise:
    """What runs with all data in orders of their own say.

    mean [queries]  of their values; std [queries]: deviation of one run
    runs            how many there were; apart: how many queries move by themselves
    own, common     degrees of freedom with which one query's deviation is known among others, and that of all together
    """

    mean: np.ndarray
    std: np.ndarray
    runs: int
    apart: float
    own: float
    common: float

    @property
    def freedom(self) -> float:
        """Degrees of freedom of a deviation."""
        return min(self.own, self.common)


def run_noise(values: np.ndarray) -> RunNoise:
    """Mean and deviation of runs with values [runs, queries]."""
    runs, d = len(values), len(values) - 1
    mean, variance = values.mean(0), values.var(0, ddof=1)
    if not (variance > 0).any():
        return RunNoise(mean, np.zeros_like(mean), runs, 1.0, np.inf, np.inf)
    variance = np.maximum(variance, 1e-12 * variance.max())
    logs = np.log(variance) - _digamma(d / 2) + np.log(d / 2)
    spread = logs.var(ddof=1) - _trigamma(d / 2) if len(logs) > 1 else np.inf
    before = _common_freedom(spread)
    if np.isinf(before):
        shrunk = np.full_like(variance, np.exp(logs.mean()))
    else:
        common = np.exp(logs.mean() + (_digamma(before / 2) - np.log(before / 2) if before else 0.0))
        shrunk = (before * common + d * variance) / (before + d)
    apart = _apart(values)
    return RunNoise(mean, np.sqrt(shrunk), runs, apart, float(before + d), float(d * apart))


def _common_freedom(spread: float) -> float:
    """Degrees of freedom f of a common variance, where logarithms of variances spread by trigamma(f / 2): 0 for infinity."""
    if spread <= 0:
        return np.inf
    if np.isinf(spread):
        return 0.0
    low, high = 1e-3, 1e6
    for _ in range(200):
        middle = np.sqrt(low * high)
        low, high = (middle, high) if _trigamma(middle / 2) > spread else (low, middle)
    return float(middle)


def _apart(values: np.ndarray) -> float:
    """How many queries move by themselves from run to run [runs, queries]: fewer where they are correlated.

    The square of a correlation over d degrees of freedom is 1 / d where there is none.
    """
    d, queries = len(values) - 1, values.shape[1]
    if queries == 1:
        return 1.0
    moved = values - values.mean(0)
    moved = moved / np.maximum(np.sqrt((moved**2).sum(0)), 1e-300)
    squares = ((moved.T @ moved) ** 2).sum() - queries
    found = (squares / (queries * (queries - 1)) - 1 / d) / (1 - 1 / d)
    return queries / (1 + (queries - 1) * float(np.clip(found, 0, 1)))


def quantile(level: float, freedom: np.ndarray) -> np.ndarray:
    """The quantile of Student's distribution (Cornish and Fisher's series; within 1 % from three degrees of freedom)."""
    z = NormalDist().inv_cdf(level)
    with np.errstate(divide="ignore"):
        inverse = 1 / np.asarray(freedom, np.float64)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return z + np.sum([term * inverse**power for power, term in enumerate(terms, 1)], axis=0)


def _digamma(x: float) -> float:
    return float(torch.special.digamma(torch.tensor(x, dtype=torch.float64)))


def _trigamma(x: float) -> float:
    return float(torch.special.polygamma(1, torch.tensor(x, dtype=torch.float64)))
