"""Units that are in no step: they are named, and their effect is 0 without a guess."""

import json

import numpy as np
import pytest
import torch
import yaml
from typer.testing import CliRunner

from leaveout.cli import app
from leaveout.deletion.predict import NEVER
from leaveout.deletion.run import TrainingRun
from leaveout.training.recipe import OptimizerSettings, Recipe

ESTIMATORS = ["posterior", "least_squares", "leave_one_out", "mean"]


def points(n=8):
    g = torch.Generator().manual_seed(0)
    return tuple((torch.randn(4, generator=g), i % 3) for i in range(n))


def recipe(**changes):
    settings = {"batch_size": 3, "epochs": 3, "optimizer": OptimizerSettings("sgd", 0.3), "dtype": "float64", **changes}
    return Recipe("classifier", points(), units=tuple("aabbccde"), **settings)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Examples 6 and 7, units d and e, are dropped."""
    opened = TrainingRun.train(recipe(drop_last=True), tmp_path_factory.mktemp("untrained") / "run")
    opened.measure(directions=6, retrain=5, design="singles", heldout=3)
    return opened


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_effect_without_what_was_never_trained_on_is_zero(run, estimator):
    sets = [["d"], ["d", "e"], ["a"], ["a", "d"]]
    found = run.predict(list(points(2)), sets, estimator)
    assert found.effect[:, :2].tolist() == [[0.0, 0.0]] * 2 and np.abs(found.effect[:, 2:]).min() > 0
    assert np.array_equal(found.effect[:, 2], found.effect[:, 3])  # d adds nothing to a
    lines = list(found.lines())
    assert [line["verdict"] == NEVER for line in lines] == [True, True, False, False] * 2
    assert [line.get("never_trained_on") for line in lines[:4]] == [["d"], ["d", "e"], None, ["d"]]
    assert [line["std"] for line in lines[:2]] == [0.0, 0.0]


def test_really_retrained_without_it_the_model_is_the_same(run):
    found = run.verify(list(points(2)), [["d"], ["a"]])
    assert found.actual is not None
    np.testing.assert_allclose(found.actual[:, 0], found.base[:, 0], rtol=1e-12)
    assert [line["inside"] for line in found.lines() if line["without"] == "d"] == [True, True]


def test_a_set_that_was_measured_but_for_such_units_proves_nothing(run):
    found = run.verify(list(points(2)), [["a", "d"], ["a"], ["a", "b", "d"]])
    assert found.measured.tolist() == [True, True, False] and np.array_equal(found.actual[:, 0], found.actual[:, 1])
    real = run.retrain(list(points(2)), [["a", "d"]])
    np.testing.assert_allclose(found.actual[:, :1], real, rtol=1e-12)


def test_where_every_unit_is_trained_nothing_is_said(tmp_path):
    opened = TrainingRun.train(recipe(), tmp_path / "run")
    opened.measure(retrain=5, design="singles")
    lines = list(opened.predict(list(points(2)), [["d"], ["e"]]).lines())
    assert not any("never_trained_on" in line or line["verdict"] == NEVER for line in lines)
    assert all(line["effect"] != 0 for line in lines) and opened.notes == []


def test_train_predict_and_info_say_so(tmp_path):
    x = np.stack([p.numpy() for p, _ in points()])
    np.savez(tmp_path / "d.npz", x=x, y=np.arange(8) % 3)
    np.savez(tmp_path / "q.npz", x=x[:1], y=[0])
    fields = {"kind": "classifier", "data": "d.npz", "batch_size": 3, "epochs": 2, "drop_last": True}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(fields))
    run, queries = str(tmp_path / "run"), str(tmp_path / "q.npz")
    trained = CliRunner().invoke(app, ["train", str(tmp_path / "r.yaml"), "--out", run])
    assert "2 of 8 units are in no step, so that nothing changes without them: 6, 7." in trained.stderr
    CliRunner().invoke(app, ["measure", run, "--retrain", "3", "--design", "singles"])
    said = CliRunner().invoke(app, ["predict", run, "--queries", queries, "--without", "7", "--without", "1"])
    assert said.stdout.count(NEVER) == 1
    line = CliRunner().invoke(app, ["predict", run, "--queries", queries, "--without", "7", "--json"]).stdout
    assert json.loads(line)["effect"] == 0 and json.loads(line)["never_trained_on"] == ["7"]
    info = json.loads(CliRunner().invoke(app, ["info", run, "--json"]).stdout)
    assert info["never_trained_on"] == ["6", "7"] and "in no step" in info["notes"][0]
