"""Searches by a short list: what is listed, scored exactly, encoded anew, and what is said of it beforehand."""

from __future__ import annotations

import itertools
import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from leaveout.errors import UnsupportedError
from leaveout.readout import shortlist
from leaveout.readout.build import Pace
from leaveout.readout.codec import Filled, Planes, Whole
from leaveout.readout.index import Index
from leaveout.readout.scan import Scanner
from leaveout.readout.search import SearchOptions, usual_best
from leaveout.readout.shortlist import LEAST, Recall, recall_of, worst
from leaveout.store import Store

from .conftest import GH, assert_close, ranked
from .test_index import CORPUS, IN_FULL, MANY_COMMITS, TRIPLES, contents
from .tiny import TEXTS, built, make_model

QUERIES = [TEXTS[0], {"prompt": TEXTS[1], "completion": TEXTS[3]}, f"{TEXTS[5]} {TEXTS[2]}"]
WORDS = sorted({word for text in TEXTS for word in text.split()})
MANY = [
    {
        "id": f"row {n}",
        "text": " ".join(np.random.default_rng(n).choice(WORDS, 5 + n % 7)),
        "n": n,
        "group": n // 40,
    }
    for n in range(120)
]
# Vectors of 1,024 numbers of one byte, and 96 bits of them beside; triples in 400 bytes, and in 60.
FORMS = {"vectors": {"short_bytes": 16}, "triples": {"bytes_per_row": 460, "short_bytes": 60}}
SMALL = {"QUERIES": 16, "ROWS": 100, "ROWS_ANEW": 50, "LISTS": (5, 10, 20, 40, 200), "LEAST": 60, "BEST": 1}


@pytest.fixture(scope="module")
def lm():
    return make_model("llama", spread=0.1, dtype=torch.float32)


@pytest.fixture(scope="module")
def build(lm, tokenizer, tmp_path_factory):
    """Indexes of many rows, which are to be left as they are."""
    known = {}

    def build(form="vectors", rows=MANY, **changes):
        options = {**FORMS.get(form, IN_FULL), **changes}
        key = (form, len(rows), *sorted(options.items()))
        if key not in known:
            place = tmp_path_factory.mktemp("index") / "index"
            known[key] = built(lm, rows, place, GH, tokenizer, pace=Pace(commit_bytes=1), **options)
        return known[key]

    return build


@pytest.fixture
def small(monkeypatch):
    """As if few rows were many."""
    for name, value in SMALL.items():
        monkeypatch.setattr(shortlist, name, value)


def lengths(index):
    """Lengths [rows] of the rows before they were rounded."""
    norms = np.concatenate([segment.arrays()["norms"] for segment in index.store.segments()]).astype(np.float64)
    return np.sqrt((norms**2).sum(1))


def short_scores(index, queries, length="cosine"):
    """Estimates [query, rows]: products of queries with the short forms as they are decoded, over the rows' lengths."""
    vectors = index.encode(queries).vectors
    scanner = Scanner(index.short, "short", vectors)
    parts = [index.short.decode(scanner.taken(segment.arrays())) for segment in index.store.segments()]
    products = np.concatenate([index.short.form.products(part, vectors).numpy() for part in parts]).T
    return products / (lengths(index) if length == "cosine" else 1.0)


def listed(index, queries, n, allowed=None, length="cosine"):
    """Rows of each query's list, and of those that nearly are in it (queries are rounded for the scan)."""
    scores = short_scores(index, queries, length)
    if allowed is not None:
        scores[:, [at for at in range(scores.shape[1]) if at not in allowed]] = -np.inf
    order = np.argsort(-scores, axis=1)
    slack = 0.05 * np.abs(scores[np.isfinite(scores)]).max()
    return [
        (set(row[:n]), set(np.flatnonzero(own >= own[row[n - 1]] - slack)))
        for row, own in zip(order, scores, strict=True)
    ]


