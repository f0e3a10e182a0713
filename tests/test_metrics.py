"""Metrics against scikit-learn, scipy and brute force."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import average_precision_score

from leaveout.metrics import (
    average_precision,
    bootstrap_interval,
    difference_interval,
    precision_at,
    ranks,
    recall_at,
    spearman,
)

FEW_VALUES = st.lists(st.tuples(st.integers(0, 4), st.booleans()), min_size=2, max_size=7).filter(
    lambda rows: any(relevant for _, relevant in rows)
)


def split(rows):
    scores, relevant = zip(*rows, strict=True)
    return np.array(scores, float), np.array(relevant)


def orders(scores):
    """Every ranking that sorts by score, all orders of equal ones."""
    for order in itertools.permutations(range(len(scores))):
        if all(scores[a] >= scores[b] for a, b in itertools.pairwise(order)):
            yield list(order)


@given(FEW_VALUES)
@settings(max_examples=100, deadline=None)
def test_average_precision_equals_scikit_learn_with_ties(rows):
    scores, relevant = split(rows)
    assert average_precision(scores, relevant)[0] == pytest.approx(average_precision_score(relevant, scores))


def test_average_precision_of_many_queries_equals_scikit_learn():
    rng = np.random.default_rng(0)
    scores, relevant = rng.normal(size=(5, 300)).astype(np.float32), rng.random((5, 300)) < 0.1
    wanted = [average_precision_score(a, b) for a, b in zip(relevant, scores, strict=True)]
    np.testing.assert_allclose(average_precision(scores, relevant), wanted, rtol=1e-12)
    np.testing.assert_allclose(
        average_precision(scores, relevant[0]), [average_precision_score(relevant[0], row) for row in scores]
    )


def test_average_precision_at_its_ends():
    relevant = np.array([True, True, False, False])
    assert average_precision([4, 3, 2, 1], relevant)[0] == 1
    assert average_precision([1, 2, 3, 4], relevant)[0] == pytest.approx((1 / 3 + 2 / 4) / 2)
    assert average_precision([0, 0, 0, 0], relevant)[0] == 0.5


@given(FEW_VALUES, st.integers(1, 7))
@settings(max_examples=60, deadline=None)
def test_precision_and_recall_are_means_over_all_orders_of_ties(rows, k):
    scores, relevant = split(rows)
    k = min(k, len(scores))
    hits = np.mean([relevant[order[:k]].sum() for order in orders(scores)])
    assert precision_at(scores, relevant, k)[0] == pytest.approx(hits / k)
    assert recall_at(scores, relevant, k)[0] == pytest.approx(hits / relevant.sum())


@given(st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), min_size=2, max_size=40))
@settings(max_examples=100, deadline=None)
def test_spearman_equals_scipy_with_ties(pairs):
    x, y = np.array(pairs, float).T
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        assert np.isnan(spearman(x, y)[0])
    else:
        assert spearman(x, y)[0] == pytest.approx(stats.spearmanr(x, y).statistic)
    np.testing.assert_array_equal(ranks(x), stats.rankdata(x))


def test_spearman_goes_row_by_row():
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(2, 4, 50))
    np.testing.assert_allclose(spearman(x, y), [stats.spearmanr(a, b).statistic for a, b in zip(x, y, strict=True)])


def test_bootstrap_interval_equals_scipys():
    values = np.random.default_rng(2).exponential(size=60)
    ours = bootstrap_interval(values, seed=0, resamples=20_000)
    theirs = stats.bootstrap(
        (values,), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(3)
    ).confidence_interval
    spread = values.std() / np.sqrt(len(values))
    assert ours.mean == pytest.approx(values.mean())
    assert ours.low == pytest.approx(theirs.low, abs=0.05 * spread)
    assert ours.high == pytest.approx(theirs.high, abs=0.05 * spread)


def test_bootstrap_interval_covers_the_true_mean():
    rng = np.random.default_rng(4)
    inside = 0
    for trial in range(400):
        interval = bootstrap_interval(rng.normal(size=50), seed=trial, resamples=400)
        inside += interval.low <= 0 <= interval.high
    assert abs(inside - 0.94 * 400) < 5 * np.sqrt(400 * 0.94 * 0.06)  # percentile intervals of 50 cover 94 %


def test_bootstrap_interval_is_a_function_of_its_seed_and_narrows():
    values = np.arange(10.0)
    assert bootstrap_interval(values, 1) == bootstrap_interval(values, 1) != bootstrap_interval(values, 2)
    wide, narrow = bootstrap_interval(values, 1), bootstrap_interval(values, 1, level=0.5)
    assert wide.low < narrow.low < narrow.mean < narrow.high < wide.high


def test_difference_interval_pairs_the_queries():
    rng = np.random.default_rng(5)
    hard = rng.normal(size=40) * 10
    interval = difference_interval(hard + 1, hard, seed=0)
    assert interval == pytest.approx((1, 1, 1))
    assert difference_interval([1, 2], [0, 0], 0) == bootstrap_interval([1, 2], 0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: average_precision([1.0, 2.0], [False, False]), "no relevant row"),
        (lambda: average_precision([1.0, np.nan], [True, False]), "score is nan"),
        (lambda: average_precision([1.0, 2.0], [True]), r"relevant has shape \(1, 1\), scores \(1, 2\)"),
        (lambda: precision_at([1.0, 2.0], [True, False], 3), "k is 3: give 1 to 2"),
        (lambda: recall_at([1.0, 2.0], [True, False], 0), "k is 0"),
        (lambda: spearman([1.0, 2.0], [1.0, 2.0, 3.0]), "arrays of one shape"),
        (lambda: spearman([1.0], [1.0]), "at least 2 numbers"),
        (lambda: spearman([1.0, np.nan], [1.0, 2.0]), "none that is nan"),
        (lambda: bootstrap_interval([], 0), "at least one query"),
        (lambda: bootstrap_interval([1.0, np.inf], 0), "one finite value per query"),
        (lambda: bootstrap_interval([1.0], 0, level=1.0), "level is 1.0"),
        (lambda: difference_interval([1.0], [1.0, 2.0], 0), "needs the same queries"),
    ],
)
def test_undefined_values_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
