"""New runs: measured, kept, predicted with the noise of a run, and retrained; against plain training, run by run."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from leaveout.deletion.estimators import EstimatorSettings
from leaveout.deletion.measurements import MeasureSettings, NewRuns
from leaveout.deletion.noise import quantile, run_noise
from leaveout.deletion.plan import Budget
from leaveout.deletion.predict import NEW_RUN, Prediction
from leaveout.deletion.run import TrainingRun, _order_seed
from leaveout.deletion.sets import deletion_sets
from leaveout.deletion.shift import Shift, fit_shift
from leaveout.errors import UnsupportedError
from leaveout.training.queries import as_queries, query_losses
from leaveout.training.recipe import OptimizerSettings, Recipe
from leaveout.training.repacking import new_run, steps_lost, weights_left
from leaveout.training.reverse.metagradient import metagradient
from leaveout.training.train import train_plain

UNITS = 12


def points(n=24, seed=0):
    g = torch.Generator().manual_seed(seed)
    return tuple((torch.randn(4, generator=g), i % 3) for i in range(n))


QUERIES = list(points(3, seed=9))


@pytest.fixture(scope="module")
def recipe():
    return Recipe(
        "classifier", points(), units=tuple(f"u{i // 2}" for i in range(24)), batch_size=4, epochs=3, order="shuffled",
        optimizer=OptimizerSettings("sgd", 0.3, momentum=0.9), model={"hidden": [4]},
    )  # fmt: skip


@pytest.fixture(scope="module")
def noisy(recipe, tmp_path_factory):
    """A run with retrainings, held-out sets, and the noise of runs; not to be changed."""
    run = TrainingRun.train(recipe, tmp_path_factory.mktemp("noisy") / "run")
    run.measure(retrain=20, heldout=8, repeats=5, queries=QUERIES)
    return run


def plain(recipe, x, seed):
    return query_losses(recipe, train_plain(new_run(recipe, x, seed)), QUERIES).double().numpy()


def test_repeats_are_plain_runs_in_other_orders(noisy, recipe):
    nothing = np.zeros(UNITS)
    wanted = [plain(recipe, nothing, _order_seed(nothing, 0, k)) for k in range(5)]
    counts = noisy.bank.info()["measurements"]
    assert counts["new run, new order, repeat"] == 5 and counts["new run, new order, heldout"] == 8
    p = noisy.predict(QUERIES, ["u0"])
    assert p.meaning == "new run" and np.abs(p.base[:, 0] - np.mean(wanted, 0)).max() < 1e-6
    assert np.abs(noisy.bank.noise(p_queries()).std / np.std(wanted, 0, ddof=1) - 1).max() < 1.5
    assert (p.run_std > 0).all() and (p.reach() > 1.95996 * np.hypot(p.std, p.run_std)).all()
    same = noisy.predict(QUERIES, ["u0"], meaning="same-run")
    assert same.meaning == "same run" and np.all(same.run_std == 0) and not np.allclose(same.base, p.base)


def p_queries():
    return as_queries(QUERIES)


def test_the_same_is_not_measured_twice(noisy, monkeypatch):
    before = len(noisy.bank)
    monkeypatch.setattr("leaveout.deletion.run.train_plain", None)
    noisy.measure(repeats=5, queries=QUERIES)
    assert len(noisy.bank) == before


def test_a_killed_measurement_goes_on_where_it_was(noisy, recipe, tmp_path, monkeypatch):
    """Finished new runs of a task have checkpoints: only the others are trained."""
    run, trained = TrainingRun.train(recipe, tmp_path / "run"), []

    def killed(recipe, weights, options):
        if len(trained) == 3:
            raise KeyboardInterrupt
        trained.append(recipe.hash())
        return train_plain(recipe, weights, options)

    monkeypatch.setattr("leaveout.deletion.run.train_plain", killed)
    with pytest.raises(KeyboardInterrupt):
        run.measure(repeats=5, queries=QUERIES)
    assert len(run.bank) == 0 and len(list((run.path / "work").rglob("plain.safetensors"))) == 3
    monkeypatch.setattr("leaveout.deletion.run.train_plain", train_plain)
    run.measure(repeats=5, queries=QUERIES)
    found = [r.bank.new_runs(p_queries(), "repeat").y for r in (run, noisy)]
    assert np.allclose(*found, atol=1e-6)


def test_parameters_that_were_kept_answer_other_queries(recipe, tmp_path):
    run = TrainingRun.train(recipe, tmp_path / "run")
    run.measure(retrain=4, heldout=2, repeats=3)
    nothing = np.zeros(UNITS)
    wanted = [plain(recipe, nothing, _order_seed(nothing, 0, k)) for k in range(3)]
    assert np.abs(run.predict(QUERIES, ["u1"]).base[:, 0] - np.mean(wanted, 0)).max() < 1e-6


def test_verify_retrains_new_runs_and_takes_their_mean(noisy, recipe):
    x = np.zeros(UNITS)
    x[[1, 4]] = 1
    found = noisy.verify(QUERIES, [["u1", "u4"]], runs=3)
    wanted = np.mean([plain(recipe, x, _order_seed(x, 0, k)) for k in range(3)], 0)
    assert found.runs == 3 and np.abs(found.actual[:, 0] - wanted).max() < 1e-6
    assert (found.reach() < found.reach(runs=1)).all() and not found.measured.any()
    line = next(found.lines())
    assert line["meaning"] == "new run" and line["run_std"] > 0 and json.dumps(line)
    table = found.table()
    assert "Without means a new run" in table.notes[0] and {"sd of the mean", "sd of runs"} < set(table.headers)


def test_parts_of_weights_are_kept_in_new_runs(noisy, recipe):
    x = np.zeros(UNITS)
    x[2], x[3] = 0.5, 1
    found = noisy.retrain(QUERIES, {"u2": 0.5, "u3": 1.0}, meaning="new-run")
    made = new_run(recipe, x, _order_seed(x, 0, 0))
    wanted = query_losses(recipe, train_plain(made, torch.from_numpy(1 - x)), QUERIES).double().numpy()
    assert np.abs(found[:, 0] - wanted).max() < 1e-6


def test_without_noise_measured_the_same_run_is_meant(recipe, tmp_path):
    run = TrainingRun.train(recipe, tmp_path / "run")
    run.measure(retrain=14, queries=QUERIES)
    assert run.predict(QUERIES, ["u0"]).meaning == "same run"
    with pytest.raises(UnsupportedError, match="was not measured for these queries"):
        run.predict(QUERIES, ["u0"], meaning="new-run")
    with pytest.raises(ValueError, match="did you mean 'new-run'"):
        run.predict(QUERIES, ["u0"], meaning="newrun")
    with pytest.raises(ValueError, match="a deviation takes at least 3 runs"):
        run.measure(repeats=2, queries=QUERIES)
    with pytest.raises(ValueError, match="the same run is the same each time"):
        run.verify(QUERIES, ["u0"], runs=2)


def test_new_runs_train_on_what_one_run_never_drew(recipe, tmp_path):
    """Of 24 rows four batches of four have 16, and other orders have other ones: no effect is known to be 0."""
    few = recipe.with_(epochs=1, steps=4)
    run = TrainingRun.train(few, tmp_path / "run")
    run.measure(retrain=12, heldout=2, repeats=3, queries=QUERIES)
    never = few.untrained_units()[0]
    sets = [[never], ["u0"], ["u0", never]]
    new, same = (run.predict(QUERIES, sets, meaning=name) for name in ("new-run", "same-run"))
    assert np.isinf(new.std).tolist() == [[True, False, True]] * 3 and not any(new.never)
    assert np.isfinite(same.std).all() and same.never == (True, False, False)
    x = np.zeros(UNITS)
    x[few.unit_names.index(never)] = 1
    seeds = range(20)
    apart = [plain(few, x, seed) - plain(few, np.zeros(UNITS), seed + 100) for seed in seeds]
    assert np.abs(np.mean(apart, 0)).max() > 0.02
    assert run.predict(QUERIES[:1], [[never]]).table().title.endswith("with an unknown error.")


# --- from the same run to new ones ---------------------------------------------------------------------------------


def test_an_estimator_is_asked_at_what_rows_weigh_in_a_new_run(recipe, noisy):
    """24 rows in batches of 4; without 2 of them the last batch has 2, and each row's part of all batches grows."""
    x = np.zeros((3, UNITS))
    x[1, 0] = x[2, :4] = 1
    parts = []
    for row in x:
        batches = [b for seed in range(200) for b in new_run(recipe, row, seed).batches()]
        parts.append(sum(1 / len(b) for b in batches if 23 in b))
    wanted = np.array([1, 24 / 22, 1])
    assert np.allclose(weights_left(recipe, x), wanted) and np.allclose(np.array(parts) / parts[0], wanted, rtol=0.05)
    adam = recipe.with_(optimizer=OptimizerSettings("adam", 0.01))
    assert np.array_equal(weights_left(adam, x), np.ones(3))
    places = noisy.bank.at_new_runs(x, EstimatorSettings())
    assert np.allclose(places[1], [1, *[1 - 24 / 22] * 11]) and np.array_equal(places[2], x[2])
    assert np.array_equal(noisy.bank.at_new_runs(x, EstimatorSettings("leave_one_out")), x)


