"""The deletion engine's commands, in this process: answers against the Python API, and one sentence for every error."""

from __future__ import annotations

import itertools
import json
import re
import shlex
import shutil

import numpy as np
import pytest
import torch

from command import run_command
from leaveout import Recipe, TrainingRun, UnsupportedError, load_scores, report
from leaveout.deletion.plan import Budget
from leaveout.deletion.predict import prediction_table
from leaveout.methods.gradient_dot import GradientDot
from leaveout.training.queries import query_losses
from leaveout.training.tasks import task_of
from leaveout.training.train import train_plain

NAMES = ("ana", "bob", "cleo", "dan", "eva", "finn", "gus", "hana", "ivo", "jana", "kim", "lou")
RECIPE = "kind: microgpt\ndata: names.txt\nunits: units.json\nsteps: 12\n"
QUERIES = ("nina", "bea")


def write_recipe(place):
    """Twelve names in four units."""
    (place / "names.txt").write_text("\n".join(NAMES) + "\n")
    recipe = place / "recipe.yaml"
    recipe.write_text(RECIPE.replace("units: units.json\n", ""))
    group = {name: "abcd"[number // 3] for number, name in enumerate(NAMES)}
    (place / "units.json").write_text(json.dumps({id: group[id.split(":")[1]] for id in Recipe.from_yaml(recipe).ids}))
    recipe.write_text(RECIPE)
    return recipe


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A directory with a recipe and its run, measured by retraining; not to be changed."""
    place = tmp_path_factory.mktemp("deletion")
    run = TrainingRun.train(write_recipe(place), place / "run")
    run.measure(retrain=8, heldout=3)
    return place


@pytest.fixture
def leaveout(monkeypatch, capsys):
    def run(*arguments):
        return run_command(monkeypatch, capsys, *arguments)

    return run


def asking(*names):
    return [part for name in names for part in ("--query", name)]


def test_train_measure_and_info_count_what_is_there(leaveout, tmp_path):
    recipe, run = write_recipe(tmp_path), tmp_path / "run"
    for _ in range(2):  # the second time it reopens
        code, out, _ = leaveout("train", recipe, "--out", run, "--json")
        assert code == 0
        assert {"examples": 12, "units": 4, "steps": 12}.items() <= json.loads(out).items()
    command = (
        "measure",
        run,
        "--directions",
        3,
        "--degree",
        2,
        "--retrain",
        5,
        "--heldout",
        2,
        "--sizes",
        "2",
        "--seed",
        7,
    )
    code, out, err = leaveout(*command, "--workers", 2, "--dtype", "complex128", "--memory", "1GB", "--json")
    assert code == 0 and "jets of degree 2" in err
    counts = {"jets of degree 2": 3, "retraining, auto, fit": 5, "retraining, random, heldout": 2}
    facts = json.loads(out)
    assert facts["added"] == sum(counts.values())
    for name, n in counts.items():
        assert [v for k, v in facts["measurements"].items() if k.startswith(name)] == [n]
    assert json.loads(leaveout(*command, "--dtype", "complex128", "--json")[1])["added"] == 0
    info = json.loads(leaveout("info", run, "--json")[1])
    assert (info["kind"], info["examples"], info["units"]) == ("microgpt", 12, 4)
    assert info["measurements"] == facts["measurements"]
    assert leaveout("check", run)[:2] == (0, "all files are as they were written\n")
    part = next((run / "bank").glob("*.safetensors"))
    data = bytearray(part.read_bytes())
    data[-1] ^= 1
    part.write_bytes(data)
    code, out, _ = leaveout("check", run)
    assert code == 1 and part.name in out


def test_predict_says_what_the_api_says(leaveout, trained, tmp_path):
    (tmp_path / "queries.jsonl").write_text("".join(json.dumps({"text": name}) + "\n" for name in QUERIES))
    (tmp_path / "sets.jsonl").write_text('["a", "c"]\n{"d": 0.5}\n')
    options = [
        "--without",
        "a",
        "--without",
        "b, c",
        "--without-where",
        "unit = 'd'",
        "--sets",
        tmp_path / "sets.jsonl",
    ]
    code, out, _ = leaveout("predict", trained / "run", "--queries", tmp_path / "queries.jsonl", *options, "--json")
    assert code == 0
    lines = [json.loads(line) for line in out.splitlines()]
    labels = ["a", "b, c", "unit = 'd'", "a, c", "d=0.5"]
    assert [(line["query"], line["without"]) for line in lines] == [(q, w) for q in QUERIES for w in labels]
    sets = [["a"], ["b", "c"], ["d"], ["a", "c"], {"d": 0.5}]
    found = TrainingRun.open(trained / "run").predict(list(QUERIES), sets)
    for key, values in (("base", found.base), ("predicted", found.mean), ("std", found.std)):
        np.testing.assert_allclose([line[key] for line in lines], values.ravel(), rtol=1e-9)
    assert {line["estimator"] for line in lines} == {"posterior"}
    assert all("actual" not in line for line in lines)


def test_predict_takes_a_behaviour(leaveout, trained, tmp_path):
    file = tmp_path / "likes names.jsonl"
    file.write_text("".join(json.dumps({"text": q, "sign": s}) + "\n" for q, s in zip(QUERIES, (1, -1), strict=False)))
    code, out, _ = leaveout("predict", trained / "run", "--behaviour", file, "--without", "a", "--json")
    line = json.loads(out)
    found = TrainingRun.open(trained / "run").predict(list(QUERIES[:2]), [["a"]])
    assert code == 0 and line["query"] == "likes names"
    np.testing.assert_allclose(line["predicted"], found.mean[0, 0] - found.mean[1, 0], rtol=1e-6)


def test_predict_by_another_estimator_gives_other_numbers(leaveout, trained):
    ask = ["predict", trained / "run", *asking("nina"), "--without", "a,b", "--json"]
    by_sum = json.loads(leaveout(*ask, "--estimator", "leave_one_out")[1])
    run = TrainingRun.open(trained / "run")
    single = run.retrain(["nina"], [["a"], ["b"]])[0] - by_sum["base"]
    assert by_sum["predicted"] - by_sum["base"] == pytest.approx(single.sum(), abs=1e-5)
    assert json.loads(leaveout(*ask)[1])["predicted"] != by_sum["predicted"]


def test_verify_compares_with_plain_retraining(leaveout, trained, tmp_path):
    ask = [*asking(*QUERIES), "--without", "b,d", "--without", "a", "--without", "a,b,c"]
    code, out, _ = leaveout("verify", trained / "run", *ask, "--json", "--html", tmp_path / "page.html")
    assert code == 0
    *lines, last = [json.loads(line) for line in out.splitlines()]
    actual = TrainingRun.open(trained / "run").retrain(list(QUERIES), [["b", "d"], ["a"], ["a", "b", "c"]])
    np.testing.assert_allclose([line["actual"] for line in lines], actual.ravel(), rtol=1e-6)
    for line in lines:
        reach = 1.959964 * line["std"]
        assert line["inside"] == (abs(line["actual"] - line["predicted"]) <= reach)
    assert last["summary"]["coverage"] == pytest.approx(
        np.mean([line["inside"] for line in lines if not line["already_measured"]])
    )
    page = (tmp_path / "page.html").read_text()
    assert page.count('class="ring"') == page.count('class="dot"') == 6 + 1  # and in the key
    code, out, _ = leaveout("verify", trained / "run", *ask)
    assert code == 0 and "1 more set had been measured before, and is not counted." in " ".join(out.split())
    shutil.copytree(trained / "run", tmp_path / "run")
    code, out, _ = leaveout("verify", tmp_path / "run", *asking(*QUERIES), "--without", "c,d")
    said = " ".join(out.split())
    assert (
        "Of 2 retrained values" in said and "In the median of 2 predictions the retrained effect is missed by" in said
    )


def test_a_table_says_that_nothing_tested_its_intervals(leaveout, tmp_path):
    run = TrainingRun.train(write_recipe(tmp_path), tmp_path / "run")
    run.measure(retrain=3, design="singles")
    ask = [*asking("nina"), "--without", "a,b"]
    untested = (
        "No held-out retraining has tested these intervals, which may be too narrow: `leaveout measure RUN --heldout"
    )
    shown = " ".join(leaveout("predict", run.path, *ask)[1].split())
    assert untested in shown and "Without means the same run" in shown
    run.measure(without=[["a", "b"]])  # measured itself
    assert untested not in " ".join(leaveout("predict", run.path, *ask)[1].split())
    run.measure(heldout=2)
    line = json.loads(leaveout("predict", run.path, *asking("nina"), "--without", "c,d", "--json")[1])
    assert line["heldout"] == 2


def test_new_runs_are_measured_predicted_and_verified(leaveout, trained, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained / "run", run)
    ask = [*asking("nina"), "--without", "a"]
    assert json.loads(leaveout("predict", run, *ask, "--json")[1])["meaning"] == "same run"
    code, _, err = leaveout("verify", run, *ask, "--new-run")
    assert code == 1 and "leaveout measure RUN --repeats 4" in err
    code, out, _ = leaveout("measure", run, "--repeats", 3, "--json")
    assert code == 0 and json.loads(out)["measurements"]["new run, new order, repeat"] == 3
    line = json.loads(leaveout("predict", run, *ask, "--json")[1])
    assert line["meaning"] == "new run" and line["run_std"] > 0
    assert json.loads(leaveout("predict", run, *ask, "--meaning", "same-run", "--json")[1])["meaning"] == "same run"
    code, out, _ = leaveout("verify", run, *ask, "--new-run", "--runs", 2)
    said = " ".join(out.split())
    assert code == 0 and "Without means a new run" in said and "the interval is that of the mean of 2 runs" in said
    line = json.loads(leaveout("verify", run, *ask, "--new-run", "--runs", 2, "--json")[1].splitlines()[0])
    inside = (
        abs(line["actual"] - line["predicted"]) <= line["reach"]
    )  # the interval that is shown is the one that is judged
    assert line["runs"] == 2 and line["inside"] == inside and line["reach"] < 3 * line["run_std"] + 3 * line["std"]
    one = json.loads(leaveout("predict", run, *ask, "--json")[1])
    assert line["reach"] < one["reach"] and "runs" not in one
    code, _, err = leaveout("predict", run, *ask, "--meaning", "new")
    assert code == 1 and "meaning is 'new'" in err
    code, _, err = leaveout("verify", run, *ask, "--meaning", "same-run", "--runs", 2)
    assert code == 1 and "the same run is the same each time" in err


def test_curve_is_drawn_and_page_escapes_queries(leaveout, trained, tmp_path):
    pytest.importorskip("matplotlib")
    files = tmp_path / "curve.png", tmp_path / "page.html"
    ask = [*asking("nina"), "--without-where", "unit < 'b'", "--curve", files[0], "--html", files[1]]
    code, out, _ = leaveout("predict", trained / "run", *ask)
    assert code == 0 and "nina" in out
    assert files[0].read_bytes().startswith(b"\x89PNG")
    assert "unit &lt; &#x27;b&#x27;" in files[1].read_text()


def test_plan_lists_choices_whose_commands_run(leaveout, trained, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained / "run", run)
    ask = [*asking("nina"), "--without", "a,b", "--budget", "3s"]
    few = json.loads(leaveout("plan", run, *ask, "--json")[1])
    assert few["stability"] is None and not any("jets" in choice["name"] for choice in few["choices"])
    code, out, _ = leaveout("plan", run, *ask, "--jets", "--repeats", 0, "--json")
    found = json.loads(out)
    assert code == 0 and found["stability"] == "stable" and found["budget"] == 3
    choices = {choice["name"]: choice for choice in found["choices"]}
    assert all(choice["seconds"] <= 3 and 0 <= choice["error"] <= 1 for choice in choices.values())
    errors = [round(choice["error"], 3) for choice in found["choices"]]
    assert errors == sorted(errors)
    named = choices["retraining the sets themselves"]["command"]
    assert named == f"leaveout measure {run} --without a,b --query nina"
    pairs = choices["retrainings of all units and pairs"]["command"]
    assert "--design 'all pairs'" in pairs and "--sizes 2" in pairs
    assert "--gradient" in choices["exact first order, and retrainings"]["command"]
    for command in (named, choices["jets of degree 1"]["command"]):
        assert leaveout(*shlex.split(command)[1:])[0] == 0
    line = json.loads(leaveout("verify", run, *asking("nina"), "--without", "a,b", "--json")[1].splitlines()[0])
    assert line["predicted"] == pytest.approx(line["actual"], abs=0.02)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["predict", "RUN", "--query", "nina", "--without", ""], 1, "deletion set is empty"),
        (["predict", "RUN", "--query", "nina", "--without", "a,b,c,d"], 1, "leave something to train on"),
        (
            ["predict", "RUN", "--query", "nina", "--without", "nobody"],
            1,
            "no unit and no example with the id 'nobody'",
        ),
        (["predict", "RUN", "--query", "nina", "--without-where", "unit = 'z'"], 1, "No example satisfies"),
        (["predict", "RUN", "--query", "nina", "--without-where", "nosuch = 1"], 1, "nosuch"),
        (
            ["predict", "RUN", "--query", "nina", "--without", "a", "--estimator", "oracle"],
            1,
            "there is no estimator 'oracle': give one of",
        ),
        (["predict", "RUN", "--query", "nina", "--without", "a", "--estimator", "mean"], 1, "needs jet runs"),
        (
            ["predict", "RUN", "--query", "nina", "--without", "a", "--estimator", "pairwise", "--degree", "2"],
            2,
            "--degree goes with",
        ),
        (["predict", "RUN", "--query", "Nina", "--without", "a"], 1, "the character 'N'"),
        (["predict", "RUN", "--query", "nina"], 2, "say what is left out"),
        (["predict", "RUN", "--without", "a"], 2, "give either --query or --queries"),
        (["predict", "nowhere", "--query", "nina", "--without", "a"], 1, "leaveout train RECIPE --out nowhere"),
        (["predict", "RUN", "--queries", "missing.jsonl", "--without", "a"], 1, "missing.jsonl"),
        (["predict", "RUN", "--query", "nina", "--sets", "missing.jsonl"], 1, "missing.jsonl"),
        (
            ["measure", "RUN", "--retrain", "5", "--design", "clever"],
            1,
            "there is no design 'clever': give one of auto",
        ),
        (["measure", "RUN", "--gradient"], 1, "pass queries"),
        (["measure", "RUN", "--retrain", "5", "--prompt", "a"], 2, "give either --query or --queries"),
        (["measure", "RUN"], 2, "say what to measure"),
        (["measure", "RUN", "--retrain", "5", "--sizes", "4;5"], 2, "--sizes must be positive numbers"),
        (["measure", "RUN", "--directions", "5", "--dtype", "int8"], 2, "complex64 or complex128"),
        (["measure", "RUN", "--retrain", "5", "--memory", "4 apples"], 2, "--memory must be a number"),
        (["measure", "RUN", "--merge", "nowhere"], 1, "nowhere is not a training run"),
        (["plan", "RUN", "--query", "nina", "--without", "a", "--budget", "soon"], 2, "--budget must be a number"),
        (["plan", "RUN", "--query", "nina", "--without", "a", "--budget", "0s"], 1, "must be positive"),
        (["plan", "nowhere", "--query", "nina", "--without", "a", "--budget", "0s"], 1, "must be positive"),
        (
            ["verify", "nowhere", "--query", "nina", "--without", "a", "--estimator", "oracle"],
            1,
            "no estimator 'oracle'",
        ),
        (["train", "missing.yaml", "--out", "OUT"], 1, "missing.yaml"),
        (["train", "OTHER", "--out", "RUN"], 1, "was trained by another recipe"),
        (["info", "nowhere"], 1, "nowhere"),
        (["search", "RUN", "--query", "nina"], 1, "is a training run, not an index"),
    ],
)
def test_errors_are_one_sentence(leaveout, trained, tmp_path, arguments, code, message):
    other = tmp_path / "other.yaml"
    other.write_text("kind: microgpt\ndata: names.txt\nsteps: 2\n")
    (tmp_path / "names.txt").write_text("ada\nbo\n")
    places = {"RUN": trained / "run", "OUT": tmp_path / "out", "OTHER": other}
    found, out, err = leaveout(*(places.get(argument, argument) for argument in arguments))
    assert (found, out) == (code, ""), err
    assert message in " ".join(err.replace("│", " ").split())
    assert "Traceback" not in err
    if code == 1:
        assert err.strip().startswith("leaveout: ") and len(err.strip().splitlines()) == 1


def test_empty_bank_changed_recipe_and_merge(leaveout, tmp_path):
    recipe = write_recipe(tmp_path)
    for name in ("one", "two"):
        assert leaveout("train", recipe, "--out", tmp_path / name)[0] == 0
    ask = [*asking("nina"), "--without", "a"]
    code, _, err = leaveout("predict", tmp_path / "one", *ask)
    assert code == 1 and "needs measurements" in err
    assert leaveout("measure", tmp_path / "two", "--retrain", 4, *asking("nina"))[0] == 0
    code, out, _ = leaveout("measure", tmp_path / "one", "--merge", tmp_path / "two", "--json")
    assert (code, json.loads(out)["added"]) == (0, 4)
    answers = [leaveout("predict", tmp_path / name, *ask, "--json")[1] for name in ("one", "two")]
    assert answers[0] == answers[1] != ""
    code, _, err = leaveout("predict", tmp_path / "one", *asking("bea"), "--without", "a")
    assert code == 1 and "measured for other queries" in err
    recipe.write_text(RECIPE.replace("12", "13"))
    code, _, err = leaveout("predict", tmp_path / "one", *ask)
    assert code == 1 and "recipe or its data changed" in err


def test_plan_hands_all_limits_on(leaveout, trained, monkeypatch):
    seen = []

    def stop(self, queries, without, budget):
        seen.append(budget)
        raise UnsupportedError("Enough seen.")

    monkeypatch.setattr(TrainingRun, "plan", stop)
    ask = [*asking("nina"), "--without", "a", "--budget", "1.5min", "--workers", 2]
    assert leaveout("plan", trained / "run", *ask, "--disk", "2GB", "--memory", "500 MB", "--examples")[0] == 1
    assert seen == [Budget(90, 2 * 10**9, 500 * 10**6, 2, examples=True)]


def test_classifier_asks_npz_and_refuses_not_a_number(leaveout, tmp_path):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(12, 3)).astype(np.float32), np.arange(12) % 2
    np.savez(tmp_path / "data.npz", x=x, y=y)
    (tmp_path / "recipe.yaml").write_text(
        "kind: classifier\ndata: data.npz\nmodel: {hidden: [4]}\nepochs: 2\noptimizer: {name: sgd, lr: 0.05}\n"
    )
    run = tmp_path / "run"
    assert leaveout("train", tmp_path / "recipe.yaml", "--out", run)[0] == 0
    np.savez(tmp_path / "ask.npz", x=x[:2] + 1, y=y[:2])
    assert leaveout("measure", run, "--retrain", 12, "--queries", tmp_path / "ask.npz")[0] == 0
    code, out, _ = leaveout("predict", run, "--queries", tmp_path / "ask.npz", "--without", "0,3", "--json")
    assert (code, len(out.splitlines())) == (0, 2)
    np.savez(tmp_path / "nan.npz", x=np.full((1, 3), np.nan, np.float32), y=y[:1])
    code, _, err = leaveout("predict", run, "--queries", tmp_path / "nan.npz", "--without", "0")
    assert code == 1 and "nan.npz, example 0: the feature [0] is nan" in err
    np.savez(tmp_path / "half.npz", x=x)
    code, _, err = leaveout("predict", run, "--queries", tmp_path / "half.npz", "--without", "0")
    assert code == 1 and "has no array 'y'" in err


def test_interval_chart_puts_values_on_one_axis():
    line = {
        "query": "<q>",
        "without": "s",
        "base": 1.0,
        "predicted": 2.0,
        "std": None,
        "reach": None,
        "meaning": "same run",
        "actual": 3.0,
        "verdict": "rises",
        "effect": 1.0,
        "unit": "nats",
        "measure": "loss",
        "inside": None,
        "already_measured": False,
    }
    shown = report.interval_chart([line])
    assert (
        'cx="200.0"' in shown and 'cx="386.0"' in shown and "M14.0" in shown
    )  # an effect of 1, 2 when retrained, and 0
    assert "H546.0" not in shown and "<q>" not in shown and "change in nats" in shown
    assert report.interval_chart([{**line, "std": 0.1, "reach": 0.2}]).count('class="bar"') == 2  # one is the key's
    assert "7 more are not drawn" in report.interval_chart([line] * (report.CHART_ROWS + 7))
    table = prediction_table([line])
    assert dict(zip(table.headers, table.rows[0], strict=True))["retrained"] == "+2"  # inside of nothing that is known


def test_evaluate_judges_methods_and_scores_of_ones_own(leaveout, trained, tmp_path):
    np.save(tmp_path / "mine.npy", np.random.default_rng(0).normal(size=(2, 12)).astype(np.float32))
    place = tmp_path / "run"
    shutil.copytree(trained / "run", place)
    options = ("--scores", tmp_path / "mine.npy", "--subsets", 6, "--qld", 0, "--no-ceiling")
    code, out, err = leaveout("evaluate", place, *asking(*QUERIES), "--method", "random", *options, "--json")
    assert code == 0, err
    assert {"random", "mine"} <= {line.get("method") for line in map(json.loads, out.splitlines())}
    code, _, err = leaveout("evaluate", place, *asking(*QUERIES), "--method", "magic", *options)
    assert code == 1 and "magic" in err
    assert leaveout("evaluate", place, *asking(*QUERIES))[0] == 2
    code, out, _ = leaveout("evaluate", place, *asking(*QUERIES), *options[:2], "--subsets", 40, *options[4:])
    assert code == 0 and "over 6 retrained subsets" in out  # there are no more halves of four units


@pytest.mark.parametrize("kind", ["npy", "csv", "jsonl"])
def test_attribute_writes_what_evaluate_reads(kind, leaveout, trained, tmp_path):
    run, place, out = trained / "run", tmp_path / "run", tmp_path / f"dot.{kind}"
    shutil.copytree(run, place)
    code, text, err = leaveout(
        "attribute", place, *asking(*QUERIES), "--method", "gradient dot", "--out", out, "--json"
    )
    assert code == 0, err
    recipe = TrainingRun.open(place).recipe
    assert {"method": "gradient dot", "queries": 2, "rows": 12}.items() <= json.loads(text).items()
    task = task_of(recipe)
    wanted = GradientDot(task, TrainingRun.open(place).parameters).score(list(QUERIES), recipe.examples)
    np.testing.assert_allclose(load_scores(out, QUERIES, recipe.ids), wanted, rtol=1e-5, atol=1e-7)
    code, text, err = leaveout("attribute", place, *asking(*QUERIES), "--method", "metagradient", "--out", out)
    assert code == 0, err
    best = load_scores(out, QUERIES, recipe.unit_names).argmax(1)
    assert re.findall(r"│ +1 │ +[-\d.e]+ │ (\S+) ", text) == [recipe.unit_names[unit] for unit in best]
    assert text.count("Removing ") == 2 and "rise of the loss (nats)" in " ".join(text.split())
    shown = leaveout("attribute", place, *asking(*QUERIES), "--method", "gradient dot", "--out", tmp_path / "o.npy")[1]
    assert "100 %" in shown and "of the best" in shown and "stand" in shown
    sets = [[unit] for unit in recipe.unit_names]
    effects = TrainingRun.open(place).predict([*QUERIES], sets, "first_order").effect
    np.testing.assert_allclose(load_scores(out, QUERIES, recipe.unit_names), effects, rtol=1e-5, atol=1e-7)
    options = ("--subsets", 4, "--qld", 0, "--no-ceiling", "--json")
    code, text, err = leaveout(
        "evaluate", place, *asking(*QUERIES), "--scores", out, "--method", "metagradient", *options
    )
    assert code == 0, err
    one, other = (json.loads(line)["by_query"]["lds"] for line in text.splitlines())
    assert [line["query"] for line in one] == list(QUERIES) and one == other


def test_suspects_of_a_search_are_predicted_and_verified(leaveout, trained, tmp_path):
    place, out, sets = tmp_path / "run", tmp_path / "dot.npy", tmp_path / "suspects.jsonl"
    shutil.copytree(trained / "run", place)
    options = ("--method", "gradient dot", "--out", out, "--sets", sets, "--top", 2, "--json")
    code, text, err = leaveout("attribute", place, *asking(*QUERIES), *options)
    assert code == 0 and json.loads(text)["sets"] == str(sets), err
    recipe = TrainingRun.open(place).recipe
    sums = [[row[recipe.unit_of == unit].sum() for unit in range(4)] for row in np.load(out)]
    best = [{recipe.unit_names[unit] for unit in np.argsort(row)[-2:]} for row in sums]
    assert [set(json.loads(line)["without"]) for line in sets.read_text().splitlines()] == best
    code, text, err = leaveout("verify", place, *asking(*QUERIES), "--sets", sets, "--json")
    assert code == 0, err
    lines = [json.loads(line) for line in text.splitlines()[:-1]]
    assert [line["chosen_for"] for line in lines] == [*QUERIES] * 2  # two queries and two sets
    assert {line["without"] for line in lines} == {", ".join(u for u in recipe.unit_names if u in ids) for ids in best}
    shown = leaveout("predict", place, *asking(*QUERIES), "--sets", sets)[1]
    every = leaveout("predict", place, *asking(*QUERIES), "--sets", sets, "--all-pairs")[1]
    assert "of 2 effects can be told" in " ".join(shown.split()) and "of 4 effects can be told" in " ".join(
        every.split()
    )
    for line, (query, ids) in zip(lines, itertools.product(QUERIES, best), strict=True):
        kept = torch.tensor([float(name not in ids) for name in recipe.unit_names])
        actual = query_losses(recipe, train_plain(recipe, kept), [query]).item()
        assert line["query"] == query and line["actual"] == pytest.approx(actual, abs=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--sets", "s.npy"), "name the same file"),
        (("--sets", "no/sets.jsonl"), "cannot be written"),
        (("--sets", "sets.jsonl", "--top", 4), "would leave nothing to train on"),
    ],
)
def test_sets_that_cannot_be_written_are_refused_at_once(options, message, leaveout, trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = leaveout("attribute", trained / "run", *asking(*QUERIES), "--out", "s.npy", *options)
    assert code == 2 and message in " ".join(err.split()) and not list(tmp_path.iterdir())


def test_attribute_refuses_before_it_works(leaveout, trained, tmp_path):
    run = trained / "run"
    for out, message in (("s.txt", "give .npy"), ("no/s.csv", "There is no directory"), (".", "give .npy")):
        code, _, err = leaveout("attribute", run, *asking(*QUERIES), "--out", tmp_path / out)
        assert code == 1 and message in err
    code, _, err = leaveout("attribute", run, *asking("ada", "ada"), "--out", tmp_path / "s.csv")
    assert code == 1 and "stands twice" in err
    code, _, err = leaveout("attribute", run, "--query", "ada", "--method", "magic", "--out", tmp_path / "s.npy")
    assert code == 1 and "there is no method 'magic'" in err and not list(tmp_path.iterdir())
    files = [part for place in (tmp_path, tmp_path / "other") for part in ("--scores", place / "mine.npy")]
    code, _, err = leaveout("evaluate", run, *asking(*QUERIES), *files)
    assert code == 2 and "two files of scores are called mine" in err


def test_evaluate_judges_without_retraining_by_known_rows_and_one_more_step(leaveout, trained, tmp_path):
    ids = TrainingRun.open(trained / "run").recipe.ids
    file = tmp_path / "relevant.jsonl"
    file.write_text("".join(json.dumps({"query": query, "id": ids[i]}) + "\n" for i, query in enumerate(QUERIES)))
    place = tmp_path / "run"
    shutil.copytree(trained / "run", place)
    options = ("--relevant", file, "--tail-patch", "--top", 2, "--subsets", 0, "--qld", 0)
    command = ("evaluate", place, *asking(*QUERIES), "--method", "random", "--method", "gradient dot", *options)
    code, out, err = leaveout(*command, "--json")
    assert code == 0, err
    lines = [json.loads(line) for line in out.splitlines()]
    assert [line["method"] for line in lines] == ["gradient dot", "random"]
    assert all(line[name] for line in lines for name in ("tail_patch", "average_precision", "recall"))
    assert all(line[name] is None for line in lines for name in ("lds", "qld", "changed", "ceiling"))
    code, out, _ = leaveout(*command)
    assert code == 0 and "recall@2" in out and "Tail-patch:" in out and "LDS" not in out
    file.write_text('{"query": "nobody", "id": "0"}')
    code, _, err = leaveout(*command)
    assert code == 1 and "'nobody' is not there" in err


def test_evaluate_says_whose_answers_changed(leaveout, trained, tmp_path):
    place = tmp_path / "run"
    shutil.copytree(trained / "run", place)
    options = ("--method", "random", "--subsets", 0, "--qld", 0, "--brittleness", 1)
    code, out, err = leaveout("evaluate", place, *asking(*QUERIES), *options)
    assert code == 0 and "answer of no query" in out, err
