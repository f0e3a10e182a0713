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
    auprc_top_bottom,
    average_precision,
    bootstrap_interval,
    brittleness,
    coverage,
    difference_interval,
    lds,
    leave_one_out_correlation,
    noise_ceiling,
    pearson,
    precision_at,
    qld,
    ranks,
    recall_at,
    spearman,
    tail_patch,
    top_rows,
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


@given(FEW_VALUES, st.integers(1, 3))
@settings(max_examples=60, deadline=None)
def test_auprc_top_bottom_is_the_mean_over_all_orders_of_ties(rows, k):
    scores, relevant = split(rows)
    k = min(k, len(scores) // 2)
    areas = []
    for order in orders(scores):
        ends = order[:k] + order[len(order) - k :]
        areas.append(average_precision_score(relevant[ends], scores[ends]) if relevant[ends].any() else 0.0)
    assert auprc_top_bottom(scores, relevant, k)[0] == pytest.approx(np.mean(areas))


def test_auprc_top_bottom_is_blind_to_the_middle():
    rng = np.random.default_rng(0)
    scores = -np.arange(1000.0)
    relevant = np.arange(1000) < 5
    hidden = relevant | ((np.arange(1000) >= 400) & (np.arange(1000) < 500))
    assert auprc_top_bottom(scores, relevant, 5)[0] == auprc_top_bottom(scores, hidden, 5)[0] == 1
    assert average_precision(scores, hidden)[0] < 0.3
    many = rng.integers(0, 30, (3, 1000)).astype(float), rng.random((3, 1000)) < 0.3
    for row, wanted, found in zip(*many, auprc_top_bottom(*many, k=50), strict=True):
        drawn = []
        for _ in range(200):
            order = np.lexsort((rng.random(1000), -row))
            ends = np.r_[order[:50], order[-50:]]
            drawn.append(average_precision_score(wanted[ends], row[ends]))
        assert abs(found - np.mean(drawn)) < 5 * np.std(drawn) / 200**0.5


@given(st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), min_size=2, max_size=40))
@settings(max_examples=100, deadline=None)
def test_pearson_equals_scipy(pairs):
    x, y = np.array(pairs, float).T / 7
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        assert np.isnan(pearson(x, y)[0])
    else:
        assert pearson(x, y)[0] == pytest.approx(stats.pearsonr(x, y).statistic)


def test_pearson_goes_row_by_row_and_leave_one_out_is_a_rank_correlation():
    x, y = np.random.default_rng(1).normal(size=(2, 4, 50))
    np.testing.assert_allclose(pearson(x, y), [stats.pearsonr(a, b).statistic for a, b in zip(x, y, strict=True)])
    wanted = [stats.spearmanr(a, b).statistic for a, b in zip(x, y, strict=True)]
    np.testing.assert_allclose(leave_one_out_correlation(x, y), wanted)


def test_lds_equals_loops_over_subsets():
    rng = np.random.default_rng(6)
    scores, removed = rng.integers(-2, 3, (5, 30)).astype(np.float32), rng.random((17, 30)) < 0.5
    losses = rng.integers(0, 6, (5, 17)).astype(float)  # ties on both sides
    for q, found in enumerate(lds(scores, removed, losses)):
        sums = [sum(scores[q, i] for i in range(30) if removed[s, i]) for s in range(17)]
        assert found == pytest.approx(stats.spearmanr(sums, losses[q]).statistic)


def test_lds_is_one_for_an_additive_truth_and_keeps_the_sign():
    rng = np.random.default_rng(7)
    scores, removed = rng.normal(size=(3, 20)), rng.random((40, 20)) < 0.5
    losses = 2.0 + np.stack([[scores[q, gone].sum() for gone in removed] for q in range(3)])
    np.testing.assert_allclose(lds(scores, removed, losses), 1)
    np.testing.assert_allclose(lds(-scores, removed, losses), -1)
    assert np.isnan(lds(np.zeros((3, 20)), removed, losses)).all()


def test_noise_ceiling_is_what_the_true_signal_reaches():
    """Truth = signal + noise of half its variance: agreement 2/3, and the signal itself correlates sqrt(.8) with the mean."""
    rng = np.random.default_rng(8)
    signal = rng.normal(size=(30, 2000))
    first, second = signal + rng.normal(size=(2, 30, 2000)) * 0.5**0.5
    found = noise_ceiling(first, second, seed=0)
    assert found.agreement == bootstrap_interval(spearman(first, second), seed=0)
    reached = spearman(signal, (first + second) / 2).mean()
    assert found.ceiling.mean == pytest.approx(reached, abs=0.01)
    assert found.ceiling.low < found.ceiling.mean < found.ceiling.high < 1
    r = found.agreement.low
    assert found.ceiling.low == pytest.approx((2 * r / (1 + r)) ** 0.5)


def test_noise_ceiling_at_its_ends():
    x = np.random.default_rng(9).normal(size=(4, 12))
    assert noise_ceiling(x, x, seed=0).ceiling == pytest.approx((1, 1, 1))
    assert noise_ceiling(x, -x, seed=0).ceiling == (0, 0, 0)