def test_first_orders_of_other_orders_are_their_metagradients(recipe, tmp_path):
    run = TrainingRun.train(recipe, tmp_path / "run")
    run.measure(gradient=True, repeats=3, queries=QUERIES)
    nothing, asked = np.zeros(UNITS), p_queries()
    wanted = [metagradient(recipe, asked).effects]
    wanted += [metagradient(new_run(recipe, nothing, _order_seed(nothing, 0, k)), asked).effects for k in range(3)]
    shift = run.bank.shift(asked, EstimatorSettings("first_order"), run.bank.noise(asked))
    assert np.allclose(shift.orders, wanted, atol=1e-6)
    x = np.eye(UNITS)[:2]
    effect, std = shift.shifted(x, x, wanted[0] @ x.T, np.zeros((3, 2)))
    assert np.allclose(effect, np.mean(wanted, 0) @ x.T)
    assert (std**2 >= np.var([g @ x.T for g in wanted], axis=0, ddof=1) / 4).all()


def test_sets_in_each_order_are_the_mean_of_runs_without_them(recipe, tmp_path):
    """Beside `train_plain` of each order, at what rows weigh in a new run; wherever a call stopped, and with two workers."""
    run, sets = TrainingRun.train(recipe, tmp_path / "run"), [["u0"], ["u1", "u2"]]
    asked = {"queries": QUERIES, "without": sets, "repeats": 3}
    run.measure(**asked)
    run.measure(**asked, each_order=True, settings=MeasureSettings(workers=2, progress=False))
    before = len(run.bank)
    run.measure(**asked, each_order=True)
    assert len(run.bank) == before and "retraining in another order" in str(run.bank.info()["measurements"])
    x, nothing, effects = deletion_sets(recipe, sets).x, np.zeros(UNITS), []
    assert weights_left(recipe, x).round(3).tolist() == [1.091, 1.0]  # of the second the same run is one more
    for order in (recipe, *(new_run(recipe, nothing, _order_seed(nothing, 0, k)) for k in range(3))):
        weights = weights_left(recipe, x)[:, None] * (1 - x)
        whole, *left = (
            query_losses(order, train_plain(order, torch.from_numpy(w)), QUERIES).double().numpy()
            for w in (1 - nothing, *weights)
        )
        effects.append([one - whole for one in left])
    found = run.predict(QUERIES, sets)
    wanted = np.stack([np.mean(effects[1:], 0)[0], np.mean(effects, 0)[1]], 1)
    assert found.meaning == NEW_RUN and np.allclose(found.effect, wanted, atol=1e-5)
    assert (found.std > 0).all()
    with pytest.raises(ValueError, match="each_order is of sets that you name"):
        run.measure(**{**asked, "repeats": 0}, each_order=True)
    plan = run.plan(QUERIES, sets, Budget(60))
    assert plan.best.arguments["each_order"] and "in 5 orders" in plan.best.name
    assert plan.best.arguments["heldout"] > 0, "new runs of held-out sets tell what lost steps are worth"


