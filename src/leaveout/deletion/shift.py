"""From the same run to new ones: the mean effect over orders, and how far it may be from what one order says.

A new run on fewer rows gives each row that is left more weight than the same run does, or less, as its batches are full
again and their number is another (`training.repacking.weights_left`): the estimator is asked at those weights. The first
order is another in each order: where it was measured in several, their mean at those weights takes its place, their spread is
known, and of what the same run has beside its own first order less is kept, the less the estimator is sure of it.

What is left was held against new runs of held-out sets: its variance is that of a run times `by_share` x the share of
rows that is removed, plus `anyway`, which is 0 where small sets change little. Where runs are so unstable that it is not,
effects are shrunk by as much as they are made of it (James and Stein, over queries). The held-out runs also say how large
the deviation of a run is: few runs with all data leave it open, for all queries together.

A new run on fewer rows also has fewer steps (`training.repacking.steps_lost`). What a step is worth to a query is the slope of
what held-out new runs leave over the steps that they lost, shrunk towards that of all queries.

A set that was retrained in several orders itself has the mean of what it did there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from leaveout.deletion.measurements import NewRuns
from leaveout.deletion.noise import RunNoise

BY_SHARE = (3.0, 1.0)
"""Expected before any held-out new run, without and with first orders of several orders (found on 300 digits)."""
TRIED_BY_SHARE, TRIED_ANYWAY = np.geomspace(0.03, 100, 15), np.array([0, 0.03, 0.1, 0.2, 0.4, 0.7, 1, 2])
TRIED_SCALE = np.geomspace(0.4, 4, 17)
RARE = 0.3
"""`anyway` is expected to be so large at most: its prior falls by e with each such step."""
MEDIAN = 0.455
"""Of the square of a normal number, whose mean is 1: the mean over queries is taken by it, so that no query counts for all."""
SWEEPS = 5
"""Of weights and slopes in turn, until neither changes much."""
ORDERS = 4.0
"""Orders that the expected spread of an effect counts for, where it was measured in a few."""
KEPT = 0.25
"""Of an effect at least, however unstable runs are: what is shrunk to nothing has no rank any more."""
MOST = 9.0
"""A residual's square over its variance counts up to this: a strong set is no reason to widen all others."""