@pytest.mark.parametrize("form", FORMS)
def test_forms_are_as_they_are_asked_for(form, build):
    index = build(form)
    if form == "vectors":
        assert index.long == Whole(1024, "int8") and index.short == Planes(1024, 96, 1, 0)
    else:
        assert isinstance(index.long, Filled) and (index.long.n_bytes, index.long.query_triples) == (400, 64)
        assert isinstance(index.short, Filled) and (index.short.n_bytes, index.short.query_triples) == (60, 16)
    (arrays, *_) = [segment.arrays() for segment in index.store.segments()]
    for name, codec in (("long", index.long), ("short", index.short)):
        n_bytes = sum(a[0].nbytes for key, a in arrays.items() if key.startswith(name + "."))
        assert n_bytes == codec.row_bytes
    assert {key.split(".")[0] for key in arrays} == {"long", "short", "norms"}


@pytest.mark.parametrize(("where", "length"), [(None, "product"), (None, "cosine"), ("n % 3 = 0", "cosine")])
@pytest.mark.parametrize("form", FORMS)
def test_the_best_of_the_list_are_found_with_their_exact_scores(form, where, length, build):
    index = build(form)
    allowed = set(range(120) if where is None else range(0, 120, 3))
    scores, place = index.score(QUERIES, length=length), {id: at for at, id in enumerate(index.ids)}
    ways = {"length": length, "shortlist": 15}
    for workers in (1, 2):
        found = index.search(QUERIES, 6, where, workers=workers, **ways)
        for hits, row, (sure, likely) in zip(found, scores, listed(index, QUERIES, 15, allowed, length), strict=True):
            rows = [place[hit.id] for hit in hits]
            assert len(rows) == 6 and set(rows) <= likely & allowed
            assert [hit.score for hit in hits] == row[rows].tolist()  # bit for bit those of a scan of all
            assert rows == [at for at in ranked(row) if at in rows]
            best = [at for at in ranked(row) if at in sure][:3]
            assert len(set(best) & set(rows)) >= 2
    alone = [index.search([query], 6, where, **ways)[0] for query in QUERIES]
    assert [[hit.id for hit in hits] for hits in alone] == [[hit.id for hit in hits] for hits in found]
    assert any(
        [hit.id for hit in hits] != [hit.id for hit in every]
        for hits, every in zip(found, index.search(QUERIES, 6, where, length=length), strict=True)
    )  # so short a list does not hold all


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("where", [None, "n > 100"])
def test_a_list_of_all_rows_is_the_exact_search(where, form, build):
    index = build(form)
    wanted = index.search(QUERIES, 9, where, exact=True)
    for options in ({"shortlist": 120}, {"shortlist": 500}, {}):  # so few rows need no list
        assert index.search(QUERIES, 9, where, **options) == wanted
    assert index.search(QUERIES, 9, "n > 1000", shortlist=20) == [[], [], []]


@pytest.mark.parametrize("form", FORMS)
def test_rows_that_are_encoded_anew_have_no_rounding(form, build):
    index, exact = build(form), build("exact")
    place = {id: at for at, id in enumerate(index.ids)}
    true, stored = (one.score(QUERIES, length="cosine") for one in (exact, index))
    for options in ({"exact": True}, {"shortlist": 40}, {"where": "n < 90"}):
        found = index.search(QUERIES, 5, reencode=12, **options)
        for hits, row, own, (_, likely) in zip(found, true, stored, listed(index, QUERIES, 40), strict=True):
            rows = [place[hit.id] for hit in hits]
            assert_close([hit.score for hit in hits], row[rows], "model float32")
            assert rows == [at for at in ranked(row) if at in rows]
            allowed = [at for at in ranked(own) if (at < 90 if "where" in options else True)]
            allowed = allowed if "shortlist" not in options else [at for at in allowed if at in likely]
            assert set(rows) <= set(allowed[: 12 if "shortlist" not in options else 14])
    assert [hit.score for hit in index.search(QUERIES, 5, reencode=1)[0]] == pytest.approx(
        sorted(true[0][[place[hit.id] for hit in index.search(QUERIES, 5)[0]]], reverse=True), rel=1e-3
    )  # hits have scores of one kind: at least k rows are encoded
    assert index.search(QUERIES, 5, "n > 1000", reencode=3) == [[], [], []]
    assert index.plan_search(5, reencode=1).anew == 5 and index.plan_search(5, reencode=12).anew == 12
    assert index.plan_search(5, reencode=500).anew == 120 and index.plan_search(5).anew == 0


