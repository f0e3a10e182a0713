"""The posterior against draws from its own prior, made without its code, and against exact solutions."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from leaveout.deletion import directions
from leaveout.deletion.estimators import EstimatorSettings, fit
from leaveout.deletion.kernels import FewUnits, ManyUnits, similar_units
from leaveout.deletion.measurements import JetBlock, Measurements, Retrainings
from leaveout.deletion.posterior import NUGGET, Posterior, _covariance, _gram, _Rows, _rows_of, expected_error
from leaveout.errors import UnsupportedError
from leaveout.training.reverse.updates import UnitVectors, influence

UNITS = 5


def draw(rng, kernel_scales, sizes, draws):
    """Random polynomials whose order-r parts have the covariance of FewUnits, from independent coefficients.

    e_r(g x y) = sum over subsets of products: independent coefficients per subset, with variance scale * prod g.
    """
    first, second, third, squares = kernel_scales
    g = sizes / sizes.mean()
    linear = rng.standard_normal((draws, UNITS)) * np.sqrt(first * g)
    pairs = list(itertools.combinations(range(UNITS), 2))
    triples = list(itertools.combinations(range(UNITS), 3))
    two = rng.standard_normal((draws, len(pairs))) * np.sqrt([second * g[i] * g[j] for i, j in pairs])
    own = rng.standard_normal((draws, UNITS)) * np.sqrt(squares) * g
    three = rng.standard_normal((draws, len(triples))) * np.sqrt([third * g[i] * g[j] * g[k] for i, j, k in triples])
    cubes = rng.standard_normal((draws, UNITS)) * squares * g**1.5

    def orders(x):
        return [
            linear @ x,
            two @ np.array([x[i] * x[j] for i, j in pairs]) + own @ x**2,
            three @ np.array([x[i] * x[j] * x[k] for i, j, k in triples]) + cubes @ x**3,
        ]

    return orders


def test_gram_is_the_covariance_of_measured_numbers():
    """Every kind of entry - real, imaginary, mixed, each order, retrainings - against 40,000 random functions."""
    rng = np.random.default_rng(0)
    sizes = np.array([1.0, 2.0, 1.0, 3.0, 1.0])
    scales = (1.0, 0.5, 0.3, 0.4)
    kernel = FewUnits(sizes, second=0.5, third=0.3, fourth=0.0, squares=0.4)
    psi = directions.complex_uniform(0, 3, UNITS, 1) * 2
    x = np.array([[1.0, 0, 1, 0, 1], [0, 1, 1, 0.5, 0]])
    orders = draw(rng, scales, sizes, 40_000)
    measured = []
    for r in range(3):
        measured += [orders(p)[r].real for p in psi] + [orders(p)[r].imag for p in psi]
    # The fourth order of the kernel has only its small fourth powers; leave it out of the retrainings' sum.
    measured += [sum(orders(row)) for row in x]
    found = np.cov(np.array(measured))
    rows = [*list(_rows_of(JetBlock(psi, np.zeros((3, 3, 1), complex)))), _Rows(x, 0)]
    wanted = _gram(kernel, rows)
    fourth = 0.4**3 * ((sizes / sizes.mean() * x) ** 4) @ (x**4).T
    wanted[-2:, -2:] -= fourth
    size = np.sqrt(np.outer(np.diag(wanted), np.diag(wanted)))
    assert np.abs(found - wanted).max() / size.max() < 0.03
    assert (np.abs(found - wanted) / size).max() < 0.05


def many(features=None, **changes):
    units = 40
    return ManyUnits(*similar_units(features, units), **changes)


@pytest.mark.parametrize("kernel", [many(), FewUnits(np.ones(40))], ids=["many", "few"])
def test_diagonal_is_that_of_the_orders(kernel):
    x = np.random.default_rng(0).random((4, 40))
    assert np.allclose(kernel.diagonal(x), [sum(o[i, i] for o in kernel.orders(x, x)) for i in range(4)])


def test_similar_units_share_their_effects():
    rng = np.random.default_rng(0)
    groups = np.repeat(rng.standard_normal((4, 30)), 10, 0) + 0.1 * rng.standard_normal((40, 30))
    linear = many(groups).orders(np.eye(40), np.eye(40))[0]
    assert np.diag(linear).mean() == pytest.approx(1, rel=1e-6)
    assert linear[0, 1:10].mean() > 0.5 > 0.2 > np.abs(linear[0, 10:]).mean()


def problem(seed=0, units=40, jets=0, runs=60, noise=0.0, queries=6):
    """Functions drawn from the prior of `many`, by dense algebra, and what was measured of them."""
    rng = np.random.default_rng(seed)
    kernel = many()
    x = np.concatenate([directions.random_sets(0, runs, units, seed), directions.random_sets(0, 80, units, seed + 7)])
    x = np.unique(x, axis=0)
    rng.shuffle(x)
    psi = directions.complex_uniform(0, jets, units, seed)
    rows = list(_rows_of(JetBlock(psi, np.zeros((1, jets, 1), complex)))) if jets else []
    cov = _gram(kernel, [*rows, _Rows(x, 0)])
    values = (
        np.linalg.cholesky(cov + 1e-9 * np.eye(len(cov)))
        @ rng.standard_normal((len(cov), queries))
        * [1, 2, 1, 1, 5, 1]
    )
    c = (values[:jets] + 1j * values[jets : 2 * jets])[None]
    y = values[2 * jets :]
    measured = y[:runs] + noise * rng.standard_normal((runs, queries))
    blocks = (JetBlock(psi, c),) if jets else ()
    data = Measurements(np.zeros(queries), np.ones(units), jets=blocks, retrainings=Retrainings(x[:runs], measured))
    return data, kernel, x[runs:], y[runs:]


@pytest.mark.parametrize("jets", [0, 8])
def test_intervals_cover_draws_from_the_prior(jets):
    inside, smaller = [], []
    for seed in range(8):
        data, kernel, x, y = problem(seed, jets=jets, runs=30)
        mean, std = Posterior(data, kernel).predict(x)
        inside.append((np.abs(mean.T - y) < 1.96 * std.T).mean())
        smaller.append(np.abs(mean.T - y).mean() / np.abs(y).mean())
    assert 0.9 < np.mean(inside) < 0.98
    assert np.mean(smaller) < 0.8


def test_jets_add_to_what_retrainings_know():
    def error(jets):
        found = []
        for seed in range(4):
            data, kernel, x, y = problem(seed, jets=jets, runs=20)
            found.append(np.abs(Posterior(data, kernel).predict(x)[0].T - y).mean())
        return np.mean(found)

    assert error(16) < 0.8 * error(0)


def test_noise_of_retrainings_is_not_fitted():
    inside, better = [], []
    for seed in range(4):
        data, kernel, x, y = problem(seed, runs=60, noise=1.0)
        blind = Posterior(data, kernel).predict(x)[0]
        mean, std = Posterior(Measurements(**{**vars(data), "noise": np.full(6, 1.0)}), kernel).predict(x)
        inside.append((np.abs(mean.T - y) < 1.96 * std.T)[:, 0].mean())
        better.append(np.abs(mean.T - y)[:, 0].mean() / np.abs(blind.T - y)[:, 0].mean())
    assert np.mean(better) < 0.9 and 0.8 < np.mean(inside) <= 1


def test_scores_are_scaled_by_the_data():
    data, kernel, x, y = problem(2)
    slope = np.random.default_rng(0).standard_normal((6, 40)) * 10
    moved = Retrainings(data.retrainings.x, data.retrainings.y + data.retrainings.x @ slope.T)
    found = Posterior(Measurements(**{**vars(data), "retrainings": moved, "scores": slope / 7}), kernel)
    assert found.beta == pytest.approx(7, rel=0.05)
    assert np.abs(found.predict(x)[0].T - y - x @ slope.T).mean() < 2 * np.abs(y).mean()


def test_a_known_gradient_leaves_only_the_curvature_open():
    units = 40
    gradient = np.random.default_rng(0).standard_normal((2, units))
    x = directions.random_sets(0, 60, units, 3)
    y = x @ gradient.T + 0.01 * (x.sum(1, keepdims=True) ** 2)
    data = Measurements(np.zeros(2), np.ones(units), retrainings=Retrainings(x[:30], y[:30]), gradient=gradient)
    mean, _ = Posterior(data).predict(x[30:])
    without, _ = Posterior(Measurements(**{**vars(data), "gradient": None})).predict(x[30:])
    assert np.abs(mean.T - y[30:]).mean() < 0.25 * np.abs(without.T - y[30:]).mean()
    assert Posterior(data).beta == 1.0


def test_retrainings_that_mislead_are_believed_as_far_as_held_out_ones_say():
    """Far weightings of a run that is wild there, beside a first order that foretells deletions well."""
    units, rng = 80, np.random.default_rng(0)
    gradient, features = rng.standard_normal((3, units)), rng.standard_normal((units, 5))
    far = directions.along(0, 60, np.linalg.qr(rng.standard_normal((units, units)))[0].T)
    near = directions.random_sets(0, 36, units, 3)
    wild = 30 * rng.standard_normal((60, 3))
    data = Measurements(
        np.zeros(3), np.ones(units), retrainings=Retrainings(far, far @ gradient.T + wild),
        heldout=Retrainings(near[:12], near[:12] @ gradient.T), gradient=gradient, features=features,
    )  # fmt: skip

    def wrong(fitted, x):
        return np.abs(fitted.predict(x)[0] - gradient @ x.T).mean()

    found, _ = fit(data, EstimatorSettings())
    plain = Posterior(data)
    assert found.misfit[0] > 0 and wrong(found, near[12:]) < 0.1 * wrong(plain, near[12:])
    measured = far @ gradient.T + wild
    assert np.allclose(found.predict(far)[0].T, measured, rtol=0.02, atol=0.5)  # what was retrained is as it was

    def bent(x):
        return Retrainings(x, x @ gradient.T + 0.05 * x.sum(1, keepdims=True) ** 2)

    calm = replace(data, retrainings=bent(near[12:]), heldout=bent(near[:12]))
    assert fit(calm, EstimatorSettings())[0].misfit[0] <= 1


def classes(units=60, of=10):
    """Random sets, and whole classes without which a query is lost: [sets, units], [classes, units]."""
    return directions.random_sets(0, 90, units, 3), np.kron(np.eye(units // of), np.ones(of))


def with_classes(x, whole, slope):
    """Effects [sets, queries] of a sum over units, and of a class that is gone as a whole."""
    gone = (x @ whole.T == whole.sum(1)).astype(float)
    return x @ slope.T + 200 * gone[:, : len(slope)]


def test_sets_that_follow_rules_of_their_own_do_not_mislead_about_others():
    """A class that is gone takes a query with it; a random set of rows does nothing of the kind."""
    x, whole = classes()
    slope = np.random.default_rng(0).standard_normal((3, x.shape[1]))
    taught, held = np.concatenate([x[:60], whole[:4]]), np.concatenate([x[60:74], whole[4:]])
    data = Measurements(
        np.zeros(3), np.ones(x.shape[1]), retrainings=Retrainings(taught, with_classes(taught, whole, slope)),
        heldout=Retrainings(held, with_classes(held, whole, slope)),
    )  # fmt: skip
    found, _ = fit(data, EstimatorSettings())
    asked = x[74:]
    wrong = [np.abs(fitted.predict(asked)[0] - slope @ asked.T).mean() for fitted in (found, Posterior(data))]
    assert found.misfit[60:63].min() > 10 * np.median(found.misfit[:60])
    assert wrong[0] < 0.5 * wrong[1]
    union = np.array([whole[0] + whole[1]])
    assert np.allclose(found.predict(union)[0][:, 0], with_classes(union, whole, slope)[0], rtol=0.1, atol=10)
    assert np.allclose(found.predict(whole)[0].T, with_classes(whole, whole, slope), rtol=0.01, atol=2)


def test_a_misfit_is_a_bend_of_its_own_for_each_retrained_set():
    """The same posterior by regression on one more number for each retrained set, times its power of the share."""
    data, kernel, x, _ = problem(0, runs=8)
    much, runs = np.linspace(0.5, 4, 8), data.retrainings

    def shares(sets):
        return np.array([[min(1, (a @ b) / (b @ b)) ** 8 for b in runs.x] for a in sets])

    first = _covariance(kernel, _Rows(runs.x, 0), _Rows(runs.x, 0))
    gram = first + shares(runs.x) @ np.diag(much) @ shares(runs.x).T
    gram += np.eye(8) * (NUGGET + 1e-10 * np.trace(first) / 8)
    cross = _covariance(kernel, _Rows(runs.x, 0), _Rows(x, 0)) + shares(runs.x) @ np.diag(much) @ shares(x).T
    prior = kernel.diagonal(x) + np.square(shares(x)) @ much
    found = Posterior(data, kernel, misfit=much)
    mean, std = found.predict_unbent(x)
    assert np.allclose(mean, runs.y.T @ np.linalg.solve(gram, cross), rtol=1e-6, atol=1e-8)
    left = prior - (cross * np.linalg.solve(gram, cross)).sum(0)
    assert np.allclose(std**2 / found.tau[:, None], left, rtol=1e-5, atol=1e-8)


def test_what_is_left_out_is_foretold_by_all_others():
    data, kernel, _, _ = problem(5)
    whole, runs = Posterior(data, kernel), data.retrainings
    others = np.arange(len(runs)) != len(runs) - 1
    less = Posterior(replace(data, retrainings=runs.take(others)), kernel)
    wrong = runs.y[-1] - less.predict(runs.x[-1:])[0][:, 0]
    assert np.allclose(whole.left_out(1)[:, 0], wrong, rtol=1e-5, atol=1e-7)


def test_held_out_sets_that_mislead_spoil_no_others():
    """Whole groups that bend as no kernel foresees are learned as they are, and say nothing of random sets."""
    units, rng = 80, np.random.default_rng(0)
    gradient, features = rng.standard_normal((3, units)), rng.standard_normal((units, 5))
    x, groups = directions.random_sets(0, 60, units, 3), np.kron(np.eye(8), np.ones(10))
    strong = groups @ gradient.T + 200 * rng.standard_normal((8, 3))
    held = Retrainings(np.concatenate([x[:20], groups]), np.concatenate([x[:20] @ gradient.T, strong]))
    data = Measurements(
        np.zeros(3), np.ones(units), retrainings=Retrainings(x[20:40], x[20:40] @ gradient.T), heldout=held,
        gradient=gradient, features=features,
    )  # fmt: skip
    found, _ = fit(data, EstimatorSettings())
    plain = Posterior(data.with_heldout())

    def wrong(fitted):
        return np.abs(fitted.predict(x[40:])[0] - gradient @ x[40:].T).mean()

    assert wrong(found) < 0.1 * wrong(plain)
    assert np.allclose(found.predict(groups)[0].T, strong, rtol=0.02, atol=0.5)


def test_a_known_gradient_alone_foretells_its_own_error():
    """Effects with squares of the prior's size beside the known first order; no retraining at all."""
    units, queries = 40, 5
    rng = np.random.default_rng(0)
    scale = np.array([1, 2, 1, 5, 0.1])[:, None]
    gradient = scale * rng.standard_normal((queries, units))
    squares = scale * np.sqrt(0.2) * rng.standard_normal((queries, units))
    x = directions.random_sets(0, 200, units, 3)
    data = Measurements(np.zeros(queries), np.ones(units), gradient=gradient)
    mean, std = Posterior(data, ManyUnits(*similar_units(None, units), second=0, third=0, first=1e-3)).predict(x)
    assert np.allclose(mean, gradient @ x.T)
    assert 0.9 < (np.abs(squares @ x.T) < 1.96 * std).mean() < 0.995