def test_what_the_same_run_bends_is_taken_at_the_set_itself():
    """The first order alone is asked at what the rest weighs in a new run, so that a retrained set is as it was."""
    orders = np.array([[[1.0, 0.5]], [[2.0, 0.5]]])
    shift = Shift(run_noise(np.random.default_rng(0).standard_normal((5, 1))), np.full(2, 0.5), orders, 1.0)
    x, asked = np.array([[1.0, 0.0]]), np.array([[1.0, -0.1]])
    found, _ = shift.shifted(x, asked, np.array([[4.0]]), np.zeros((1, 1)))
    assert found[0, 0] == pytest.approx(1.5 - 0.05 + (4.0 - 1.0))


def test_strong_sets_keep_what_they_bend_and_what_the_rest_weighs_more(tmp_path, monkeypatch):
    """However wide their intervals are: parts and steps say how far such a set bends an effect, in whatever order."""
    orders = np.array([[[1.0, 0.5]], [[2.0, 0.5]]])
    shift = Shift(run_noise(np.random.default_rng(0).standard_normal((5, 1))), np.full(2, 0.5), orders, 1.0)
    x, effect, std = np.eye(2), np.array([[4.0, 3.0]]), np.full((1, 2), 1e3)
    found, _ = shift.shifted(x, x, effect, std, np.array([[True, False]]))
    assert np.allclose(found, [[4.5, 0.5]], atol=1e-4)
    many = Recipe("classifier", points(70), batch_size=8, order="shuffled", optimizer=OptimizerSettings("sgd", 0.3))
    run = TrainingRun.train(many, tmp_path / "run")
    run.measure(retrain=6, repeats=3, queries=QUERIES, settings=MeasureSettings(sizes=(30,)))
    monkeypatch.setattr(TrainingRun, "_strong", lambda self, *given: np.ones((3, 1), bool))
    monkeypatch.setattr("leaveout.deletion.run.mended", lambda predicted, *others: (0 * predicted[0], predicted[1]))
    removed = np.zeros((1, 70))
    removed[0, :9] = 1
    fitted, _ = run.bank.fit(p_queries(), EstimatorSettings())
    places = run.bank.at_new_runs(removed, EstimatorSettings())
    wanted = fitted.predict(places)[0] - fitted.predict(removed)[0]
    assert np.abs(wanted).max() > 1e-3
    assert np.allclose(run.predict(QUERIES, [list(many.ids[:9])]).effect, wanted)
    assert (run.predict(QUERIES, [list(many.ids[:9])], meaning="same-run").effect == 0).all()