def test_sums_that_differ_by_rounding_are_equal_predictions():
    rng = np.random.default_rng(0)
    removed = np.stack([rng.permutation(200) < 100 for _ in range(64)])
    losses = rng.normal(size=(3, 64))
    assert np.isnan(lds(np.full((3, 200), 0.1), removed, losses)).all()
    assert np.isnan(lds(np.zeros((3, 200)), removed, losses)).all()
    tied = rng.choice([0.1, 0.3, -0.7], size=(3, 200))
    exact = np.stack([ranks(row) for row in (10 * tied).round().astype(int) @ removed.T])
    assert np.allclose(lds(tied * 1e-9, removed, losses), spearman(exact, losses), atol=1e-12)


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int64, np.float16, np.float32])
def test_rankings_do_not_depend_on_the_type_of_the_scores(dtype):
    scores = np.array([0, 3, 1, np.iinfo(np.int8).max], dtype)
    if dtype == np.int8:
        scores[0] = -128
    wanted = np.array([False, True, False, False])
    assert average_precision(scores, wanted) == 0.5 and top_rows(scores, 2).tolist() == [[False, True, False, True]]


def test_tied_infinities_enter_together():
    for wanted in np.eye(4, dtype=bool)[1:]:
        assert average_precision([0.0, -np.inf, -np.inf, -np.inf], wanted) == 0.25


def test_top_rows_are_the_best_and_of_ties_the_first():
    np.testing.assert_array_equal(top_rows([[1, 3, 3, 2], [0, 0, 0, 0]], 2), [[0, 1, 1, 0], [1, 1, 0, 0]])
    scores = np.random.default_rng(10).normal(size=(6, 40))
    for row, chosen in zip(scores, top_rows(scores, 7), strict=True):
        assert set(np.flatnonzero(chosen)) == set(sorted(range(40), key=lambda i: -row[i])[:7])


def test_qld_is_top_minus_mean_of_random():
    assert qld([3.0, 1.0], [[1.0, 2.0], [1.5, 0.5]]) == pytest.approx([1.5, 0.0])
    assert qld([3.0, 1.0], [2.0, 2.0]) == pytest.approx([1.0, -1.0])


def test_brittleness_is_the_first_size_that_changes_the_answer():
    changed = [[False, True, False], [True, True, True], [False, False, False]]
    found = brittleness(changed, [1, 5, 20])
    assert found.tolist() == [5, 1, np.inf]
    assert bootstrap_interval(found <= 5, seed=0).mean == pytest.approx(2 / 3)


def test_tail_patch_is_the_mean_rise_of_probability():
    before, after = np.log([[2.0], [4.0]])[:, 0], np.log([[1.0, 4.0], [2.0, 2.0]])
    assert tail_patch(before, after) == pytest.approx([(0.5 + -0.25) / 2, 0.25])


@pytest.mark.parametrize("level", [0.5, 0.95])
def test_coverage_of_normal_errors_is_the_level(level):
    rng = np.random.default_rng(11)
    mean, std = rng.normal(size=(5, 4000)), rng.exponential(size=(5, 4000))
    found = coverage(mean + std * rng.normal(size=mean.shape), mean, std, level)
    assert found.shape == (5,) and abs(found.mean() - level) < 5 * (level * (1 - level) / 20_000) ** 0.5


def test_coverage_counts_the_ends():
    assert coverage([1.0, 1.0, 2.0, -1.9], [1.0, 1.1, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0]).tolist() == [0.5]


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
        (lambda: auprc_top_bottom([1.0, 2.0, 3.0], [True, False, True], 2), "k is 2: give 1 to 1, half"),
        (lambda: auprc_top_bottom([1.0, 2.0], [False, False], 1), "no relevant row"),
        (lambda: pearson([1.0, np.inf], [1.0, 2.0]), "pearson needs finite numbers"),
        (lambda: pearson([1.0], [1.0]), "pearson needs at least 2"),
        (lambda: lds(np.ones((2, 3)), np.ones((4, 3)), np.ones((4, 2))), r"not \(2, 3\), \(4, 3\) and \(4, 2\)"),
        (lambda: lds(np.ones((2, 3)), np.ones((4, 2)), np.ones((2, 4))), "lds needs scores"),
        (lambda: noise_ceiling(np.ones((2, 3)), np.ones((2, 3)), 0), "one finite value per query"),
        (lambda: top_rows([1.0, 2.0], 3), "k is 3"),
        (lambda: top_rows([1.0, np.nan], 1), "score is nan"),
        (lambda: qld([1.0, 2.0], [1.0]), r"not \(2,\) and \(1,\)"),
        (lambda: qld([1.0], [[]]), "qld needs losses"),
        (lambda: qld([np.nan], [1.0]), "qld needs finite"),
        (lambda: brittleness([[True, False]], [2, 1]), "ascending sizes"),
        (lambda: brittleness([[True, False]], [1]), "ascending sizes"),
        (lambda: tail_patch([1.0], [[1.0], [2.0]]), "tail_patch needs losses"),
        (lambda: coverage([1.0], [1.0], [-1.0]), "standard deviation is negative"),
        (lambda: coverage([1.0], [1.0, 2.0], [1.0]), "arrays of one shape"),
        (lambda: coverage([1.0], [1.0], [1.0], level=0), "level is 0"),
    ],
)
def test_undefined_values_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
