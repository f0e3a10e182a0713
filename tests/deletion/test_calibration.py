"""Intervals scaled by held-out retrainings: simulated truths, and a small run that is measured further."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from leaveout.deletion import directions
from leaveout.deletion.calibration import _within, calibrate
from leaveout.deletion.estimators import EstimatorSettings, fit
from leaveout.deletion.measurements import Measurements, Retrainings
from leaveout.deletion.posterior import Posterior
from leaveout.deletion.predict import UNTESTED
from leaveout.training.queries import as_queries

from .conftest import FAST, QUERIES
from .test_posterior import problem


class Made:
    """An estimator of known means, x . effects, and of one deviation a unit's share."""

    def __init__(self, effects, std=1.0):
        self.effects, self.std = effects, std

    def predict(self, x):
        return self.effects @ x.T, np.broadcast_to(self.std * np.sqrt(x.sum(1)), (len(self.effects), len(x))).copy()


def held(x, y, **known):
    units, queries = x.shape[1], y.shape[1]
    return Measurements(np.zeros(queries), np.ones(units), heldout=Retrainings(x, y), **known)


def sets_of(n, units, seed):
    return directions.random_sets(0, n, units, seed, (1, 2, 6, 12))


def covered(found, fitted, x, y):
    mean, std = fitted.predict(x)
    reach = 1.96 * found.factor(x, mean, std) * std
    return np.abs(y.T - mean) <= reach, reach


def test_calibration_repairs_standard_deviations():
    data, kernel, x, y = problem(4, runs=40)

    class Overconfident(Posterior):
        def predict(self, x):
            mean, std = super().predict(x)
            return mean, std / 5

    fitted = Overconfident(data, kernel)
    found = calibrate(replace(data, heldout=Retrainings(x[:16], y[:16])), fitted)
    mean, std = fitted.predict(x[16:])
    inside, reach = covered(found, fitted, x[16:], y[16:])
    assert 3 < np.median(reach / std) / 1.96 < 9
    assert inside.mean() > 0.88 > (np.abs(mean.T - y[16:]) < 1.96 * std.T).mean()
    nothing = calibrate(data, fitted)
    assert (nothing.factor(x, *fitted.predict(x)) == 1.0).all() and not nothing.outside(x[16:], mean).any()


@pytest.mark.parametrize("queries", [1, 8])
@pytest.mark.parametrize("n", [6, 16])
def test_new_sets_are_covered_where_deviations_are_ten_times_wrong(n, queries):
    inside = []
    for seed in range(20):
        rng, std = np.random.default_rng(seed), (0.1, 10.0)[seed % 2]
        fitted = Made(rng.standard_normal((queries, 40)), std)
        x = sets_of(n + 100, 40, seed)
        y = x @ fitted.effects.T + np.sqrt(x.sum(1))[:, None] * rng.standard_normal((n + 100, queries))
        found = calibrate(held(x[:n], y[:n]), fitted)
        hit, reach = covered(found, fitted, x[n:], y[n:])
        inside.append(hit.mean())
        assert np.median(reach / np.sqrt(x[n:].sum(1))) < 10  # of errors whose deviation is 1
    assert np.mean(inside) > (0.88 if queries == 1 else 0.93)


def test_errors_that_grow_with_the_effect_widen_large_effects_alone():
    rng = np.random.default_rng(0)
    fitted = Made(np.concatenate([0.01 * rng.standard_normal((4, 40)), 10 * rng.standard_normal((4, 40))]), 0.1)
    x = sets_of(216, 40, 1)
    mean, std = fitted.predict(x)
    y = (mean + 0.3 * mean * rng.standard_normal(mean.shape) + std * rng.standard_normal(mean.shape)).T
    hit, reach = covered(calibrate(held(x[:16], y[:16]), fitted), fitted, x[16:], y[16:])
    assert hit[:4].mean() > 0.9 and hit[4:].mean() > 0.9
    assert np.median(reach[:4] / std[:4, 16:]) < 6 < 30 < np.median(reach[4:] / std[4:, 16:])


def test_queries_that_err_together_count_as_one():
    """A hundred queries with one error a set say no more than one query."""
    rng = np.random.default_rng(0)
    x, error = sets_of(8, 40, 0), rng.standard_normal((8, 1))
    y = error * np.sqrt(x.sum(1))[:, None]
    one, many = (calibrate(held(x, np.repeat(y, n, 1)), Made(np.zeros((n, 40)))) for n in (1, 100))
    assert one.numbers == many.numbers and one.quantiles == pytest.approx(many.quantiles, rel=0.01)


