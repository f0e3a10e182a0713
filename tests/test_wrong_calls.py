"""Calls from Python that can only be a mistake: each ends in one sentence that says what to give instead."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import leaveout as lo
from command import run_command
from readout.tiny import TEXTS, make_model, make_tokenizer

WRONG_SCORES = lo.EstimatorSettings(scores=np.array([1, 2]))
NAMES = ["anna", "bori", "citu", "dune", "elri", "fatu"]


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    torch.set_num_threads(1)
    rows = [{"id": f"r{i}", "text": text, "source": "web"} for i, text in enumerate(TEXTS)]
    return lo.Index.build(make_model(), rows, tmp_path_factory.mktemp("index") / "idx", tokenizer=make_tokenizer())


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    run = lo.TrainingRun.train(lo.Recipe.microgpt(NAMES, epochs=2), tmp_path_factory.mktemp("run") / "run")
    run.measure(retrain=4)
    return run


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda i: i.search("one"), TypeError, "queries is 'one': give a list of queries"),
        (lambda i: i.search({"text": "one two"}), TypeError, "queries is {'text': 'one two'}: give a list of queries"),
        (lambda i: i.score({"prompt": "a", "response": "b"}), TypeError, "give a list of queries"),
        (lambda i: i.search(None), TypeError, "queries is None: give a list of queries"),
        (lambda i: i.search(["one two"], k="3"), ValueError, "k is '3': give a whole number of at least 1"),
        (lambda i: i.search(["one two"], k=2.5), ValueError, "k is 2.5: give a whole number of at least 1"),
        (lambda i: i.search(["one two"], k=True), ValueError, "k is True: give a whole number"),
        (lambda i: i.search(["one two"], where=5), ValueError, "where is 5: give an SQL expression"),
        (lambda i: i.search(["one two"], aproximate="simhash"), TypeError, "unexpected keyword argument 'aproximate'"),
        (lambda i: i.search(["one two"], unique="yes"), ValueError, "unique is 'yes': give True, or a cosine"),
        (lambda i: i.search(["one two"], group_by="sorce"), ValueError, "did you mean 'source'"),
        (lambda i: i.select("one two", n=2), TypeError, "give a list of queries"),
        (lambda i: i.select(["one two"], n="2"), ValueError, "n is '2': give a whole number of at least 1"),
        (lambda i: i.explain("one two", "r-0"), ValueError, "no row has the id 'r-0': did you mean 'r0'"),
        (lambda i: i.explain("one two", ["r0"]), TypeError, r"an id is \['r0'\]: give the text that names one row"),
        (lambda i: i.delete("r0"), TypeError, "ids is 'r0': give a list of ids"),
        (lambda i: i.delete(None), TypeError, "ids is None: give a list of ids"),
        (lambda i: i.append(["one two"], worker=2), TypeError, "unexpected keyword argument 'worker'"),
    ],
)
def test_wrong_call_of_an_index(index, call, error, message):
    with pytest.raises(error, match=message):
        call(index)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"preset": "defualt"}, ValueError, "There is no preset 'defualt': did you mean 'default'"),
        ({"preset": 5}, TypeError, "preset is 5: give one of default"),
        ({"tempreture": 2}, TypeError, "unexpected keyword argument 'tempreture'"),
        ({"temperature": "2"}, ValueError, "temperature is '2': give a number"),
        ({"workers": "2"}, ValueError, "workers is '2': give a whole number of at least 1"),
        ({"backend": "rai"}, ValueError, "backend is 'rai': did you mean 'ray'"),
    ],
)
def test_wrong_options_of_a_build(tmp_path, options, error, message):
    with pytest.raises(error, match=message):
        lo.Index.build(make_model(), TEXTS, tmp_path / "idx", tokenizer=make_tokenizer(), **options)
    assert not (tmp_path / "idx").exists()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"tempreture": 2}, TypeError, "unexpected keyword argument 'tempreture'"),
        ({"temperature": "2"}, ValueError, "temperature is '2': give a number"),
        ({"channels": 5}, TypeError, "channels is 5: give a list of"),
        ({"bytes_per_row": 2.5}, ValueError, "bytes_per_row is 2.5: give a whole number of at least 1"),
        ({"sample_rows": 0}, ValueError, "sample_rows is 0: give a whole number of at least 1"),
    ],
)
def test_wrong_settings_of_a_signature(changes, error, message):
    with pytest.raises(error, match=message):
        replace(lo.PRESETS["default"], **changes)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda r: r.measure("3"), ValueError, "directions is '3': give a whole number of at least 0"),
        (lambda r: r.measure(2.5), ValueError, "directions is 2.5: give a whole number"),
        (lambda r: r.measure(2, 0), ValueError, "degree is 0: give a whole number of at least 1"),
        (lambda r: r.measure(retrain=-1), ValueError, "retrain is -1: give a whole number of at least 0"),
        (lambda r: r.measure(heldout=-1), ValueError, "heldout is -1: give a whole number of at least 0"),
        (lambda r: r.measure(heldout=2.5), ValueError, "heldout is 2.5: give a whole number"),
        (lambda r: r.measure(without=5), TypeError, "without is 5: give ids as texts"),
        (lambda r: r.measure(settings={"workers": 2}), TypeError, "settings is .*: give a MeasureSettings"),
        (lambda r: r.measure(retrain=2, design="radnom"), ValueError, "no design 'radnom': did you mean 'random'"),
        (lambda r: r.retrain(5, [["anna"]]), TypeError, "queries is 5: give texts, rows or functions"),
        (lambda r: r.retrain(["anna"], None), TypeError, "without is None: give ids as texts"),
        (lambda r: r.retrain(["anna"], [0]), TypeError, r"without is \[0\]: give ids as texts"),
        (lambda r: r.retrain(["anna"], np.arange(2)), TypeError, "without is array.*: give ids as texts"),
        (lambda r: r.retrain(["anna"], r.recipe.ids[0].upper()), lo.FormatError, "did you mean '0:"),
        (lambda r: r.predict(["anna"], r.recipe.ids[0], "posterier"), ValueError, "did you mean 'posterior'"),
        (lambda r: r.plan(["anna"], r.recipe.ids[0], "soon"), ValueError, "budget must be a number with a unit"),
        (lambda r: r.plan(["anna"], r.recipe.ids[0], 0), ValueError, "the budget must be positive, got 0"),
        (lambda r: lo.EstimatorSettings(degree=0), ValueError, "degree is 0: give a whole number of at least 1"),
        (
            lambda r: lo.EstimatorSettings("pairwise", degree=2),
            ValueError,
            "degree goes with posterior, .*, not with pair",
        ),
        (lambda r: r.predict(["anna"], r.recipe.ids[0], WRONG_SCORES), ValueError, "wanted scores"),
        (lambda r: lo.Query("anna", "los"), ValueError, "there is no measure 'los': did you mean 'loss'"),
        (lambda r: lo.evaluate(r, ["anna"], "random"), TypeError, "methods is 'random': give a list of names"),
        (lambda r: lo.evaluate(r, ["anna"], None), TypeError, "methods is None: give a list of names"),
        (lambda r: lo.attribute(r, ["anna"], ["random"]), TypeError, "the method is .*: give the name of one"),
        (lambda r: lo.MeasureSettings(memory="4GB"), ValueError, "memory is '4GB': give a whole number of at least 1"),  # pyright: ignore
        (lambda r: lo.EvaluationSettings(subsets=-1), ValueError, "subsets is -1: give a whole number of at least 0"),
        (lambda r: lo.EvaluationSettings(removed=2), ValueError, "removed is 2: give a number between 0 and 1"),
        (lambda r: lo.Indx, AttributeError, "no attribute 'Indx': did you mean 'Index'"),
    ],
)
def test_wrong_call_of_a_run(run, call, error, message):
    with pytest.raises(error, match=message):
        call(run)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: lo.Recipe.microgpt("anna"), TypeError, "documents is 'anna': give a list of texts or rows"),
        (lambda: lo.Recipe.microgpt(["anna", 5]), TypeError, "a document is 5: give texts or rows"),
        (lambda: lo.Recipe.microgpt(NAMES, epoch=2), TypeError, "did you mean 'epochs'"),
        (lambda: lo.Recipe.microgpt(NAMES, optimizer="adam"), TypeError, r"give OptimizerSettings\('adam', lr=...\)"),
        (lambda: lo.Recipe.microgpt(NAMES, epochs="2"), ValueError, "epochs must be a whole number of at least 1"),
        (lambda: lo.Recipe.microgpt(NAMES, clip_norm=-1), ValueError, "clip_norm must be a number of at least 0"),
        (lambda: lo.Recipe.microgpt(NAMES).with_(epoch=2), TypeError, "no field of a recipe 'epoch': did you mean"),
        (lambda: lo.Recipe.microgpt(NAMES).grouped(5), TypeError, "units is 5: give a list of a name for each example"),
        (lambda: lo.Recipe.microgpt(NAMES).grouped("no.json"), FileNotFoundError, "There is no file no.json"),
        (lambda: lo.Recipe("microgpt", NAMES, model="x"), lo.FormatError, "leave `model` out"),
        (lambda: lo.Recipe("classifier", ((1, 0),), model={"hiden": [8]}), lo.FormatError, "did you mean 'hidden'"),
        (lambda: lo.Recipe("classifier", ((1, 0),), model={"hidden": 8}), lo.FormatError, "must be a list of widths"),
        (lambda: lo.OptimizerSettings("adamm"), lo.UnsupportedError, "no optimizer 'adamm': did you mean 'adam'"),
        (lambda: lo.OptimizerSettings(lr="x"), ValueError, "optimizer.lr must be a number of at least 0, got 'x'"),
        (lambda: lo.OptimizerSettings("adam", betas=(0.9, 1.5)), ValueError, "two numbers from 0 to below 1"),
        (lambda: lo.Recipe.from_yaml("nothere.yaml"), FileNotFoundError, "There is no recipe in nothere.yaml"),
    ],
)
def test_wrong_recipe_from_python(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_examples_of_a_recipe_may_be_texts_or_objects_with_fields():
    rows = lo.Recipe("microgpt", [{"id": "a", "text": "anna"}, {"id": "b", "text": "bori"}])
    assert rows.ids == ("a", "b") and [row.text for row in rows.examples] == ["anna", "bori"]
    assert [row.text for row in lo.Recipe("microgpt", NAMES).examples] == NAMES


def test_a_build_that_kept_nothing_leaves_no_settings_behind(tmp_path):
    """At a bad first row the directory is there, and says what the rows were to be."""
    with pytest.raises(lo.FormatError, match="field `kind` is missing"):
        lo.Index.build(make_model(), TEXTS, tmp_path / "idx", tokenizer=make_tokenizer(), units="kind")
    built = lo.Index.build(make_model(), TEXTS, tmp_path / "idx", "paper", tokenizer=make_tokenizer())
    assert len(built) == len(TEXTS)
    with pytest.raises(lo.MismatchError, match="holds an index with other channels"):
        lo.Index.build(make_model(), TEXTS, tmp_path / "idx", "similarity", tokenizer=make_tokenizer())


def test_engines_do_not_write_into_each_others_directories(index, run, tmp_path):
    with pytest.raises(FileExistsError, match="holds files that are no index"):
        lo.Index.build(make_model(), TEXTS, run.path, tokenizer=make_tokenizer())
    with pytest.raises(FileExistsError, match="holds something else than a training run"):
        lo.TrainingRun.train(lo.Recipe.microgpt(NAMES), index.path)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="holds something else than a training run"):
        lo.TrainingRun.train(lo.Recipe.microgpt(NAMES), tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine" and index.check() == []
    with pytest.raises(lo.FormatError, match="is an index, not a training run"):
        lo.TrainingRun.open(index.path)


@pytest.fixture
def unloadable(index, monkeypatch):
    """The index as a command opens it: its model is loaded when it is first needed, which is a failure here."""

    def loaded(*args, **options):
        raise AssertionError("the model was loaded before the question was looked at")

    for place in ("index", "opened"):
        monkeypatch.setattr(f"leaveout.readout.{place}.load_readout", loaded)
    monkeypatch.setattr(lo.Index, "readout", property(loaded))
    return lo.Index.open(index.path)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda i: i.search(["one two"], k=0), ValueError, "k is 0: give a whole number"),
        (lambda i: i.search(["one two"], where="colour = 1"), ValueError, "unknown column"),
        (lambda i: i.search(["one two"], group_by="sorce"), ValueError, "did you mean 'source'"),
        (lambda i: i.search(["one two"], shortlist=5), ValueError, "shortlist is 5, k 10: give a list of at least k"),
        (lambda i: i.plan_search(where="colour = 1"), ValueError, "unknown column"),
        (lambda i: i.search(["one two"], workers=0), ValueError, "workers is 0"),
        (lambda i: i.select(["one two"], n=0), ValueError, "n is 0: give a whole number"),
        (lambda i: i.select(["one two"], n=1, where="colour = 1"), ValueError, "unknown column"),
        (lambda i: i.select(["one two"], n=1, combine="men"), ValueError, "did you mean 'mean'"),
        (lambda i: i.explain("one two", "zz"), ValueError, "no row has the id 'zz'"),
        (lambda i: i.append("nothere.jsonl"), FileNotFoundError, "nothere.jsonl does not exist"),
        (
            lambda i: lo.Index.build("nomodel", TEXTS, i.path.parent / "new", statistics=i.path.parent / "no"),
            FileNotFoundError,
            "There is no index in",
        ),
        (
            lambda i: lo.Index.build("nomodel", "no.jsonl", i.path.parent / "new"),
            FileNotFoundError,
            "no.jsonl does not",
        ),
    ],
)
def test_what_can_be_known_is_refused_before_the_model_is_loaded(unloadable, call, error, message):
    with pytest.raises(error, match=message):
        call(unloadable)


@pytest.mark.parametrize(
    "arguments",
    [
        ["search", "IDX", "--query", "one two", "--html", "nothere/page.html"],
        ["explain", "IDX", "--query", "one two", "--id", "r0", "--html", "nothere/page.html"],
        ["select", "IDX", "--wanted", "wanted.jsonl", "--out", "nothere/rows.jsonl"],
    ],
)
def test_outputs_that_cannot_be_written_are_refused_before_the_index_is_opened(arguments, monkeypatch, capsys):
    monkeypatch.setattr("leaveout.cli.asking.open_index", lambda *args: pytest.fail("the index was opened"))
    code, _, err = run_command(monkeypatch, capsys, *arguments)
    assert code == 2 and "cannot be written" in err
