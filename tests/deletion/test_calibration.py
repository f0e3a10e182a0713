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
    assert one.numbers == many.numbers and one.quantile == pytest.approx(many.quantile, rel=0.01)


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
    assert (before.numbers, before.quantile) == (after.numbers, after.quantile)
    assert np.allclose(covered(before, one, x[10:], y[10:])[1], covered(after, two, x[10:], y[10:])[1])


def test_a_set_that_was_measured_is_known(recipe, run):
    """Also where errors grow with the effect: what was held out and what was retrained since has no error to speak of."""
    ids = list(recipe.ids)
    run.measure(retrain=24, heldout=8, queries=QUERIES, settings=FAST)
    others = [ids[:3], ids[4:9], ids[10:16], ids[18:20]]
    first = run.predict(QUERIES, others, meaning="same-run")
    assert ((first.factor > 0) & np.isfinite(first.factor)).all()
    run.measure(without=others[:2], queries=QUERIES, settings=FAST)
    found = run.verify(QUERIES, others)
    assert (found.std[:, :2] < 0.2 * first.std[:, :2]).all() and found.inside.mean() > 0.8
    asked = as_queries(QUERIES)
    held_out = run.bank.measurements(asked).heldout
    before = run.bank.fit(asked, EstimatorSettings())[1]
    sets = [[ids[i] for i in np.flatnonzero(row)] for row in held_out.x]
    run.measure(without=sets, queries=QUERIES, settings=FAST)
    after = run.bank.fit(asked, EstimatorSettings())[1]
    assert before.sets == after.sets == 8 and before.quantile == after.quantile