@pytest.mark.parametrize(("by_share", "anyway"), [(1.0, 0.0), (10.0, 0.0), (1.0, 1.0)])
def test_what_held_out_new_runs_say_is_found(by_share, anyway):
    chance, queries, sets, units = np.random.default_rng(0), 40, 120, 60
    noise = run_noise(chance.standard_normal((200, queries)))
    prior = Shift(noise, np.full(units, 1 / units), np.zeros((0, 0, 0)), 3.0)
    x = (chance.random((sets, units)) < np.linspace(0.02, 0.4, sets)[:, None]).astype(float)
    x[:, 0] = 1
    effect = 3 * chance.standard_normal((queries, sets))
    apart = np.sqrt(by_share * x.mean(1) + anyway)
    y = (
        (1 - anyway / 9) * effect
        + apart * chance.standard_normal((queries, sets))
        + chance.standard_normal((queries, sets))
    )
    held = NewRuns(x, (y + noise.mean[:, None]).T, np.arange(sets))
    found = fit_shift(prior, held, x, x, effect, np.zeros((queries, sets)), np.zeros(sets))
    assert found.worth is None
    assert found.by_share * 0.2 + found.anyway == pytest.approx(by_share * 0.2 + anyway, rel=0.4)
    assert (found.anyway > 0.3) == (anyway > 0)


def test_what_steps_are_worth_is_found_beside_wild_sets():
    chance, queries, sets = np.random.default_rng(0), 30, 12
    noise = run_noise(0.1 * chance.standard_normal((4, queries)))
    worth, lost = 1 + 0.3 * chance.standard_normal(queries), np.resize([0.05, 0.1, 0.2, 0.3], sets)
    y = worth[:, None] * lost + 0.1 * chance.standard_normal((queries, sets))
    y[:, 0] += 5
    y[3], noise.std[3], noise.mean[3] = 0, 0, 0  # a query that never moves says nothing of others
    held = NewRuns(np.zeros((sets, 5)), (y + noise.mean[:, None]).T, np.arange(sets))
    prior, nothing = Shift(noise, np.full(5, 0.2), np.zeros((0, 0, 0)), 1.0), np.zeros((queries, sets))
    found, wrong = fit_shift(prior, held, held.x, held.x, nothing, nothing, lost).worth
    others = np.arange(queries) != 3
    assert np.abs(found - worth)[others].mean() < 0.2 and (np.abs(found - worth) < 2 * wrong)[others].mean() > 0.85
    assert found[3] == 0


def test_new_runs_on_fewer_rows_have_fewer_steps(tmp_path):
    """Adam's steps are as long for any rows: a run that lacks a part of them ends elsewhere, which no weight says."""
    rows = tuple((x, int(x[:3].argmax())) for x, _ in points(96))
    recipe = Recipe(
        "classifier", rows, units=tuple(f"u{i // 8}" for i in range(96)), batch_size=4, epochs=2, order="shuffled",
        optimizer=OptimizerSettings("adamw", 2e-2), model={"hidden": [4]},
    )  # fmt: skip
    run, sets = TrainingRun.train(recipe, tmp_path / "run"), [["u1", "u4", "u7"], ["u0", "u2", "u5", "u9"]]
    asked, quiet = (
        [(x, int(x[:3].argmax())) for x, _ in points(3, seed=9)],
        MeasureSettings(sizes=(1, 3, 4), progress=False),
    )
    run.measure(retrain=20, heldout=8, repeats=4, queries=asked, settings=quiet)
    assert steps_lost(recipe, deletion_sets(recipe, sets).x).tolist() == [0.25, pytest.approx(1 / 3)]
    found, same = run.predict(asked, sets), run.predict(asked, sets, meaning="same-run")
    runs = [run.retrain(asked, sets, replace(quiet, seed=seed), meaning="new-run") for seed in range(6)]
    left = np.mean(runs, 0) - found.base
    assert np.abs(found.effect - left).mean() < 0.8 * np.abs(same.effect - left).mean()


