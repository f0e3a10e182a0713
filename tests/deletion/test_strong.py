"""Sets that remove most of what helps a query: their halves, and steps from the trained model instead of retraining."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from command import run_command
from leaveout.corpus import Corpus
from leaveout.deletion import newton
from leaveout.deletion.directions import halved
from leaveout.deletion.estimators import EstimatorSettings
from leaveout.deletion.measurements import Retrainings
from leaveout.deletion.newton import Newton, cheaper
from leaveout.deletion.run import TrainingRun
from leaveout.deletion.strong import DOUBT, mended, parts_of
from leaveout.errors import FormatError, MismatchError, StabilityError, UnsupportedError
from leaveout.training.loop import Steps
from leaveout.training.queries import as_queries, query_function
from leaveout.training.recipe import OptimizerSettings, Recipe
from leaveout.training.tasks import task_of
from leaveout.training.train import train_plain
from test_reverse_scale import llama, recipe_of

from .conftest import FAST, QUERIES


def test_halves_are_two_parts_of_each_set_and_do_not_depend_on_the_others():
    x = np.array([[1, 0, 1, 1, 0.5, 0], [0, 0, 0, 0, 0, 1], [1, 1, 0, 0, 0, 0]], float)
    found = halved(x, seed=3)
    assert len(found) == 5 and (found[:2].sum(0) == x[0]).all() and (found[3:].sum(0) == x[2]).all()
    assert (found[2] == x[1]).all() and ((found[:2] > 0).sum(1) == 2).all()
    assert (halved(x[2:], seed=3) == found[3:]).all()
    assert any((halved(x[:1], seed=seed) != found[:2]).any() for seed in range(9))


def test_halves_are_retrained_instead_of_the_set(run, monkeypatch, capsys):
    set_ = [run.recipe.ids[i] for i in (0, 3, 5, 9)]
    run.measure(without=[set_], halves=True, queries=QUERIES, settings=FAST)
    known = run.bank.measurements(QUERIES).retrainings
    assert len(known) == 2 and known.x.sum(0)[[0, 3, 5, 9]].tolist() == [1, 1, 1, 1] and known.x.sum() == 4
    assert run.bank.info()["measurements"] == {"retraining, halves, fit": 2}
    with pytest.raises(ValueError, match="halves are those of sets that you name"):
        run.measure(halves=True, settings=FAST)
    code, _, told = run_command(monkeypatch, capsys, "measure", run.path, "--halves", "--retrain", "2")
    assert code == 2 and "--halves are those of sets that you name" in told


def classes(n=40):
    """Points of three classes in two dimensions, and the recipe of a linear model of them."""
    chance = np.random.default_rng(0)
    labels = np.arange(n) % 3
    points = chance.standard_normal((n, 2)) + 1.5 * np.array([[1, 0], [-1, 1], [0, -1.5]])[labels]
    examples = tuple((torch.tensor(x), int(y)) for x, y in zip(points, labels, strict=True))
    sgd = OptimizerSettings("sgd", lr=0.05)
    recipe = Recipe(
        "classifier", examples, model={"hidden": []}, optimizer=sgd, batch_size=4, epochs=6, dtype="float64"
    )
    return recipe, torch.tensor(points), torch.tensor(labels)


def letters_of(rows, **changes):
    model = recipe_of(llama).model
    return Recipe("causal-lm", tuple(Corpus.open(rows, units="id")), model=model, batch_size=2, epochs=2, **changes)


def test_weights_of_rows_pull_as_they_do_in_training():
    texts = ("the red fox", "a blue jar", "rain", "two and two is")
    rows = [
        {"id": str(i), "text": text, "weight": w} for i, (text, w) in enumerate(zip(texts, (1, 3, 0.5, 2), strict=True))
    ]
    recipe = letters_of(rows, optimizer=OptimizerSettings("sgd", 0.1), dtype="float64", loss_per="token")
    steps = Newton(recipe, train_plain(recipe))
    _, found = steps._loss(steps._model.theta, np.arange(4), steps._pull)
    task = steps._task
    whole = Steps(recipe, task)
    with torch.no_grad():
        for p, own in zip(task.parameters().values(), steps._model.named(steps._model.theta).values(), strict=True):
            p.copy_(own)
    loss = sum(whole.loss(part) for step in range(len(whole)) for part in whole.parts(step)) / len(whole)
    wanted = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(task.parameters().values()))])
    assert (found - wanted).norm() < 1e-5 * wanted.norm()


def test_preference_rows_have_no_steps():
    rows = [{"id": str(i), "prompt": "the ", "chosen": "red", "rejected": "fox"} for i in range(4)]
    recipe = letters_of(rows, loss={"kind": "dpo", "beta": 0.5}, steps=5000)
    assert not cheaper(recipe)
    with pytest.raises(UnsupportedError, match="need a model that gives logits"):
        Newton(recipe, dict(task_of(recipe).parameters()))


def test_newton_steps_follow_the_descent_that_a_plain_loop_of_small_steps_follows(monkeypatch):
    recipe, points, labels = classes()
    trained = train_plain(recipe)
    x = np.zeros((2, 40))
    x[0, :24:3], x[1, 5] = 1, 0.5  # eight of fourteen of one class; half of one example
    asked = as_queries([(points[0], 0), (points[1], 1)])
    ask = query_function(task_of(recipe), asked)
    monkeypatch.setattr(newton, "SAMPLE", 40)
    found = Newton(recipe, trained).effects(x, ask)

    weight, bias = (trained[name].clone() for name in trained)
    start, length = (weight.clone(), bias.clone()), 0.05 * 60

    def slope(parts, weights):
        parts = [p.clone().requires_grad_() for p in parts]
        losses = cross_entropy(points @ parts[0].T + parts[1], labels, reduction="none")
        return torch.autograd.grad((losses * weights).sum() / 40, parts)

    def values(parts):
        return cross_entropy(points[:2] @ parts[0].T + parts[1], labels[:2], reduction="none")

    pull = slope(start, torch.ones(40))
    for number, gone in enumerate(x):
        parts = start
        for _ in range(600):
            down = slope(parts, torch.tensor(1 - gone))
            parts = tuple(p - length / 600 * (d - g) for p, d, g in zip(parts, down, pull, strict=True))
        exact = (values(parts) - values(start)).numpy()
        assert np.abs(found[:, number] - exact).max() < 0.03 * np.abs(exact).max()


def test_steps_that_would_climb_are_halved_and_those_that_never_settle_are_refused(monkeypatch):
    recipe, points, _ = classes()
    trained, x = train_plain(recipe), np.zeros((1, 40))
    x[0, :24:3] = 1
    ask = query_function(task_of(recipe), as_queries([(points[0], 0)]))
    wanted = Newton(recipe, trained).effects(x, ask)
    turned = newton.refined
    lengths = []

    def far(model, sample, pulls, run):  # a thousand times too far, unless the step is short
        lengths.append(run.rates)
        too_far = run.rates > 0.05
        return [d * (1000 if too_far else 1) for d in turned(model, sample, pulls, run)]

    monkeypatch.setattr(newton, "refined", far)
    np.testing.assert_allclose(Newton(recipe, trained).effects(x, ask), wanted, rtol=0.02)
    assert max(lengths) > 0.3 and min(lengths) < 0.05
    monkeypatch.setattr(newton, "refined", lambda *given: [-d for d in turned(*given)])
    with pytest.raises(StabilityError, match="do not settle: retrain it"):
        Newton(recipe, trained).effects(x, ask)


def test_strong_sets_are_mended_by_their_measured_parts_and_by_steps():
    known = Retrainings(np.array([[1, 1, 0, 0], [0, 0, 1, 0], [0, 1, 1, 0]], float), np.array([[1.0], [2.0], [4.0]]))
    x = np.array([[1, 1, 1, 0], [1, 0, 1, 0], [0, 1, 1, 0]], float)
    assert parts_of(x, known) == [(0, 1), None, None]
    mean, std = np.array([[5.0, 6.0, 7.0]]), np.array([[1.0, 1.0, 1.0]])

    def steps(rows):
        return (rows.sum(1) ** 2)[None]

    found, error = mended((mean, 9 * std), (mean, std), x, np.array([[True, True, False]]), known, steps)
    # parts: 1 + 2, and by steps 9 of the whole less 4 + 1; the other: 4 by steps
    np.testing.assert_allclose(found, [[3 + 9 - 5, 4, 7]])
    np.testing.assert_allclose(error, [[np.hypot(9, DOUBT * 4), np.hypot(1, DOUBT * 4), 9]])


def test_steps_that_do_not_settle_are_told_and_left_out_where_nobody_asked_for_them(tmp_path, monkeypatch, capsys):
    recipe, points, _ = classes(80)
    run = TrainingRun.train(recipe, tmp_path / "run")
    asked, sets = [(points[0], 0)], [[str(i) for i in range(0, 80, 3)]]
    run.measure(gradient=True, queries=asked, settings=FAST)
    wanted = run.predict(asked, sets, EstimatorSettings(steps=False))

    def never(*_):
        raise StabilityError("do not settle")

    monkeypatch.setattr(Newton, "moved", never)
    monkeypatch.setattr("leaveout.deletion.run.cheaper", lambda _: True)
    found = run.predict(asked, sets)
    assert "do not settle and are left out" in capsys.readouterr().err
    np.testing.assert_array_equal(found.effect, wanted.effect)
    np.testing.assert_array_equal(found.std, wanted.std)
    with pytest.raises(StabilityError):
        run.predict(asked, sets, EstimatorSettings(steps=True))


def test_label_smoothing_has_no_steps():
    recipe = replace(classes()[0], label_smoothing=0.1)
    assert not cheaper(recipe)
    with pytest.raises(UnsupportedError, match="know no label smoothing"):
        Newton(recipe, train_plain(recipe))


def test_a_model_without_logits_takes_no_steps():
    recipe = Recipe("custom", ((torch.ones(2), 0),), model=lambda: torch.nn.Linear(2, 1), loss=own_loss, version="1")
    with pytest.raises(UnsupportedError, match="need a model that gives logits"):
        Newton(recipe, train_plain(recipe))


def own_loss(model, batch):
    return model(batch[0]).square().mean(1)


def test_the_command_takes_steps(run, monkeypatch, capsys):
    run.measure(retrain=3, design="singles", settings=FAST)
    asked = ("predict", run.path, "--query", "anri", "--without", run.recipe.ids[0])
    monkeypatch.setattr(TrainingRun, "open", lambda *_, **__: run)
    seen = []
    predict = TrainingRun.predict
    monkeypatch.setattr(
        TrainingRun, "predict", lambda s, a, w, e, **k: seen.append(e.steps) or predict(s, a, w, e, **k)
    )
    for more in ((), ("--steps",), ("--no-steps",)):
        assert run_command(monkeypatch, capsys, *asked, *more)[0] == 0
    assert seen == [None, True, False]
    told = run_command(monkeypatch, capsys, *asked, "--steps", "--estimator", "leave_one_out")[2]
    assert "steps go with posterior" in told


def test_steps_mend_predictions_of_strong_sets_where_asked_for_and_of_others_not(tmp_path):
    recipe, points, _ = classes(80)
    run = TrainingRun.train(recipe, tmp_path / "run")
    asked = [(points[0], 0), (points[1], 1)]
    run.measure(gradient=True, queries=asked, settings=FAST)
    sets = [[str(i) for i in range(0, 80, 3)], ["4", "7"]]
    plain, stepped = (run.predict(asked, sets, EstimatorSettings(steps=steps)) for steps in (None, True))
    actual = run.retrain(asked, sets) - plain.base
    assert not cheaper(recipe) and (stepped.effect[:, 1] == plain.effect[:, 1]).all()
    assert abs(stepped.effect[0, 0] - actual[0, 0]) < 0.7 * abs(plain.effect[0, 0] - actual[0, 0])
    run.measure(without=sets[:1], queries=asked, settings=FAST)
    measured = run.predict(asked, sets, EstimatorSettings(steps=True))
    np.testing.assert_allclose(measured.effect[:, 0], actual[:, 0], rtol=0.02)
    with pytest.raises(ValueError, match="steps go with posterior"):
        EstimatorSettings("first_order", steps=True)


# --- what is refused before anything is trained --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("without", "sentence"),
    [
        ([[]], "A deletion set is empty: name at least one id"),
        ([["nobody"]], "no unit and no example with the id 'nobody'"),
        ("all", "removes everything: leave something to train on"),
    ],
)
@pytest.mark.parametrize("verb", ["measure", "retrain", "verify", "plan"])
def test_sets_that_are_empty_whole_or_unknown_are_refused_before_work(run, monkeypatch, verb, without, sentence):
    monkeypatch.setattr(TrainingRun, "_retrain", lambda *_: pytest.fail("work was begun"))
    without = [list(run.recipe.ids)] if without == "all" else without
    calls = {
        "measure": lambda: run.measure(without=without, settings=FAST),
        "retrain": lambda: run.retrain(QUERIES, without, FAST),
        "verify": lambda: run.verify(QUERIES, without),
        "plan": lambda: run.plan(QUERIES, without, "1min"),
    }
    with pytest.raises(FormatError, match=sentence):
        calls[verb]()


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    from jets.test_recipe import ROWS, tiny_gpt2

    place = tiny_gpt2(tmp_path_factory.mktemp("lm"))
    recipe = Recipe("causal-lm", tuple(ROWS), model=str(place), batch_size=2)
    return TrainingRun.train(recipe, tmp_path_factory.mktemp("runs") / "run")


@pytest.mark.parametrize("query", ["a", {"prompt": "say a: ", "completion": ""}, {"text": ""}])
def test_queries_without_a_learned_token_are_refused_before_work(lm, monkeypatch, query):
    monkeypatch.setattr(TrainingRun, "_retrain", lambda *_: pytest.fail("work was begun"))
    with pytest.raises(FormatError, match=r"no token to learn|nothing is learned"):
        lm.measure(retrain=2, queries=[query], settings=FAST)


def test_a_run_of_other_libraries_is_not_measured_on(lm, monkeypatch):
    monkeypatch.setattr("leaveout.training.recipe.installed", lambda name: {"torch": "9.9"}.get(name, "1"))
    monkeypatch.setattr(TrainingRun, "_retrain", lambda *_: pytest.fail("work was begun"))
    unit = [[lm.recipe.unit_names[0]]]
    for measured in (lambda: lm.measure(retrain=2, settings=FAST), lambda: lm.retrain(["say ann: ann"], unit, FAST)):
        with pytest.raises(MismatchError, match=r"was trained with torch .*, and here is 9\.9.*: install torch=="):
            measured()