@dataclass(frozen=True)
class Shift:
    """What is known of the way from effects in the same run to those of new ones.

    noise, by_share, anyway   see the module
    orders [orders, queries, units]   the exact first order in each, that of the same run first; none where not measured
    rows [units]   each unit's part of all rows
    worth  what all steps are worth to each query, and its deviation, both [queries]; None: not known
    """

    noise: RunNoise
    rows: np.ndarray
    orders: np.ndarray
    by_share: float
    anyway: float = 0.0
    worth: tuple[np.ndarray, np.ndarray] | None = None

    def shifted(
        self, x: np.ndarray, asked: np.ndarray, effect: np.ndarray, std: np.ndarray, strong: np.ndarray | bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        """Mean effect over orders and its standard deviation, both [queries, sets].

        x: what is removed [sets, units], without which effect and std were predicted where the first order is known in several
        orders; asked: 1 less what rows weigh in new runs, where they were predicted else; strong: where the set takes so much
        that its effect bends in every order, by as much as its parts or steps say [queries, sets]
        """
        own = np.square(self.noise.std)[:, None]
        variance = np.square(std) + own * (self.by_share * (x @ self.rows) + self.anyway) * x.any(1)
        if len(self.orders) > 1:
            each, bent = self.orders @ asked.T, effect - self.orders[0] @ x.T
            effect = each.mean(0) + bent * np.where(strong, 1.0, _sure(bent, std))
            variance = variance + each.var(0, ddof=1) / len(each)
        if self.anyway:
            size = np.median(np.square(effect) / np.maximum(own, 1e-300), 0) / MEDIAN
            effect = effect * np.clip(1 - self.anyway / np.maximum(size, 1e-300), KEPT, 1)
        return effect, np.sqrt(variance)

    def shortened(self, lost: np.ndarray, effect: np.ndarray, std: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The same in runs that lack a part of their steps [sets]."""
        if self.worth is None:
            return effect, std
        worth, wrong = self.worth
        return effect + worth[:, None] * lost, np.hypot(std, wrong[:, None] * lost)

    def as_measured(
        self, x: np.ndarray, effect: np.ndarray, std: np.ndarray, found: Sequence[np.ndarray]
    ) -> tuple[np.ndarray, np.ndarray]:
        """The same where a set [units] was retrained in several orders itself, effects found [orders, queries] of each set.

        Few orders say little of their own spread: what a new run is expected to differ by counts as much as ORDERS of them.
        """
        effect, std = effect.copy(), std.copy()
        for column, each in enumerate(found):
            if (n := len(each)) < 2:
                continue
            expected = np.square(self.noise.std) * self.by_share * float(x[column] @ self.rows)
            spread = (np.square(each - each.mean(0)).sum(0) + ORDERS * expected) / (n - 1 + ORDERS)
            effect[:, column], std[:, column] = each.mean(0), np.sqrt(spread / n)
        return effect, std


def _sure(bent: np.ndarray, std: np.ndarray) -> np.ndarray:
    """The share that is kept of what an effect has beside its first order: little of what the estimator itself is unsure of.

    In one order that part is another than in others; what is small beside its deviation ranks sets worse than nothing.
    """
    square = np.square(bent)
    return np.divide(square, square + np.square(std), out=np.zeros_like(square), where=square > 0)


def fit_shift(
    prior: Shift, held: NewRuns, x: np.ndarray, asked: np.ndarray, effect: np.ndarray, std: np.ndarray,
    lost: np.ndarray,
) -> Shift:  # fmt: skip
    """The shift with the `by_share`, `anyway` and size of the noise that are most likely after new runs of held-out sets.

    held: the runs; x, asked [runs, units], effect, std [queries, runs]: see `Shift.shifted`; lost [runs]: the part of all steps
    """
    noise = prior.noise
    moving = noise.std > 0
    if not len(held.y) or not moving.any():
        return prior
    actual = (held.y - noise.mean).T
    mean, deviation = prior.shifted(x, asked, effect, std)
    variance = np.square(deviation) + np.square(noise.std)[:, None] * (1 + 1 / noise.runs)
    if lost.any():
        worth = np.zeros((2, len(moving)))  # of queries that never move nothing is worth anything
        worth[:, moving] = _worth((actual - mean)[moving], lost, variance[moving])
        prior = replace(prior, worth=(worth[0], worth[1]))
    weight, best, found, part = noise.apart / held.y.shape[1], -np.inf, prior, 0.0
    for scale in TRIED_SCALE:
        run = np.square(scale * noise.std)[:, None]
        by_noise = noise.common * (-2 * np.log(scale) - 1 / scale**2) / 2  # of a variance that so many runs gave
        for by_share in TRIED_BY_SHARE:
            for anyway in TRIED_ANYWAY:
                sized = replace(noise, std=scale * noise.std)
                tried = replace(prior, noise=sized, by_share=float(by_share), anyway=float(anyway))
                mean, deviation = tried.shortened(lost, *tried.shifted(x, asked, effect, std))
                variance = (np.square(deviation) + run * (1 + 1 / noise.runs))[moving]
                surprise = np.log(variance) + np.minimum(np.square(actual - mean)[moving] / variance, MOST)
                before = np.square(np.log(by_share / prior.by_share)) / 2 + anyway / RARE - by_noise
                score = -weight * float(surprise.sum()) / 2 - before
                if score > best:
                    best, found = score, tried
                    part = float(np.square(run[moving] / variance).sum()) * weight
    return replace(found, noise=replace(found.noise, common=noise.common + part))


def _worth(left: np.ndarray, lost: np.ndarray, variance: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Slopes of what is left [queries, runs] over the steps that were lost [runs], and their deviations, both [queries].

    What lies MOST variances off has no more weight than that. Queries are taken to be drawn around a common slope.
    """
    slope, shared, spread = np.zeros(len(left)), 0.0, 0.0
    information = np.zeros(len(left))
    for _ in range(SWEEPS):
        wild = np.square(left - slope[:, None] * lost) / MOST
        weight = 1 / np.maximum(variance, np.maximum(wild, 1e-300))
        information = (weight * lost**2).sum(1)
        each = (weight * lost * left).sum(1) / information
        shared = float(np.average(each, weights=information))
        apart = float(np.average(np.square(each - shared), weights=information))
        spread = max(apart - len(left) / float(information.sum()), 0.0)
        slope = (each * spread * information + shared) / (spread * information + 1)
    deviation = np.sqrt((spread + 1 / information.sum()) / (spread * information + 1))
    return slope, deviation
