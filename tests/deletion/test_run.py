"""Runs and banks from end to end, against plain retraining; what is kept, refused, resumed and merged."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from leaveout.deletion import plan as plan_module
from leaveout.deletion.bank import Bank
from leaveout.deletion.estimators import EstimatorSettings
from leaveout.deletion.kernels import FewUnits
from leaveout.deletion.measurements import MeasureSettings
from leaveout.deletion.plan import Budget, Cost, Costs
from leaveout.deletion.predict import Verification
from leaveout.deletion.run import TrainingRun
from leaveout.deletion.sets import DeletionSets
from leaveout.errors import FormatError, MismatchError, StabilityError, UnsupportedError
from leaveout.store import Store
from leaveout.training.loop import Loop
from leaveout.training.queries import Query, as_queries, query_losses
from leaveout.training.queries import margin as margin_of
from leaveout.training.recipe import Recipe
from leaveout.training.train import Retrainer, train_plain

from .conftest import FAST, NAMES, QUERIES


def retrained(recipe, x):
    """Losses [query, set] by plain training, one model after another."""
    out = [query_losses(recipe, train_plain(recipe, torch.tensor(1 - row)), QUERIES) for row in x]
    return torch.stack(out, 1).double().numpy()


def test_predictions_agree_with_plain_retraining(measured, recipe):
    ids = list(recipe.ids)
    sets = [[ids[0]], ids[3:6], ids[5:11]]
    x = np.array([[float(i in s) for i in ids] for s in sets])
    truth = retrained(recipe, x)
    base = retrained(recipe, np.zeros((1, 24)))
    p = measured.predict(QUERIES, sets)
    assert p.mean.shape == p.std.shape == p.base.shape == (3, 3)
    assert np.abs(p.base - base).max() < 1e-5
    assert np.abs(p.mean - truth).max() < 0.25 * np.abs(truth - base).max()
    low, high = p.interval()
    assert ((low <= truth) & (truth <= high)).mean() > 0.7


def test_exact_estimators_agree_on_the_first_order(measured, recipe):
    """24 units, 16 complex directions: least squares is exact, and so is reverse mode."""
    sets = DeletionSets(np.eye(24), tuple(recipe.ids))
    least = measured.predict(QUERIES, sets, EstimatorSettings("least_squares", degree=1)).effect
    exact = measured.predict(QUERIES, sets, "first_order").effect
    assert np.abs(least - exact).max() < 1e-4 * np.abs(exact).max()


def test_verify_compares_with_truth_that_nothing_was_fitted_to(recipe, tmp_path):
    run = TrainingRun.train(recipe, tmp_path / "run")
    run.measure(retrain=40, queries=QUERIES, settings=FAST)
    ids = list(recipe.ids)
    sets = [ids[i : i + 4] for i in range(0, 24, 4)]
    before = run.predict(QUERIES, sets).effect
    found = run.verify(QUERIES, sets)
    x = np.array([[float(i in s) for i in ids] for s in sets])
    assert np.abs(found.actual - retrained(recipe, x)).max() < 1e-5
    assert np.array_equal(run.predict(QUERIES, sets).effect, before)
    summary = found.summary()
    assert summary["spearman"] > 0.7 and summary["queries"] == 3 and summary["sets"] == 6
    assert summary["coverage"] == pytest.approx(found.inside.mean())
    line = next(found.lines())
    assert {"query", "without", "base", "predicted", "std", "estimator", "actual", "inside"} <= line.keys()


def test_results_print_as_tables_and_show_as_html(measured, recipe):
    sets = [list(recipe.ids[:2]), [recipe.ids[5]]]
    prediction = measured.predict(QUERIES, sets)
    (curve,) = measured.curve(QUERIES[:1], sets[:1], points=3)
    found = Verification(**vars(prediction), actual=prediction.mean, measured=np.array([False, True]))
    for result, words in (
        (prediction, ("query", "effect (nats)", "verdict", QUERIES[0], "can be told from zero")),
        (found, ("retrained", "measured", "predictions the retrained effect is missed by", "1 more set had been")),
        (curve, ("Without", "share", "50 %")),
    ):
        shown = str(result)
        assert all(word in shown for word in words), shown
        assert "\x1b" not in shown and "<table>" in result._repr_html_()
    assert len(found.table().rows) == 6 and found.table().rows[0][3].endswith(", inside")


def test_truth_is_computed_once(recipe, tmp_path, monkeypatch):
    run = TrainingRun.train(recipe, tmp_path / "run")
    first = run.retrain(QUERIES, [list(recipe.ids[:3])])
    monkeypatch.setattr("leaveout.deletion.run.Retrainer", None)
    assert np.array_equal(run.retrain(QUERIES, [list(recipe.ids[:3])]), first)


def test_halves_are_retrained_alone_where_that_costs_less(recipe, tmp_path, monkeypatch):
    """And tell the same as the batch: here of one unit more, so that the share of examples that is absent is seen."""
    sizes = []

    def watched(self, weights, options, together, true=Retrainer.train):
        sizes.append(len(weights))
        return true(self, weights, options, together)

    monkeypatch.setattr(Retrainer, "train", watched)
    halves = np.zeros((3, len(recipe.unit_names)))
    halves[:, ::2], halves[1:, 1] = 1, 1
    names = ("a", "b", "c")
    first = TrainingRun.train(recipe, tmp_path / "batch").retrain(QUERIES, DeletionSets(halves, names))
    monkeypatch.setattr("leaveout.training.memory.HEAVY", 1)
    alone = TrainingRun.train(recipe, tmp_path / "alone")
    assert np.allclose(alone.retrain(QUERIES, DeletionSets(halves, names)), first, atol=1e-5)
    assert np.allclose(first, retrained(recipe, halves), atol=1e-5)
    alone.retrain(QUERIES, DeletionSets(np.eye(len(recipe.unit_names))[:3], names))
    assert sizes == [2, 1, 1, 3]  # two of the three halves are equal
    again = TrainingRun.train(recipe, tmp_path / "weighted")
    again.retrain(QUERIES, DeletionSets(halves / 2, names))
    assert sizes[4:] == [2]


def test_kept_parameters_answer_any_query_with_the_same_numbers(recipe, tmp_path):
    kept, asked = (TrainingRun.train(recipe, tmp_path / name) for name in ("kept", "asked"))
    kept.measure(6, 2, retrain=5, settings=FAST)
    asked.measure(6, 2, retrain=5, queries=QUERIES, settings=FAST)
    a, b = kept.bank.measurements(QUERIES), asked.bank.measurements(QUERIES)
    assert np.allclose(a.jets[0].c, b.jets[0].c, atol=1e-5) and np.allclose(a.retrainings.y, b.retrainings.y, atol=1e-5)
    assert a.retrainings.y.any() and a.jets[0].c[1].any()
    again = TrainingRun.train(recipe, tmp_path / "kept").bank.measurements(QUERIES)
    assert np.array_equal(again.jets[0].c, a.jets[0].c)
    assert kept.predict(["dutu"], [list(recipe.ids[:2])]).effect.shape == (1, 1)
    with pytest.raises(MismatchError, match="dutu"):
        asked.predict(["dutu"], [list(recipe.ids[:2])])


def test_measuring_again_adds_only_what_is_missing(run):
    run.measure(4, 1, retrain=3, queries=QUERIES, settings=FAST)
    n, version = len(run.bank), run.bank.store.version
    run.measure(4, 1, retrain=3, queries=QUERIES, settings=FAST)
    assert (len(run.bank), run.bank.store.version) == (n, version)
    run.measure(7, 1, queries=QUERIES, settings=FAST)
    assert len(run.bank) == n + 3


def test_worker_processes_give_the_same_bits(recipe, tmp_path):
    runs = [TrainingRun.train(recipe, tmp_path / str(w)) for w in (1, 2)]
    for workers, run in zip((1, 2), runs, strict=True):
        run.measure(130, 1, queries=QUERIES, settings=MeasureSettings(workers=workers, check=False))
    a, b = (run.bank.measurements(QUERIES).jets for run in runs)
    assert len(a) == len(b) == 2
    assert all(np.array_equal(x.c, y.c) for x, y in zip(a, b, strict=True))


def test_real_orthogonal_directions_give_the_exact_first_order(recipe, tmp_path):
    run = TrainingRun.train(recipe, tmp_path / "run")
    run.measure(24, 1, gradient=True, queries=QUERIES, settings=MeasureSettings(check=False, real=True))
    assert run.bank.measurements(QUERIES).jets[0].real
    sets = DeletionSets(np.eye(24), tuple(recipe.ids))
    exact = run.predict(QUERIES, sets, "first_order").effect
    assert np.abs(run.predict(QUERIES, sets, "least_squares").effect - exact).max() < 1e-4 * np.abs(exact).max()
    kept = TrainingRun.train(recipe, tmp_path / "kept")
    kept.measure(24, 1, settings=MeasureSettings(check=False, real=True))
    assert np.abs(kept.predict(QUERIES, sets, "least_squares").effect - exact).max() < 1e-4 * np.abs(exact).max()
    with pytest.raises(ValueError, match="only 24"):
        run.measure(25, 1, queries=QUERIES, settings=MeasureSettings(check=False, real=True))


def test_any_matrix_can_say_which_units_are_alike(tmp_path):
    """More than 64 units; two halves whose members are called alike."""
    names = [
        a + b
        for a in ("an", "bo", "ci", "du", "el", "fa", "gi", "ho")
        for b in ("na", "ri", "so", "tu", "ve", "ma", "ke", "li", "po")
    ]
    recipe = Recipe.microgpt(names, n=72)
    run = TrainingRun.train(recipe, tmp_path / "run")
    run.measure(retrain=12, design="random", queries=QUERIES, settings=MeasureSettings(check=False, sizes=(6,)))
    one = DeletionSets(np.eye(72)[:1], ("first",))
    plain = run.predict(QUERIES, one).effect
    run.measure_vectors()
    own = run.predict(QUERIES, one).effect
    again = run.predict(QUERIES, one, EstimatorSettings(features=run.bank.features())).effect
    other = run.predict(QUERIES, one, EstimatorSettings(features=np.random.default_rng(0).normal(size=(72, 3)))).effect
    assert np.array_equal(own, again) and not np.allclose(own, other) and not np.allclose(own, plain)
    with pytest.raises(ValueError, match="72 units"):
        run.predict(QUERIES, one, EstimatorSettings(features=np.zeros((5, 3))))


def test_scores_of_another_engine_are_the_prior_mean(recipe, tmp_path):
    """The exact first order given as scores, up to a factor: it says more than 6 retrainings."""
    run = TrainingRun.train(recipe, tmp_path / "run")
    run.measure(retrain=6, gradient=True, design="random", queries=QUERIES, settings=FAST)
    sets = DeletionSets(np.eye(24), tuple(recipe.ids))
    exact = run.predict(QUERIES, sets, "first_order").effect
    truth = run.retrain(QUERIES, sets) - run.bank.base(as_queries(QUERIES))[:, None]
    bare = TrainingRun.train(recipe, tmp_path / "bare")
    bare.measure(retrain=6, design="random", queries=QUERIES, settings=FAST)

    def error(**known):
        return (
            np.abs(bare.predict(QUERIES, sets, EstimatorSettings(**known)).effect - truth).mean() / np.abs(truth).mean()
        )

    assert error(scores=1e3 * exact) < 0.7 * error() and error(scores=1e3 * exact) < 0.6
    with pytest.raises(ValueError, match="24 units"):
        bare.predict(QUERIES, sets, EstimatorSettings(scores=exact[:, :3]))
    with pytest.raises(ValueError, match="scores hold numbers that are not finite"):
        bare.predict(QUERIES, sets, EstimatorSettings(scores=np.where(exact > 0, np.nan, exact)))


def test_fits_with_other_kernels_are_not_mistaken_for_each_other(measured, recipe):
    sets = [list(recipe.ids[:5])]
    kernels = [FewUnits(np.ones(24), second=second) for second in (1e-6, 1.0)]
    a, b, a_again = (
        measured.predict(QUERIES, sets, EstimatorSettings(kernel=k)).effect for k in (*kernels, kernels[0])
    )
    assert np.array_equal(a, a_again) and not np.allclose(a, b)


def test_degree_limits_what_the_posterior_uses(measured, recipe):
    sets = [list(recipe.ids[:5])]
    assert not np.allclose(
        measured.predict(QUERIES, sets, EstimatorSettings(degree=1)).effect, measured.predict(QUERIES, sets).effect
    )


def test_a_set_can_be_truth_and_fitted_one_after_the_other(recipe, tmp_path):
    run, sets = TrainingRun.train(recipe, tmp_path / "run"), [list(recipe.ids[:3])]
    truth = run.retrain(QUERIES, sets)
    assert not len(run.bank.measurements(QUERIES).retrainings)
    run.measure(without=sets, queries=QUERIES, settings=FAST)
    known = run.bank.measurements(QUERIES)
    assert len(known.retrainings) == 1
    assert np.allclose(known.retrainings.y[0] + known.base, truth[:, 0], atol=1e-6)
    assert np.array_equal(run.retrain(QUERIES, sets), truth)


def test_plan_buys_the_exact_first_order_alone_where_it_leaves_room_for_nothing_else(recipe, tmp_path, monkeypatch):
    costs = Costs(Cost(4.0, 0.1, 256), {}, gradient=9.0, probe=0.0)
    monkeypatch.setattr("leaveout.deletion.plan.probe", lambda *args, **options: costs)
    run, sets = TrainingRun.train(recipe, tmp_path / "run"), [list(recipe.ids[:3])]
    names = {
        b: {c.name for c in run.plan(QUERIES, sets, Budget(b, examples=True, repeats=0)).choices} for b in (8, 10, 30)
    }
    assert names[8] == {"retrainings"}
    assert names[10] == {"retrainings", "exact first order"}
    assert names[30] == {"retrainings", "exact first order, and retrainings"}
    bought = next(
        c
        for c in run.plan(QUERIES, sets, Budget(10, examples=True, repeats=0)).choices
        if c.name == "exact first order"
    )
    shown = str(run.plan(QUERIES, sets, Budget(10, examples=True, repeats=0)))
    assert "expected error" in shown and "exact first order" in shown
    run = TrainingRun.train(recipe, tmp_path / "without the planner's two retrainings")
    run.measure(**bought.arguments)
    p = run.predict(QUERIES, sets)
    assert np.array_equal(p.effect, run.predict(QUERIES, sets, "first_order").effect)
    assert (np.isfinite(p.std) & (p.std > 0)).all()


def test_probe_tells_starting_from_going_on(recipe, monkeypatch):
    """A task of 2 s and 0.5 s a step."""
    monkeypatch.setattr("leaveout.deletion.plan._seconds", lambda task: task())
    assert plan_module._whole(recipe, lambda short: 2 + 0.5 * len(short.batches())) == 2 + 0.5 * len(recipe.batches())


@pytest.mark.parametrize("bad", [{"workers": 0}, {"dtype": "float32"}, {"sizes": (0,)}])
def test_settings_are_checked(bad):
    with pytest.raises(ValueError, match=r"must be|give"):
        MeasureSettings(**bad)


def test_banks_merge_without_doubles(recipe, tmp_path):
    a, b, both = (TrainingRun.train(recipe, tmp_path / name) for name in ("a", "b", "both"))
    a.measure(4, 1, queries=QUERIES, settings=FAST)
    b.measure(4, 1, retrain=5, queries=QUERIES, settings=FAST)
    both.measure(4, 1, retrain=5, queries=QUERIES, settings=FAST)
    assert a.bank.merge(b.path / "bank") == 5
    assert a.bank.merge(b.path / "bank") == 0
    sets = [list(recipe.ids[:2])]
    assert np.allclose(a.predict(QUERIES, sets).effect, both.predict(QUERIES, sets).effect, atol=1e-9)


def test_another_recipe_is_refused(run, recipe, tmp_path):
    other = recipe.with_(lr=0.02)
    with pytest.raises(MismatchError, match="another recipe"):
        TrainingRun.train(other, run.path)
    with pytest.raises(MismatchError, match="another recipe"):
        Bank(other, run.path / "bank", run.parameters)


def test_a_run_made_in_python_is_opened_with_its_recipe(run, recipe):
    with pytest.raises(
        UnsupportedError, match=r"trained from Python: open it with TrainingRun.open\(path, recipe=...\)"
    ):
        TrainingRun.open(run.path)
    again = TrainingRun.open(run.path, recipe)
    assert all(torch.equal(p, run.parameters[name]) for name, p in again.parameters.items())
    with pytest.raises(MismatchError, match="another recipe"):
        TrainingRun.open(run.path, recipe.with_(lr=0.02))


def test_a_training_that_was_killed_before_its_record_goes_on(run, recipe):
    with Store.open(run.path / "examples", write=True) as store:
        store.set_state("trained", None)
    with pytest.raises(FormatError, match="was killed: train the same recipe again"):
        TrainingRun.open(run.path, recipe)
    TrainingRun.train(recipe, run.path)
    assert len(TrainingRun.open(run.path, recipe).recipe.examples) == len(recipe.examples)


def test_recipe_files_and_their_data_are_watched(tmp_path):
    (tmp_path / "names.txt").write_text("\n".join(NAMES))
    (tmp_path / "recipe.yaml").write_text("kind: microgpt\ndata: names.txt\nn: 12\n")
    TrainingRun.train(tmp_path / "recipe.yaml", tmp_path / "run")
    assert len(TrainingRun.open(tmp_path / "run").recipe.examples) == 12
    (tmp_path / "names.txt").write_text("\n".join(["zzz", *NAMES]))
    with pytest.raises(MismatchError, match="changed since"):
        TrainingRun.open(tmp_path / "run")
    (tmp_path / "recipe.yaml").unlink()
    with pytest.raises(MismatchError, match="is gone"):
        TrainingRun.open(tmp_path / "run")
    with pytest.raises(FormatError, match="not a training run"):
        TrainingRun.open(tmp_path)


@pytest.mark.parametrize(
    ("without", "message"),
    [
        ([], "no deletion set"),
        ([[]], "is empty"),
        (["nobody"], "no unit and no example with the id 'nobody'"),
        ([{"0:duna": 2.0}], "between 0 and 1"),
        ([{"0:dutu": 0.0}], "removes nothing: give a share above 0"),
        (None, "removes everything"),
    ],
)
def test_bad_deletion_sets_get_one_sentence(measured, recipe, without, message):
    without = [list(recipe.ids)] if without is None else without
    with pytest.raises(FormatError, match=message):
        measured.predict(QUERIES, without)


@pytest.mark.parametrize("noise", ["x", -0.1, float("nan"), float("inf"), [0.1, 0.2], [[0.1, 0.1, 0.1]], True])
def test_noise_that_is_no_standard_deviation_is_refused(noise, measured, recipe):
    with pytest.raises(ValueError, match=r"noise is .*: give"):
        measured.predict(QUERIES, [recipe.ids[0]], EstimatorSettings(noise=noise))


def test_half_a_unit_is_refused(recipe, tmp_path):
    letters = recipe.grouped([row.text[0] for row in recipe.examples])
    run = TrainingRun.train(letters, tmp_path / "run")
    run.measure(retrain=8, queries=QUERIES, settings=FAST)
    first = recipe.examples[0]
    with pytest.raises(FormatError, match="name the whole unit"):
        run.predict(QUERIES, [first.id])
    whole = [row.id for row in recipe.examples if row.text[0] == first.text[0]]
    for two in ({whole[0]: 0.2, **dict.fromkeys(whole[1:], 0.9)}, {first.text[0]: 0.5, whole[0]: 1.0}):
        with pytest.raises(FormatError, match=r"have two shares, 0\.\d and"):
            run.predict(QUERIES, [two])
    a = run.predict(QUERIES, whole).effect
    assert np.array_equal(a, run.predict(QUERIES, [first.text[0]]).effect)
    assert sorted(run.ids_where(f"text LIKE '{first.text[0]}%'")) == sorted(whole) and len(whole) == 4


def test_files_of_deletion_sets(measured, recipe, tmp_path):
    a, b = recipe.ids[:2]
    file = tmp_path / "sets.txt"
    file.write_text(f'{a},{b}\n["{a}"]\n\n{{"without": ["{b}"]}}\n{{"{a}": 0.5}}\n')
    p = measured.predict(QUERIES, file)
    lists = measured.predict(QUERIES, [[a, b], [a], [b], {a: 0.5}])
    assert np.array_equal(p.effect, lists.effect) and p.without[3] == f"{a}=0.5"
    file.write_text(f'{{"without": "{a}"}}\n{{"name": "other", "without": ["{b}"]}}\n')
    assert measured.predict(QUERIES, file).without == (a, "other")
    assert np.allclose(measured.predict(QUERIES, file).effect, lists.effect[:, 1:3])
    file.write_text("[broken\n")
    with pytest.raises(FormatError, match="Line 1"):
        measured.predict(QUERIES, file)


def test_arrays_of_ids_are_deletion_sets(measured, recipe):
    ids = list(recipe.ids[:3])
    one = measured.predict(QUERIES, np.array(ids))
    assert np.array_equal(one.effect, measured.predict(QUERIES, ids).effect)
    many = measured.predict(QUERIES, np.array([[id] for id in ids]))
    assert np.array_equal(many.effect, measured.predict(QUERIES, [[id] for id in ids]).effect)
    assert np.array_equal(measured.predict(QUERIES, ([id] for id in ids)).effect, many.effect)
    assert np.allclose(measured.predict(QUERIES, ids[0]).effect, many.effect[:, :1])
    assert np.allclose(measured.predict(QUERIES, [ids[0], [ids[1]]]).effect, many.effect[:, :2])
    with pytest.raises(FormatError, match=r"1\.0"):
        measured.predict(QUERIES, np.eye(len(recipe.ids)))


def test_nan_queries_are_refused_by_name(measured, recipe):
    bad = Query("anri", lambda logits, targets: logits.sum() * float("nan"), name="broken")
    with pytest.raises(FormatError, match="'broken' has the value nan"):
        measured.predict([bad], [list(recipe.ids[:1])])
    with pytest.raises(FormatError, match="no query"):
        measured.predict([], [list(recipe.ids[:1])])


def test_measures_of_an_answer_agree_with_the_model(run, recipe):
    queries = [Query("anri", m) for m in ("loss", "probability", "logit", "margin")]
    loss, probability, _, margin = run.bank.base(queries)
    tokens = 5  # four letters and the end
    assert probability == pytest.approx(np.exp(-loss * tokens), rel=1e-5)
    run.measure(6, 2, retrain=4, queries=queries, settings=FAST)
    data = run.bank.measurements(queries)
    actual = run.retrain(queries, [list(recipe.ids[:4])])[:, 0]
    assert actual[1] == pytest.approx(np.exp(-actual[0] * tokens), rel=1e-5)
    # The chain rule of the first order: dp = -p * tokens * dloss.
    assert np.allclose(data.jets[0].c[0, :, 1], -probability * tokens * data.jets[0].c[0, :, 0], rtol=1e-3, atol=1e-9)
    assert margin < 0
    sure = torch.tensor([[30.0, 0.0, 0.0]])
    assert float(margin_of(sure, torch.tensor([0]))) == pytest.approx(30 - np.log(2), rel=1e-6)
    with pytest.raises(ValueError, match="there is no measure"):
        Query("anri", "surprise")


def test_functions_of_the_model_are_queries(run, recipe):
    run.measure(retrain=4, settings=FAST)
    norm = Query(lambda model: sum(p.square().sum() for p in model.parameters()), name="norm")
    wanted = sum(float(p.square().sum()) for p in run.parameters.values())
    p = run.predict([norm], [list(recipe.ids[:4])])
    assert p.base[0, 0] == pytest.approx(wanted, rel=1e-5) and p.queries == ("norm",)


def test_curves_start_at_the_base_and_end_at_the_prediction(measured, recipe):
    ids = list(recipe.ids[:5])
    (curve,) = measured.curve(QUERIES, ids, points=5)
    assert curve.shares.tolist() == [0, 0.25, 0.5, 0.75, 1]
    assert np.allclose(curve.prediction.effect[:, 0], 0, atol=1e-9) and np.allclose(
        curve.prediction.std[:, 0], 0, atol=1e-6
    )
    assert np.allclose(curve.prediction.effect[:, -1], measured.predict(QUERIES, ids).effect[:, 0])


def test_wrong_calls_are_refused(run, measured, recipe):
    ids = list(recipe.ids[:1])
    for call, error, message in (
        (lambda: measured.predict(QUERIES, ids, "magic"), ValueError, "there is no estimator"),
        (lambda: run.measure(retrain=2, design="magic"), ValueError, "there is no design"),
        (lambda: run.measure(gradient=True), ValueError, "pass queries"),
        (lambda: run.predict(QUERIES, ids), UnsupportedError, "needs measurements"),
        (lambda: run.predict(QUERIES, ids, "leave_one_out"), UnsupportedError, "each unit alone"),
        (lambda: run.predict(["übel"], ids), FormatError, "ü"),
    ):
        with pytest.raises(error, match=message):
            call()


def test_unstable_recipes_buy_no_jets(recipe, tmp_path):
    wild = recipe.with_(lr=1.0, eps=1e-9)
    run = TrainingRun.train(wild, tmp_path / "run")
    with pytest.raises(StabilityError, match=r"no usable power series"):
        run.measure(4, 2, queries=QUERIES)


KILLED = """
import sys, torch
from deletion.conftest import NAMES, QUERIES
from leaveout.deletion.run import MeasureSettings, TrainingRun
from leaveout.training.recipe import Recipe
import leaveout.deletion.run as module
module.JETS_TOGETHER, module.RUNS_TOGETHER = 2, 4
torch.set_num_threads(1)
run = TrainingRun.train(Recipe.microgpt(NAMES, n=24), sys.argv[1])
print("ready", flush=True)
run.measure(10, 1, retrain=24, queries=QUERIES, settings=MeasureSettings(check=False))
"""


def test_a_kill_leaves_nothing_in_the_way_of_other_batches(recipe, tmp_path, monkeypatch):
    """Free memory, another number of workers or of sets cut the batches otherwise."""
    sets = DeletionSets(np.eye(len(recipe.unit_names))[:5], tuple("abcde"))
    run = TrainingRun.train(recipe, tmp_path / "run")

    def killed(self, checkpoint, label, options, true=Loop.run):
        checkpoint.every = 0.0
        self.after = lambda step: (_ for _ in ()).throw(KeyboardInterrupt) if step == 3 else None
        true(self, checkpoint, label, options)

    monkeypatch.setattr(Loop, "run", killed)
    with pytest.raises(KeyboardInterrupt):
        run.retrain(QUERIES, sets)
    monkeypatch.undo()
    assert list((tmp_path / "run" / "work").rglob("*.safetensors"))
    monkeypatch.setattr("leaveout.deletion.run.RUNS_TOGETHER", 2)
    assert np.allclose(
        TrainingRun.train(recipe, tmp_path / "run").retrain(QUERIES, sets), retrained(recipe, sets.x), atol=1e-5
    )


def killed_and_finished(directory, kills, rng):
    """Rows seen after each kill and at the end, and the bank when measuring was left alone at last."""
    root = os.path.dirname(os.path.dirname(__file__))
    rows = []
    for _ in range(kills):
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(directory)], stdout=subprocess.PIPE, cwd=root, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        time.sleep(rng.uniform(0.02, 0.6))
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=120)
        found = TrainingRun.train(Recipe.microgpt(NAMES, n=24), directory)
        assert all("belongs to no version" in problem for problem in found.bank.store.check())
        rows.append(len(found.bank))
    found.measure(10, 1, retrain=24, queries=QUERIES, settings=FAST)
    return [*rows, len(found.bank)], found.bank


@pytest.mark.parametrize("kills", [2, pytest.param(10, marks=pytest.mark.nightly)])
def test_killed_measuring_loses_nothing_and_ends_equal(tmp_path, kills, monkeypatch):
    monkeypatch.setattr("leaveout.deletion.run.JETS_TOGETHER", 2)
    monkeypatch.setattr("leaveout.deletion.run.RUNS_TOGETHER", 4)
    calm = TrainingRun.train(Recipe.microgpt(NAMES, n=24), tmp_path / "calm")
    calm.measure(10, 1, retrain=24, queries=QUERIES, settings=FAST)
    rows, bank = killed_and_finished(tmp_path / "killed", kills, np.random.default_rng(kills))
    assert rows == sorted(rows) and rows[-1] == 34
    with_kills, without = bank.measurements(QUERIES), calm.bank.measurements(QUERIES)
    order = [np.lexsort(d.retrainings.x.T) for d in (with_kills, without)]
    assert np.array_equal(with_kills.retrainings.y[order[0]], without.retrainings.y[order[1]])
    assert all(np.array_equal(a.c, b.c) for a, b in zip(with_kills.jets, without.jets, strict=True))


def test_jsonl_lines_are_json(measured, recipe):
    lines = list(measured.predict(QUERIES, [list(recipe.ids[:1])], "datamodels").lines())
    assert len(lines) == 3 and json.loads(json.dumps(lines[0], allow_nan=False))["estimator"] == "datamodels"
    unknown = replace(measured.predict(QUERIES, [list(recipe.ids[:1])]), std=np.full((3, 1), np.inf))
    assert next(unknown.lines())["std"] is None and next(unknown.lines())["verdict"] == "cannot tell from zero"


def test_unknown_intervals_are_not_counted_as_covering(recipe, tmp_path):
    """Jets alone, read by least squares: nobody knows what the orders above add."""
    run = TrainingRun.train(recipe, tmp_path / "run")
    run.measure(16, 1, queries=QUERIES, settings=FAST)
    found = run.verify(QUERIES, [[recipe.ids[0]], list(recipe.ids[3:6])], "least_squares")
    assert {line["inside"] for line in found.lines()} == {None}
    assert found.summary()["coverage"] is None and found.summary()["relative_error"] > 0