def test_unstable_runs_shrink_what_is_no_larger_than_chance():
    noise = run_noise(np.random.default_rng(0).standard_normal((50, 9)))
    shift = Shift(noise, np.full(4, 0.25), np.zeros((0, 0, 0)), 1.0, 1.0)
    effect = noise.std[:, None] * np.array([[0.5, 1.5, 20.0]])
    found, _ = shift.shifted(np.eye(4)[:3], np.eye(4)[:3], effect, np.zeros((9, 3)))
    assert np.allclose(found, effect * [0.25, 1 - 0.455 / 2.25, 1 - 0.455 / 400])  # nothing is without a rank


def test_noise_drowns_small_effects_and_says_how_many_seeds_show_them():
    effect = np.array([[0.1, 0.6, 0.1]])
    p = Prediction(
        ("q",), ("a", "b", "c"), np.ones((1, 3)), effect, np.array([[0.05, 0.05, 0.5]]), "posterior", np.ones((1, 3)),
        np.zeros((1, 3), bool), meaning="new run", run_std=np.full((1, 3), 0.2),
    )  # fmt: skip
    verdicts = [line["verdict"] for line in p.lines()]
    assert verdicts == ["not distinguishable from a new seed", "rises", "cannot tell from zero"]
    assert next(p.lines())["seeds"] == 63  # 2 (1.96 + 0.84)^2 (0.2 / 0.1)^2 = 62.8
    assert "(63 runs each way would show it)" in p.table().rows[0][-1]


def test_plan_buys_repeats_within_its_budget(recipe, tmp_path):
    run = TrainingRun.train(recipe, tmp_path / "run")
    plan = run.plan(QUERIES, [["u0"], ["u1", "u2"]], Budget(30, examples=True))
    assert plan.best.arguments["repeats"] == 4 and "Each choice buys new runs, too: 4 with all data" in str(plan)
    assert plan.best.arguments["gradient"], "one order alone says little of new runs"
    none = run.plan(QUERIES, [["u0"]], Budget(30, examples=True, repeats=0))
    assert "repeats" not in none.best.arguments and none.best.seconds <= plan.best.seconds
    with pytest.raises(ValueError, match="repeats is 1"):
        Budget(30, repeats=1)


# --- the deviation of a run ----------------------------------------------------------------------------------------


def test_quantiles_are_students():
    stats = pytest.importorskip("scipy.stats")
    for freedom in (3, 5, 9, 30, 1e3, np.inf):
        assert quantile(0.975, np.array(freedom)) == pytest.approx(stats.t.ppf(0.975, freedom), rel=0.01)


@pytest.mark.parametrize("spread", [0.0, 0.7], ids=["all alike", "each its own"])
def test_intervals_of_a_new_run_hold(spread):
    """Four runs, twenty queries: the interval of one more run holds 95 %, at less than the width of four runs alone."""
    chance, inside, widths, alone = np.random.default_rng(0), [], [], []
    for _ in range(300):
        scale = np.exp(spread * chance.standard_normal(20))
        values, more = scale * chance.standard_normal((4, 20)), scale * chance.standard_normal(20)
        found = run_noise(values)
        half = quantile(0.975, np.array(found.freedom)) * found.std * np.sqrt(1 + 1 / 4)
        inside.append(np.abs(more - found.mean) < half)
        widths.append(half / scale)
        alone.append(3.182 * values.std(0, ddof=1) * np.sqrt(1.25) / scale)
    assert 0.93 < np.mean(inside) < 0.98
    assert np.mean(widths) < 0.92 * np.mean(alone)


def test_queries_that_move_together_are_no_more_than_one():
    chance = np.random.default_rng(0)
    together = chance.standard_normal((4, 1)) * np.ones((1, 30)) + 1e-3 * chance.standard_normal((4, 30))
    assert run_noise(together).freedom < 3.5
    assert run_noise(chance.standard_normal((4, 30))).freedom > 12
    still = run_noise(np.ones((4, 3)))
    assert (still.std == 0).all() and np.isinf(still.freedom)
