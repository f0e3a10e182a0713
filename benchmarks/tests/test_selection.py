"""The benchmark of prospective selection in its smoke form, and its parts against plain computations."""

from __future__ import annotations

import gzip
import json
import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats

from .conftest import BENCHMARKS, numbers

FILE = "readout_selection.json"


@pytest.fixture(scope="module")
def selection(script):
    return script("selection")


@pytest.fixture(scope="module")
def rows(script):
    return script("selection_rows")


@pytest.fixture(scope="module")
def smoke(selection, tmp_path_factory):
    """The result of a smoke run of three seeds, and its picture."""
    place = tmp_path_factory.mktemp("smoke")
    arguments = ["--smoke", "--seeds", "0", "1", "2", "--out", str(place), "--picture", str(place / "picture.png")]
    assert selection.main(arguments) == 0
    return json.loads((place / FILE).read_text()), place / "picture.png"


@pytest.fixture
def small(selection, rows, tmp_path):
    """A base model, a trial and its sizes."""
    place, sources, _ = rows.base_model(tmp_path, True, rows.SMOKE, 0)
    return place, rows.draw_trial(sources, rows.SMOKE, 0), rows.SMOKE


def test_smoke_result_has_every_method_and_finite_numbers(selection, smoke):
    result, picture = smoke
    assert result["smoke"] is True and result["repeats"] == 3 and result["question"].endswith("?")
    assert picture.stat().st_size > 5000
    assert set(result["results"]) == {"news", "wiki"}
    for facts in result["results"].values():
        assert tuple(facts["methods"]) == selection.METHODS
        assert set(facts["default_minus_others"]) == set(selection.METHODS) - {"default"}
    assert all(math.isfinite(number) for number in numbers(result))


def test_oracle_random_and_all_select_what_they_say(smoke):
    news, wiki = (smoke[0]["results"][kind]["methods"] for kind in ("news", "wiki"))
    assert news["oracle"]["shares_of_kinds"] == {"clickbait": 0, "news": 1, "wiki": 0}
    assert wiki["oracle"]["shares_of_kinds"] == {"clickbait": 0, "news": 0, "wiki": 1}
    assert news["all rows"]["precision_by_seed"] == pytest.approx([1 / 3] * 3)
    for method in ("random", "all rows"):
        assert news[method]["losses_of_kinds"] == wiki[method]["losses_of_kinds"]


def test_made_up_kinds_are_told_apart_and_training_helps(smoke):
    for kind, facts in smoke[0]["results"].items():
        found = facts["methods"]
        assert (
            min(found[m]["precision"] for m in ("default", "paper-responses", "BM25"))
            > 0.8
            > found["random"]["precision"]
        )
        assert found["oracle"]["loss"]["mean"] < found["random"]["loss"]["mean"] < facts["loss_at_start"]
        assert found["oracle"]["losses_of_kinds"][kind] == min(found["oracle"]["losses_of_kinds"].values())


def test_a_killed_run_goes_on_and_gives_the_same(selection, small, tmp_path, monkeypatch):
    place, trial, sizes = small
    trained, real = [], selection.trained_losses

    def counted(*arguments):
        if len(trained) == 3:
            raise KeyboardInterrupt
        trained.append(arguments[2])
        return real(*arguments)

    monkeypatch.setattr(selection, "trained_losses", counted)
    with pytest.raises(KeyboardInterrupt):
        selection.measured(place, trial, sizes, tmp_path / "killed")
    n_first = len(trained)
    trained.clear()
    monkeypatch.setattr(selection, "trained_losses", lambda *a: trained.append(a[2]) or real(*a))
    resumed = selection.measured(place, trial, sizes, tmp_path / "killed")
    n_trainings = len(selection.METHODS) * 2 - len(selection.ALIKE)
    assert (n_first, len(trained)) == (3, n_trainings - 3)
    monkeypatch.undo()
    assert resumed["wanted"] == selection.measured(place, trial, sizes, tmp_path / "whole")["wanted"]


def test_losses_are_those_of_the_library(selection, small):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place, trial, sizes = small
    model, tokenizer = AutoModelForCausalLM.from_pretrained(place), AutoTokenizer.from_pretrained(place)
    recipe = selection.recipe_of(trial.rows[:12], place, sizes, 5)
    changed = {name: value + 0.01 for name, value in model.named_parameters()}
    found = selection.losses(selection.task_of(recipe), changed, trial)
    model.load_state_dict(changed, strict=True)
    for kind, texts in trial.held_out.items():
        each = []
        for text in texts:
            ids = torch.tensor([tokenizer(text)["input_ids"]])
            with torch.no_grad():
                each.append(float(model(input_ids=ids, labels=ids).loss))
        assert found[kind] == pytest.approx(np.mean(each), rel=1e-5)


def test_bm25_selects_the_rows_of_highest_mean_score(selection, small):
    bm25s = pytest.importorskip("bm25s")
    place, trial, sizes = small
    found = selection.Valuer(place, trial, sizes.selected).select("BM25")
    index = bm25s.BM25(method="lucene", k1=1.5, b=0.75)
    index.index([text.lower().split() for text in trial.pool], show_progress=False)
    for kind in ("news", "wiki"):
        words = [word for text in trial.wanted[kind] for word in text.lower().split()]
        scores = index.get_scores([word for word in words if any(word in text.split() for text in trial.pool)])
        kept, left = scores[found[kind]], np.delete(scores, found[kind])
        assert len(set(found[kind])) == sizes.selected and kept.min() >= left.max() - 1e-5