def test_expected_error_needs_no_values_and_agrees_with_the_posterior(monkeypatch):
    monkeypatch.setattr("leaveout.deletion.posterior.CONCENTRATED", 0.0)
    data, kernel, x, _ = problem(3)
    std = Posterior(data, kernel).predict(x)[1][0]
    found = expected_error(kernel, [], data.retrainings.x, x)
    assert np.allclose(found * np.sqrt(kernel.diagonal(x)), std / np.sqrt(Posterior(data, kernel).tau[0]), rtol=1e-3)
    assert (expected_error(kernel, [], np.zeros((0, 40)), x) == 1).all()


def test_removing_all_that_helps_a_query_is_called_uncertain():
    """Two queries: three units carry all of one's effect, forty units that of the other."""
    units = 40
    effects = np.zeros((2, units))
    effects[0, :3], effects[1] = 1.0, 1.0
    x = directions.random_sets(0, 120, units, 3)
    x[:, :3] *= (np.arange(120) % 4 == 0)[:, None]
    data = Measurements(np.zeros(2), np.ones(units), retrainings=Retrainings(x, x @ effects.T), gradient=effects)
    sets = np.zeros((2, units))
    sets[0, :3], sets[1, 20:23] = 1, 1
    mean, std = Posterior(data, many(first=1e-3)).predict(sets)
    assert std[0, 0] > 1.0 and std[0, 0] > 10 * std[1, 0]  # three of the three
    assert std[0, 1] < 0.2 and mean[0, 0] == pytest.approx(3, rel=0.1)  # none of the three


def test_nothing_measured_is_refused():
    with pytest.raises(UnsupportedError, match="measure"):
        Posterior(Measurements(np.zeros(1), np.ones(4)))


@pytest.mark.parametrize("units", [5, 40])
def test_influence_is_that_of_the_damped_fisher_matrix_for_few_units_and_for_many(units):
    rng = np.random.default_rng(0)
    final, asked = rng.standard_normal((units, 12)), rng.standard_normal((3, 12))
    zeros = np.zeros(units)
    fisher = sum(np.outer(row, row) for row in final)
    inverse = np.linalg.inv(fisher + 0.7 * np.trace(fisher) / 12 * np.eye(12))
    found = influence(UnitVectors(final, final, {}, zeros, zeros), asked, 0.7)
    assert np.allclose(found, [[q @ inverse @ row for row in final] for q in asked], rtol=1e-9)
