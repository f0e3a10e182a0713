"""Tail-patch, brittleness and retrieval of `evaluate`, against plain PyTorch loops, greedy decoding and counting by hand."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from leaveout.corpus import Corpus
from leaveout.deletion.run import TrainingRun
from leaveout.errors import FormatError, MismatchError, UnsupportedError
from leaveout.evaluation import EvaluationSettings, evaluate
from leaveout.evaluation.truth import load_relevant
from leaveout.training.queries import Query
from leaveout.training.recipe import OptimizerSettings, Recipe
from leaveout.training.train import train_plain
from test_evaluation import language_model

ADAMW = OptimizerSettings("adamw", 0.05, weight_decay=0.1)
MOMENTUM = OptimizerSettings("sgd", 0.3, momentum=0.8)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    torch.set_num_threads(1)


# --- a classifier and its plain loop -----------------------------------------------------------------------------


def net():
    return nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 3))


def points(n, seed, spread=0.9):
    """Three overlapping clouds, in turn."""
    rng = np.random.default_rng(seed)
    centres = np.array([[1, 0], [-0.5, 0.9], [-0.5, -0.9]])
    x = torch.from_numpy(centres[np.arange(n) % 3] + spread * rng.standard_normal((n, 2)))
    return [(row, i % 3) for i, row in enumerate(x)]


ROWS = points(24, 0)


def classifier(optimizer, units=()):
    return Recipe(
        "classifier", tuple(ROWS), units=units, model=net, optimizer=optimizer, schedule="linear", epochs=4, batch_size=6,
        clip_norm=1.0, dtype="float64",
    )  # fmt: skip


def maker(settings):
    if settings.name == "adamw":
        return lambda p: torch.optim.AdamW(p, settings.lr, weight_decay=settings.weight_decay)
    return lambda p: torch.optim.SGD(p, settings.lr, momentum=settings.momentum)


def trained(settings, weights):
    """Model and optimizer after the recipe's 16 steps, one line after another."""
    torch.manual_seed(0)
    model = net().double()
    optimizer = maker(settings)(model.parameters())
    for step in range(16):
        optimizer.param_groups[0]["lr"] = settings.lr * (1 - step / 16)
        part = [(step * 6 + i) % 24 for i in range(6)]
        advance(model, optimizer, part, weights[part] / 6)
    return model, optimizer


def advance(model, optimizer, part, weights):
    x, y = torch.stack([ROWS[i][0] for i in part]), torch.tensor([ROWS[i][1] for i in part])
    optimizer.zero_grad()
    (F.cross_entropy(model(x), y, reduction="none") * weights).sum().backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def stepped(settings, part, weights):
    """The model after one more step at the full rate."""
    model, optimizer = trained(settings, torch.ones(24).double())
    model = copy.deepcopy(model)
    again = maker(settings)(model.parameters())
    again.load_state_dict(optimizer.state_dict())
    again.param_groups[0]["lr"] = settings.lr
    advance(model, again, part, weights)
    return model


