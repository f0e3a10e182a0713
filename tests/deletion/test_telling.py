"""Of sets that are too many to retrain, and of their halves, those are retrained that say most about all of them."""

from __future__ import annotations

import numpy as np
import pytest

from command import run_command
from leaveout.cli.deletion import _measure_command
from leaveout.deletion.directions import halved, random_sets
from leaveout.deletion.kernels import FewUnits
from leaveout.deletion.plan import Budget, Cost, Costs
from leaveout.deletion.posterior import MOST_SETS, NUGGET, telling
from leaveout.deletion.run import TrainingRun
from leaveout.deletion.sets import DeletionSets

from .conftest import FAST, QUERIES

KERNEL = FewUnits(np.ones(12))


def left_of(known, x):
    """Mean relative deviation of sets x after known retrainings, by the formula."""
    def covariance(a, b):
        return sum(KERNEL.orders(a, b))

    gram = covariance(known, known) + NUGGET * np.eye(len(known))
    cross, own = covariance(known, x), np.diag(covariance(x, x))
    return np.sqrt(np.maximum(1 - np.einsum("ks,ks->s", cross, np.linalg.inv(gram) @ cross) / own, 0)).mean()


def test_each_choice_leaves_least():
    x = np.concatenate([random_sets(0, 5, 12, 1, (2, 5)), np.eye(12)[:1], random_sets(0, 1, 12, 1, (2, 5))])
    tried, found, x = np.concatenate([x, halved(x)]), telling(x, 9, KERNEL), np.unique(x, axis=0)
    assert len(x) == 6
    assert len(found) == len(np.unique(found, axis=0)) == 9
    for n in range(1, 9):
        others = [row for row in tried if not (row == found[: n - 1]).all(1).any()]
        least = min(left_of(np.concatenate([found[: n - 1], row[None]]), x) for row in others)
        assert left_of(found[:n], x) < least + 1e-9
    assert {row.tobytes() for row in telling(x, 99, KERNEL)} == {row.tobytes() for row in tried}


def test_a_half_is_chosen_where_it_says_more_than_any_set():
    """Of eight sets with one common half, this half says most."""
    x = np.zeros((1, 12))
    x[0, :4] = 1
    half = halved(x)[0]
    sets = np.concatenate([x, [half + np.eye(12)[i] for i in range(4, 12)]])
    assert (telling(sets, 1, KERNEL)[0] == half).all()


def test_more_sets_than_can_be_compared_are_refused():
    with pytest.raises(ValueError, match="1,501 sets to choose from"):
        telling(np.eye(MOST_SETS + 1), 1, KERNEL)


def test_plan_offers_some_of_the_sets_and_halves(recipe, tmp_path, monkeypatch):
    costs = Costs(Cost(0.0, 1.0, 1), {}, gradient=2.0, probe=0.0)
    monkeypatch.setattr("leaveout.deletion.plan.probe", lambda *args, **options: costs)
    run = TrainingRun.train(recipe, tmp_path / "run")
    many = [list(row) for row in np.array_split(np.array(recipe.ids), 6)] + [list(recipe.ids[i : i + 3]) for i in range(20)]
    found = {c.name: c for c in run.plan(QUERIES[:1], many, Budget(16, repeats=0)).choices}
    alone, both = found["retraining 12 of the sets"], found["exact first order, and retraining 10 of the sets"]
    assert both.error < alone.error < found["retrainings"].error and alone.seconds <= 16 >= both.seconds
    assert alone.arguments["most"] == 12 and 0.1 < alone.error < 0.9
    few = {c.name: c for c in run.plan(QUERIES[:1], [*many[:3], many[0]], Budget(16, repeats=0)).choices}
    assert few["retraining the sets themselves"].seconds == 3
    assert few["retraining the sets themselves"].error == 0
    assert few["retraining the sets themselves, and 6 halves of them"].error < 0.02
    assert not any("exact" in name and "the sets" in name for name in few)
    stand = run.plan(QUERIES[:1], many, Budget(16, repeats=0, examples=True)).choices
    assert not any("the sets" in c.name for c in stand)

    run = TrainingRun.train(recipe, tmp_path / "another")
    run.measure(**alone.arguments | {"heldout": 0})
    known = run.bank.measurements(QUERIES[:1]).retrainings
    assert run.bank.info()["measurements"] == {"retraining, telling, fit": 12} and len(known) == 12
    std = run.predict(QUERIES[:1], many).std[0]
    assert (std < 0.1 * std.max()).sum() == 12
    command = _measure_command(run.path, alone, "--query anri", "--sets many.jsonl", "")
    assert command.endswith(" --sets many.jsonl --most 12 --heldout 3 --sizes 3,4 --query anri")


def test_most_is_of_sets_that_are_named(run, monkeypatch, capsys):
    with pytest.raises(ValueError, match="most is of sets that you name"):
        run.measure(most=3, settings=FAST)
    with pytest.raises(ValueError, match="most is of sets that you name"):
        run.measure(most=3, without=[run.recipe.ids[0]], halves=True, settings=FAST)
    code, _, told = run_command(monkeypatch, capsys, "measure", run.path, "--most", "3", "--retrain", "2")
    assert code == 2 and "--most is of sets that you name" in told


def test_a_vector_of_nothing_says_nothing(run):
    nothing = DeletionSets(np.zeros((1, 24)), ("0 %",))
    run.measure(without=nothing, halves=True, queries=QUERIES, settings=FAST)
    assert not len(run.bank.measurements(QUERIES).retrainings)
    run.measure(retrain=5, design="random", queries=QUERIES, settings=FAST)
    assert np.isfinite(run.predict(QUERIES, [run.recipe.ids[:2]], "datamodels").effect).all()
    assert len(telling(np.concatenate([nothing.x, np.eye(24)[:2]]), 9, FewUnits(np.ones(24)))) == 2


def test_sets_of_one_unit_are_offered_once(recipe, tmp_path, monkeypatch):
    costs = Costs(Cost(0.0, 1.0, 1), {}, gradient=None, probe=0.0)
    monkeypatch.setattr("leaveout.deletion.plan.probe", lambda *args, **options: costs)
    run = TrainingRun.train(recipe, tmp_path / "run")
    names = [c.name for c in run.plan(QUERIES[:1], [[id] for id in recipe.ids[:5]], Budget(40, repeats=0)).choices]
    assert names.count("retraining the sets themselves") == 1 and len(set(names)) == len(names)
