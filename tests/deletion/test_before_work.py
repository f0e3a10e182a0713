"""What can be known before the work is refused before it, and what was measured or not measured is said."""

from __future__ import annotations

import json
import re
import sys

import numpy as np
import pytest

from command import run_command
from leaveout.deletion import plan as plan_module
from leaveout.deletion import run as run_module
from leaveout.deletion.measurements import MeasureSettings
from leaveout.deletion.plan import Budget, Cost, Costs
from leaveout.deletion.run import TrainingRun
from leaveout.errors import FormatError, MismatchError, StabilityError, UnsupportedError
from leaveout.evaluation import EvaluationSettings, evaluate
from leaveout.methods.registry import attribute
from leaveout.methods.scorer import Method
from leaveout.training.queries import as_queries
from leaveout.training.recipe import OptimizerSettings, Recipe

from .conftest import NAMES, QUERIES


@pytest.fixture
def small(tmp_path):
    """Four units of one name each."""
    return TrainingRun.train(Recipe.microgpt(NAMES, n=4), tmp_path / "run")


@pytest.fixture
def idle(small, monkeypatch):
    """The same, and whatever trains or scores is an error."""
    for name in ("Retrainer", "train_jets", "metagradient", "unit_vectors", "check_stability"):
        monkeypatch.setattr(run_module, name, lambda *_, **__: pytest.fail("work was begun"))
    monkeypatch.setattr(Method, "__call__", lambda *_: pytest.fail("work was begun"))
    monkeypatch.setattr("leaveout.evaluation.judge.second_order", lambda *_: pytest.fail("work was begun"))
    return small


@pytest.mark.parametrize(
    ("arguments", "error", "sentence"),
    [
        ({"gradient": True, "queries": QUERIES, "without": [["nobody"]]}, FormatError, "nobody"),
        ({"gradient": True, "queries": QUERIES, "heldout": [["nobody"]]}, FormatError, "nobody"),
        ({"directions": 4, "without": [["nobody"]]}, FormatError, "nobody"),
        ({"directions": 4, "retrain": 3, "design": "single"}, ValueError, "there is no design 'single'.*singles"),
        ({"directions": 4, "retrain": 3, "design": "along"}, ValueError, "for more than 64 units"),
        ({"directions": 4, "gradient": True}, ValueError, "pass queries="),
        ({"gradient": True, "queries": QUERIES, "directions": 5, "settings": MeasureSettings(real=True)}, ValueError,
         "only 4 orthogonal directions"),
    ],
)  # fmt: skip
def test_measuring_refuses_before_it_begins(arguments, error, sentence, idle):
    with pytest.raises(error, match=sentence):
        idle.measure(**arguments)


@pytest.mark.parametrize(
    ("methods", "settings", "error", "sentence"),
    [
        (["random"], {}, UnsupportedError, "Another seed trains the same model here.*second_order=False"),
        (["random"], {"subsets": 1}, ValueError, "at least 2"),
        (["random"], {"removed": 1.0}, ValueError, "between 0 and 1"),
        (["random", "defualt"], {"second_order": False}, ValueError, "no method 'defualt'"),
        (["random", "default"], {"second_order": False}, UnsupportedError, "takes no microgpt recipe"),
        (["random", "bm25"], {"second_order": False}, UnsupportedError, r"needs the package bm25s"),
    ],
)
def test_evaluation_refuses_before_it_begins(methods, settings, error, sentence, idle, monkeypatch):
    monkeypatch.setitem(sys.modules, "bm25s", None)
    with pytest.raises(error, match=sentence):
        evaluate(idle, QUERIES, methods, settings=EvaluationSettings(**settings))


def test_evaluation_refuses_scores_of_another_length_before_it_begins(idle):
    scores = {"mine": np.zeros((len(QUERIES), 7))}
    with pytest.raises(MismatchError, match=r"\[3, 4\]"):
        evaluate(idle, QUERIES, [], scores, EvaluationSettings(second_order=False))