@pytest.mark.parametrize(("settings", "pairs"), [(ADAMW, False), (MOMENTUM, True)], ids=["adamw", "momentum"])
def test_tail_patch_is_one_more_step_of_a_plain_loop(tmp_path, settings, pairs):
    members = [[2 * i, 2 * i + 1] if pairs else [i] for i in range(12 if pairs else 24)]
    units = tuple(str(i // 2) for i in range(24)) if pairs else ()
    run = TrainingRun.train(classifier(settings, units), tmp_path / "run")
    queries = points(4, 1)
    given = {
        name: np.random.default_rng(seed).standard_normal((4, len(members))) for name, seed in (("a", 5), ("b", 6))
    }
    report = evaluate(
        run, queries, scores=given, settings=EvaluationSettings(0, tail_patch=True, top=3, removal_queries=0)
    )

    def chance(model, query):
        return float(torch.softmax(model(query[0]).detach(), -1)[query[1]])

    nothing = stepped(settings, [0], torch.zeros(1).double())
    after = [stepped(settings, part, torch.full((len(part),), 1 / len(part)).double()) for part in members]
    for judged, scores in zip(report.judged, given.values(), strict=True):
        assert judged.tail_patch is not None and judged.tail_patch_nats is not None
        for q, query in enumerate(queries):
            found = np.array([chance(after[u], query) for u in np.argsort(-scores[q])[:3]])
            assert judged.tail_patch[q] == pytest.approx(np.mean(found) - chance(nothing, query), abs=1e-10)
            wanted = np.mean(np.log(found)) - np.log(chance(nothing, query))
            assert judged.tail_patch_nats[q] == pytest.approx(wanted, abs=1e-10)
    assert report.table().headers == ["method", "tail-patch (nats)", "tail-patch (probability)", "CPU s"]
    assert any("top 3 units" in note for note in report.notes())


def test_brittleness_counts_the_flips_of_really_retrained_classifiers(tmp_path, monkeypatch):
    run = TrainingRun.train(classifier(ADAMW), tmp_path / "run")
    queries = points(12, 2)
    given = {name: np.random.default_rng(seed).standard_normal((12, 24)) for name, seed in (("a", 7), ("b", 8))}
    given["near"] = np.array([[-float((x - row[0]).norm()) for row in ROWS] for x, _ in queries])
    settings = EvaluationSettings(0, removal_queries=0, brittleness=4, brittleness_shares=(0.05, 0.2, 0.4))
    report = evaluate(run, queries, scores=given, settings=settings)

    def gives(model, query):
        return int(model(query[0]).argmax()) == query[1]

    right = [q for q, query in enumerate(queries) if gives(trained(ADAMW, torch.ones(24).double())[0], query)]
    chosen = [right[round(place)] for place in np.linspace(0, len(right) - 1, 4)]
    found = report.brittleness
    assert found is not None and found.sizes == (1, 5, 10) and 4 < found.answered == len(right) < 12
    assert found.queries == tuple(Query(queries[q]).name for q in chosen)
    flips = set()
    for judged in report.judged:
        wanted = []
        for q in chosen:
            smallest = np.inf
            for size in (10, 5, 1):
                weights = torch.ones(24).double()
                weights[np.argsort(-given[judged.method][q])[:size].copy()] = 0
                if not gives(trained(ADAMW, weights)[0], queries[q]):
                    smallest = size
            wanted.append(smallest)
        assert found.smallest[judged.method].tolist() == wanted
        assert judged.changed is not None and judged.changed.tolist() == [float(w <= 10) for w in wanted]
        (line,) = [line for line in report.lines() if line["method"] == judged.method]
        assert {s: share["mean"] for s, share in line["brittleness"].items()} == {
            str(size): np.mean([w <= size for w in wanted]) for size in (1, 5, 10)
        }
        flips.update(wanted)
    assert len(flips) > 2  # the rows chosen change some answers early, some late or never
    monkeypatch.setattr("leaveout.deletion.run.Retrainer", None)
    again = evaluate(run, queries, scores=given, settings=settings)
    assert list(again.lines()) == list(report.lines())


def test_no_answer_can_change_where_none_is_given(tmp_path):
    run = TrainingRun.train(classifier(ADAMW), tmp_path / "run")
    wrong = [(torch.tensor([3.0, 0.0]), 1), (torch.tensor([4.0, 0.0]), 2)]
    report = evaluate(run, wrong, ["random"], settings=EvaluationSettings(0, removal_queries=0, brittleness=2))
    assert report.judged[0].changed is None and next(report.lines())["brittleness"] is None
    assert any("answer of no query" in note for note in report.notes())


# --- a language model --------------------------------------------------------------------------------------------

WORDS = {"sells": " plums", "mends": " boats", "wears": " hats", "feeds": " owls"}


def completions(optimizer, **length):
    """Rows with a prompt and a completion, and a recipe on them."""
    rows = [{"prompt": f"she {verb}", "completion": word} for verb, word in WORDS.items()]
    rest = {"model": language_model, "optimizer": optimizer, "batch_size": 4, "max_tokens": 24}
    return rows, Recipe("causal-lm", tuple(Corpus.open(rows)), **rest, **length)


def decoded(model, tokenizer, prompt, n):
    ids = list(tokenizer(prompt)["input_ids"])
    for _ in range(n):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return tokenizer.decode(ids[-n:])


def test_a_completion_counts_as_the_answer_while_greedy_decoding_gives_it(tmp_path):
    rows, recipe = completions(OptimizerSettings("adamw", 0.02), epochs=40)
    run = TrainingRun.train(recipe, tmp_path / "run")
    asked = [*rows, {"prompt": "she feeds", "completion": " hats"}, {"prompt": "she feeds", "completion": " owl"}]
    scores = np.zeros((6, 4))
    scores[[0, 1, 2, 3, 4, 5], [0, 0, 2, 0, 3, 3]] = 1  # its own row goes for 0, 2 and 5, another's for 1 and 3
    settings = EvaluationSettings(0, removal_queries=0, brittleness=6, brittleness_shares=(0.25,))
    report = evaluate(run, asked, scores={"mine": scores}, settings=settings)

    def reproduced(weights, query):
        model, tokenizer = language_model()
        model.load_state_dict(train_plain(recipe, torch.tensor(weights)), strict=False)
        return decoded(model, tokenizer, query["prompt"], len(query["completion"])) == query["completion"]

    given = [q for q, query in enumerate(asked) if reproduced([1.0] * 4, query)]
    assert report.brittleness is not None and report.brittleness.answered == len(given)
    assert given == [0, 1, 2, 3, 5]
    changed = [not reproduced((1 - scores[q]).tolist(), asked[q]) for q in given]
    assert report.judged[0].changed is not None and report.judged[0].changed.tolist() == changed
    assert changed == [True, False, True, False, True]


def test_tail_patch_of_a_completion_is_about_all_its_tokens(tmp_path):
    rows, recipe = completions(OptimizerSettings("sgd", 0.5), steps=3)
    asked = [{"prompt": "he feeds", "completion": " owls"}, {"prompt": "he sells", "completion": " plums, plums"}]
    scores = np.array([[0.0, 0, 1, 2], [2, 0, 0, 1]])
    settings = EvaluationSettings(0, removal_queries=0, tail_patch=True, top=2)
    report = evaluate(TrainingRun.train(recipe, tmp_path / "run"), asked, scores={"mine": scores}, settings=settings)
    model, tokenizer = language_model()

    def loss(model, row):
        """The mean over the completion's tokens, as transformers has it."""
        ids = torch.tensor([tokenizer(row["prompt"] + row["completion"])["input_ids"]])
        labels = ids.clone()
        labels[0, : len(row["prompt"])] = -100
        return model(ids, labels=labels).loss

    def advanced(model, rows):
        model = copy.deepcopy(model)
        gradients = torch.autograd.grad(
            torch.stack([loss(model, row) for row in rows]).mean(), list(model.parameters())
        )
        with torch.no_grad():
            for p, g in zip(model.parameters(), gradients, strict=True):
                p -= 0.5 * g
        return model

    for _ in range(3):
        model = advanced(model, rows)
    (judged,) = report.judged
    assert judged.tail_patch is not None and judged.tail_patch_nats is not None
    for q, best in enumerate(([3, 2], [0, 3])):
        n = len(asked[q]["completion"])
        before, *after = (
            -n * float(loss(m.eval(), asked[q]).detach()) for m in (model, *(advanced(model, [rows[i]]) for i in best))
        )
        assert judged.tail_patch_nats[q] == pytest.approx(np.mean(after) - before, rel=1e-4)
        assert judged.tail_patch[q] == pytest.approx(np.mean(np.exp(after)) - np.exp(before), rel=1e-3)


# --- retrieval ---------------------------------------------------------------------------------------------------


def precision_of(ranked):
    """Average precision of truth values, best first."""
    found = [sum(ranked[: i + 1]) / (i + 1) for i, wanted in enumerate(ranked) if wanted]
    return sum(found) / len(found) if found else 0.0


def test_retrieval_metrics_need_no_retraining_and_agree_with_counting(tmp_path, monkeypatch):
    run = TrainingRun.train(classifier(ADAMW), tmp_path / "run")
    monkeypatch.setattr("leaveout.deletion.run.Retrainer", None)
    queries, rng = points(5, 3), np.random.default_rng(9)
    relevant, scores = rng.random((5, 24)) < 0.25, rng.standard_normal((5, 24))
    relevant[2] = False
    settings = EvaluationSettings(0, removal_queries=0, top=4)
    report = evaluate(run, queries, scores={"mine": scores}, settings=settings, relevant=relevant)
    (judged,) = report.judged
    for q in range(5):
        ranked = relevant[q][np.argsort(-scores[q])].tolist()
        wanted = [
            precision_of(ranked),
            sum(ranked[:4]) / 4,
            sum(ranked[:4]) / max(1, sum(ranked)),
            precision_of(ranked[:4] + ranked[-4:]),
        ]
        found = [
            values[q]
            for values in (judged.average_precision, judged.precision, judged.recall, judged.auprc)
            if values is not None
        ]
        assert found == (pytest.approx(wanted) if q != 2 else pytest.approx([np.nan] * 4, nan_ok=True))
    line = next(report.lines())
    assert line["lds"] is None and line["undefined"] is None and line["average_precision"]["mean"] > 0
    assert report.table().headers == ["method", "AP", "P@4", "recall@4", "auPRC@4", "CPU s"]
    assert any("4 queries that have some" in note for note in report.notes())


def test_one_query_has_no_interval_and_few_units_a_smaller_top(tmp_path):
    run = TrainingRun.train(classifier(ADAMW, tuple(str(i // 2) for i in range(24))), tmp_path / "run")
    relevant = np.arange(24)[None] < 4
    given, settings = {"mine": np.arange(24.0)[None]}, EvaluationSettings(0, removal_queries=0)
    report = evaluate(run, points(1, 3), scores=given, settings=settings, relevant=relevant)
    assert report.top == 6  # half of twelve units
    line = next(report.lines())
    found = line["average_precision"]
    assert found["mean"] > 0 and found["low"] is None and found["high"] is None
    assert line["by_query"]["average_precision"] == [{"query": report.queries[0], "value": found["mean"]}]
    assert report.table().rows[0][1] == f"{found['mean']:.3f}" and "there are no intervals" in report.notes()[0]
    twice = evaluate(run, points(1, 3), scores={**given, "other": -given["mine"]}, settings=settings, relevant=relevant)
    difference = twice.difference("mine", "other", "average_precision")
    assert difference is not None and difference.mean < 0 and np.isnan(difference.low)


def test_a_unit_is_relevant_if_one_of_its_rows_is(tmp_path):
    run = TrainingRun.train(classifier(ADAMW, tuple(str(i // 2) for i in range(24))), tmp_path / "run")
    relevant = np.zeros((1, 24), bool)
    relevant[0, 3] = True
    scores = np.arange(24.0)[None]
    settings = EvaluationSettings(0, removal_queries=0, top=6)
    report = evaluate(run, points(1, 3), scores={"mine": scores}, settings=settings, relevant=relevant)
    values = report.judged[0].average_precision
    assert values is not None and values[0] == pytest.approx(1 / 11)  # the second lowest of twelve units


def test_a_file_names_the_relevant_rows(tmp_path):
    file = tmp_path / "relevant.jsonl"
    pairs = [("q1", "b"), ("q0", "a"), ("q1", "c")]
    file.write_text("\n".join(json.dumps({"query": q, "id": i}) for q, i in pairs) + "\n\n")
    assert load_relevant(file, ["q0", "q1"], ["a", "b", "c"]).tolist() == [[True, False, False], [False, True, True]]
    for text, error, message in (
        ('{"query": "q9", "id": "a"}', MismatchError, "line 1: 'q9' is not there"),
        ('{"query": "q0", "id": "z"}', MismatchError, "'z' is not there"),
        ('{"query": "q0"}', FormatError, "no object with query and id"),
        ("[1]", FormatError, "no object with query and id"),
        ("\n", FormatError, "no pair"),
    ):
        file.write_text(text)
        with pytest.raises(error, match=message):
            load_relevant(file, ["q0", "q1"], ["a", "b"])
    with pytest.raises(ValueError, match="query id stands twice"):
        load_relevant(file, ["q0", "q0"], ["a"])


# --- refusals ----------------------------------------------------------------------------------------------------


def test_what_cannot_be_judged_is_refused_before_anything_is_trained(tmp_path, monkeypatch):
    run = TrainingRun.train(classifier(ADAMW), tmp_path / "run")
    monkeypatch.setattr("leaveout.deletion.run.Retrainer", None)
    queries, some = points(2, 3), np.ones((2, 24), bool)
    function = [Query(lambda model: model(torch.zeros(1, 2, dtype=torch.float64))[0, 0], name="a function")]

    def judged(queries=queries, relevant=None, **changes):
        return evaluate(run, queries, ["random"], settings=EvaluationSettings(0, **changes), relevant=relevant)

    for call, error, message in (
        (lambda: judged(removal_queries=0), ValueError, "nothing to judge with"),
        (lambda: judged(relevant=some, top=13), ValueError, "top is 13: give 1 to 12"),
        (lambda: judged(tail_patch=True, top=0), ValueError, "top is 0"),
        (lambda: judged(relevant=~some), ValueError, "no query has a relevant row"),
        (lambda: judged(relevant=some[:1]), MismatchError, "relevant rows have the shape"),
        (lambda: judged(function, tail_patch=True), UnsupportedError, "'a function' has no single answer"),
        (lambda: judged(function, brittleness=1), UnsupportedError, "'a function' has no single answer"),
        (lambda: judged(brittleness_shares=(0.1, 1.0)), ValueError, "between 0 and 1"),
    ):
        with pytest.raises(error, match=message):
            call()
