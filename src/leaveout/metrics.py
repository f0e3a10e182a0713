"""How good a ranking or a prediction is: pure functions of numpy arrays.

Conventions: scores [query, train], larger is more relevant; one result per query, and a mean over queries gets its
interval from `bootstrap_interval`. No metric depends on the order in which rows of equal score happen to stand.
Undefined values raise, they are never filled in; only `spearman` of constant numbers is nan, as it is in scipy.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike


class Interval(NamedTuple):
    """A mean and the ends of its interval."""

    mean: float
    low: float
    high: float


def average_precision(scores: ArrayLike, relevant: ArrayLike) -> np.ndarray:
    """Precision at the rank of each relevant row, averaged over the relevant rows: the full ranking counts.

    Rows of equal score enter together: each has the precision at the end of its group, so that equal scores for all
    rows give the share of relevant rows.

    Shapes: scores [query, train] or [train]; relevant [query, train] or [train], true or false -> [query].
    Raises: ValueError if a query has no relevant row, or a score is nan.
    Source: the definition of scikit-learn's `average_precision_score`, sum_n (R_n - R_{n-1}) P_n over distinct scores.
    """
    values, truth = _checked(scores, relevant)
    result = np.empty(len(values))
    for query, (row, wanted) in enumerate(zip(values, truth, strict=True)):
        order = np.argsort(-row, kind="stable")
        row, found = row[order], np.cumsum(wanted[order])
        ends = np.append(np.flatnonzero(np.diff(row)), len(row) - 1)
        new = np.diff(found[ends], prepend=0)
        result[query] = (new * found[ends] / (ends + 1)).sum() / found[-1]
    return result


def precision_at(scores: ArrayLike, relevant: ArrayLike, k: int) -> np.ndarray:
    """Share of relevant rows among the k best; the mean over all orders of rows of equal score.

    Shapes: scores [query, train] or [train]; relevant [query, train] or [train] -> [query].
    Raises: ValueError if k is not one of 1 ... train, a query has no relevant row, or a score is nan.
    """
    return _found(*_checked(scores, relevant), k) / k


def recall_at(scores: ArrayLike, relevant: ArrayLike, k: int) -> np.ndarray:
    """Share of the relevant rows that are among the k best; the mean over all orders of rows of equal score.

    Shapes and errors: as in `precision_at`.
    """
    values, truth = _checked(scores, relevant)
    return _found(values, truth, k) / truth.sum(1)


def spearman(first: ArrayLike, second: ArrayLike) -> np.ndarray:
    """Rank correlation of each row of numbers with its partner; equal numbers share the mean of their ranks.

    Shapes: [query, train] or [train], both alike -> [query]. nan where either row is constant.
    Raises: ValueError for different shapes, fewer than 2 numbers, or nan.
    """
    pair = [np.atleast_2d(np.asarray(x, dtype=np.float64)) for x in (first, second)]
    if pair[0].shape != pair[1].shape:
        raise ValueError(f"spearman compares arrays of one shape, not {pair[0].shape} and {pair[1].shape}.")
    if pair[0].shape[1] < 2 or any(np.isnan(x).any() for x in pair):
        raise ValueError("spearman needs at least 2 numbers a row and none that is nan.")
    x, y = (np.stack([ranks(row) for row in rows]) - (rows.shape[1] + 1) / 2 for rows in pair)
    product, length = (x * y).sum(1), np.sqrt((x * x).sum(1) * (y * y).sum(1))
    return np.divide(product, length, out=np.full(len(product), np.nan), where=length > 0)


def ranks(values: ArrayLike) -> np.ndarray:
    """Ranks 1, 2, ... [n] of numbers [n], ascending; equal numbers share the mean of their ranks."""
    _, group, count = np.unique(np.asarray(values), return_inverse=True, return_counts=True)
    last = np.cumsum(count)
    return (last - (count - 1) / 2)[group.ravel()]


def bootstrap_interval(values: ArrayLike, seed: int, level: float = 0.95, resamples: int = 2000) -> Interval:
    """The mean of one value per query, and its percentile interval over resampled queries.

    Shapes: values [query]. Memory: 16 bytes per query and resample.
    Raises: ValueError for no values, or one that is not finite.
    Source: Efron 1979, "Bootstrap methods: another look at the jackknife".
    """
    numbers = np.asarray(values, dtype=np.float64)
    if numbers.ndim != 1 or not numbers.size or not np.isfinite(numbers).all():
        raise ValueError("an interval needs one finite value per query, and at least one query.")
    if not 0 < level < 1:
        raise ValueError(f"level is {level}: give a probability between 0 and 1.")
    chosen = np.random.default_rng(seed).integers(0, len(numbers), (resamples, len(numbers)))
    low, high = np.quantile(numbers[chosen].mean(1), [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(numbers.mean()), float(low), float(high))


def difference_interval(
    first: ArrayLike, second: ArrayLike, seed: int, level: float = 0.95, resamples: int = 2000
) -> Interval:
    """The mean of first - second over the same queries, and its interval: queries are resampled in pairs.

    Shapes: first, second [query].
    Raises: ValueError for different shapes, and as `bootstrap_interval`.
    """
    one, other = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if one.shape != other.shape:
        raise ValueError(f"a paired difference needs the same queries, not {one.shape} and {other.shape} values.")
    return bootstrap_interval(one - other, seed, level, resamples)


def _checked(scores: ArrayLike, relevant: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Scores [query, train] and relevance of the same shape."""
    values = np.atleast_2d(np.asarray(scores))
    truth = np.atleast_2d(np.asarray(relevant, dtype=bool))
    if truth.shape not in (values.shape, (1, values.shape[1])):
        raise ValueError(f"relevant has shape {truth.shape}, scores {values.shape}: give one truth value per score.")
    truth = np.broadcast_to(truth, values.shape)
    if np.isnan(values).any():
        raise ValueError("a score is nan: rank only finite scores.")
    if not truth.any(1).all():
        raise ValueError("a query has no relevant row, so it cannot be judged: leave it out.")
    return values, truth


def _found(values: np.ndarray, truth: np.ndarray, k: int) -> np.ndarray:
    """Expected number of relevant rows among the k best [query]."""
    if not 1 <= k <= values.shape[1]:
        raise ValueError(f"k is {k}: give 1 to {values.shape[1]}, the number of rows.")
    edge = np.partition(values, -k, axis=1)[:, -k, None]  # the k-th largest
    above, tied = values > edge, values == edge
    share = (k - above.sum(1)) / tied.sum(1)
    return (above & truth).sum(1) + share * (tied & truth).sum(1)