def test_a_second_order_that_differs_is_not_refused(tmp_path):
    from leaveout.evaluation.truth import refuse_second_order

    refuse_second_order(TrainingRun.train(Recipe.microgpt(NAMES, n=4).with_(order="shuffled"), tmp_path / "run"))


def test_a_missing_package_is_told_before_the_model_is_asked(idle, monkeypatch):
    monkeypatch.setitem(sys.modules, "bm25s", None)
    with pytest.raises(UnsupportedError, match="needs the package bm25s"):
        attribute(idle, QUERIES, "bm25@third")


@pytest.mark.parametrize("command", ["predict", "verify"])
def test_outputs_that_cannot_be_written_are_refused_first(command, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("leaveout.cli.deletion.open_run", lambda *_: pytest.fail("work was begun"))
    arguments = (command, tmp_path / "run", "--query", "ana", "--without", "a")
    code, _, err = run_command(monkeypatch, capsys, *arguments, "--html", tmp_path / "nowhere" / "page.html")
    assert code == 2 and "cannot be written" in err.replace("\n", " ")


# Degree 1 and what grows.


def wild(**changes):
    """A recipe whose power series grow without bound."""
    wanted = OptimizerSettings("adamw", 0.3, eps=1e-12, weight_decay=0.0)
    return Recipe.microgpt(NAMES, n=12).with_(optimizer=wanted, epochs=4, **changes)


def test_degree_one_is_measured_whatever_higher_degrees_do(tmp_path, monkeypatch):
    run = TrainingRun.train(wild(), tmp_path / "run")
    with pytest.raises(StabilityError, match="no usable power series up to degree 3: measure at a lower degree"):
        run.measure(2, 3, queries=QUERIES)
    monkeypatch.setattr(run_module, "check_stability", lambda *_, **__: pytest.fail("growth was checked"))
    run.measure(2, 1, queries=QUERIES)
    assert run.bank.info()["measurements"] == {"jets of degree 1, complex uniform": 2}


def test_growth_is_checked_up_to_the_degree_that_is_measured(tmp_path, monkeypatch):
    degrees = []

    def check(recipe, *_, degree, true=run_module.check_stability, **options):
        degrees.append(degree)
        return true(recipe, degree=degree, **options)

    monkeypatch.setattr(run_module, "check_stability", check)
    run = TrainingRun.train(Recipe.microgpt(NAMES, n=6), tmp_path / "run")
    for degree in (2, 2, 3):
        run.measure(2, degree, queries=QUERIES)
    assert degrees == [2, 3]


def test_a_plan_asks_for_no_more_sets_than_there_are(small, monkeypatch):
    cheap = Costs(Cost(0.0, 1e-3, 64), {1: Cost(0.0, 1e-3, 64)}, 1e-3, 0.0)
    monkeypatch.setattr(plan_module, "probe", lambda *_: cheap)
    ids = small.recipe.ids
    for sets, known in (
        ([[ids[0]]], {"auto": 4, "all pairs": 10}),
        ([ids[:1], ids[1:3]], {"auto": 10, "all pairs": 10}),
    ):
        choices = small.plan(QUERIES, sets, Budget(600, examples=True)).choices
        for choice in choices:
            retrain, there = choice.arguments.get("retrain", 0), known[choice.arguments.get("design", "auto")]
            assert retrain <= there and choice.arguments["heldout"] <= max(known.values()) - retrain
        assert any("retrain" in choice.arguments for choice in choices)


def test_a_plan_keeps_degree_one_where_series_grow(tmp_path, monkeypatch):
    run = TrainingRun.train(wild(), tmp_path / "run")
    plan = run.plan(QUERIES, [[run.recipe.ids[0]]], Budget(600, examples=True, jets=True))
    assert 1 in plan.costs.jets and 2 not in plan.costs.jets
    assert any(note.startswith("No jets above degree 1: ") for note in plan.notes)
    assert plan.choices and not any("degree 2" in choice.name for choice in plan.choices)


def test_a_plan_begins_with_two_retrainings_and_tries_within_a_tenth_of_its_budget(tmp_path, monkeypatch):
    run = TrainingRun.train(Recipe.microgpt(NAMES, n=6), tmp_path / "run")
    plan = run.plan(QUERIES, [[run.recipe.ids[0]]], Budget(600, examples=True))
    assert run.bank.info()["measurements"] == {"retraining, auto, fit": 2} and run.bank.retraining_seconds() > 0
    assert plan.stability is None and plan.costs.jets == {} and plan.notes[0].startswith("No jets: they win")
    tried: list[int] = []
    monkeypatch.setattr(
        plan_module, "train_batch", lambda recipe, weights, options, together: tried.append(len(weights))
    )
    monkeypatch.setattr(plan_module, "query_losses", lambda *_: None)
    monkeypatch.setattr(plan_module, "metagradient", lambda *_: pytest.fail("tried"))
    share = sum(plan_module.PROBE_STEPS) / len(run.recipe.batches())  # of a training that a probe takes
    asked = as_queries(QUERIES)
    costs = plan_module.probe(run.recipe, asked, (1.0, 0.5 * share))
    assert tried == [] and costs.retraining == Cost(0.0, 1.0, costs.retraining.together)
    assert costs.gradient == 4.6 + 0.06 * len(asked) and "was not tried" in costs.notes[0]
    monkeypatch.setattr(plan_module, "metagradient", lambda *_: None)
    plan_module.probe(run.recipe, asked, (1.0, 8 * share))
    # At two lengths each; three times what will be bought.
    assert tried == [*[2] * 2, *[16] * 2, *[128] * 2, *[costs.retraining.together] * 6]


def test_a_plan_says_what_the_run_tells_of_the_first_order(small, monkeypatch):
    monkeypatch.setattr(plan_module, "probe", lambda *_: Costs(Cost(400.0, 1.0, 64), {}, 1.0, 0.0))
    sets = [[small.recipe.ids[0]]]
    untold = small.plan(QUERIES, sets, Budget(600, examples=True, repeats=0))
    assert not any("as the run tells" in note for note in untold.notes)
    monkeypatch.setattr(small.bank, "first_order_error", lambda x: np.full(len(x), 0.37))
    told = small.plan(QUERIES, sets, Budget(300, examples=True, repeats=0))
    assert [(c.name, c.error) for c in told.choices] == [("exact first order", 0.37)]
    assert any("about 0.37 of these effects wrong" in note for note in told.notes)


# What was made, and what was measured already.


def test_fewer_retrainings_than_asked_for_are_said(small, capsys):
    small.measure(retrain=24, queries=QUERIES)
    said = capsys.readouterr().err
    assert "4 retrainings of the design `auto` instead of 24: with 4 units there are no more different sets" in said
    assert len(small.bank) == 4 and small.said == [said.strip().removeprefix("leaveout: ")]
    small.measure(heldout=20, queries=QUERIES)
    said = capsys.readouterr().err
    assert "14 retrainings held out instead of 20: with 4 units there are no more sets that are not fitted." in said


def test_as_many_retrainings_as_asked_for_are_not_spoken_of(small, capsys):
    small.measure(retrain=4, queries=QUERIES)
    assert not capsys.readouterr().err and not small.said


def test_random_sets_that_are_held_out_are_not_fitted(small, capsys):
    """Also where only four sets are of the usual sizes, each of which is fitted."""
    small.measure(retrain=100, heldout=8, queries=QUERIES)
    found = small.bank.measurements(QUERIES)
    fitted, held = ({tuple(row) for row in runs.x} for runs in (found.retrainings, found.heldout))
    assert len(fitted) == 4 and len(held) == 8 and not fitted & held
    assert "held" not in capsys.readouterr().err
    small.measure(retrain=100, heldout=8, queries=QUERIES, settings=MeasureSettings(sizes=(1,)))
    told = r"[0-3] retrainings held out instead of 8: .* no more sets of these sizes that are not fitted; give --sizes"
    assert re.search(told, capsys.readouterr().err)


def test_held_out_sets_that_are_fitted_as_well_are_said(small, capsys):
    ids = small.recipe.ids
    small.measure(retrain=4, heldout=[[ids[0]], [ids[0], ids[1]]], queries=QUERIES)
    assert "1 of the held-out sets are fitted as well" in capsys.readouterr().err


@pytest.mark.parametrize("role", ["without", "heldout"])
def test_sets_that_were_measured_prove_nothing_and_are_counted_apart(role, small, monkeypatch):
    ids = small.recipe.ids
    small.measure(retrain=2, queries=QUERIES, **{role: [[ids[0], ids[1]]]})
    before = len(small.bank)
    sets = [[ids[0], ids[1]], [ids[2], ids[3]]]
    found = small.verify(QUERIES, sets)
    assert found.new.tolist() == [False, True] and len(small.bank) == before + 1
    summary = found.summary()
    assert (summary["sets"], summary["already_measured"]) == (1, 1)
    lines = list(found.lines())
    assert [line["already_measured"] for line in lines] == [False, True] * 0 + [True, False] * len(QUERIES)
    actual = found.actual
    assert np.abs(actual[:, 1] - small.retrain(QUERIES, [sets[1]])[:, 0]).max() == 0
    assert summary["relative_error"] == pytest.approx(
        float(np.median(abs(actual - found.mean)[:, 1] / abs(actual - found.base)[:, 1]))
    )
    again = small.verify(QUERIES, [sets[1]])  # a proof can be repeated: nothing was fitted to it
    assert again.new.all()
    monkeypatch.setattr(run_module, "Retrainer", lambda *_, **__: pytest.fail("it was retrained"))
    known = small.verify(QUERIES, [sets[0]]).summary()
    assert (known["sets"], known["already_measured"], known["coverage"]) == (0, 1, None)
    truth = small.verify(QUERIES, [sets[0]]).actual
    monkeypatch.undo()
    assert np.abs(truth - small.retrain(QUERIES, [sets[0]])).max() < 1e-5


def test_the_command_counts_what_was_measured_apart(monkeypatch, capsys, tmp_path):
    (tmp_path / "names.txt").write_text("\n".join(NAMES[:4]) + "\n")
    (tmp_path / "recipe.yaml").write_text("kind: microgpt\ndata: names.txt\n")
    run = TrainingRun.train(tmp_path / "recipe.yaml", tmp_path / "run")
    code, out, _ = run_command(monkeypatch, capsys, "measure", tmp_path / "run", "--retrain", 24, "--json")
    facts = json.loads(out)
    assert code == 0 and facts["added"] == 4 and "4 retrainings of the design `auto` instead of 24" in facts["notes"][0]
    _, out, said = run_command(monkeypatch, capsys, "measure", tmp_path / "run", "--retrain", 24)
    assert (out + said).count("4 retrainings of the design `auto` instead of 24") == 1
    one, two = run.recipe.ids[:2]
    arguments = ("verify", tmp_path / "run", "--query", "anna", "--without", one, "--without", f"{one},{two}")
    lines = [json.loads(line) for line in run_command(monkeypatch, capsys, *arguments, "--json")[1].splitlines()]
    assert [line.get("already_measured") for line in lines[:2]] == [True, False]
    assert (lines[2]["summary"]["sets"], lines[2]["summary"]["already_measured"]) == (1, 1)
    shown = run_command(monkeypatch, capsys, *arguments)[1]
    assert "1 more set had been measured before" in shown and "measured" in shown.split("1 more set")[0]