def test_sets_beyond_all_that_were_held_out_are_told():
    features = np.concatenate([np.repeat(np.eye(4, 24), 5, 0), np.eye(24)[4:24]])  # four groups of five, twenty alone
    effects = np.ones((1, 40))
    effects[0, 20:] = 0.0
    fitted = Made(effects)
    tested = np.zeros((3, 40))
    tested[0, [0, 20, 21]], tested[1, [5, 6, 22, 23]], tested[2, 24:34] = 1, 1, 1
    found = calibrate(held(tested, tested @ effects.T, features=features), fitted)
    asked = np.zeros((5, 40))
    asked[0, [1, 2, 25]] = 1  # as those
    asked[1, 20:31] = 1  # larger
    asked[2, 10:14] = 1  # more alike, and more of the help
    asked[3, [0, 5, 10]] = 1  # more of the help alone
    asked[4, 24:34] = 0.5
    assert found.outside(asked, fitted.predict(asked)[0]).tolist() == [[False, True, True, True, False]]


def test_the_share_of_errors_within_so_many_scales_is_students():
    t = np.linspace(-400, 400, 800_001)
    density = (1 + t**2 / 4) ** -2.5
    for reach in (0.5, 2.0, 2.776445):
        part = density[np.abs(t) <= reach].sum() / density.sum()
        assert _within(np.array(reach)) == pytest.approx(part, abs=1e-3)
    assert _within(np.array(2.776445)) == pytest.approx(0.95, abs=1e-6)


def test_more_measurements_keep_intervals_honest():
    """Truths of a prior that the estimator does not have, ever more of it fitted."""
    for runs in (12, 40, 100):
        inside = []
        for seed in range(4):
            data, _, x, y = problem(seed, runs=runs)
            y, bent = y + 0.03 * x.sum(1, keepdims=True) ** 1.5, data.retrainings
            bent = Retrainings(bent.x, bent.y + 0.03 * bent.x.sum(1, keepdims=True) ** 1.5)
            known = replace(data, retrainings=bent, heldout=Retrainings(x[:12], y[:12]))
            fitted, found = fit(known, EstimatorSettings())
            inside.append(covered(found, fitted, x[12:], y[12:])[0].mean())
        assert np.mean(inside) > 0.9, runs


def test_held_out_sets_that_are_fitted_later_do_not_narrow_intervals():
    data, _, x, y = problem(0, runs=30)
    known = replace(data, heldout=Retrainings(x[:10], y[:10]))
    again = replace(known, retrainings=Retrainings(*(np.concatenate(p) for p in zip(
        (data.retrainings.x, data.retrainings.y), (x[:10], y[:10]), strict=True
    ))))  # fmt: skip
    for settings in (EstimatorSettings(), EstimatorSettings("datamodels")):
        (_, before), (_, after) = fit(known, settings), fit(again, settings)
        assert before.sets == 10 and after.sets == (10 if settings.name == "posterior" else 0)
    (one, before), (two, after) = fit(known, EstimatorSettings()), fit(again, EstimatorSettings())
    assert (before.numbers, before.quantiles) == (after.numbers, after.quantiles)
    assert np.allclose(covered(before, one, x[10:], y[10:])[1], covered(after, two, x[10:], y[10:])[1])


def test_what_was_learned_from_held_out_sets_is_believed_by_overlap(monkeypatch):
    """An interval of a set that overlaps one of them stays between those of the fits without and with them."""
    monkeypatch.setattr("leaveout.deletion.estimators.CHOICES", ())
    data, kernel, x, y = problem(0, runs=30)
    first, second = x[0], np.roll(x[0], 1) * (1 - x[0])
    held_out = np.array([first, second, *x[1:9]])
    known = replace(data, heldout=Retrainings(held_out, np.concatenate([y[:1], y[:1], y[1:9]])))
    fitted, found = fit(known, EstimatorSettings(kernel=kernel))
    union = np.array([first + second, first, *x[9:12]])
    before, after = Posterior(data, kernel), fitted
    ratio = before.predict_unbent(union)[1] / np.sqrt(before.tau[:, None])
    ratio /= after.predict_unbent(union)[1] / np.sqrt(after.tau[:, None])
    assert np.allclose(fitted.before_last(union, len(held_out)), ratio, rtol=1e-3)
    _, now = covered(found, fitted, union, np.zeros((len(union), len(y[0]))))
    _, bare = covered(replace(found, held=None), fitted, union, np.zeros((len(union), len(y[0]))))
    assert (now[:, 0] > 1.1 * bare[:, 0]).all() and np.allclose(now[:, 1], bare[:, 1])
    assert (now >= bare * (1 - 1e-9)).all() and (now <= bare * np.maximum(1, ratio) * (1 + 1e-9)).all()


