"""Tokens as words, passages, and verdicts."""

from __future__ import annotations

import numpy as np
import pytest

from leaveout.words import (
    agreement_told,
    passage,
    retrained_told,
    shared_words,
    standing_out,
    strongest,
    verdict,
    words_of,
)


@pytest.mark.parametrize(
    ("pieces", "words"),
    [
        (["The", " fer", "ry", " left", "."], ["The", " ferry", " left", "."]),
        ([" ", "Cop", "per", "\n", "\n"], [" Copper", "\n", "\n"]),
        (["漢", "字", " sign"], ["漢", "字", " sign"]),
        (["na", "ï", "", "ve"], ["naïve"]),
        (["", "a"], ["a"]),
        (["3", ".", "5", "kg"], ["3", ".", "5kg"]),
        (
            ["Who?", "\n\n### Chosen:\n Me", "\n\n### Rejected:\nYou"],
            ["Who?", "\n\n### Chosen:\n", " Me", "\n\n### Rejected:\n", "You"],
        ),
    ],
)
def test_words_are_whole_and_keep_the_text(pieces, words):
    found, place = words_of(pieces)
    assert found == words
    assert "".join(found) == "".join(pieces)
    assert len(place) == len(pieces) and place[-1] == len(words) - 1 and (np.diff(place) >= 0).all()


def test_passage_is_where_most_is_added():
    weights = np.zeros(100)
    weights[[70, 72]] = -3, 2
    start, end = passage(weights, 10)
    assert end - start == 10 and start <= 70 and end > 72
    assert passage(weights[:5], 10) == (0, 5)


def test_strongest_pairs_go_by_size_and_leave_out_nothing_else():
    pairs = np.array([[0.0, -3.0], [2.0, 0.0]])
    assert strongest(pairs) == [(0, 1, -3.0), (1, 0, 2.0)]
    assert strongest(pairs, 1) == [(0, 1, -3.0)]


@pytest.mark.parametrize(
    ("scores", "opposite", "sentence"),
    [
        ([], 0.0, "No row stands out."),
        ([-1.0], 1.0, "No row stands out."),
        ([3.0, 2.9], 2.0, "No row stands out: rows push it down about as much as any pushes it up."),
        ([3.0], 0.0, "One row pushes this answer up."),
        ([3.0, 1.0, 0.9], 0.1, "One row stands out: the next scores 33 % of the one before it."),
        ([3.0, -1.0], 0.0, "One row stands out: the next scores 0 % of the one before it."),
        ([9.0, 8.0, 2.0], 0.1, "2 rows stand out: the next scores 25 % of the last of them."),
        (
            [9.0, 8.0, 7.0, 6.0],
            3.2,
            "3 rows stand out: each scores more than 2 times what any row scores against the answer.",
        ),
        (
            [9.0, 8.0, 7.0, 6.0, 1.0],
            3.2,
            "3 rows stand out: each scores more than 2 times what any row scores against the answer.",
        ),
        (
            [9.0, 8.0, 7.0],
            0.0,
            "No row stands out from the others: the last of the best 3 still scores 78 % of the first.",
        ),
    ],
)
def test_verdict_says_what_stands_out(scores, opposite, sentence):
    assert verdict(scores, opposite) == sentence


def test_verdict_compares_with_what_is_usual_and_names_what_rows_share():
    said = verdict([30.0, 20.0, 1.0], usual=1.0, shared=["Marie Curie", "radium"])
    assert said == (
        "2 rows stand out, all with “Marie Curie” and “radium”: the next scores 5 % of the last of them."
        " The best scores 30 times the usual."
    )
    nothing = verdict([1.4, 1.2], opposite=0.1, usual=1.0)  # what is usual counts, not what is against
    assert nothing == "No row stands out: the best scores 1.4 times what the best row usually scores for another text."
    assert verdict([9.0, 8.0], usual=1.0).startswith("The best 2 rows all score more than 2 times the usual")
    assert standing_out([30.0, 20.0, 1.0], 1.0) == 2 and standing_out([1.4, 0.1], 1.0) == 0


def test_shared_words_are_in_all_texts_and_in_few_others():
    texts = ["In 1903 Marie Curie got a prize.", "The prize of Marie Curie, for radium", "marie curie: a prize"]
    others = ["A prize was given"] + ["Nothing of that kind"] * 9
    assert shared_words(texts, others) == ["Marie Curie"]  # `prize` is in one of ten others
    assert shared_words([*texts, "Marie, not Curie"], others) == ["Marie", "Curie"]
    marked = [f"<|im_start|>user {text}<|im_end|>" for text in ("until five", "not until five.")]
    assert shared_words(marked, others) == ["user", "until five"]
    assert shared_words(texts[:1], others) == [] and shared_words(["a b", "c d"], others) == []


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ([(True, False)], "Retrained: it lies inside the interval."),
        ([(False, False), (True, True)], "Retrained: it lies outside the interval."),
        ([(True, False), (False, False), (None, False)], "Of 2 retrained values 1 lie inside their intervals."),
        ([(True, True)], "This set had been measured before, so that it proves nothing."),
        ([(None, False)], "Retrained; the errors of the predictions are unknown, so that nothing says how far off they may be."),
    ],
)  # fmt: skip
def test_retrained_values_are_counted_where_they_prove_something(values, sentence):
    assert retrained_told([{"inside": inside, "already_measured": old} for inside, old in values]) == sentence


def test_agreement_is_told_in_sentences():
    facts = {"pearson": 0.934, "spearman": 0.9, "relative_error": 0.123, "coverage": 1.0, "queries": 2, "sets": 6}
    assert agreement_told({**facts, "already_measured": 1}) == [
        "In the median of 12 predictions the retrained effect is missed by 12 % of its size.",
        "Over 6 sets predicted and retrained effects correlate by 0.93 (ranks: 0.9), in the mean of 2 queries.",
        "1 more set had been measured before, and is not counted.",
    ]
    one = {**facts, "pearson": None, "spearman": None, "queries": 1, "sets": 1, "already_measured": 0}
    assert agreement_told({**one, "relative_error": 1.5}) == [
        "The prediction misses the retrained effect by 1.5 times its size."
    ]
    assert agreement_told({**one, "relative_error": None, "sets": 0, "already_measured": 2}) == []