# What is said of a list.


def brute_force(index, exact, n_rows, n_queries, length="cosine"):
    """Recall of the best one by lists of 5, 10, 20 and 40: rows as queries, that are no answer to themselves."""
    rows = np.unique(np.linspace(0, len(index) - 1, n_rows).round().astype(int))
    asked = np.unique(np.linspace(0, len(rows) - 1, n_queries).round().astype(int))
    texts = [MANY[rows[at]]["text"] for at in asked]
    true, short = exact.score(texts, length=length)[:, rows], short_scores(index, texts, length)[:, rows]
    held = []
    for n in (5, 10, 20, 40):
        count = 0
        for query, (a, b) in enumerate(zip(true, short, strict=True)):
            others = [at for at in range(len(rows)) if at != asked[query]]
            best = max(others, key=lambda at: a[at])
            count += sum(b[at] > b[best] for at in others) < n
        held.append(count / len(asked))
    return len(rows), len(asked), held


@pytest.mark.parametrize("form", FORMS)
def test_recall_is_measured_when_an_index_is_built(form, build, lm, tokenizer, tmp_path, small):
    plain = built(lm, MANY, tmp_path / "plain", GH, tokenizer, **FORMS[form])
    again = built(lm, MANY, tmp_path / "again", GH, tokenizer, **FORMS[form])
    for length in ("product", "cosine"):
        table = recall_of(plain, length)
        n_rows, n_queries, held = brute_force(plain, build(form), 100, 16, length)
        assert (table.rows, table.queries, table.lists) == (n_rows, n_queries, (5, 10, 20, 40))
        assert np.abs(np.array(table.recall) - held).max() <= 1.01 / n_queries  # one answer of sixteen at the edge
        assert held[0] < 1 and list(table.recall) == sorted(table.recall)
        assert recall_of(again, length) == table
    assert "other queries may do worse" in plain.info()["recall"].pop("note")
    assert plain.info()["recall"]["cosine"] == plain.store.state("recall")["cosine"]
    plain.append(["a text that came later"])
    plain.delete(["row 3", "row 4"])
    assert recall_of(Index.open(plain.path), length) == table  # which says how the rows were that there were


def test_rows_without_long_form_are_measured_by_the_model(build, lm, tokenizer, tmp_path, small):
    index = built(lm, MANY, tmp_path / "none", GH, tokenizer, long="none", short_bytes=16)
    _, n_queries, held = brute_force(index, build("exact"), 50, 16)
    table = recall_of(index, "cosine")
    assert (table.rows, table.queries, table.lists) == (50, n_queries, (5, 10, 20, 40))
    assert np.abs(np.array(table.recall) - held).max() <= 1.01 / n_queries


def test_small_indexes_and_those_without_short_form_have_no_table(build, lm, tokenizer, tmp_path, monkeypatch):
    assert LEAST > 120 and build("vectors").info()["recall"] is None
    for name, value in {**SMALL, "LEAST": 121}.items():
        monkeypatch.setattr(shortlist, name, value)
    assert recall_of(built(lm, MANY, tmp_path / "few", GH, tokenizer, **FORMS["vectors"]), "cosine") is None
    monkeypatch.setattr(shortlist, "LEAST", 120)
    assert recall_of(built(lm, MANY, tmp_path / "enough", GH, tokenizer, **FORMS["vectors"]), "cosine") is not None
    assert recall_of(built(lm, MANY, tmp_path / "plain", GH, tokenizer, **IN_FULL), "cosine") is None