def test_that_deviations_are_too_wide_is_half_believed(monkeypatch):
    """Errors of large sets go with their effects; of single units nothing is known but the estimator's own deviation."""
    rng, units = np.random.default_rng(0), 60
    effects = np.abs(rng.standard_normal((6, units))) + 1
    large = directions.random_sets(0, 40, units, 0, (12, 20))
    fitted = Made(effects, 3.0)
    y = (effects @ large.T * (1 + 0.3 * rng.standard_normal((6, 40)))).T
    found = calibrate(held(large, y), fitted)
    with monkeypatch.context() as patched:
        patched.setattr("leaveout.deletion.calibration.NARROWER", 1.0)
        bare = calibrate(held(large, y), fitted)
    single = np.eye(units)
    assert found.numbers[0] == bare.numbers[0] / 2 < -0.2 and found.numbers[1:] == bare.numbers[1:]
    reaches = [covered(one, fitted, single, effects.T)[1] for one in (found, bare)]
    assert (reaches[0] > 1.1 * reaches[1]).all()
    assert covered(found, fitted, single, (effects * (1 + 0.6 * rng.standard_normal((6, units)))).T)[0].mean() > 0.9
    again = (effects @ large.T * (1 + 0.3 * rng.standard_normal((6, 40)))).T
    assert 0.9 < covered(found, fitted, large, again)[0].mean() < 0.995


def test_sets_of_like_units_have_a_quantile_of_their_own_where_there_are_eight(monkeypatch):
    """Errors of blocks are ten times those of other sets."""
    rng, units = np.random.default_rng(0), 80
    blocks, features = np.kron(np.eye(10), np.ones(8)), np.kron(np.eye(10), np.ones((8, 1)))
    x = np.concatenate([blocks, sets_of(30, units, 0)])
    fitted, size = Made(np.zeros((6, units))), np.sqrt(x.sum(1))[:, None]
    y = size * rng.standard_normal((40, 6)) * np.where(np.arange(40) < 10, 10, 1)[:, None]
    for n in (9, 3):
        rows = np.r_[:n, 10:26]
        others, alike = calibrate(held(x[rows], y[rows], features=features), fitted).quantiles
        with monkeypatch.context() as patched:
            patched.setattr("leaveout.deletion.calibration.LEAST_GROUP", 99)
            shared = calibrate(held(x[rows], y[rows], features=features), fitted).quantiles
        assert shared[0] == shared[1] > others
        assert (alike > max(2 * others, shared[1])) if n == 9 else (alike == shared[1])


def test_a_set_that_was_measured_is_known(recipe, run):
    """Also where errors grow with the effect: what was held out and what was retrained since has no error to speak of."""
    ids = list(recipe.ids)
    run.measure(retrain=24, heldout=8, queries=QUERIES, settings=FAST)
    others = [ids[:3], ids[4:9], ids[10:16], ids[18:20]]
    first = run.predict(QUERIES, others, meaning="same-run")
    assert ((first.factor > 0) & np.isfinite(first.factor)).all()
    run.measure(without=others[:2], queries=QUERIES, settings=FAST)
    found = run.verify(QUERIES, others)
    assert (found.std[:, :2] < 0.3 * first.std[:, :2]).all() and found.inside.mean() > 0.8
    asked = as_queries(QUERIES)
    held_out = run.bank.measurements(asked).heldout
    before = run.bank.fit(asked, EstimatorSettings())[1]
    sets = [[ids[i] for i in np.flatnonzero(row)] for row in held_out.x]
    run.measure(without=sets, queries=QUERIES, settings=FAST)
    after = run.bank.fit(asked, EstimatorSettings())[1]
    assert before.sets == after.sets == 8 and before.quantiles == after.quantiles


def test_an_exact_first_order_alone_knows_its_error_and_is_called_untested(recipe, run, monkeypatch):
    ids = list(recipe.ids)
    sets = [ids[i : i + n] for i, n in ((0, 3), (2, 6), (5, 8), (8, 4), (11, 2), (14, 8), (16, 1), (3, 7))]
    run.measure(gradient=True, queries=QUERIES, settings=FAST)
    found = run.verify(QUERIES, sets)
    assert UNTESTED in found.table().notes
    monkeypatch.setattr("leaveout.deletion.run.FIRST_ORDER_ERROR", 0.0)
    bare = run.predict(QUERIES, sets)
    assert np.allclose(found.std, np.hypot(bare.std, 0.25 * np.abs(found.effect)), rtol=1e-6)
    run.measure_vectors()
    told = run.bank.first_order_error(np.array([[i in s for i in ids] for s in sets], float))
    assert np.allclose(run.predict(QUERIES, sets).std, np.hypot(bare.std, told * np.abs(found.effect)), rtol=1e-6)
    run.measure(retrain=10, heldout=4, queries=QUERIES, settings=FAST)
    assert UNTESTED not in run.predict(QUERIES, [ids[:3]]).table().notes
