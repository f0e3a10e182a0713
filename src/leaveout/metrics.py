"""How good a ranking or a prediction is: pure functions of numpy arrays.

Conventions: scores [query, train], larger is more relevant, and positive means that removing the row raises the
query's loss; one result per query, and a mean over queries gets its interval from `bootstrap_interval`. No metric
depends on the order in which rows of equal score happen to stand. Undefined values raise, they are never filled in;
only a correlation with constant numbers is nan, as it is in scipy, and `bootstrap_interval` then refuses it.
"""

from __future__ import annotations

import itertools
import math
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike


class Interval(NamedTuple):
    """A mean and the ends of its interval."""

    mean: float
    low: float
    high: float


class NoiseCeiling(NamedTuple):
    """How far two retrained truths agree, and the correlation with their mean that no prediction can be expected to pass."""

    agreement: Interval
    ceiling: Interval


# --- rankings with known relevant rows ---------------------------------------------------------------------------


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
        order = _descending(row)
        row, found = row[order], np.cumsum(wanted[order])
        ends = np.append(np.flatnonzero(row[1:] != row[:-1]), len(row) - 1)
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


def auprc_top_bottom(scores: ArrayLike, relevant: ArrayLike, k: int) -> np.ndarray:
    """Average precision among the k best and the k worst rows only, all others left out: the paper's backdoor table.

    It is blind to relevant rows in the middle of a ranking, so that it stands beside `average_precision`, never for it.
    Where rows tie for the last of the k places, the mean over all ways to choose among them; 0 for a query that has no
    relevant row among the 2 k.

    Shapes: scores [query, train] or [train]; relevant [query, train] or [train]; 2 k <= train -> [query].
    Cost: (k + 1)^2 small curves a query where both ends tie, one where neither does.
    Raises: ValueError for another k, a query without a relevant row in the corpus, or a score that is nan.
    Source: the evaluation of arXiv 2604.16197, with the step form of the area that `average_precision` has.
    """
    values, truth = _checked(scores, relevant)
    if not 1 <= k <= values.shape[1] // 2:
        raise ValueError(f"k is {k}: give 1 to {values.shape[1] // 2}, half the number of rows.")
    return np.array([_ends_precision(row, wanted, k) for row, wanted in zip(values, truth, strict=True)])


# --- correlations with retrained truth ---------------------------------------------------------------------------


def spearman(first: ArrayLike, second: ArrayLike) -> np.ndarray:
    """Rank correlation of each row of numbers with its partner; equal numbers share the mean of their ranks.

    Shapes: [query, train] or [train], both alike -> [query]. nan where either row is constant.
    Raises: ValueError for different shapes, fewer than 2 numbers, or nan.
    """
    return _correlation(*(np.stack([ranks(row) for row in rows]) for rows in _rows_alike("spearman", first, second)))


def pearson(first: ArrayLike, second: ArrayLike) -> np.ndarray:
    """Linear correlation of each row of numbers with its partner.

    Shapes: as in `spearman`; nan where either row is constant.
    Raises: ValueError for different shapes, fewer than 2 numbers, or numbers that are not finite.
    """
    return _correlation(*(_finite("pearson", rows) for rows in _rows_alike("pearson", first, second)))


def ranks(values: ArrayLike) -> np.ndarray:
    """Ranks 1, 2, ... [n] of numbers [n], ascending; equal numbers share the mean of their ranks."""
    _, group, count = np.unique(np.asarray(values), return_inverse=True, return_counts=True)
    last = np.cumsum(count)
    return (last - (count - 1) / 2)[group.ravel()]


def lds(scores: ArrayLike, removed: ArrayLike, losses: ArrayLike) -> np.ndarray:
    """Linear datamodeling score: rank correlation, over subsets, of summed scores with the losses after retraining.

    The prediction for a subset is the sum of the scores of the rows removed, so that good scores correlate positively.

    Shapes: scores [query, train]; removed [subset, train], true where the subset's retraining lacked the row;
            losses [query, subset] of the retrained models -> [query]. A constant added to a query's losses changes nothing.
    Units:  losses in nats. nan for a query whose predictions or losses are constant.
    Raises: ValueError for shapes that do not fit, fewer than 2 subsets, or nan.
    Source: arXiv 2303.14186, definition of the LDS.
    """
    values, gone, truth = np.asarray(scores, np.float64), np.asarray(removed, bool), np.asarray(losses, np.float64)
    if (
        values.ndim != 2
        or gone.ndim != 2
        or (len(values), len(gone)) != truth.shape
        or values.shape[1] != gone.shape[1]
    ):
        raise ValueError(
            f"lds needs scores [query, train], removed [subset, train] and losses [query, subset], "
            f"not {values.shape}, {gone.shape} and {truth.shape}."
        )
    # The same scores summed in another order differ by rounding, which must not rank subsets.
    quantum = np.abs(values).sum(1, keepdims=True) * 1e-12
    return spearman(np.round(values @ np.transpose(gone) / np.where(quantum > 0, quantum, 1.0)), truth)


