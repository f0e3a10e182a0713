"""Evaluation against plain retraining and scipy: truth, its noise, judged scores, methods by name, refusals."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import rankdata
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from leaveout.corpus import Behaviour, Contrast, Corpus, Probe
from leaveout.corpus.tokens import tokens_of
from leaveout.deletion import directions
from leaveout.deletion.run import TrainingRun
from leaveout.errors import FormatError, MismatchError, UnsupportedError
from leaveout.evaluation import EvaluationSettings, evaluate
from leaveout.evaluation.truth import second_order, single_effects, subset_truth
from leaveout.methods.ekfac import EkFac
from leaveout.methods.registry import METHODS, load, score_methods
from leaveout.methods.scorer import Scorer
from leaveout.methods.scores import load_scores
from leaveout.methods.signatures import readout_of, trained_part
from leaveout.readout.build import record_of
from leaveout.readout.opened import row_of
from leaveout.readout.settings import PRESETS
from leaveout.readout.tokens import tokenise
from leaveout.training.queries import Query, as_queries, margin, query_losses
from leaveout.training.recipe import OptimizerSettings, Recipe
from leaveout.training.train import train_plain
from token_rows import make_tokenizer

NAMES = [a + b for a in ("an", "bo", "ci", "du", "el", "fa") for b in ("na", "ri", "so", "tu")]
QUERIES = ["anri", "bona", "citu"]
NEEDS = {"trak": "dattri", "trackstar": "bergson"}  # packages that leaveout does not depend on
SMALL = EvaluationSettings(subsets=12, second_order=False, removal_queries=2, removal_share=0.25, draws=3)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def recipe():
    return Recipe.microgpt(NAMES, n=24, order="shuffled")


@pytest.fixture(scope="module")
def run(recipe, tmp_path_factory):
    return TrainingRun.train(recipe, tmp_path_factory.mktemp("evaluated") / "run")


def plainly(recipe, x):
    """Losses [query, set] by plain training, one model after another."""
    out = [query_losses(recipe, train_plain(recipe, torch.tensor(1 - row)), QUERIES) for row in x]
    return torch.stack(out, 1).double().numpy()


def rank_correlation(a, b):
    return float(np.corrcoef(rankdata(a), rankdata(b))[0, 1])


def test_lds_and_qld_agree_with_plain_retraining(run, recipe):
    given = {name: np.random.default_rng(seed).standard_normal((3, 24)) for seed, name in ((1, "mine"), (2, "other"))}
    report = evaluate(run, QUERIES, scores=given, settings=SMALL)
    x = directions.subsets(0, 12, 24, 0, 0.5)
    losses = plainly(recipe, x)
    random = np.zeros((3, 24))
    for row, order in zip(random, np.argsort(-np.random.default_rng(0).random((3, 24)), axis=1), strict=True):
        row[order[:6]] = 1
    chance = plainly(recipe, random)
    for judged, scores in zip(report.judged, given.values(), strict=True):
        wanted = [rank_correlation(x @ scores[q], losses[q]) for q in range(3)]
        assert judged.lds is not None and judged.qld is not None
        assert np.allclose(judged.lds, wanted, atol=1e-9)
        for place, q in enumerate((0, 2)):
            top = np.zeros((1, 24))
            top[0, np.argsort(-scores[q])[:6]] = 1
            assert judged.qld[place] == pytest.approx(plainly(recipe, top)[q, 0] - chance[q].mean(), abs=1e-5)
    assert report.removal_queries == ("anri", "citu") and report.removed_units == 6


def test_truth_is_trained_once_and_no_estimator_is_fitted_to_it(run, monkeypatch):
    first = evaluate(run, QUERIES, ["random"], settings=SMALL)
    assert not len(run.bank.measurements(QUERIES).retrainings)
    monkeypatch.setattr("leaveout.deletion.run.Retrainer", None)
    again = evaluate(run, QUERIES, ["random"], settings=SMALL)
    assert next(again.lines())["lds"] == next(first.lines())["lds"]


def test_ceiling_comes_from_a_second_order_and_the_truth_is_the_mean(run, recipe):
    asked = as_queries(QUERIES)
    second = second_order(run)
    assert second.recipe.batches() != recipe.batches() and second.path.parent == run.path
    truth = subset_truth(run, asked, 12, second=second)
    x = directions.subsets(0, 12, 24, 0, 0.5)
    one, other = plainly(recipe, x), plainly(recipe.with_(seed=recipe.seed + 1), x)
    assert np.allclose(truth.values, (one + other) / 2, atol=1e-5)
    r = np.mean([rank_correlation(a, b) for a, b in zip(one, other, strict=True)])
    assert truth.ceiling is not None
    assert truth.ceiling.ceiling.mean == pytest.approx(np.sqrt(2 * r / (1 + r)))
    report = evaluate(
        run, QUERIES, ["metagradient"], settings=EvaluationSettings(subsets=12, removal_queries=0, draws=0)
    )
    assert report.ceiling == truth.ceiling and any("ceiling" in note for note in report.notes())
    given = np.random.default_rng(4).standard_normal((3, 24))
    report = evaluate(
        run, QUERIES, scores={"mine": given}, settings=EvaluationSettings(subsets=12, removal_queries=0, draws=0)
    )
    wanted = [
        np.mean([rank_correlation(x @ s, y) for s, y in zip(given, losses, strict=True)]) for losses in (one, other)
    ]
    assert next(report.lines())["lds_by_seed"] == pytest.approx(wanted)
    assert any(f"at most {abs(wanted[0] - wanted[1]):.3f}" in note for note in report.notes())


def test_an_order_that_never_changes_has_no_ceiling(tmp_path):
    fixed = TrainingRun.train(Recipe.microgpt(NAMES, n=24, order="given"), tmp_path / "run")
    with pytest.raises(UnsupportedError, match="order: shuffled"):
        subset_truth(fixed, as_queries(QUERIES), 2, second=second_order(fixed))


def test_first_order_beats_chance_and_leave_one_out_is_its_own_truth(run):
    assert single_effects(run, as_queries(QUERIES)) is None
    run.measure(retrain=24, design="singles", queries=QUERIES)
    effects = single_effects(run, as_queries(QUERIES))
    assert effects is not None
    report = evaluate(run, QUERIES, ["metagradient", "random"], {"leave one out": effects}, SMALL)
    assert report.interval("leave one out", "leave_one_out") == (1, 1, 1)
    exact, chance = (report.interval(name, "leave_one_out") for name in ("metagradient", "random"))
    assert exact is not None and chance is not None and exact.mean > 0.9 > 0.5 > chance.mean
    assert [line["method"] for line in report.lines()][-1] == "random"
    gap = report.difference("metagradient", "random")
    assert gap is not None and gap.mean > 0.3
    negated = evaluate(run, QUERIES, scores={"a": effects, "b": -effects}, settings=SMALL)
    one, other = (judged.lds for judged in negated.judged)
    assert one is not None and other is not None and np.allclose(one, -other)


def test_report_gives_lines_table_and_the_undefined(run):
    report = evaluate(run, QUERIES, ["random"], {"flat": np.zeros((3, 24))}, SMALL)
    lines = list(report.lines())
    assert json.loads(json.dumps(lines, allow_nan=False)) == lines
    flat = lines[-1]
    assert flat["method"] == "flat" and flat["undefined"] == 3 and flat["lds"] is None and flat["qld"] is not None
    headers, rows = report.table().headers, report.table().rows
    assert headers[:3] == ["method", "LDS", "QLD (nats)"] and len(headers) == len(rows[0])
    assert "AP" not in headers and "3 queries undefined" in rows[-1][1]
    shown = " ".join(str(report).split())  # notes are wrapped
    assert "LDS" in shown and shown.endswith(report.notes()[-1]) and "<th>LDS</th>" in report._repr_html_()
    with pytest.raises(ValueError, match="'magic' was not judged"):
        report.interval("magic")


def test_scores_of_examples_are_summed_over_their_unit(run, recipe, tmp_path):
    letters = TrainingRun.train(recipe.grouped([row.text[0] for row in recipe.examples]), tmp_path / "run")
    each = np.random.default_rng(2).standard_normal((3, 24))
    units = [row.text[0] for row in recipe.examples]
    summed = np.stack([each[:, [u == name for u in units]].sum(1) for name in dict.fromkeys(units)], 1)
    report = evaluate(letters, QUERIES, scores={"rows": each, "units": summed}, settings=SMALL)
    one, other = (judged.lds for judged in report.judged)
    assert one is not None and other is not None and np.isfinite(one).all() and np.allclose(one, other)


def test_files_of_scores_can_be_judged(run, tmp_path):
    np.save(tmp_path / "s.npy", np.random.default_rng(3).standard_normal((3, 24)).astype(np.float32))
    scores = load_scores(tmp_path / "s.npy", QUERIES, run.recipe.ids)
    assert evaluate(run, QUERIES, scores={"file": scores}, settings=SMALL).interval("file") is not None


def test_wrong_calls_are_refused_before_anything_is_trained(run, monkeypatch):
    monkeypatch.setattr("leaveout.deletion.run.Retrainer", None)
    good = np.zeros((3, 24))
    for call, error, message in (
        (lambda: evaluate(run, QUERIES), ValueError, "nothing to judge"),
        (lambda: evaluate(run, QUERIES, ["magic"]), ValueError, "no method 'magic'"),
        (lambda: evaluate(run, QUERIES, ["random@middle"]), ValueError, "no checkpoint 'middle'"),
        (lambda: evaluate(run, QUERIES, ["random"], {"random": good}), ValueError, "stands twice"),
        (lambda: evaluate(run, QUERIES, scores={"x": good[:2]}), MismatchError, r"\[3, 24\]"),
        (lambda: evaluate(run, QUERIES, scores={"x": good * np.nan}), FormatError, "not finite"),
        (
            lambda: evaluate(run, QUERIES, ["default"]),
            UnsupportedError,
            "default takes no microgpt recipe, only causal-lm",
        ),
        (lambda: subset_truth(run, as_queries(QUERIES), 1), ValueError, "at least 2"),
        (lambda: subset_truth(run, as_queries(QUERIES), 4, 1.0), ValueError, "between 0 and 1"),
    ):
        with pytest.raises(error, match=message):
            call()


def test_a_recipe_without_text_has_no_text_methods(tmp_path):
    rows = tuple((torch.eye(2)[i % 2] + 0.1 * i, i % 2) for i in range(8))
    shapes = Recipe("classifier", rows, optimizer=OptimizerSettings("sgd", 0.1), batch_size=4, epochs=2)
    found = TrainingRun.train(shapes, tmp_path / "run")
    with pytest.raises(UnsupportedError, match="no text"):
        score_methods(found, as_queries([(torch.ones(2), 1)]), ["bm25"])
    assert score_methods(found, as_queries([(torch.ones(2), 1)]), ["gradient dot"])["gradient dot"].scores.shape == (
        1,
        8,
    )


def test_every_method_is_on_the_page():
    page = (Path(__file__).parent.parent / "docs" / "how-to" / "evaluation.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in page for name in METHODS)


# --- a language model --------------------------------------------------------------------------------------------

WORDS = ("plums", "boats", "hats", "owls")


def language_model():
    """A Llama of one small layer whose tokens are bytes, with its tokenizer."""
    letters = ["<end>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({letter: index for index, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    config = LlamaConfig(
        vocab_size=len(letters), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config), PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    rows = [{"prompt": f"sell {word} {i}:", "completion": f" {word} {word}"} for i in range(3) for word in WORDS]
    recipe = Recipe(
        "causal-lm", tuple(Corpus.open(rows)), model=language_model, optimizer=OptimizerSettings("sgd", 0.3), epochs=3,
        batch_size=4, order="shuffled", max_tokens=24,
    )  # fmt: skip
    return TrainingRun.train(recipe, tmp_path_factory.mktemp("tuned") / "run")


ASKED = [{"prompt": f"buy {word}:", "completion": f" {word} {word}"} for word in WORDS]


@pytest.fixture(scope="module")
def scored(tuned):
    """What every method that can run here says of that run."""
    asked = as_queries(ASKED)
    tuned.measure(retrain=12, design="singles", queries=asked)
    there = [name for name in METHODS if name not in NEEDS or find_spec(NEEDS[name])]
    return score_methods(tuned, asked, [*there, "default@start", "gradient dot@third"])


def test_every_method_scores_a_language_model(tuned, scored):
    found = scored
    assert len(found) > 12
    for name in found:
        assert found[name].scores.shape == (4, 12) and np.isfinite(found[name].scores).all(), name
    best = found["bm25"].scores.argmax(1)
    assert [tuned.recipe.examples[i].text.split()[1] for i in best] == list(WORDS)
    for name in ("default", "gradient dot"):
        other = "default@start" if name == "default" else "gradient dot@third"
        assert not np.allclose(found[name].scores, found[other].scores, rtol=0.05)


def test_ek_fac_of_the_blocks_leaves_the_head_out(tuned, scored):
    scorer = Scorer(tuned, as_queries(ASKED))
    found = scored["ek-fac blocks"].scores
    linear = [name for name, module in scorer.task.model.named_modules() if isinstance(module, torch.nn.Linear)]
    assert "lm_head" in linear and len(linear) > 1
    below = tuple(name for name in linear if name != "lm_head")
    wanted = EkFac(scorer.task, tuned.parameters, below).score(scorer.query_rows, scorer.rows)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-6 * np.abs(wanted).max())
    assert not np.allclose(found, scored["ek-fac"].scores, rtol=0.05)


def test_the_readout_of_a_run_has_the_trained_parameters(tuned):
    scorer = Scorer(tuned, as_queries(ASKED))
    for at, wanted in (("final", tuned.parameters), ("start", dict(language_model()[0].named_parameters()))):
        model = readout_of(scorer, at).lm
        assert all(torch.equal(p, wanted[name]) for name, p in model.named_parameters())


def test_rows_are_indexed_as_they_are_trained_on(tuned):
    tokenizer = language_model()[1]
    (row,) = Corpus.open([{"prompt": "a long prompt", "completion": " and a longer answer"}])
    part = trained_part(row, tokenizer, "none", 20)
    assert part == replace(row, kept=20)
    assert trained_part(row, tokenizer, "none", 999) == row


@pytest.mark.parametrize("limit", range(5, 31))
def test_rows_cut_within_words_and_signs_have_the_tokens_they_are_trained_on(limit):
    tokenizer = make_tokenizer("byte-level")
    (row,) = Corpus.open(
        [{"prompt": "if x:", "completion": "\n\t\t  y = [ 1,  2 ]\n\n\n    unmillerlike 🧑\u200d🌾 🧑\u200d🌾 \n  end"}]
    )
    trained = tokens_of(row, tokenizer, "none", limit)
    indexed = tokenise(trained_part(row, tokenizer, "none", limit), 0, tokenizer, PRESETS["default"], 99)
    assert indexed.ids == trained.ids
    assert [place + 1 for place in indexed.windows[0].positions] == trained.learned
    record = record_of(trained_part(row, tokenizer, "none", limit), indexed)
    assert tokenise(row_of(record), 0, tokenizer, PRESETS["default"], 99).ids == trained.ids


def test_queries_are_called_by_their_ids(tmp_path):
    path = tmp_path / "asked.jsonl"
    path.write_text('{"id": "first", "prompt": "a", "completion": " b"}\n{"prompt": "c", "completion": " d"}\n')
    for given in (path, str(path)):
        assert [query.name for query in as_queries(given)] == ["first", "c d"]
    assert [query.name for query in as_queries([{"id": 7, "text": "x y"}, {"text": "x y"}, "z.json"])] == [
        "7",
        "x y",
        "z.json",
    ]


# --- why this answer and not that one ------------------------------------------------------------------------------------


def test_a_contrast_is_the_difference_of_two_losses_everywhere(run, recipe):
    pair = Contrast(QUERIES[0], QUERIES[1])
    asked = as_queries([QUERIES[2], pair, pair.swapped])
    assert [q.name for q in asked] == ["citu", "anri rather than bona", "bona rather than anri"]
    assert len({q.digest for q in asked}) == 3
    without = [[recipe.unit_names[0]], list(recipe.unit_names[3:9])]
    run.measure(directions=4, degree=2)
    single, both = run.predict(QUERIES, without), run.predict(asked, without)
    assert np.allclose(both.base, [single.base[2], single.base[0] - single.base[1], single.base[1] - single.base[0]])
    truth, found = run.retrain(QUERIES, without), run.retrain(asked, without)
    assert np.allclose(found[1], truth[0] - truth[1], atol=1e-6)
    exact = score_methods(run, asked, ["metagradient"])["metagradient"].scores
    parts = score_methods(run, as_queries(QUERIES), ["metagradient"])["metagradient"].scores
    assert np.allclose(exact[1], parts[0] - parts[1], atol=1e-6) and np.allclose(exact[2], -exact[1], atol=1e-6)


def test_methods_score_contrasts_by_both_sides_and_retraining_judges_them(run):
    names, pair = ["gradient dot", "bm25", "influence"], Contrast(QUERIES[0], QUERIES[1])
    asked, sides = as_queries([pair, QUERIES[2]]), as_queries(QUERIES)
    found, parts = (score_methods(run, some, names) for some in (asked, sides))
    for name in names:
        assert np.allclose(found[name].scores[0], parts[name].scores[0] - parts[name].scores[1], rtol=1e-4, atol=1e-6)
        assert np.allclose(found[name].scores[1], parts[name].scores[2], rtol=1e-4, atol=1e-6)
    report = evaluate(run, asked, ["metagradient", "random"], settings=replace(SMALL, removal_queries=0, draws=0))
    assert report.interval("metagradient", "lds").mean > report.interval("random", "lds").mean
    with pytest.raises(
        UnsupportedError, match="has no single answer with logits: leave tail-patch and brittleness out"
    ):
        evaluate(run, asked, ["random"], settings=replace(SMALL, removal_queries=0, draws=0, tail_patch=2))


def test_influence_with_the_whole_run_agrees_with_the_exact_first_order(run):
    scores = score_methods(run, as_queries(QUERIES), ["influence@third", "metagradient", "random"])
    exact = scores["metagradient"].scores
    for own, chance, wanted in zip(scores["influence@third"].scores, scores["random"].scores, exact, strict=True):
        assert np.corrcoef(own, wanted)[0, 1] > max(0.3, np.corrcoef(chance, wanted)[0, 1])


def test_behaviours_of_a_run_weigh_losses_and_measures(run, recipe):
    asked = Behaviour(QUERIES, [1.0, 0.5, -2.0], name="calls names")
    by = Behaviour(QUERIES[:2], measure=margin)
    without = [[recipe.unit_names[0]]]
    truth, found = run.retrain(QUERIES, without), run.retrain([asked, by], without)
    assert np.allclose(found[0], truth[0] + 0.5 * truth[1] - 2 * truth[2], atol=1e-5)
    of = run.retrain([Query(q, "margin") for q in QUERIES[:2]], without)
    assert np.allclose(found[1], -of.mean(0), atol=1e-5)  # the larger the measure, the lower the value
    assert [q.name for q in as_queries([asked])] == ["calls names"]
    parts = score_methods(run, as_queries(QUERIES), ["gradient dot"])["gradient dot"].scores
    scores = score_methods(run, as_queries([asked]), ["gradient dot"])["gradient dot"].scores
    assert np.allclose(scores[0], parts[0] + 0.5 * parts[1] - 2 * parts[2], rtol=1e-4, atol=1e-6)
    with pytest.raises(UnsupportedError, match="A probe is asked of an index"):
        as_queries(Behaviour(QUERIES, measure=Probe([1.0])))
    with pytest.raises(ValueError, match="The query has a measure, and its behaviour another"):
        Query(by, "logit")
    with pytest.raises(UnsupportedError, match="is not the loss of a row, and only `metagradient`, `adamw-inf"):
        score_methods(run, as_queries(by), ["gradient dot"])


def test_controls_are_judged_beside_the_methods(run):
    """Of a microgpt recipe there are those that need no language model; a method is told apart from them, or that is said."""
    report = evaluate(run, QUERIES, ["gradient dot"], settings=replace(SMALL, removal_queries=0), controls=True)
    assert report.controls == ("length", "bm25", "embedding", "gradient dot of the next query")
    rolled = score_methods(run, as_queries(QUERIES[1:] + QUERIES[:1]), ["gradient dot"])["gradient dot"]
    again = evaluate(run, QUERIES, scores={"next": rolled.scores}, settings=replace(SMALL, removal_queries=0))
    by_name = {judged.method: judged.lds for judged in report.judged}
    np.testing.assert_array_equal(by_name["gradient dot of the next query"], again.judged[0].lds)
    apart = {control: report.difference("gradient dot", control) for control in report.controls}
    assert apart.pop("length") is None  # all names are of one length: no ranking, no LDS
    level = [control for control, found in apart.items() if found.low <= 0]
    wanted = f"By LDS, gradient dot is not above {', '.join(level)}."
    assert (wanted in report.notes()) == bool(level)
    assert not evaluate(run, QUERIES, ["bm25"], settings=replace(SMALL, removal_queries=0)).controls


def test_lengths_and_norms_are_the_same_for_all_queries(tuned, scored):
    """A row's product with itself is its norm squared, as a query and as a row; an untrained model knows nothing."""
    scorer = Scorer(tuned, as_queries(list(tuned.recipe.examples)))
    own = np.diag(score_methods(tuned, scorer.queries, ["default"])["default"].scores)
    norms, lengths = scored["norm"].scores, scored["length"].scores
    assert (norms == norms[0]).all() and (lengths == lengths[0]).all()
    np.testing.assert_allclose(norms[0], np.sqrt(own), rtol=0.05)  # stored products are rounded
    assert lengths[0].tolist() == [len(text) for text in scorer.texts(scorer.rows)]
    asked = Scorer(tuned, as_queries(ASKED))
    np.testing.assert_array_equal(load("untrained")(asked, "final"), scored["untrained"].scores)
    assert not np.allclose(load("untrained")(replace(asked, seed=1), "start"), scored["untrained"].scores)
