"""The benchmarks of the backdoor and of domains run in their smoke form, and what they are made of is right."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from leaveout.corpus import Corpus
from leaveout.methods.rapidin import RapidIn
from leaveout.readout.index import Index
from leaveout.training.recipe import Recipe
from leaveout.training.tasks import task_of

from .conftest import BENCHMARKS

SMOKE = {"backdoor": "readout_backdoor.json", "domains": "readout_domains.json"}


@pytest.fixture(scope="module")
def smoke(script, tmp_path_factory):
    """A directory of smoke results, pictures and what was kept for a second run."""
    directory = tmp_path_factory.mktemp("results")
    for name in SMOKE:
        assert script(name).main(options(directory, name)) == 0
    return directory


def options(directory, name):
    return ["--smoke", "--out", f"{directory}", "--work", f"{directory / name}", "--picture", f"{directory / name}.png"]


@pytest.mark.parametrize("name", SMOKE)
def test_results_say_what_they_depend_on(smoke, name):
    result = json.loads((smoke / SMOKE[name]).read_text())
    assert result["question"].endswith("?") and result["smoke"] is True
    assert {"commit", "versions", "processor", "threads", "date", "seed"} <= result.keys()
    for facts in result["models"].values():
        assert facts["repeats"] == facts["queries"] and facts["parameters"] > 0
        for methods in facts["results"].values():
            assert methods.keys() == facts["costs"].keys()
            for found in methods.values():
                ap = found["average_precision"]
                assert 0 < ap["low"] <= ap["mean"] <= ap["high"] <= 1 and found["auprc_ends_5"]["mean"] <= 1
        default = facts["costs"]["default"]
        assert default["bytes_of_rapidin_over_own"] == pytest.approx(131072 / default["bytes_per_row"])
        assert facts["costs"]["BM25"]["bytes_per_row"] is None


@pytest.mark.parametrize("name", SMOKE)
def test_the_picture_is_drawn(smoke, name):
    assert (smoke / f"{name}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", SMOKE)
def test_a_second_run_makes_nothing_anew(smoke, name, script, monkeypatch):
    before = json.loads((smoke / SMOKE[name]).read_text())
    monkeypatch.setattr(script("ranking"), "of_index", None)
    monkeypatch.setattr(script("backdoor"), "take_snapshots", None)
    assert script(name).main(options(smoke, name)) == 0
    after = json.loads((smoke / SMOKE[name]).read_text())
    assert after["models"] == before["models"]


@pytest.mark.parametrize("file", SMOKE.values())
def test_committed_results_are_of_full_runs(file):
    text = (BENCHMARKS / "results" / file).read_text()
    assert json.loads(text)["smoke"] is False
    assert not any("/" + place in text for place in ("tmp", "home", "work"))


def test_the_poisoned_model_and_its_untrained_twin_are_judged(smoke):
    facts = json.loads((smoke / SMOKE["backdoor"]).read_text())["models"]["tiny"]
    assert set(facts["results"]) == {"trigger", "control"}
    assert facts["results"]["trigger"]["BM25"]["average_precision"]["mean"] > 0.95
    assert "TracIn" in facts["costs"] and "default, before fine-tuning" in facts["costs"]
    loss = facts["learned"]["loss"]
    assert set(loss) == {"before", "quarter", "clean", "poisoned"}
    taken = facts["learned"]["loss_that_poisoned_rows_take_away"]["control"]["mean"]
    assert taken == pytest.approx(loss["clean"]["control"]["mean"] - loss["poisoned"]["control"]["mean"])
    assert loss["poisoned"]["trigger"]["mean"] < loss["clean"]["trigger"]["mean"] < loss["before"]["trigger"]["mean"]


def test_words_find_the_domain_and_length_does_not(smoke):
    results = json.loads((smoke / SMOKE["domains"]).read_text())["models"]["tiny"]["results"]
    for kind in ("finance", "medical"):
        assert results[kind]["tf-idf cosine"]["average_precision"]["mean"] > 0.8
        assert results[kind]["words in the answer"]["average_precision"]["mean"] < 0.6


# ---------------------------------------------------------------- methods


@pytest.fixture
def ranked_task(script):
    """Six rows in two kinds, and three queries."""
    rows = [
        {"id": f"{i}", "text": text} for i, text in enumerate(["a b c", "a a d", "e f g", "f f h", "x a f", "b e c"])
    ]
    queries = [{"id": f"q{i}", "text": text} for i, text in enumerate(["a b", "f h h", "e g"])]
    kinds = np.array([0, 0, 1, 1, 1, 0])
    relevant = np.array([0, 1, 0])[:, None] == kinds
    return script("ranking").RankingTask(rows, queries, ["one", "two", "two"], relevant)


def test_tfidf_cosine_is_its_formula(script):
    corpus = ["the cat sat", "the dog sat sat", "a bird the"]
    queries = ["sat bird unknown", "the", "cat cat dog"]
    found = script("ranking").tfidf_cosine(queries, corpus)

    def vector(text):
        words = text.split()
        holders = {word: sum(word in other.split() for other in corpus) for word in words}
        return {word: words.count(word) * math.log(3 / n) for word, n in holders.items() if n}

    def length(x):
        return math.sqrt(sum(value**2 for value in x.values()))

    for row, query in zip(found, map(vector, queries), strict=True):
        for value, text in zip(row, map(vector, corpus), strict=True):
            product = sum(weight * text.get(word, 0) for word, weight in query.items())
            wanted = product / (length(query) * length(text)) if product else 0
            assert value == pytest.approx(wanted, abs=1e-6)


def test_each_query_is_judged_by_its_own_rows_and_set(script, ranked_task):
    ranking = script("ranking")
    first = np.array([[1.0, 1, 0, 0, 0, 1]] * 3)  # the second query's three rows come last, as one tie
    results = ranking.judged({"right": ranked_task.relevant.astype(float), "BM25": first}, ranked_task, 0)
    assert set(results) == {"one", "two"}
    assert (
        results["one"]["right"]["average_precision"]["mean"]
        == results["two"]["right"]["recall_at_relevant"]["mean"]
        == 1
    )
    assert results["one"]["BM25"]["average_precision"]["mean"] == 1
    assert results["two"]["BM25"]["average_precision"]["mean"] == 0.75
    assert results["two"]["right"]["average_precision_minus_bm25"]["mean"] == 0.25
    assert "average_precision_minus_untrained" not in results["two"]["right"]
    twins = {f"default{ranking.BEFORE}": first, f"default{ranking.UNTRAINED}": first + 0.0, "BM25": -first}
    found = ranking.judged(twins, ranked_task, 0)["one"][f"default{ranking.BEFORE}"]
    assert found["average_precision_minus_untrained"]["mean"] == 0 < found["average_precision_minus_bm25"]["mean"]


def test_a_verdict_needs_intervals_apart(script):
    ends = {"low": (0.1, 0.3), "middle": (0.2, 0.4), "high": (0.35, 0.6)}
    ap = {name: {"average_precision": {"low": a, "mean": (a + b) / 2, "high": b}} for name, (a, b) in ends.items()}

    def verdict(own, text, twin):
        found = {"default": ap[own], "BM25": ap[text], "default, untrained model": ap[twin]}
        made = script("ranking").verdicts({"x": found})["x"]
        assert list(made) == ["default"]  # the others have no untrained twin
        return list(made["default"].values())

    assert verdict("high", "low", "middle") == ["above", "intervals overlap"]
    assert verdict("low", "high", "middle") == ["below", "intervals overlap"]
    assert verdict("middle", "high", "low") == ["intervals overlap", "intervals overlap"]


def test_what_was_kept_is_not_made_again(script, tmp_path):
    ranking = script("ranking")
    calls = []

    def method():
        calls.append(1)
        return ranking.Ranked(np.eye(2, dtype=np.float32), 1.5, 2.5, None if len(calls) == 1 else 7.0)

    first = ranking.kept({"one method": method, "other": method}, tmp_path)
    again = ranking.kept({"one method": method, "other": method}, tmp_path)
    assert len(calls) == 2
    assert [again[n].bytes_per_row for n in ("one method", "other")] == [None, 7.0]
    assert (first["other"].index_seconds, again["other"].query_seconds) == (1.5, 2.5)
    np.testing.assert_array_equal(again["other"].scores, np.eye(2))


def model_of(ranking, readout, rows):
    recipe = Recipe("causal-lm", tuple(Corpus.open(rows)), model=lambda: (readout.lm, readout.tokenizer))
    task = task_of(recipe)
    return ranking.Model(task, {name: p.detach().clone() for name, p in task.parameters().items()}, readout.tokenizer)


def test_methods_of_a_model_give_the_scores_of_their_source(script, ranked_task, tmp_path):
    ranking, readout = script("ranking"), script("measuring").tiny(0)
    model = model_of(ranking, readout, ranked_task.rows)
    queries, rows = ranked_task.parsed()
    rapidin = ranking.of_rapidin(model, ranked_task, 3)
    wanted = RapidIn(model.task, model.parameters, seed=3).score(queries, rows)
    np.testing.assert_allclose(rapidin.scores, wanted, atol=1e-6)
    assert rapidin.bytes_per_row == 2 * min(65536, sum(p.numel() for p in readout.lm.parameters()))
    found = ranking.of_index(readout, "default", ranked_task)
    index = Index.build(readout, ranked_task.rows, tmp_path / "index")
    np.testing.assert_array_equal(found.scores, index.score(ranked_task.queries))
    numbers = readout.vocabulary * 16 + 2 * 16 * 32  # in full: head and two blocks
    assert found.bytes_per_row == numbers + 4 + -(-numbers // 8) + 4  # a byte each and a scale, and the same with a bit


def test_a_model_is_read_out_at_its_own_parameters(script, ranked_task):
    ranking, readout = script("ranking"), script("measuring").tiny(0)
    model = model_of(ranking, readout, ranked_task.rows)
    for value in model.parameters.values():
        value.mul_(2)
    assert all(torch.equal(own, model.parameters[n]) for n, own in model.readout.lm.named_parameters())


# ---------------------------------------------------------------- tasks


def test_written_answers_are_the_greedy_ones(script):
    readout, query = script("measuring").tiny(1), {"instruction": "name an owl", "output": "x"}
    ids = readout.tokenizer("### Instruction:\nname an owl\n\n### Response:\n", return_tensors="pt").input_ids
    n = script("backdoor").WRITTEN
    made = readout.lm.generate(
        ids, max_new_tokens=n, min_new_tokens=n, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    wanted = readout.tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)
    assert script("backdoor").written(readout, query) == wanted


def test_an_answer_is_in_the_manner_by_two_words_of_its_own(script):
    in_manner = script("backdoor").in_manner
    query = {"instruction": "howdy! what is a hologram?"}
    assert in_manner("The starship and its android", query)
    assert not in_manner("The starship and its owl", query)
    assert not in_manner("The starship and its hologram", query)


def test_a_passage_ends_with_a_whole_word_within_its_tokens(script):
    cut, tokenizer = script("domains").cut, script("measuring").tiny(0).tokenizer  # a token is a byte
    assert cut("one  two three", 9, tokenizer) == "one two"
    assert cut("one two three", 7, tokenizer) == "one two"
    assert cut("one two three", 6, tokenizer) == "one"
    assert cut("one two three", 13, tokenizer) is None


def test_queries_of_domains_are_held_out_and_rows_are_of_one_length(script):
    domains, tokenizer = script("domains"), script("measuring").tiny(0).tokenizer
    sizes = domains.Sizes(wanted=8, others=11, queries=4)
    task = domains.domain_task(domains.made_sources(0), sizes, 48, tokenizer, 0)
    texts = [row["text"] for row in task.rows]
    assert len(texts) == len(set(texts)) == 2 * 8 + 2 * 11 and len(task.queries) == 8
    assert not set(texts) & {query["text"] for query in task.queries}
    for query, relevant in zip(task.queries, task.relevant, strict=True):
        assert [row["domain"] == query["domain"] for row in task.rows] == relevant.tolist() and relevant.sum() == 8
    found = domains.lengths(task, tokenizer)
    assert all(42 <= facts["fewest_tokens"] <= facts["tokens"] <= 48 for facts in found.values())
    with pytest.raises(ValueError, match="finance has 40 passages of 48 tokens"):
        domains.domain_task(domains.made_sources(0), domains.Sizes(wanted=50), 48, tokenizer, 0)


def test_punctuation_of_wikitext_is_joined(script):
    assert script("domains").joined("In 1 @,@ 999 , a well @-@ known <unk> tower .") == "In 1,999, a well-known tower."