def leave_one_out_correlation(scores: ArrayLike, effects: ArrayLike) -> np.ndarray:
    """Rank correlation over rows of scores with what removing each row alone did to the query's loss.

    Shapes: scores, effects [query, train] -> [query]; effects in nats, positive where the removal raised the loss.
    nan and errors: as in `spearman`.
    """
    return spearman(scores, effects)


def noise_ceiling(
    first: ArrayLike, second: ArrayLike, seed: int, level: float = 0.95, resamples: int = 2000
) -> NoiseCeiling:
    """How far two retrained truths of the same subsets agree, and the ceiling for a correlation with their mean.

    The agreement r is the mean over queries of the rank correlation of the two. The mean of both has the reliability
    2 r / (1 + r) (Spearman-Brown), and a prediction without any error of its own correlates with it by the root of that.
    A mean agreement of 0 or less has the ceiling 0: such truths hold nothing that could be predicted.

    Shapes: first, second [query, subset], losses of two retrainings of each subset with different seeds.
    Raises: ValueError as `spearman`, or if a query's losses are constant.
    Source: Spearman 1910 and Brown 1910 for the reliability of a mean; Spearman 1904 for its root.
    """
    agreement = bootstrap_interval(spearman(first, second), seed, level, resamples)
    return NoiseCeiling(agreement, Interval(*(math.sqrt(2 * r / (1 + r)) if r > 0 else 0.0 for r in agreement)))


# --- what removal or training really does ------------------------------------------------------------------------


def top_rows(scores: ArrayLike, k: int) -> np.ndarray:
    """The k rows of highest score of each query, for a removal: true [query, train]; of equal scores the first ones.

    Raises: ValueError if k is not one of 1 ... train, or a score is nan.
    """
    values = np.atleast_2d(np.asarray(scores))
    if np.isnan(values).any():
        raise ValueError("a score is nan: rank only finite scores.")
    _check_k(k, values)
    chosen = np.zeros(values.shape, bool)
    np.put_along_axis(chosen, _descending(values)[:, :k], True, axis=1)
    return chosen


def qld(without_top: ArrayLike, without_random: ArrayLike) -> np.ndarray:
    """Query loss difference: rise of the loss when the top rows are removed, over the rise when random rows are.

    Shapes: without_top [query], losses of models retrained without the query's top rows; without_random [query, draw]
            or [query], losses of models retrained without as many random rows -> [query].
    Units:  nats.
    Raises: ValueError for shapes that do not fit, or a loss that is not finite.
    """
    top, chance = _finite("qld", without_top), _finite("qld", without_random)
    if top.ndim != 1 or chance.ndim not in (1, 2) or len(chance) != len(top) or not chance.size:
        raise ValueError(f"qld needs losses [query] and [query, draw], not {top.shape} and {chance.shape}.")
    return top - (chance if chance.ndim == 1 else chance.mean(1))


def brittleness(changed: ArrayLike, sizes: ArrayLike) -> np.ndarray:
    """The smallest number of top rows whose removal changes the model's answer; inf where none that was tried does.

    inf has no mean: report the share of queries up to a size, `bootstrap_interval(brittleness(...) <= size, seed)`.

    Shapes: changed [query, size], true where the retrained model answers otherwise; sizes [size], ascending -> [query].
    Raises: ValueError for shapes that do not fit, or sizes that do not ascend.
    Source: the data brittleness of arXiv 2202.00622.
    """
    flags, counts = np.asarray(changed, bool), np.asarray(sizes, np.float64)
    if flags.ndim != 2 or counts.shape != flags.shape[1:] or not counts.size or (np.diff(counts) <= 0).any():
        raise ValueError(
            f"brittleness needs changed [query, size] and ascending sizes, not {flags.shape} and {counts}."
        )
    return np.where(flags.any(1), counts[flags.argmax(1)], np.inf)


def tail_patch(before: ArrayLike, after: ArrayLike) -> np.ndarray:
    """Rise of the target's probability by one training step on each of the top rows, meaned over the rows.

    Shapes: before [query], losses of the query's target; after [query, rank], the same after one step on that row alone
            -> [query].
    Units:  losses in nats, summed over the target's tokens; the result is a difference of probabilities, exp(-loss).
    Raises: ValueError for shapes that do not fit, or a loss that is not finite.
    Source: arXiv 2410.17413, the tail-patch score.
    """
    base, patched = _finite("tail_patch", before), _finite("tail_patch", after)
    if base.ndim != 1 or patched.ndim != 2 or len(base) != len(patched) or not patched.size:
        raise ValueError(f"tail_patch needs losses [query] and [query, rank], not {base.shape} and {patched.shape}.")
    return (np.exp(-patched) - np.exp(-base)[:, None]).mean(1)