def test_a_killed_measurement_is_made_later(lm, tokenizer, tmp_path, small, monkeypatch):
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("leaveout.readout.index.measured_recall", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        built(lm, MANY, tmp_path / "index", GH, tokenizer, **FORMS["vectors"])
    assert recall_of(Index.open(tmp_path / "index"), "cosine") is None  # it is complete, and can be asked
    assert recall_of(built(lm, MANY, tmp_path / "index", GH, tokenizer, **FORMS["vectors"]), "cosine") is not None


def test_rows_that_make_an_index_large_are_measured(lm, tokenizer, tmp_path, small):
    index = built(lm, MANY[:40], tmp_path / "index", GH, tokenizer, **FORMS["vectors"])
    assert recall_of(index, "cosine") is None
    index.append(MANY[40:])
    found = recall_of(index, "cosine")
    assert found == recall_of(Index.open(index.path), "cosine") and found.rows == 100
    index.append(["a text that came later"])
    assert recall_of(index, "cosine") == found


def test_rows_are_encoded_a_few_at_a_time(build, monkeypatch):
    """So that memory does not grow with the list."""
    index, seen, real = build("triples"), [], Index.encoded_anew
    monkeypatch.setattr(Index, "encoded_anew", lambda self, numbers: seen.append(len(numbers)) or real(self, numbers))
    index.search(QUERIES, 5, reencode=60)
    assert sum(seen) >= 60 and max(seen) <= 16


def test_a_list_needs_a_short_form(build):
    with pytest.raises(UnsupportedError, match="has no short form to make a list from: leave shortlist out"):
        build("exact").search(QUERIES, 5, shortlist=20)
    assert build("exact").plan_search(5).shortlist is None


def table(recall, rows=2000, lists=(10, 20, 50, 100)):
    return {"rows": rows, "queries": 64, "lists": list(lists[: len(recall)]), "recall": recall}


def test_merged_indexes_have_the_table_that_needs_the_longest_list(lm, tokenizer, tmp_path):
    good, fair = table([0.5, 0.96, 0.99, 1.0]), table([0.9, 0.94, 0.95, 0.96])
    bad, short = table([0.5, 0.6, 0.7, 0.8]), table([0.99, 1.0])
    good, fair, bad, short = ({"product": facts, "cosine": good} for facts in (good, fair, bad, short))
    assert worst([good, fair]) == worst([fair, good]) == fair and worst([bad, fair]) == bad
    assert worst([good, short]) == good and worst([good, None]) is None and worst([good]) == good
    one = built(lm, CORPUS[:9], tmp_path / "one", "paper", tokenizer)
    two = built(lm, CORPUS[9:], tmp_path / "two", "paper", tokenizer)
    for path, facts in ((one.path, good), (two.path, fair)):
        with Store.open(path, write=True) as store:
            store.set_state("recall", facts)
    assert Index.merge([one.path, two.path], tmp_path / "all").store.state("recall") == fair
    with Store.open(two.path, write=True) as store:
        store.set_state("recall", None)
    assert Index.merge([one.path, two.path], tmp_path / "other").info()["recall"] is None


def test_recall_of_a_list_is_that_of_its_share():
    found = Recall(2000, 64, (10, 20, 50, 100), (0.5, 0.9, 0.95, 0.97))
    assert [found.at(n / 2000) for n in (9, 10, 19, 20, 70, 100, 2000)] == [None, 0.5, 0.5, 0.9, 0.95, 0.97, 0.97]
    assert found.share() == 50 / 2000
    assert replace(found, recall=(0.1, 0.2, 0.3, 0.4)).share() == 1  # no list is long enough


@pytest.mark.parametrize(
    ("recall", "considered", "options", "n", "held"),
    [
        (None, 100_000, {}, 5_000, None),  # without a table, one row of twenty
        ([0.5, 0.96], 100_000, {}, 1_000, 0.96),
        ([0.5, 0.96], 100_001, {}, 1_001, 0.96),
        ([0.5, 0.96], 2_000, {}, 200, 0.96),  # at least 200
        ([0.5, 0.6], 100_000, {}, None, None),  # none was long enough: all
        ([0.5, 0.96], 100_000, {"shortlist": 600}, 600, 0.5),
        ([0.5, 0.96], 100_000, {"shortlist": 100}, 100, None),
        ([0.5, 0.96], 100_000, {"exact": True}, None, None),
        ([0.5, 0.96], 100_000, {"shortlist": 100_000}, None, None),
        ([0.5, 0.96], 999, {}, None, None),
        ([0.5, 0.96], 999, {"shortlist": 300}, 300, 0.96),
    ],
)
def test_plan_says_what_a_search_does(recall, considered, options, n, held, build, monkeypatch):
    index = build("vectors")
    facts = None if recall is None else table(recall)
    monkeypatch.setattr(shortlist, "recall_of", lambda *_: None if facts is None else shortlist._recall(facts))
    told = {"shortlist": None, "exact": False, "reencode": 0, **options}
    plan = shortlist.plan_search(
        index, considered, "cosine", *(told[name] for name in ("shortlist", "exact", "reencode"))
    )
    assert (plan.considered, plan.shortlist, plan.recall, plan.anew) == (considered, n, held, 0)
    long, short = 1028, 16
    assert plan.bytes == (considered * long if n is None else considered * short + n * long)
    said = str(plan)
    assert f"{plan.bytes / 2**20:,.1f} MiB read" in said and f"{considered:,} rows" in said
    if n is None:
        assert said.startswith("All ") and "short form" not in said
    else:
        assert said.startswith(f"The {n:,} best of") and ("was not measured" in said) == (held is None)
        assert held is None or (f"held {held:.0%} of the best 10" in said and "others may do worse" in said)


def test_lists_are_as_long_as_the_table_says(build, monkeypatch):
    """And longer where the hits are more, or groups."""
    index = build("vectors")
    for name, value in {"LEAST": 60, "BEST": 1}.items():
        monkeypatch.setattr(shortlist, name, value)
    monkeypatch.setattr(shortlist, "recall_of", lambda *_: Recall(100, 16, (10, 30), (0.5, 0.96)))
    assert index.plan_search(5).shortlist == 36 == math.ceil(0.3 * 120)
    assert index.plan_search(50).shortlist == 50 and len(index.search(QUERIES, 50)[0]) == 50
    assert index.plan_search(5, "n < 70").shortlist == 21 and index.plan_search(5, "n < 50").shortlist is None
    assert index.search(QUERIES, 5) == index.search(QUERIES, 5, shortlist=36)
    monkeypatch.setattr(shortlist, "recall_of", lambda *_: Recall(1000, 16, (10,), (0.96,)))
    monkeypatch.setattr(shortlist, "BEST", 0.05)
    assert index.plan_search(3).shortlist == 3  # the three best rows are of fewer groups
    listed = index.search(QUERIES, 3, group_by="group", shortlist=3)
    assert min(len(hits) for hits in listed) < 3  # as it was asked for
    for hits in index.search(QUERIES, 3, group_by="group"):
        assert len({hit.meta["group"] for hit in hits}) == len(hits) == 3
    assert [len(hits) for hits in index.search(QUERIES, 3, group_by="group", where="n < 70")] == [2] * 3
    assert len(index.search(QUERIES, 18, unique=0.999)[0]) == 18


# Without a long form.


@pytest.mark.parametrize("form", [{"short_bytes": 16}, {"bytes_per_row": 300}])
def test_scores_come_from_the_model_where_no_long_form_is_kept(form, build, lm, tokenizer, tmp_path):
    exact = build("exact")
    index = built(lm, MANY, tmp_path / "none", GH, tokenizer, long="none", **MANY_COMMITS, **form)
    assert index.long is None and index.short.row_bytes == (16 if "short_bytes" in form else 300)
    assert {name.split(".")[0] for name in contents(index.path)[0]} == {"short", "norms"}
    assert_close(index.score(QUERIES), exact.score(QUERIES), "model float32")
    scores, place = exact.score(QUERIES, length="cosine"), {id: at for at, id in enumerate(index.ids)}
    for options in ({}, {"exact": True}, {"where": "n < 50"}):
        wanted = exact.search(QUERIES, 5, **options)
        found = index.search(QUERIES, 5, **options)
        assert [[hit.id for hit in hits] for hits in found] == [[hit.id for hit in hits] for hits in wanted]
        assert_close([hit.score for hit in found[0]], [hit.score for hit in wanted[0]], "model float32")
    for options in ({}, {"workers": 2}, {"reencode": 30}):
        for hits, row, (_, likely) in zip(
            index.search(QUERIES, 5, shortlist=15, **options), scores, listed(index, QUERIES, 15), strict=True
        ):
            rows = [place[hit.id] for hit in hits]
            assert set(rows) <= likely and rows == [at for at in ranked(row) if at in rows]
            assert_close([hit.score for hit in hits], row[rows], "model float32")
    plan = index.plan_search(5, shortlist=15)
    assert (plan.anew, plan.bytes) == (15, 120 * index.short.row_bytes) and "15 encoded anew by the model" in str(plan)
    assert index.plan_search(5).anew == 120 and index.plan_search(5, exact=True).bytes == 0
    chosen, wanted = (one.select(QUERIES, 4, where="n < 40") for one in (index, exact))
    assert [hit.id for hit in chosen] == [hit.id for hit in wanted]
    explained = index.explain(QUERIES[1], "row 7")
    assert_close([explained.score, explained.stored_score], [scores[1, 7]] * 2, "model float32")
    index.append([{"id": "again", "text": MANY[3]["text"]}])
    once = index.search([MANY[3]["text"]], 3, unique=0.9999, shortlist=30)[0]
    assert {once[0].id} <= {"row 3", "again"} and not {hit.id for hit in once[1:]} & {"row 3", "again"}
    assert index.delete(["row 3"]) == 1 and index.search([MANY[3]["text"]], 1, shortlist=9)[0][0].id == "again"
    assert index.purge()["rows"] >= 1 and index.check() == []


# Files.


def purged_bytes(index, numbers):
    """What the files hold of rows: the bytes of every array."""
    found = []
    for segment in index.store.segments():
        for number in numbers:
            if segment.first <= number < segment.first + segment.n_rows:
                arrays = segment.arrays()
                found += [(name, arrays[name][number - segment.first].tobytes()) for name in arrays]
    return found


@pytest.mark.parametrize(
    "form", [{}, TRIPLES, {"long": "none", "short_bytes": 512}], ids=["vectors", "triples", "none"]
)
def test_purge_reaches_every_form_of_a_row(form, lm, tokenizer, tmp_path):
    """Long and short codes, norms and the rows as they came: none of their bytes is left in any file."""
    index = built(lm, CORPUS, tmp_path / "index", "default", tokenizer, **form, **MANY_COMMITS)
    gone, kept = purged_bytes(index, [5, 6, 13]), purged_bytes(index, [4])
    names = {name for name, _ in gone}
    assert {"norms", "short.codes"} <= names and any(name.startswith("long.") for name in names) == ("long" not in form)
    gone = [one for name, one in gone if not name.endswith((".counts", ".scale"))] + [
        CORPUS[n]["text"].encode() for n in (5, 6, 13)
    ]

    def there(wanted):
        files = [path.read_bytes() for path in index.path.rglob("*") if path.is_file()]
        return [any(one in data for data in files) for one in wanted]

    assert all(there(gone))
    index.delete([CORPUS[n]["id"] for n in (5, 6, 13)])
    index.purge()
    assert not any(there(gone)) and all(there([one for _, one in kept]))
    assert index.check() == [] and len(index) == 19


@pytest.mark.parametrize("call", [3, 4, 6])
@pytest.mark.parametrize("form", [TRIPLES, {"long": "none"}], ids=["triples", "none"])
def test_killed_builds_resume_to_the_same_bytes(form, call, lm, tokenizer, tmp_path, monkeypatch):
    """After the statistics, between two segments, and before the last: both forms and norms."""
    calls, real = itertools.count(1), Store._transaction

    def transaction(store):
        if next(calls) == call:
            raise KeyboardInterrupt
        return real(store)

    def build(place, pace=MANY_COMMITS["pace"]):
        return built(lm, CORPUS[:12], tmp_path / place, "default", tokenizer, pace=pace, **form)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Store, "_transaction", transaction)
        build("killed")
    resumed = build("killed", Pace(chunk_rows=4))
    assert contents(resumed.path) == contents(build("whole").path) and resumed.check() == []


