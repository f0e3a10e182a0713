"""How a row's length counts: the product, or the cosine from the norms in the store, wherever rows are scored."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from leaveout.readout import shortlist
from leaveout.readout.index import Index
from leaveout.store import Store

from .conftest import assert_close, ranked
from .test_index import IN_FULL, MANY_COMMITS, TRIPLES
from .tiny import TEXTS, built, make_model

ROWS = [
    {"id": f"row {n}", "text": " ".join([TEXTS[n % 8][n:], *["and"] * (3 * (n % 5))]), "source": ("web", "book")[n % 2]}
    for n in range(24)
]
QUERIES = [TEXTS[0], {"prompt": TEXTS[1], "completion": TEXTS[3]}, TEXTS[6]]
FORMS = {"in full": IN_FULL, "stored": {}, "triples": TRIPLES, "none": {**TRIPLES, "long": "none"}}


@pytest.fixture(scope="module")
def lm():
    return make_model("llama", spread=0.1, dtype=torch.float32)


@pytest.fixture(scope="module")
def exact(lm, tokenizer, tmp_path_factory):
    """Cosines with each query's own length [query, row], and lengths [row], in float64 of rows that nothing rounded."""
    index = built(lm, ROWS, tmp_path_factory.mktemp("exact") / "index", "default", tokenizer, **IN_FULL)
    rows, queries = (index.encode(texts).vectors.double().numpy() for texts in (ROWS, QUERIES))
    lengths = np.linalg.norm(rows, axis=1)
    assert lengths.max() > 1.5 * lengths.min()
    return queries @ rows.T / lengths, lengths


@pytest.fixture(scope="module", params=FORMS)
def index(request, lm, tokenizer, tmp_path_factory):
    place = tmp_path_factory.mktemp("index") / "index"
    return built(lm, ROWS, place, "default", tokenizer, **FORMS[request.param], **MANY_COMMITS)


def test_cosines_are_products_over_the_lengths_before_rounding(index, exact):
    cosines, lengths = exact
    assert_close(index.lengths_of(np.array([5, 0, 23])), lengths[[5, 0, 23]], "model float32")
    found = index.score(QUERIES, length="cosine")
    assert_close(found, index.score(QUERIES) / lengths, "model float32")
    if index.settings.storage == "float32" or index.long is None:
        assert_close(found, cosines, "model float32")


def test_hits_rank_as_their_length_counts(index):
    """All rows, some, by list, by group, encoded anew, and by several workers."""
    place, orders = {id: at for at, id in enumerate(index.ids)}, {}
    for length in ("product", "cosine"):
        scores = index.score(QUERIES, length=length)
        orders[length] = [ranked(row).tolist() for row in scores]
        for options in ({}, {"workers": 2}, {"where": "source = 'web'"}, {"exact": True}):
            kept = [at for at in range(24) if "where" not in options or at % 2 == 0]
            for hits, row, order in zip(
                index.search(QUERIES, 24, length=length, **options), scores, orders[length], strict=True
            ):
                assert [place[hit.id] for hit in hits] == [at for at in order if at in kept]
                assert_close([hit.score for hit in hits], row[[at for at in order if at in kept]], "float32")
        groups = index.search(QUERIES, 2, length=length, group_by="source")
        for hits, order in zip(groups, orders[length], strict=True):
            assert [place[hit.id] for hit in hits] == [order[0], next(at for at in order if (at - order[0]) % 2)]
        if index.short is not None:
            for hits, row in zip(index.search(QUERIES, 3, length=length, shortlist=12), scores, strict=True):
                assert_close([hit.score for hit in hits], row[[place[hit.id] for hit in hits]], "model float32")
    assert orders["product"] != orders["cosine"]
    assert [hit.id for hit in index.search(QUERIES, 24)[0]] == [index.ids[at] for at in orders["cosine"][0]]


def test_rows_encoded_anew_are_divided_by_the_stored_lengths(index, exact):
    for length, by in (("cosine", 1.0), ("product", exact[1])):
        for hits, row in zip(index.search(QUERIES, 5, length=length, reencode=24), exact[0] * by, strict=True):
            assert_close([hit.score for hit in hits], row[[index.ids.index(hit.id) for hit in hits]], "model float32")


def test_selection_counts_lengths_as_told(index):
    asked = np.array([float(index.form.lengths(row[None])) for row in index.encode(QUERIES).vectors])
    for length in ("product", "cosine"):
        scores = index.score(QUERIES, length=length)
        hits = index.select(QUERIES, 24, length=length)
        assert_close([hit.score for hit in hits], np.sort((scores / asked[:, None]).mean(0))[::-1], "model float32")
        ranks = np.stack([np.argsort(ranked(row)) for row in scores])
        fused = index.select(QUERIES, 1, combine="rrf", length=length)
        assert fused[0].score == pytest.approx((1 / (61 + ranks)).sum(0).max())
    products = index.select(QUERIES, 24, length="product")
    assert index.select(QUERIES, 24) == products != hits


