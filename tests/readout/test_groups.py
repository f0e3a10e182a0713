"""Scores of whole groups of rows: sums with intervals over rows, and rows that leave together."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from leaveout.readout import groups
from leaveout.readout.groups import CURVATURE

from .conftest import assert_close
from .test_index import IN_FULL, MANY_COMMITS
from .tiny import TEXTS, built, make_model

SOURCES = ["web"] * 9 + ["book"] * 6 + [None] * 4 + ["alone"]
ROWS = [
    {"id": f"row {n}", "text": " ".join([TEXTS[n % 8][n:], *["and"] * (3 * (n % 5))])}
    | ({} if source is None else {"source": source})
    for n, source in enumerate(SOURCES)
]
QUERIES = [TEXTS[0], {"prompt": TEXTS[1], "completion": TEXTS[3]}]


@pytest.fixture(scope="module")
def lm():
    return make_model("llama", spread=0.1, dtype=torch.float32)


@pytest.fixture(scope="module", params=["in full", "codes", "both sides"])
def index(request, lm, tokenizer, tmp_path_factory):
    how = {"in full": IN_FULL, "codes": {}, "both sides": {**IN_FULL, "targets": "both"}}[request.param]
    return built(lm, ROWS, tmp_path_factory.mktemp("groups") / "index", "default", tokenizer, **how, **MANY_COMMITS)


def by_source(scores):
    """Columns of scores [query, row] by source."""
    return {name: scores[:, [own == name for own in SOURCES]].astype(np.float64) for name in dict.fromkeys(SOURCES)}


def test_totals_are_sums_of_scores_with_intervals_over_rows(index):
    wanted = by_source(index.score(QUERIES))
    for query, found in enumerate(index.group_scores(QUERIES)):
        assert [group.total for group in found] == sorted((group.total for group in found), reverse=True)
        assert {group.name: group.rows for group in found} == {"web": 9, "book": 6, None: 4, "alone": 1}
        for group in found:
            own = wanted[group.name][query]
            assert_close(group.total, own.sum(), "float32")
            assert_close(group.mean, own.mean(), "float32")
            assert group.best == [r["id"] for r, s in zip(ROWS, SOURCES, strict=True) if s == group.name][own.argmax()]
            assert group.together is None
            if group.rows == 1:
                assert group.low is None and group.high is None
            else:
                half = 1.96 * np.sqrt(len(own)) * own.std(ddof=1)
                assert_close([group.low, group.high], [own.sum() - half, own.sum() + half], "float32")


def test_rows_that_leave_together_are_a_ridge_regression_without_them(index, monkeypatch):
    """Of rows as vectors, by a system of their width; the index solves one of the group's rows, a block at a time."""
    monkeypatch.setattr(groups, "BLOCK", 4)
    every = np.arange(len(ROWS))
    vectors = index.directions(every).chunk(index.settings.sides, 1)[0]
    vectors = index.side_form.divided(vectors, index.side_form.lengths(vectors))
    gram = index.side_form.products(vectors, vectors).double().numpy() * np.outer(*[index.lengths_of(every)] * 2)
    values, axes = np.linalg.eigh(gram)
    s = axes * np.sqrt(np.maximum(values, 0))  # rows of the same inner products
    scores = index.score(QUERIES).astype(np.float64)
    longest = np.linalg.eigvalsh(s.T @ s / len(s))[-1]
    assert CURVATURE > 1
    for name, of in by_source(scores).items():
        own = s[[source == name for source in SOURCES]]
        left = np.eye(s.shape[1]) - own.T @ own / (len(s) * CURVATURE * longest)
        # what multiplies each row's score: rows of (I - S S')^-1 1, which is S (I - S' S)^-1 S^+ 1 where S has full rank
        weights = np.ones(len(own)) + own @ np.linalg.solve(left, own.sum(0)) / (len(s) * CURVATURE * longest)
        found = {g.name: g.together for g in index.group_scores(QUERIES, together=True)[0]}[name]
        assert_close(found, of[0] @ weights, "model float32")


def test_groups_are_of_the_wanted_rows_and_of_units(index):
    some = index.group_scores(QUERIES[:1], where="source = 'book'")[0]
    assert [(group.name, group.rows) for group in some] == [("book", 6)]
    alone = index.group_scores(QUERIES[:1], "unit")[0]  # a row is its own unit if nothing else was said
    assert sorted(group.name for group in alone) == sorted(row["id"] for row in ROWS)
    assert index.group_scores(QUERIES[:1], where="source = 'none such'") == [[]]


def test_sets_by_ids_are_as_groups_of_the_same_rows(index):
    ids = {name: [r["id"] for r, s in zip(ROWS, SOURCES, strict=True) if s == name] for name in ("book", "web")}
    wanted = {group.name: group for group in index.group_scores(QUERIES[:1], together=True)[0]}
    (found,) = index.set_scores(QUERIES[:1], ids)
    assert [one.name for one in found] == ["book", "web"]
    for one in found:
        other = wanted[one.name]
        assert one.rows == other.rows and one.best == other.best
        assert_close([one.total, one.low, one.high], [other.total, other.low, other.high], "float32")
        assert_close(one.together, other.together, "float32")
    twice = index.set_scores(QUERIES[:1], {"book": ids["book"] * 2}, together=False)[0][0]
    assert twice.total == found[0].total and twice.together is None  # a row leaves once


def test_sets_that_say_nothing_are_refused(index):
    every = [row["id"] for row in ROWS]
    for sets, told in (
        ({}, "no set: name at least one id"), ({"none": []}, "'none' is .*: give a list of at least one id"),
        ({"all": every}, "'all' holds all rows: leave something"), ({"x": ["row 99"]}, "row 99"),
        ({"text": "row 1"}, "give a list of at least one id"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=told):
            index.set_scores(QUERIES, sets)


def test_large_groups_are_summed_and_not_solved(index, monkeypatch):
    monkeypatch.setattr(groups, "TOGETHER_MOST", 6)
    found = {g.name: g.together for g in index.group_scores(QUERIES, together=True)[0]}
    assert found.pop("web") is None and all(value is not None for value in found.values())


def test_an_unknown_field_is_refused(index):
    with pytest.raises(ValueError, match=r"by is 'sauce': .*source"):
        index.group_scores(QUERIES, "sauce")