@pytest.mark.parametrize("form", [{}, TRIPLES, {"long": "none"}], ids=["vectors", "triples", "none"])
def test_merged_shards_have_the_bytes_of_a_whole_build(form, lm, tokenizer, tmp_path):
    whole = built(lm, CORPUS[:16], tmp_path / "whole", "default", tokenizer, **form, **MANY_COMMITS)
    for number in range(2):
        built(lm, CORPUS[:16], tmp_path / "parts", "default", tokenizer, shard=(number, 2), **form, **MANY_COMMITS)
    merged = Index.merge(tmp_path / "parts", tmp_path / "one")
    assert contents(merged.path) == contents(whole.path) and merged.long == whole.long and merged.short == whole.short


@pytest.mark.parametrize("form", ["vectors", "triples"])
def test_what_is_usual_is_found_by_a_short_list(form, build, lm, tokenizer, tmp_path, monkeypatch):
    index = build(form)
    exact = usual_best(index)
    monkeypatch.setattr("leaveout.readout.search.SMALL", 10)
    assert usual_best(index) == pytest.approx(exact, rel=0.1)
    (index.path / "usual.json").unlink()
    monkeypatch.setattr("leaveout.readout.search.CANDIDATES", 1)  # of one row and two groups each: still another row
    assert 0 < usual_best(index) <= exact * 1.0001
    if form == "triples":
        alone = built(lm, MANY, tmp_path / "none", GH, tokenizer, long="none", short_bytes=128)
        assert usual_best(alone) == pytest.approx(exact, rel=0.5)  # from short forms, which are rough


def test_what_is_usual_is_kept_until_rows_come_or_go(build, tmp_path, monkeypatch):
    index = Index.open(shutil.copytree(build("triples").path, tmp_path / "idx"), build("triples").readout)
    monkeypatch.setattr("leaveout.readout.search.SMALL", 10)
    found, by_product = usual_best(index), usual_best(index, SearchOptions("product"))
    assert found != by_product
    with monkeypatch.context() as patch:
        patch.setattr("leaveout.readout.search._usual_best", None)
        assert (usual_best(index), usual_best(index, SearchOptions("product"))) == (found, by_product)
        index.delete([index.search([TEXTS[0]], 1)[0][0].id])
        with pytest.raises(TypeError):
            usual_best(index)
    (index.path / "usual.json").write_text("[]")
    assert usual_best(index) > 0 and index.check() == []
    monkeypatch.setattr("leaveout.readout.search.replacing", open)  # as a directory that may not be written: no error
    (index.path / "usual.json").unlink()
    (index.path / "usual.json").mkdir()
    assert usual_best(index) > 0