def test_selections_are_the_numbers_of_pool_rows_that_an_index_selects(selection, small):
    place, trial, sizes = small
    valuer = selection.Valuer(place, trial, sizes.selected)
    for method in selection.METHODS:
        for kind, chosen in valuer.select(method).items():
            assert chosen == sorted(set(chosen)) and set(chosen) <= set(range(len(trial.pool)))
            assert len(chosen) == (len(trial.pool) if method == "all rows" else sizes.selected), (method, kind)
    random_weights = replace(valuer, trial=replace(trial, seed=1)).select(selection.UNTRAINED)
    assert random_weights != valuer.select(selection.UNTRAINED)


# ---------------------------------------------------------------- statistics


def test_student_equals_scipys_paired_test(selection):
    chance = np.random.default_rng(0)
    for n in (2, 5, 9):
        first, second = chance.normal(size=n), chance.normal(0.5, size=n)
        truth = stats.ttest_rel(first, second)
        interval = truth.confidence_interval(0.95)
        found = selection.student(first - second)
        assert found["p"] == pytest.approx(truth.pvalue)
        assert (found["low"], found["high"]) == pytest.approx((interval.low, interval.high))
        assert found["mean"] == pytest.approx((first - second).mean())


def test_student_of_equal_values_is_certain(selection):
    assert selection.student([0.0, 0.0]) == {"mean": 0, "low": 0, "high": 0, "p": 1}
    assert selection.student([2.0, 2.0]) == {"mean": 2, "low": 2, "high": 2, "p": 0}


# ---------------------------------------------------------------- rows


def test_trials_share_no_source_between_their_parts(rows):
    sources = {kind: [[f"{kind} {a} {s}" for s in range(9)] for a in range(40)] for kind in rows.KINDS}
    sizes = replace(rows.SMOKE, wanted=9, held_out=20, pool=60)
    trial = rows.draw_trial(sources, sizes, 3)
    assert len(trial.pool) == 180 and [trial.kinds.count(kind) for kind in rows.KINDS] == [60] * 3
    assert trial.kinds != sorted(trial.kinds)
    assert [row.text for row in trial.rows] == trial.pool and [row.id for row in trial.rows][:2] == ["0", "1"]
    for kind in rows.KINDS:
        pool = [text for text, of in zip(trial.pool, trial.kinds, strict=True) if of == kind]
        parts = [{text.rsplit(" ", 1)[0] for text in part} for part in (trial.wanted[kind], trial.held_out[kind], pool)]
        assert all(text.startswith(kind) for text in pool)
        assert not parts[0] & parts[1] and not parts[0] & parts[2] and not parts[1] & parts[2]
    assert rows.draw_trial(sources, sizes, 3) == trial != rows.draw_trial(sources, sizes, 4)


def test_what_was_pretrained_on_is_not_in_a_trial(rows, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(rows, "public_sources", lambda seed: rows.made_sources())
    monkeypatch.setattr(
        rows, "pretrained", lambda work, shape, given, seed: seen.extend(r.text for r in given) or (work, 1.0)
    )
    _, sources, seconds = rows.base_model(tmp_path, False, rows.SMOKE, 0)
    left = {text for found in sources.values() for source in found for text in source}
    assert len(seen) == 8 + 3 * 8 and len(left) == 3 * 48 and not left & set(seen) and seconds == 1


def test_too_few_rows_are_refused(rows):
    with pytest.raises(ValueError, match=r"only 2 of 3 rows: ask for fewer"):
        rows.sampled([["a"], ["b"]], 3, random.Random(0))


def test_articles_are_read_as_sentences_of_the_length_of_headlines(rows, tmp_path, monkeypatch):
    (tmp_path / "wikitext2").mkdir()
    long = "word " * 30
    text = f"""
 = First thing =

 The old @-@ fashioned boat , with 1 @,@ 000 <unk> sails , went away . Short one . {long}.
 = = History = =
 In spring the boat ( a red one ) came back to the harbour .

 = Second thing =

 In spring the boat ( a red one ) came back to the harbour . Nobody there had ever seen such a boat .
"""
    with gzip.open(tmp_path / "wikitext2" / "valid.txt.gz", "wt", encoding="utf-8") as file:
        file.write(text)
    monkeypatch.setenv("LEAVEOUT_DATA", str(tmp_path))
    assert rows.articles() == [
        [
            "The old-fashioned boat, with 1,000 sails, went away",
            "In spring the boat (a red one) came back to the harbour",
        ],
        ["Nobody there had ever seen such a boat"],
    ]


# ---------------------------------------------------------------- the committed result


def test_committed_result_follows_from_its_losses():
    text = (BENCHMARKS / "results" / FILE).read_text()
    result = json.loads(text)
    assert result["smoke"] is False and "/" + "tmp" not in text and len(result["seeds"]) == 5
    for facts in result["results"].values():
        by_seed = {name: found["loss_by_seed"] for name, found in facts["methods"].items()}
        for other, found in facts["default_minus_others"].items():
            assert found["p"] == pytest.approx(stats.ttest_rel(by_seed["default"], by_seed[other]).pvalue)
        for other, reached in facts["goal_reached"].items():
            better = np.mean(by_seed["default"]) < np.mean(by_seed[other])
            assert reached == (better and facts["default_minus_others"][other]["p"] < 0.05)