def test_an_explanation_adds_up_to_the_score_of_its_length(index):
    for length in ("product", "cosine"):
        stored = index.score(QUERIES, length=length)
        for n in (3, 16):
            found = index.explain(QUERIES[1], f"row {n}", length=length)
            assert found.pairs.sum() == pytest.approx(found.score)
            assert_close([found.stored_score], stored[1:2, n], "one level")
            assert found.score == pytest.approx(stored[1, n], rel=0.5)
    assert index.explain(QUERIES[1], "row 16").score == found.score


def test_lengths_stay_with_their_rows(lm, tokenizer, tmp_path):
    """After deletions, purges, appended rows, and a merge of parts."""
    parts = [
        Index.build(lm, ROWS, tmp_path / "parts", "default", tokenizer, shard=(n, 2), **MANY_COMMITS) for n in range(2)
    ]
    merged = Index.open(Index.merge(tmp_path / "parts", tmp_path / "all").path, lm, tokenizer)
    whole = np.concatenate([part.score(QUERIES, length="cosine") for part in parts], 1)
    assert np.array_equal(merged.score(QUERIES, length="cosine"), whole)
    merged.delete(["row 2", "row 9", "row 23"])
    left = np.delete(whole, [2, 9, 23], axis=1)
    assert np.array_equal(merged.score(QUERIES, length="cosine"), left)
    merged.purge()
    assert np.array_equal(merged.score(QUERIES, length="cosine"), left)
    merged.append([{"id": "late", "text": ROWS[9]["text"]}])
    found = merged.score(QUERIES, length="cosine")
    assert np.array_equal(found[:, :21], left) and found[:, 21] == pytest.approx(whole[:, 9], rel=1e-3)


def test_rows_of_several_windows_are_divided_by_what_is_kept_of_them(lm, tokenizer, tmp_path):
    rows = [{"id": f"long {n}", "text": " ".join(TEXTS[n:] + TEXTS[:n])} for n in range(4)]
    index = built(lm, rows, tmp_path / "index", "default", tokenizer, window=40, stride=30, **TRIPLES)
    kept = index.encoded_anew(np.arange(4))
    assert_close(index.lengths_of(np.arange(4)), index.form.lengths(kept), "one level")
    assert (index.score(rows, length="cosine") / index.form.lengths(kept).numpy()[:, None]).diagonal().min() > 0.9


def test_a_row_without_length_scores_zero(lm, tokenizer, tmp_path, monkeypatch):
    index = built(lm, ROWS[:6], tmp_path / "index", "default", tokenizer, **IN_FULL)
    real = index.score(QUERIES)
    arrays = [dict(segment.arrays()) for segment in index.store.segments()]
    arrays[0]["norms"] = arrays[0]["norms"].copy()
    arrays[0]["norms"][2] = 0
    arrays[0]["long.signature"] = arrays[0]["long.signature"].copy()
    arrays[0]["long.signature"][2] = 0
    monkeypatch.setattr("leaveout.store.segment.Segment.arrays", lambda self: arrays[0])
    found = index.score(QUERIES, length="cosine")
    assert np.array_equal(found[:, 2], np.zeros(3)) and np.isfinite(found).all() and real[:, 2].all()


def test_unit_length_has_no_other_length(lm, tokenizer, tmp_path):
    for preset in ("paper", "similarity"):
        index = built(lm, ROWS, tmp_path / preset, preset, tokenizer)
        assert_close(index.score(QUERIES, length="cosine"), index.score(QUERIES), "float32")


def test_other_lengths_are_refused_before_the_model_is_loaded(index, monkeypatch):
    opened = Index.open(index.path)
    for ask in (
        lambda: opened.search(QUERIES, length="cosin"),
        lambda: opened.plan_search(length="cosin"),
        lambda: opened.score(QUERIES, length="cosin"),
        lambda: opened.select(QUERIES, length="cosin"),
        lambda: opened.explain(QUERIES[0], "row 1", length="cosin"),
    ):
        with pytest.raises(ValueError, match=r"^length is 'cosin': did you mean 'cosine'"):
            ask()


def test_lists_are_as_long_as_the_table_of_their_length_says(lm, tokenizer, tmp_path, monkeypatch):
    for name, value in {"LEAST": 10, "BEST": 1, "LISTS": (2, 4, 8)}.items():
        monkeypatch.setattr(shortlist, name, value)
    index = built(lm, ROWS, tmp_path / "index", "default", tokenizer, **TRIPLES)
    tables = index.store.state("recall")
    assert set(tables) == {"product", "cosine"}
    with Store.open(index.path, write=True) as store:
        for length, found in (("product", [0.1, 0.99, 1.0]), ("cosine", [0.1, 0.2, 1.0])):
            tables[length]["recall"] = found
        store.set_state("recall", tables)
    monkeypatch.setattr(shortlist, "BEST", 0.1)
    opened = Index.open(index.path, lm, tokenizer)
    assert opened.plan_search(1, length="product").shortlist == 4
    assert opened.plan_search(1).shortlist == opened.plan_search(1, length="cosine").shortlist == 8
