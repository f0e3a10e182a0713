"""Whether anything but the query explains its hits: each control against plain numbers, and the rule."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from leaveout import PRESETS, Behaviour, Contrast, Control, Controls, UnsupportedError
from leaveout.bm25 import Bm25
from leaveout.corpus.rows import answer_of, read_row, with_answer
from leaveout.readout.controls import DEPTH, other_answers
from leaveout.readout.search import USUAL, SearchOptions, usual_best, usual_scores

from .test_index import IN_FULL
from .tiny import TEXTS, built, make_model

ROWS = [
    {"id": f"row {n}", "prompt": f"Row {n}: {TEXTS[n % 8][:12]}", "response": TEXTS[n % 7][n % 5 : 9 + (7 * n) % 83]}
    for n in range(120)
]
ASKED = [
    {"prompt": "Row 3: Copper", "response": " conducts heat"},
    {"prompt": "Row 9: When", "response": " counted bees"},
]


@pytest.fixture(scope="module")
def index(tokenizer, tmp_path_factory):
    lm = make_model("llama", spread=0.1, dtype=torch.float32)
    return built(lm, ROWS, tmp_path_factory.mktemp("index") / "index", "default", tokenizer, **IN_FULL)


def test_controls_are_what_plain_numbers_say(index):
    """Norms from the store, learned tokens and words counted anew, and correlations by scipy."""
    found = index.search(ASKED, k=3, length="product", controls=True)
    scores, ids = index.score(ASKED, length="product"), index.ids
    records = index.store.rows(index.live_numbers())
    targets = np.array([record.extra["targets"] for record in records], float)
    counted = Bm25([f"{one['prompt']}{one['response']}" for one in ASKED])
    counted.count(record.text for record in records)
    by_words, norms = counted.score([record.text for record in records]), index.lengths_of(index.live_numbers())
    for query, hits in enumerate(found):
        assert len(hits) == 3
        ten = [ids[n] for n in np.argsort(-scores[query])[:10]]
        assert [hit.id for hit in hits] == ten[:3]
        plain = [norms, targets, -targets, by_words[:, query]]
        names = ["norm", "length", "length", "words", "other answer"]
        assert [control.name for control in hits.controls.of] == names
        for control, values in zip(hits.controls.of, plain, strict=False):
            order = np.argsort(-values, kind="stable")[:DEPTH]
            assert control.best == tuple(ids[n] for n in order[:10])
            assert control.correlation == pytest.approx(spearmanr(values[order], scores[query][order])[0], abs=1e-3)
            assert control.shared == len({*ten} & {*control.best})
        swapped = {**ASKED[query], "response": ASKED[1 - query]["response"]}
        theirs = [hit.id for hit in index.search([swapped], length="product")[0]]
        assert hits.controls.of[-1].best == tuple(theirs)
        assert hits.controls.of[-1].shared == len({*ten} & {*theirs})


def test_a_given_answer_is_compared_with_and_none_is_said(index):
    given = index.search(ASKED[:1], controls=[" swims"], where="id != 'row 7'")[0].controls
    swapped = [hit.id for hit in index.search([{**ASKED[0], "response": " swims"}], where="id != 'row 7'")[0]]
    assert given.of[-1].best == tuple(swapped) and not given.note
    assert all("row 7" not in control.best for control in given.of)
    alone = index.search(ASKED[:1], controls=True)[0].controls
    assert [control.name for control in alone.of] == ["norm", "length", "length", "words"]
    assert alone.note == "There was no other answer to compare with."
    assert index.search(ASKED[:1])[0].controls is None


def test_the_rule_speaks_from_its_thresholds_on():
    def said(name, shared, correlation):
        return Controls((Control(name, "the longest rows", shared, correlation, ()),)).sentence

    assert said("length", 10, 0.79) == said("words", 10, None) == "No control explains these hits."
    wanted = (
        "These hits may say nothing of the query: 6 of the 10 best hits are the longest rows, rank correlation 0.80."
    )
    assert said("length", 6, 0.8) == wanted
    assert said("length", 5, 0.99) == "No control explains these hits."
    for name in ("norm", "other answer"):
        assert said(name, 5, 0.99) == "No control explains these hits."
        assert said(name, 6, -0.5).startswith("These hits may say nothing of the query: 6 of the 10")


def test_ten_rows_that_fill_every_list_by_their_norm_are_told(tokenizer, tmp_path):
    """Sums over 200 tokens beside sums over four: whatever is asked, products find the ten; cosines do not."""
    rows = [{"id": f"long {n}", "text": " ".join([*TEXTS[n % 8 :], *TEXTS[: n % 8]]) + "." * n} for n in range(10)]
    rows += [{"id": f"short {n}", "text": TEXTS[n % 8][n % 9 : n % 9 + 12]} for n in range(50)]
    sums = replace(PRESETS["default"], length_power=0.0)
    index = built(make_model("llama", dtype=torch.float32), rows, tmp_path / "index", sums, tokenizer, **IN_FULL)
    product, cosine = (
        index.search([TEXTS[1][:40]], length=length, controls=True)[0].controls for length in ("product", "cosine")
    )
    assert set(product.of[0].best) == {f"long {n}" for n in range(10)}
    assert product.of[0].explains and "rows with the longest signatures" in product.sentence
    assert not cosine.of[0].explains


def test_contrasts_hold_another_answer_against_their_own(index):
    asked = Contrast(*ASKED)
    found = index.search([asked, Behaviour(ASKED)], controls=True)
    assert all(hits.controls.note and len(hits.controls.of) == 4 for hits in found)
    with pytest.raises(ValueError, match="A contrast or behaviour holds other texts against its own already"):
        index.search([asked], controls=[" no"])


def test_what_controls_cannot_compare_is_refused(index, tokenizer, tmp_path):
    with pytest.raises(TypeError, match="Controls need the words of queries: give their texts or rows"):
        index.search(index.encode(ASKED), controls=True)
    with pytest.raises(ValueError, match="There are 3 other answers and 2 queries: give one, or one for each"):
        index.search(ASKED, controls=["a", "b", "c"])
    with pytest.raises(TypeError, match="controls is 'no': give True, or a list of other answers"):
        index.search(ASKED, controls="no")
    with pytest.raises(UnsupportedError, match="at least 50 rows, and 1 are searched here: leave them out"):
        index.search(ASKED, where="id = 'row 1'", controls=True)


ROWS_OF_FORMS = [
    ({"text": "It is so."}, {"text": " no"}, "It is so."),
    ({"text": "It is so.", "prompt_text": "It is"}, {"text": "It is no", "prompt_text": "It is"}, " so."),
    ({"prompt": "Is it?", "completion": " yes"}, {"prompt": "Is it?", "response": " no"}, " yes"),
    (
        {"instruction": "Say.", "input": "it", "output": "yes"},
        {"instruction": "Say.", "input": "it", "output": " no"},
        "yes",
    ),
    (
        {"messages": [{"role": "user", "content": "Is it?"}, {"role": "assistant", "content": "yes"}]},
        {"messages": [{"role": "user", "content": "Is it?"}, {"role": "assistant", "content": " no"}]},
        "yes",
    ),
]


@pytest.mark.parametrize(("row", "wanted", "answer"), ROWS_OF_FORMS)
def test_another_answer_stands_in_the_same_form(row, wanted, answer):
    found = read_row(row, 0, None)
    assert answer_of(found) == answer
    assert with_answer(found, " no") == wanted
    assert other_answers([row], [" no"]) == [wanted] and other_answers([row], [answer]) == [None]


def test_answers_are_swapped_with_the_next_query_that_has_another():
    asked = [{"prompt": p, "response": r} for p, r in (("a", " x"), ("b", " x"), ("c", " y"))]
    assert [other["response"] for other in other_answers(asked, ())] == [" y", " y", " x"]
    assert other_answers(asked[:2], ()) == [None, None]


def test_what_is_usual_is_the_best_other_row_of_rows_that_are_asked(index, monkeypatch):
    """Cosines of rows that are encoded as queries, each without those of its own content; the median of the best."""
    rows = [index.store.rows(np.array([n]))[0] for n in index.live_numbers()]
    asked = index.encode([record.row for record in rows])
    cosines = (
        index.score([record.row for record in rows], length="cosine")
        / index.form.lengths(asked.vectors).numpy()[:, None]
    )
    same = np.array([[a.content_hash == b.content_hash for b in rows] for a in rows])
    best = np.where(same, -1, cosines).max(1)[index.spread_rows(USUAL)]
    found = usual_best(index)
    assert found == pytest.approx(np.median(best), rel=0.02)
    for name, value in {"SMALL": 10, "SEARCHED": 100}.items():  # from lists by the short form, of some rows only
        monkeypatch.setattr(f"leaveout.readout.search.{name}", value)
        assert usual_best(index) == pytest.approx(found, rel=0.1)
    one = index.encode(ASKED[:1])
    (scaled,) = usual_scores(index, one, found, "cosine")
    assert scaled == pytest.approx(found * float(index.form.lengths(one.vectors)), rel=1e-5)
    assert usual_scores(index, one, None, "cosine") == [0.0] and usual_best(index, SearchOptions(rerank=3)) is None
    assert usual_best(index, SearchOptions("product")) > 0


def test_controls_of_groups_compare_groups(tokenizer, tmp_path):
    """A group of the hits is shared if it is one of the ten best groups of the control, whichever of its rows is best there."""
    lm = make_model("llama", spread=0.1, dtype=torch.float32)
    rows = [{**row, "source": f"s{n % 25}"} for n, row in enumerate(ROWS[:75])]
    index = built(lm, rows, tmp_path / "index", "default", tokenizer, **IN_FULL)
    norms, scores = index.lengths_of(index.live_numbers()), index.score(ASKED, length="cosine")

    def best(values):
        return list(dict.fromkeys(rows[n]["source"] for n in np.argsort(-values, kind="stable")))[:10]

    for hits, values in zip(index.search(ASKED, k=3, controls=True, group_by="source"), scores, strict=True):
        assert [hit.meta["source"] for hit in hits] == best(values)[:3]
        assert hits.controls.of[0].shared == len({*best(values)} & {*best(norms)})
        assert len({rows[index.ids.index(id)]["source"] for id in hits.controls.of[0].best}) == 10
