"""Estimators on polynomials whose coefficients are known: no training, no shared code."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from leaveout.deletion import directions
from leaveout.deletion.estimators import (
    Datamodels,
    FirstOrder,
    LeastSquares,
    LeaveOneOut,
    Mean,
    MedianOfMeans,
    Pairwise,
)
from leaveout.deletion.measurements import JetBlock, Measurements, Retrainings
from leaveout.errors import UnsupportedError

UNITS, QUERIES = 6, 2


class Polynomial:
    """f(x) = sum over monomials of coefficient * product of x_i: evaluated term by term, in plain Python."""

    def __init__(self, rng: np.random.Generator, orders: tuple[int, ...] = (1, 2, 3), units: int = UNITS) -> None:
        self.terms = {
            r: [(m, rng.standard_normal(QUERIES)) for m in itertools.combinations_with_replacement(range(units), r)]
            for r in orders
        }

    def part(self, r: int, x: np.ndarray) -> np.ndarray:
        return sum((c * np.prod([x[i] for i in m]) for m, c in self.terms.get(r, [])), np.zeros(QUERIES, x.dtype))

    def __call__(self, x: np.ndarray) -> np.ndarray:
        return sum((self.part(r, x) for r in self.terms), np.zeros(QUERIES))

    def jets(self, psi: np.ndarray, degree: int, real: bool = False) -> JetBlock:
        c = np.array([[self.part(r, row) for row in psi] for r in range(1, degree + 1)])
        return JetBlock(psi.astype(complex), c.astype(complex), real)

    def runs(self, x: np.ndarray) -> Retrainings:
        return Retrainings(x, np.array([self(row) for row in x]))


@pytest.fixture
def f():
    return Polynomial(np.random.default_rng(0))


def known(units: int = UNITS, **what) -> Measurements:
    return Measurements(np.zeros(QUERIES), np.ones(units), **what)


def some_sets(n: int = 9, units: int = UNITS) -> np.ndarray:
    x = (np.random.default_rng(5).random((n, units)) < 0.5).astype(float)
    x[:, 0] = 1
    return x


def test_mean_is_unbiased_and_says_how_far_it_is_off(f):
    psi = directions.complex_uniform(0, 4000, UNITS, 3)
    data, x = known(jets=(f.jets(psi, 3),)), some_sets()
    for degree in (1, 2, 3):
        wanted = np.array([sum(f.part(r, row) for r in range(1, degree + 1)) for row in x]).T
        mean, std = Mean(data, degree).predict(x)
        z = (mean - wanted) / std
        assert 0.5 < np.sqrt((z**2).mean()) < 1.7 and np.abs(z).max() < 4.5
        assert (std < 0.2 * np.abs(wanted).max()).all() or degree == 3


def test_standard_error_of_the_mean_falls_with_the_root_of_the_directions(f):
    x = some_sets()
    few = Mean(known(jets=(f.jets(directions.complex_uniform(0, 200, UNITS), 1),))).predict(x)[1]
    many = Mean(known(jets=(f.jets(directions.complex_uniform(0, 3200, UNITS), 1),))).predict(x)[1]
    assert (few / many).mean() == pytest.approx(4, rel=0.15)


def test_median_of_means_says_how_far_it_is_off(f):
    """The spread of 60 independent sketches against the standard error that each of them states."""
    x, found = some_sets(), []
    for seed in range(60):
        data = known(jets=(f.jets(directions.complex_uniform(0, 160, UNITS, seed), 1),))
        found.append(MedianOfMeans(data, groups=16).predict(x))
    spread, stated = np.std([m for m, _ in found], 0), np.mean([s for _, s in found], 0)
    assert (spread / stated).mean() == pytest.approx(1, abs=0.15)


def test_median_of_means_survives_a_broken_direction(f):
    psi = directions.complex_uniform(0, 800, UNITS, 1)
    block = f.jets(psi, 1)
    block.c[0, 17] = 1e9
    x = some_sets()
    wanted = np.array([f.part(1, row) for row in x]).T
    mean, std = MedianOfMeans(known(jets=(block,)), groups=8).predict(x)
    assert np.abs(mean - wanted).max() < 1.5 and np.isfinite(std).all()
    assert np.abs(Mean(known(jets=(block,))).predict(x)[0] - wanted).max() > 1e4


@pytest.mark.parametrize("degree", [1, 2, 3])
def test_least_squares_is_exact_once_the_equations_suffice(f, degree):
    enough = -(-math.comb(UNITS + degree - 1, degree) // 2)
    x = some_sets()
    wanted = np.array([sum(f.part(r, row) for r in range(1, degree + 1)) for row in x]).T
    psi = directions.complex_uniform(0, enough + 2, UNITS, 2)
    nothing_above = Retrainings(x, wanted.T)
    mean, std = LeastSquares(known(jets=(f.jets(psi, degree),), retrainings=nothing_above), degree).predict(x)
    assert np.abs(mean - wanted).max() < 1e-6 and std.max() < 1e-2
    few = known(jets=(f.jets(psi[: enough - 1], degree),), retrainings=nothing_above)
    short, unsure = LeastSquares(few, degree).predict(x)
    assert np.abs(short - wanted).max() > 1e-2 and unsure.max() > 0.05


def test_least_squares_does_not_claim_to_know_the_orders_above(f):
    """Without retrainings it cannot say how large they are; with some, its intervals cover the others."""
    psi, x = directions.complex_uniform(0, UNITS + 2, UNITS, 2), some_sets(40)
    whole = np.array([sum(f.part(r, row) for r in (1, 2, 3)) for row in x])
    alone = known(jets=(f.jets(psi, 1),))
    mean, std = LeastSquares(alone, 1).predict(np.vstack([x, np.zeros(UNITS)]))
    assert np.isinf(std[:, :-1]).all() and (std[:, -1] == 0).all() and np.isfinite(mean).all()
    held = known(jets=(f.jets(psi, 1),), retrainings=Retrainings(x[:20], whole[:20]))
    mean, std = LeastSquares(held, 1).predict(x[20:])
    assert (np.abs(mean - whole[20:].T) < 1.96 * std).mean() > 0.8


def test_least_squares_takes_real_directions_at_half_the_numbers(f):
    psi, x = directions.real_orthogonal(0, UNITS, UNITS), some_sets()
    mean, _ = LeastSquares(known(jets=(f.jets(psi, 1, real=True),))).predict(x)
    assert np.abs(mean - np.array([f.part(1, row) for row in x]).T).max() < 1e-9


def test_least_squares_leaves_out_orders_it_cannot_see():
    f = Polynomial(np.random.default_rng(1), units=40)
    psi = directions.complex_uniform(0, 24, 40)
    one = LeastSquares(known(40, jets=(f.jets(psi, 2),)))
    assert np.allclose(
        one.predict(some_sets(4, 40))[0],
        LeastSquares(known(40, jets=(f.jets(psi, 2),)), 1).predict(some_sets(4, 40))[0],
    )


def test_leave_one_out_sums_are_exact_for_a_linear_function():
    f, x = Polynomial(np.random.default_rng(2), (1,)), some_sets()
    mean, std = LeaveOneOut(known(retrainings=f.runs(np.eye(UNITS)))).predict(x)
    assert np.allclose(mean.T, f.runs(x).y) and np.isinf(std).all()


def test_leave_one_out_knows_its_error_from_other_retrainings(f):
    x = some_sets(40)
    both = f.runs(np.concatenate([np.eye(UNITS), x[:20]]))
    fitted = LeaveOneOut(known(retrainings=both))
    mean, std = fitted.predict(x[20:])
    covered = np.abs(mean.T - f.runs(x[20:]).y) < 1.96 * std.T
    assert 0.8 < covered.mean() <= 1 and np.isfinite(std).all()


def test_leave_one_out_names_what_is_missing(f):
    with pytest.raises(UnsupportedError, match=r"1 of these sets' units have none"):
        LeaveOneOut(known(retrainings=f.runs(np.eye(UNITS)[1:]))).predict(np.eye(UNITS)[:1])


def test_pairwise_is_exact_for_deletions_of_a_quadratic_function():
    f, x = Polynomial(np.random.default_rng(3), (1, 2)), some_sets()
    pairs = directions.pairs(0, 99, UNITS)
    assert len(pairs) == 15
    runs = f.runs(np.concatenate([np.eye(UNITS), pairs]))
    assert np.allclose(Pairwise(known(retrainings=runs)).predict(x)[0].T, f.runs(x).y)
    with pytest.raises(UnsupportedError, match="15 pairs"):
        Pairwise(known(retrainings=runs.take(range(20))))


def test_datamodels_recover_a_linear_function():
    f, x = Polynomial(np.random.default_rng(4), (1,)), some_sets()
    runs = f.runs(directions.subsets(0, 40, UNITS))
    mean, std = Datamodels(known(retrainings=runs)).predict(x)
    assert np.abs(mean.T - f.runs(x).y).max() < 1e-4 and (std > 0).all()


def test_first_order_is_the_gradient_and_asks_for_it(f):
    gradient = np.array([f.part(1, row) for row in np.eye(UNITS)]).T
    mean, std = FirstOrder(known(gradient=gradient)).predict(some_sets())
    assert np.allclose(mean.T, [f.part(1, row) for row in some_sets()]) and np.isinf(std).all()
    with pytest.raises(UnsupportedError, match="metagradient"):
        FirstOrder(known())


@pytest.mark.parametrize("estimator", [Mean, MedianOfMeans, LeastSquares])
def test_estimators_on_jets_ask_for_them(estimator):
    with pytest.raises(UnsupportedError, match="measure"):
        estimator(known()).predict(np.eye(UNITS))


def test_degrees_that_were_not_measured_are_refused(f):
    data = known(jets=(f.jets(directions.complex_uniform(0, 20, UNITS), 1),))
    with pytest.raises(UnsupportedError, match="degree 1"):
        Mean(data, 2).predict(some_sets())
    with pytest.raises(UnsupportedError, match="degree 1"):
        LeastSquares(data, 2)