def coverage(actual: ArrayLike, mean: ArrayLike, std: ArrayLike, level: float = 0.95) -> np.ndarray:
    """Share of the deletion sets whose true effect lies in the prediction's normal interval, ends included.

    Shapes: actual, mean, std [query, deletion set] or [deletion set] -> [query].
    Raises: ValueError for different shapes, a level outside (0, 1), a negative std, or numbers that are not finite.
    """
    truth, centre, width = (np.atleast_2d(_finite("coverage", x)) for x in (actual, mean, std))
    if not truth.shape == centre.shape == width.shape or not truth.size:
        raise ValueError(f"coverage compares arrays of one shape, not {truth.shape}, {centre.shape} and {width.shape}.")
    _check_level(level)
    if (width < 0).any():
        raise ValueError("a standard deviation is negative: give the predicted std, 0 or more.")
    return (np.abs(truth - centre) <= NormalDist().inv_cdf((1 + level) / 2) * width).mean(1)


# --- intervals ---------------------------------------------------------------------------------------------------


def bootstrap_interval(values: ArrayLike, seed: int, level: float = 0.95, resamples: int = 2000) -> Interval:
    """The mean of one value per query, and its percentile interval over resampled queries.

    Shapes: values [query]. Memory: 16 bytes per query and resample.
    Raises: ValueError for no values, or one that is not finite.
    Source: Efron 1979, "Bootstrap methods: another look at the jackknife".
    """
    numbers = np.asarray(values, dtype=np.float64)
    if numbers.ndim != 1 or not numbers.size or not np.isfinite(numbers).all():
        raise ValueError("an interval needs one finite value per query, and at least one query.")
    _check_level(level)
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


# --- shared checks and counts ------------------------------------------------------------------------------------


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


def _descending(values: np.ndarray) -> np.ndarray:
    """Places along the last axis, highest first, of equal ones the first; integers have no negative to sort by."""
    return np.argsort(np.negative(values, dtype=np.result_type(values, np.float32)), axis=-1, kind="stable")


def _found(values: np.ndarray, truth: np.ndarray, k: int) -> np.ndarray:
    """Expected number of relevant rows among the k best [query]."""
    _check_k(k, values)
    edge = np.partition(values, -k, axis=1)[:, -k, None]  # the k-th largest
    above, tied = values > edge, values == edge
    share = (k - above.sum(1)) / tied.sum(1)
    return (above & truth).sum(1) + share * (tied & truth).sum(1)


def _check_k(k: int, values: np.ndarray) -> None:
    if not 1 <= k <= values.shape[1]:
        raise ValueError(f"k is {k}: give 1 to {values.shape[1]}, the number of rows.")


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level is {level}: give a probability between 0 and 1.")


def _finite(what: str, values: ArrayLike) -> np.ndarray:
    numbers = np.asarray(values, dtype=np.float64)
    if not np.isfinite(numbers).all():
        raise ValueError(f"{what} needs finite numbers: a value is nan or infinite.")
    return numbers


def _rows_alike(what: str, first: ArrayLike, second: ArrayLike) -> list[np.ndarray]:
    """Both arrays as [query, numbers], checked."""
    pair = [np.atleast_2d(np.asarray(x, dtype=np.float64)) for x in (first, second)]
    if pair[0].shape != pair[1].shape:
        raise ValueError(f"{what} compares arrays of one shape, not {pair[0].shape} and {pair[1].shape}.")
    if pair[0].shape[1] < 2 or any(np.isnan(x).any() for x in pair):
        raise ValueError(f"{what} needs at least 2 numbers a row and none that is nan.")
    return pair


def _correlation(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Correlation of rows [query, numbers]; nan where a row is constant, told by its values, not by rounding."""
    x, y = (rows - rows.mean(1, keepdims=True) for rows in (first, second))
    varies = (np.ptp(first, axis=1) > 0) & (np.ptp(second, axis=1) > 0)
    length = np.sqrt((x * x).sum(1) * (y * y).sum(1))
    return np.divide((x * y).sum(1), length, out=np.full(len(x), np.nan), where=varies)


def _ends_precision(row: np.ndarray, wanted: np.ndarray, k: int) -> float:
    """Average precision of one query over its k best and k worst rows, meaned over the choices among ties."""
    ordered = np.sort(row)
    high, low = ordered[-k], ordered[k - 1]
    places, group, sizes = np.unique(row, return_inverse=True, return_counts=True)
    relevant = np.bincount(group.ravel(), wanted, len(places)).astype(int)
    taken = np.where((places > high) | (places < low), sizes, 0)
    taken[places == high] += k - int((row > high).sum())
    taken[places == low] += k - int((row < low).sum())
    kept = np.flatnonzero(taken)[::-1]  # groups of equal score, best first
    ends = np.cumsum(taken[kept])
    chances = [_drawn(int(sizes[g]), int(relevant[g]), int(taken[g])) for g in kept]
    total = 0.0
    for choice in itertools.product(*chances):
        new = np.array([hits for hits, _ in choice])
        if new.any():
            area = (new * np.cumsum(new) / ends).sum() / new.sum()
            total += math.prod(chance for _, chance in choice) * float(area)
    return total


def _drawn(size: int, relevant: int, taken: int) -> list[tuple[int, float]]:
    """How many relevant rows `taken` of `size` equal ones hold, with the probability of each number."""
    possible = range(max(0, taken - (size - relevant)), min(taken, relevant) + 1)
    ways = math.comb(size, taken)
    return [(n, math.comb(relevant, n) * math.comb(size - relevant, taken - n) / ways) for n in possible]
