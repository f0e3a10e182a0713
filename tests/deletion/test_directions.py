"""Designs: what they promise, and that they do not depend on how many are asked for."""

from __future__ import annotations

import numpy as np
import pytest

from leaveout.deletion import directions


@pytest.mark.parametrize(
    "make",
    [
        lambda a, b: directions.complex_uniform(a, b, 30, 4),
        lambda a, b: directions.real_orthogonal(a, b, 30, 4),
        lambda a, b: directions.random_sets(a, b, 30, 4),
        lambda a, b: directions.random_sets(a, b, 30, 4, (2, 5)),
        lambda a, b: directions.subsets(a, b, 30, 4),
        lambda a, b: directions.singles(a, b, 30),
        lambda a, b: directions.pairs(a, b, 30),
    ],
)
def test_rows_do_not_depend_on_the_length(make):
    assert np.allclose(make(0, 20)[7:12], make(7, 12)) and np.allclose(make(0, 9), make(0, 20)[:9])
    assert len(np.unique(make(0, 12), axis=0)) == 12


def test_complex_directions_are_uniform_on_the_sphere():
    psi = directions.complex_uniform(0, 6000, 5)
    assert np.allclose(np.linalg.norm(psi, axis=1), 1)
    second = psi.conj().T @ psi / len(psi)
    assert np.abs(second - np.eye(5) / 5).max() < 0.01
    assert np.abs(psi.T @ psi / len(psi)).max() < 0.01  # no relation between real and imaginary parts


def test_real_directions_are_orthonormal_and_end():
    rows = directions.real_orthogonal(0, 12, 12)
    assert np.allclose(rows @ rows.T, np.eye(12))
    with pytest.raises(ValueError, match="only 12"):
        directions.real_orthogonal(0, 13, 12)


def test_random_sets_have_the_sizes_asked():
    assert directions.random_sets(0, 6, 30, 0, (2, 5)).sum(1).tolist() == [2, 5, 2, 5, 2, 5]
    sizes = directions.random_sets(0, 400, 1000, 0).sum(1)
    assert sizes.min() == 1 and 200 < sizes.max() <= 300 and 10 < np.median(sizes) < 30
    assert directions.random_sets(0, 1, 3, 0, (9,)).sum() == 2  # never everything


def test_mixture_for_few_and_many_units():
    few = directions.mixture(30, 10, sizes=(3,))
    assert np.array_equal(few[:10], np.eye(10)) and (few[10:].sum(1) == 3).all()
    vectors = np.linalg.qr(np.random.default_rng(0).standard_normal((100, 100)))[0].T
    many = directions.mixture(40, 100, vectors=vectors)
    whole = np.isin(many, (0, 1)).all(1)
    assert len(many) == 40 and (~whole).sum() == 28
    assert np.allclose(np.linalg.norm(many[0]), 4)
    near = directions.mixture(120, 100, vectors=vectors)
    assert np.array_equal(near[:100], np.eye(100)) and len(near) == 120
    beside = directions.mixture(40, 100, vectors=vectors, exact=True)  # a first order needs no weightings
    assert len(beside) == 40 and np.isin(beside, (0, 1)).all() and (beside.sum(1) == 10).sum() >= 6


def test_design_names_are_checked():
    with pytest.raises(ValueError, match="more than 64"):
        directions.design("along", 3, 10)
    assert len(directions.design("pairs", 99, 4)) == 6
