"""Which sets are held out: of all kinds, new ones, and those of a query's own top rows chosen by what is fitted."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from leaveout.corpus import Corpus
from leaveout.deletion import directions
from leaveout.deletion.heldout import PATTERN, HeldOut, kinds_of, sources_of
from leaveout.deletion.run import TrainingRun
from leaveout.training.recipe import OptimizerSettings, Recipe

from .conftest import FAST, NAMES, QUERIES


def drawn(n, units, sizes=(), fitted=None, **known):
    fitted = np.zeros((0, units)) if fitted is None else fitted
    drawer = HeldOut(units, 0, sizes, fitted, known.get("features"), known.get("sources", np.zeros((0, units))))
    kinds = known.get("kinds", ["random"] * n)
    return drawer.draw(kinds, range(n), known.get("effects"))


def vectors(found):
    return np.array([row for _, row in found.values()])


def test_random_sets_have_all_sizes_in_turn_from_the_largest_on():
    """Wherever they stand among other kinds."""
    units = 60
    features = np.random.default_rng(0).standard_normal((units, 4))
    kinds = kinds_of(32, True, 0, False)
    found = drawn(32, units, (1, 3, 6, 12), kinds=kinds, features=features, effects=features.T)
    sizes = [int(row.sum()) for place, (kind, row) in sorted(found.items()) if kinds[place] == kind == "random"]
    assert sizes == [12, 6, 3, 1] * (len(sizes) // 4) + [12, 6, 3, 1][: len(sizes) % 4] and len(sizes) >= 8


def test_held_out_sets_differ_from_the_fitted_and_from_each_other():
    fitted = directions.mixture(30, 24)
    for sizes in ((), (2, 3)):
        found = vectors(drawn(16, 24, sizes, fitted))
        both = np.concatenate([np.unique(fitted, axis=0), found])
        assert found.shape == (16, 24) and len(np.unique(both, axis=0)) == len(both)
        assert not sizes or set(found.sum(1)) == {2.0, 3.0}
        assert np.array_equal(vectors(drawn(5, 24, sizes, fitted)), found[:5])
    assert not drawn(9, 4, (1,), np.eye(4))
    assert len(drawn(99, 4, (), np.eye(4))) == 10  # pairs and triples


def test_kinds_for_which_something_is_missing_are_others():
    assert kinds_of(20, True, 9, True) == [*PATTERN, *PATTERN[:4]]
    few = kinds_of(15, True, 6, True)
    assert few[:6] == ["source"] * 6 and set(few[6:]) == set(PATTERN) - {"source"}
    assert set(kinds_of(16, False, 0, False)) == {"single", "random"}
    assert {"block", "top", "source"} <= set(kinds_of(6, True, 3, True))
    assert kinds_of(16, True, 0, True).count("block") == 6 and "union" not in kinds_of(16, True, 2, True)


def test_blocks_are_alike_and_top_rows_are_those_that_help():
    rng = np.random.default_rng(0)
    groups = np.repeat(np.eye(4), 10, 0) + 0.01 * rng.standard_normal((40, 4))
    effects = rng.standard_normal((1, 40))
    sources = np.kron(np.eye(2), np.ones(20))
    kinds = ["block", "top", "source", "single"] * 2
    found = drawn(8, 40, kinds=kinds, features=groups, effects=effects, sources=sources)
    for kind, row in found.values():
        members = np.flatnonzero(row)
        if kind == "block":
            assert len(members) >= 2 and len(set(members // 10)) == 1
        if kind == "top":
            assert set(members) == set(np.argsort(-effects[0])[: len(members)]) and len(members) <= 5
        if kind == "source":
            assert len(set(members // 20)) == 1 and len(members) == 20
        if kind == "single":
            assert len(members) == 1
    assert [kind for kind, _ in found.values()] == kinds


def test_sources_are_held_out_whole_halved_and_two_by_two():
    sources = np.kron(np.eye(3), np.ones(10))
    found = drawn(9, 30, kinds=["source", "part", "union"] * 3, sources=sources)
    sizes = {"source": (10, 1), "part": (5, 1), "union": (20, 2)}
    for kind, row in found.values():
        assert (row.sum(), ((sources @ row) > 0).sum()) == sizes[kind]
    assert len(np.unique(vectors(found), axis=0)) == 9
    every = np.kron(np.eye(10), np.ones(3))
    assert len(np.unique(vectors(drawn(10, 30, kinds=["source"] * 10, sources=every)), axis=0)) == 10
    halves = np.kron(np.eye(2), np.ones(15))
    only = drawn(3, 30, kinds=["union"] * 3, sources=halves)
    assert all(kind == "random" for kind, _ in only.values())  # both together are all units


def test_units_without_vectors_are_alike_by_their_effects():
    effects = np.kron(np.array([[1.0, -1.0, 0.3], [0.2, 1.0, -1.0]]), np.ones(8))
    found = drawn(4, 24, kinds=["block"] * 4, effects=effects)
    for kind, row in found.values():
        assert kind == "block" and len(set(np.flatnonzero(row) // 8)) == 1


def test_sources_are_the_values_of_a_field_that_units_share():
    rows = [{"id": str(i), "text": f"name{i}", "from": "ab"[i % 2], "number": i} for i in range(8)]
    found = sources_of(Recipe.microgpt(list(Corpus.open(rows)), n=8))
    assert sorted(found.sum(1)) == [4.0, 4.0] and (found.sum(0) == 1).all()
    examples = tuple((torch.zeros(2), label) for label in (0, 0, 1, 1, 2, 2, 2, 2))
    labelled = Recipe("classifier", examples, model={"hidden": [2]}, optimizer=OptimizerSettings("sgd", 0.1))
    assert sorted(sources_of(labelled).sum(1)) == [2.0, 2.0, 4.0]
    assert not len(sources_of(labelled.grouped([str(i) for i in range(4)] * 2)))  # of units of two classes
    assert not len(sources_of(Recipe.microgpt(NAMES, n=24)))


@pytest.fixture
def seventy(tmp_path):
    names = [a + b + c for a in ("an", "bo", "ci", "du", "el", "fa") for b in "aeiou" for c in ("n", "r", "t")][:70]
    return TrainingRun.train(Recipe.microgpt(names, n=70), tmp_path / "run")


def test_a_number_of_sets_is_of_all_kinds_and_is_measured_once(seventy):
    seventy.measure(retrain=12, heldout=8, queries=QUERIES, settings=FAST)
    held = seventy.bank.measurements(QUERIES).heldout
    assert sorted(held.kinds) == sorted(["block", "random", "block", "top", "block", "random", "single", "top"])
    before = len(seventy.bank)
    seventy.measure(retrain=12, heldout=8, queries=QUERIES, settings=FAST)
    assert len(seventy.bank) == before
    assert seventy.bank.info()["measurements"]["retraining, top, heldout"] == 2
