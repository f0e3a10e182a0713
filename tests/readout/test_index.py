"""The index: building, resuming, changing and asking, whatever the chunks, segments and workers."""

import itertools
import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from leaveout.errors import FormatError, LeaveoutError, MismatchError
from leaveout.readout import codec as codec_module
from leaveout.readout import scan as scan_module
from leaveout.readout.build import Pace
from leaveout.readout.codec import Filled, Planes
from leaveout.readout.index import Index
from leaveout.readout.opened import EncodedQueries
from leaveout.readout.settings import PRESETS
from leaveout.store import Store

from .conftest import GH, RAW, TOLERANCES, assert_close, ranked
from .tiny import TEXTS, built, make_model, make_tokenizer

CORPUS = [
    {"id": f"row {n}", "text": f"{TEXTS[n % 8][n:]} {n}", "source": ("web", "book")[n % 2], "n": n, "group": n // 4}
    for n in range(22)
]
QUERIES = [TEXTS[0], {"prompt": TEXTS[1], "completion": TEXTS[3]}, RAW[4]]
MANY_COMMITS = {"pace": Pace(chunk_rows=4, commit_bytes=1)}
IN_FULL = {"bytes_per_row": None, "short_bytes": None, "storage": "float32"}
TRIPLES = {"bytes_per_row": 4096, "short_bytes": 512}  # of `default`, less than four bits a number need
FEW = {"bytes_per_row": 400, "short_bytes": None}  # likewise of GH


@pytest.fixture(scope="module")
def lm():
    return make_model("llama", spread=0.1, dtype=torch.float32)


@pytest.fixture(scope="module")
def build(lm, tokenizer, tmp_path_factory):
    """Builds an index of the corpus; the same options give the same index, so leave it as it is."""
    known = {}

    def build(preset="default", rows=CORPUS, path=None, **options):
        key = (preset, json.dumps(rows), *sorted(options.items()))
        if path is None and key in known:
            return known[key]
        place = path or tmp_path_factory.mktemp("index") / "index"
        index = built(lm, rows, place, preset, tokenizer, **options)
        return known.setdefault(key, index) if path is None else index

    return build


def contents(path):
    """All that a store says about its rows, in order, and its whitening."""
    store = Store.open(path)
    parts = [segment.arrays() for segment in store.segments()]
    arrays = {name: np.concatenate([part[name] for part in parts]).tobytes() for name in parts[0]}
    whitening = {name: value.tobytes() for name, value in (store.side("whitening") or {}).items()}
    return arrays, list(store.iter_rows()), whitening


def assert_rounded(found, wanted, lengths, index):
    """Scores [query, train] up to the rounding of rows, in units of the lengths [query, 1], [train] of both sides.

    Five standard deviations of 4 bits a number, whose error points anywhere; triples lack what did not fit, too.
    """
    if isinstance(index.long, Planes):
        unit = 5 * np.sqrt(2 * codec_module.LOSS[index.long.bits] / index.long.kept)
    elif isinstance(index.long, Filled):
        unit = 0.1
    else:
        unit = sum(TOLERANCES[index.settings.storage])
    error = np.abs(found - wanted) / (lengths[0][:, None] * lengths[1])
    assert error.max() <= unit, error.max()


# Search and score.


@pytest.mark.parametrize("commits", [{}, MANY_COMMITS, {**TRIPLES, **MANY_COMMITS}], ids=["one", "many", "triples"])
@pytest.mark.parametrize("preset", PRESETS)
def test_search_equals_sorting_the_scores(preset, commits, build, monkeypatch):
    index = build(preset, **commits)
    scores = index.score(QUERIES, length="cosine")
    assert scores.shape == (3, 22) and index.ids == [row["id"] for row in CORPUS]
    for name in ("BUFFER", "PACKED"):
        monkeypatch.setattr(codec_module, name, 1)  # few rows at a time
    for k in (1, 3, 5, 100):
        for hits, row in zip(index.search(QUERIES, k), scores, strict=True):
            order = ranked(row)[:k]
            assert [hit.id for hit in hits] == [index.ids[n] for n in order]
            assert_close([hit.score for hit in hits], row[order], "float32")
            assert [hit.rank for hit in hits] == list(range(1, len(hits) + 1))
            assert [hit.meta["n"] for hit in hits] == order.tolist() and hits[0].text == CORPUS[order[0]]["text"]


@pytest.mark.parametrize("options", [{}, TRIPLES, IN_FULL], ids=["stored", "triples", "in full"])
@pytest.mark.parametrize("preset", PRESETS)
def test_scores_are_products_of_signatures(preset, options, build):
    """[query, train], whichever side a text stands on; the cosine of a text with itself is 1."""
    index, exact = build(preset, **options), build(preset, **IN_FULL)
    rows, queries = (exact.encode(texts).vectors.double() for texts in (CORPUS, QUERIES))
    encoded, lengths = index.encode(QUERIES), [x.norm(dim=1).numpy() for x in (queries, rows)]
    assert len(encoded) == 3 and encoded.texts[1] == f"{TEXTS[1]} {TEXTS[3]}"
    assert_rounded(index.score(encoded), (queries @ rows.t()).numpy(), lengths, index)
    assert_rounded(index.score(CORPUS), index.score(CORPUS).T, [lengths[1]] * 2, index)
    if index.settings.unit_length:
        assert_rounded(np.diag(index.score(CORPUS))[None], np.ones((1, 22)), [np.ones(1), lengths[1]], index)


@pytest.mark.parametrize("form", [{}, {"storage": "float32"}], ids=["stored", "float32"])
@pytest.mark.parametrize("preset", PRESETS)
def test_equal_scores_come_in_the_order_of_rows(preset, form, build):
    """Rows of one text, whose scores differ by rounding, as each stands elsewhere in a batch: see `at_resolution`."""
    index = build(preset, rows=[{**row, "text": TEXTS[0]} for row in CORPUS], **MANY_COMMITS, **form)
    for query, k in itertools.product(QUERIES, (3, 22)):
        order = ranked(index.score([query])[0])[:k]
        assert [hit.id for hit in index.search([query], k)[0]] == [index.ids[n] for n in order]
    if form and index.settings.unit_length:  # cosines of 1, which is a step: rounding takes none of them to another
        assert [hit.id for hit in index.search(QUERIES[:1], 22)[0]] == index.ids


@pytest.mark.parametrize("n_queries", [1, 3, 5, 9])
def test_products_have_no_last_few_rows_or_queries(n_queries, build, monkeypatch):
    """Which a matrix product of floats sums otherwise, so that a row's score would depend on where it stands."""
    index, seen, real = build("default", **IN_FULL, **MANY_COMMITS), [], torch.Tensor.__matmul__
    texts = [f"{TEXTS[n % 8]} {n}" for n in range(n_queries)]
    queries, wanted = index.encode(texts), np.concatenate([index.score([text]) for text in texts])
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: seen.append((len(a), b.shape[1])) or real(a, b))
    found = index.score(queries)
    assert found.shape == (n_queries, 22)
    assert_close(found, wanted, "float32")
    assert seen and all(rows % 16 == 0 and (columns % 16 == 0 or columns == 1) for rows, columns in seen)


@pytest.mark.parametrize("ask", ["search", "group_by", "unique", "shortlist", "mean", "rrf"])
def test_rounding_does_not_change_a_ranking(ask, build, monkeypatch, tmp_path):
    """Scores of every row moved by rounding, in whatever direction: the rows come as if they had not been."""
    rows = [{**row, "text": TEXTS[n % 4]} for n, row in enumerate(CORPUS)]
    index = build("paper", rows=rows, path=tmp_path / "index", storage="float32", **MANY_COMMITS)
    options = {"group_by": {"group_by": "source"}, "unique": {"unique": True}, "shortlist": {"shortlist": 20}}
    rng, real, k = np.random.default_rng(0), scan_module.Scanner.scores, 18 if ask == "shortlist" else 22

    def answers(size):
        def scores(*args):
            steps = np.round(64 * real(*args)) / 64  # on steps of the resolution, where rounding moves none to another
            return (steps * (1 + size * rng.integers(-100, 101, steps.shape) / 100)).astype(np.float32)

        with monkeypatch.context() as patched:
            patched.setattr(scan_module.Scanner, "scores", scores)
            if ask in ("mean", "rrf"):
                found = [index.select(QUERIES[:1], 22, combine=ask)]
            else:
                found = index.search(QUERIES, k, **options.get(ask, {}))
        return [[hit.id for hit in hits] for hits in found]

    wanted = answers(0)
    assert all(answers(3e-6) == wanted for _ in range(3))


def test_where_restricts_the_ranking(build):
    index = build("paper", **MANY_COMMITS)
    ranking = [hit.id for hit in index.search(QUERIES[:1], 22)[0]]
    wanted = {row["id"] for row in CORPUS if row["source"] == "web" and row["n"] > 5}
    hits = index.search(QUERIES[:1], 22, where="source = 'web' AND n > 5")[0]
    assert [hit.id for hit in hits] == [id for id in ranking if id in wanted]
    assert index.search(QUERIES[:1], 22, where="n > 100") == [[]]
    assert index.ids_where("n > 19") == ["row 20", "row 21"]
    with pytest.raises((LeaveoutError, ValueError)):
        index.search(QUERIES[:1], where="1); DROP TABLE rows; --")
    assert len(index) == 22


@pytest.mark.parametrize(
    ("ask", "error", "sentence"),
    [
        (lambda index: index.search(QUERIES, k=0), ValueError, "k is 0: give a whole number of at least 1"),
        (lambda index: index.search([]), ValueError, "queries is empty: give at least one query"),
        (lambda index: index.search("tale"), TypeError, "queries is 'tale': give a list of queries"),
        (lambda index: index.delete("row 1"), TypeError, "ids is 'row 1': give a list of ids"),
        (lambda index: index.search([{"text": ""}]), FormatError, "field `text` is empty or blank"),
        (lambda index: index.select(QUERIES, n=0), ValueError, "n is 0: give a whole number of at least 1"),
        (lambda index: index.select(QUERIES, combine="max"), ValueError, "combine is 'max': give one of mean, rrf"),
        (lambda index: index.explain(TEXTS[0], "row 99"), ValueError, "row 99"),
        (lambda index: index.append(CORPUS, seed=3), TypeError, "unexpected keyword argument 'seed'"),
    ],
)
def test_wrong_questions_are_refused(ask, error, sentence, build):
    with pytest.raises(error, match=sentence):
        ask(build("paper"))


def test_queries_of_another_index_are_refused(build):
    """Other settings, or the same settings whitened by other rows."""
    queries = build("default").encode(QUERIES)
    assert np.array_equal(build("default").score(queries), build("default").score(QUERIES))
    assert isinstance(queries, EncodedQueries)
    for other in (build("default", seed=1), build("default", rows=CORPUS[:9]), build("similarity")):
        with pytest.raises(MismatchError, match="queries were made with other settings, another model or other stat"):
            other.search(queries)


# Building.


@pytest.mark.parametrize(("preset", "form"), [("paper", {}), ("default", {}), ("default", TRIPLES)])
def test_index_does_not_depend_on_commits(preset, form, build):
    one, many = build(preset, pace=Pace(chunk_rows=4), **form), build(preset, **MANY_COMMITS, **form)
    assert {name.split(".")[0] for name in contents(one.path)[0]} == {"long", "short", "norms"}
    assert len(Store.open(one.path).segments()) == 1 and len(Store.open(many.path).segments()) == 6
    assert contents(one.path) == contents(many.path)
    assert_close(build(preset, **form).score(QUERIES), one.score(QUERIES), "one level")  # one chunk
    assert one.check() == many.check() == []


@pytest.mark.slow
def test_workers_give_the_same_index_bit_for_bit(build, tmp_path):
    other = build("default", path=tmp_path / "index", workers=2, **MANY_COMMITS)
    assert contents(other.path) == contents(build("default", **MANY_COMMITS).path)


class Killed(BaseException):
    """Stands for the end of the process."""


@pytest.mark.parametrize(("call", "preset"), [*zip(range(1, 8), itertools.cycle(["default", "paper"]), strict=False)])
def test_killed_build_resumes_to_the_same_index(call, preset, build, tmp_path, monkeypatch):
    """Killed before or after any commit, between the statistics and the rows, or just before the end."""
    calls, real = itertools.count(1), Store._transaction

    def transaction(store):
        if next(calls) == call:
            raise Killed
        return real(store)

    with monkeypatch.context() as patched:
        patched.setattr(Store, "_transaction", transaction)
        with pytest.raises(Killed):
            build(preset, path=tmp_path / "index", **MANY_COMMITS)
    with pytest.raises(MismatchError, match="index is unfinished: run the command that built it again to finish it"):
        Index.open(tmp_path / "index")
    resumed = build(preset, path=tmp_path / "index", pace=Pace(commit_bytes=1000, chunk_rows=4))
    whole = build(preset, **MANY_COMMITS)
    assert contents(resumed.path) == contents(whole.path)
    assert resumed.info()["statistics"] == whole.info()["statistics"] and resumed.fingerprint == whole.fingerprint
    assert resumed.check() == []


@pytest.mark.parametrize("changed", [False, True])
def test_killed_build_of_a_stream_goes_on_by_position_and_content(changed, lm, build, tokenizer, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    rows, calls, real = [dict(row) for row in CORPUS], itertools.count(1), Store._transaction
    stream = datasets.IterableDataset.from_generator(lambda: iter(rows))

    def transaction(store):
        if next(calls) == 5:
            raise Killed
        return real(store)

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(Store, "_transaction", transaction)
        built(lm, stream, tmp_path / "index", "default", tokenizer, **MANY_COMMITS)
    if changed:
        rows[2]["text"] = "another row"
        with pytest.raises(MismatchError, match="Row 3 of IterableDataset is not the row 'row 2' that this unfinished"):
            built(lm, stream, tmp_path / "index", "default", tokenizer, **MANY_COMMITS)
        return
    resumed = built(lm, stream, tmp_path / "index", "default", tokenizer, **MANY_COMMITS)
    assert 0 < resumed.last_report.added < len(CORPUS)
    assert contents(resumed.path) == contents(build("default", **MANY_COMMITS).path)


SCRIPT = """
import os, signal, sys
from leaveout.readout.index import Index
from leaveout.store import Store
from readout.test_index import CORPUS, MANY_COMMITS

calls, transaction = iter(range(100)), Store._transaction

def die(store):
    if next(calls) == 4:  # statistics, whitening and two segments are committed, the third has its file
        os.kill(os.getpid(), signal.SIGKILL)
    return transaction(store)

Store._transaction = die
Index.build(sys.argv[1], CORPUS, sys.argv[2], **MANY_COMMITS)
"""


def test_sigkilled_build_of_a_model_by_path_resumes(lm, tokenizer, tmp_path):
    model = tmp_path / "model"
    lm.save_pretrained(model)
    tokenizer.save_pretrained(model)
    paths = os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, sys.path)])
    command = [sys.executable, "-c", SCRIPT, str(model), str(tmp_path / "index")]
    ended = subprocess.run(
        command, check=False, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True
    )
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert Store.open(tmp_path / "index").n_rows == 8
    whole = Index.build(str(model), CORPUS, tmp_path / "whole", **MANY_COMMITS)
    assert whole.last_report.added == 22
    resumed = Index.build(str(model), CORPUS, tmp_path / "index", **MANY_COMMITS)
    assert resumed.last_report.added == 14
    assert contents(resumed.path) == contents(whole.path) and resumed.check() == []


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"temperature": 2.0}, "temperature = 1.0, not 2.0"),
        ({"seed": 1}, "seed = 0, not 1"),
        ({"targets": "all"}, "targets = 'response', not 'all'"),
        ({"units": "group"}, "units = None, not 'group'"),
        ({"bytes_per_row": 9000}, f"bytes_per_row = {PRESETS['default'].bytes_per_row}, not 9000"),
        ({"long": "none"}, "long = 'stored', not 'none'"),
    ],
)
def test_other_settings_are_refused_by_name(options, sentence, build, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(Store, "put", lambda *_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            build("default", path=tmp_path / "index")
    with pytest.raises(
        MismatchError, match=f"holds an index with {sentence}: use the same settings to resume, or anoth"
    ):
        build("default", path=tmp_path / "index", **options)


def test_finished_index_is_reopened_without_work(build, tmp_path, monkeypatch):
    first = build("paper", path=tmp_path / "index")
    monkeypatch.setattr(Store, "put", lambda *_: pytest.fail("nothing is left to do"))
    assert build("paper", path=tmp_path / "index").ids == first.ids


def test_resuming_with_other_rows_is_refused(build, tmp_path, monkeypatch):
    puts, real = itertools.count(1), Store.put

    def put(*args):
        if next(puts) == 3:
            raise Killed
        return real(*args)

    with monkeypatch.context() as patched:
        patched.setattr(Store, "put", put)
        with pytest.raises(Killed):
            build("paper", path=tmp_path / "index", **MANY_COMMITS)
    other = [*CORPUS[:5], {**CORPUS[5], "text": "another tale"}, *CORPUS[6:]]
    with pytest.raises(
        MismatchError, match="Row 6 of list of 22 rows is not the row 'row 5' that this unfinished index"
    ):
        build("paper", rows=other, path=tmp_path / "index")
    with pytest.raises(MismatchError, match="list of 5 rows no longer has the row 'row 5' that this unfinished index"):
        build("paper", rows=CORPUS[:5], path=tmp_path / "index")


# Bad rows, repeated rows, numbers that are none.


def test_bad_row_stops_with_its_place_or_is_counted(lm, tokenizer, tmp_path):
    file = tmp_path / "rows.jsonl"
    bad = [
        '{"prompt": "ask"',
        '{"prompt": "ask", "completion": ""}',
        '{"text": 5}',
        '{"txt": "a tale"}',
        '{"text": "a"}',
    ]
    good = [json.dumps(row) for row in CORPUS]
    file.write_text("\n".join([*good[:3], *bad, *good[3:]]) + "\n")
    places = [
        "rows.jsonl, line 4: is not valid JSON (Expecting ',' delimiter at character 17)",
        "rows.jsonl, line 5: field `completion` is empty or blank",
        "rows.jsonl, line 6: field `text` must be text, not a number",
        "rows.jsonl, line 7: has only the fields `txt`, but a row needs",
        "has no token to learn",
    ]
    bare = make_tokenizer(bos=False)  # so that one letter is one token, with nothing before it
    with pytest.raises(FormatError, match=re.escape(places[0])):
        Index.build(lm, file, tmp_path / "strict", "paper", bare)
    index = Index.build(lm, file, tmp_path / "index", "paper", bare, skip_bad=True, **MANY_COMMITS)
    assert len(index) == 22 and index.ids == [row["id"] for row in CORPUS]
    assert (index.last_report.added, index.last_report.skipped) == (22, 5)
    assert len(index.last_report.messages) == 5
    for place, message in zip(places, index.last_report.messages, strict=True):
        assert place in message
    assert index.records(["row 3"])[0].extra["number"] == 8


def test_units_and_facts_are_kept_and_progress_goes_to_stderr(build, tmp_path, capsys):
    index = build("default", path=tmp_path / "index", units="group", progress=True)
    assert [record.unit for record in index.records(["row 3", "row 4"])] == ["0", "1"]
    index.append([{"text": "one tale", "group": "late"}])
    assert index.records(index.ids[-1:])[0].unit == "late"
    with pytest.raises(FormatError, match="field `group` is missing, but the units are named by it"):
        index.append(["another tale"])
    facts = index.info()
    assert (facts["statistics"]["rows"], facts["units"], facts["source"]) == (22, "group", None)
    printed = capsys.readouterr()
    assert "statistics" in printed.err and "index" in printed.err and not printed.out


def test_corpus_without_rows_is_refused(lm, tokenizer, tmp_path):
    for preset, rows in itertools.product(("paper", "default"), ([], [{"text": ""}])):
        with pytest.raises(FormatError, match="has no rows to index: give a corpus with at least one row"):
            Index.build(lm, rows, tmp_path / f"{preset} {len(rows)}", preset, tokenizer, skip_bad=True)


def test_rows_without_ids_may_repeat(lm, tokenizer, tmp_path):
    index = Index.build(lm, ["one tale", "two tales", "one tale", "one tale"], tmp_path / "index", "paper", tokenizer)
    first, second = index.ids[:2]
    assert index.ids == [first, second, f"{first}-2", f"{first}-3"]
    assert index.last_report.repeated == 2 and [record.unit for record in index.records(index.ids)] == index.ids
    report = index.append(["three tales", "two tales", "one tale"])
    assert (report.added, report.repeated) == (1, 2) and len(index) == 5


def test_ids_that_two_rows_share_are_refused(lm, tokenizer, tmp_path):
    rows = [{"id": "a", "text": "one tale"}, {"id": "b", "text": "two tales"}, {"id": "a", "text": "three tales"}]
    with pytest.raises(
        FormatError, match="The id 'a' of row 3 is that of an earlier row: give every row its own id, or"
    ):
        Index.build(lm, rows, tmp_path / "strict", "paper", tokenizer)
    index = Index.build(lm, rows, tmp_path / "index", "paper", tokenizer, skip_bad=True)
    assert index.ids == ["a", "b"] and index.last_report.skipped == 1 and "'a'" in index.last_report.messages[0]
    with pytest.raises(FormatError, match="The id 'b' of row 1 is that of an earlier row"):
        index.append([{"id": "b", "text": "four tales"}])


@pytest.fixture(scope="module")
def poisoned(tokenizer):
    """A model in which one token, the exclamation mark, gives no number."""
    lm = make_model("llama", spread=0.1, dtype=torch.float32)
    token = tokenizer("!").input_ids[-1]
    with torch.no_grad():
        lm.get_input_embeddings().weight[token] = float("nan")
    return lm


@pytest.mark.parametrize(("preset", "form"), [("paper", {}), ("default", {}), ("default", TRIPLES)])
def test_signature_that_is_not_finite_stops_or_is_counted(preset, form, lm, poisoned, tokenizer, tmp_path):
    how = {**MANY_COMMITS, **form}
    rows = [*CORPUS[:9], {"id": "bad", "text": "xylophone! and so on"}, *CORPUS[9:12]]
    with pytest.raises(FormatError, match="Row 'bad' has a signature that is not finite: run `leaveout doctor` on the"):
        built(poisoned, rows, tmp_path / "index", preset, tokenizer, **how)
    assert Store.open(tmp_path / "index").n_rows == 8  # what came before is kept
    index = built(poisoned, rows, tmp_path / "index", preset, tokenizer, skip_bad=True, **how)
    assert index.ids == [row["id"] for row in CORPUS[:12]]
    assert index.last_report.skipped == 1 and "'bad'" in index.last_report.messages[0]
    healthy = built(lm, [row for row in rows if row["id"] != "bad"], tmp_path / "healthy", preset, tokenizer, **form)
    assert_close(index.score(QUERIES), healthy.score(QUERIES), "one level")  # its statistics are of the rest
    with pytest.raises(FormatError, match="A query has a signature that is not finite: run `leaveout doctor`"):
        index.search(["xylophone! or not"])


# Changing.


def test_append_equals_the_build_of_both(build, tmp_path):
    for preset, first in (("paper", 8), ("similarity", 7)):
        index = build(preset, rows=CORPUS[:first], path=tmp_path / preset, **MANY_COMMITS)
        report = index.append(CORPUS[first:], **MANY_COMMITS)
        assert (report.added, report.skipped, len(index)) == (22 - first, 0, 22)
        whole = build(preset, **MANY_COMMITS)
        if first % 4 == 0:
            assert contents(index.path)[0] == contents(whole.path)[0]
        assert index.ids == whole.ids and index.check() == []
        assert_close(index.score(QUERIES), whole.score(QUERIES), "one level")


def test_append_keeps_the_whitening(build, tmp_path):
    index = build("default", rows=CORPUS[:9], path=tmp_path / "index")
    before = contents(index.path)[2]
    index.append(CORPUS[9:])
    assert contents(index.path)[2] == before and before
    queries, rows = index.encode(QUERIES).vectors, index.encode(CORPUS).vectors
    lengths = [x.norm(dim=1).numpy() for x in (queries, rows)]
    assert_rounded(index.score(QUERIES), (queries @ rows.t()).numpy(), lengths, index)


def test_deleted_rows_are_gone_everywhere(build, tmp_path):
    index, whole = build("paper", path=tmp_path / "index", **MANY_COMMITS), build("paper", **MANY_COMMITS)
    gone = ["row 3", "row 4", "row 5", "row 6", "row 7", "row 21"]  # one whole segment, and parts of others
    assert index.delete([*gone, "never there"]) == 6
    kept = [n for n, id in enumerate(whole.ids) if id not in gone]
    for purged in (False, True):
        if purged:
            assert index.purge()["rows"] == 6
        assert len(index) == 16 and index.ids == [whole.ids[n] for n in kept]
        assert_close(index.score(QUERIES), whole.score(QUERIES)[:, kept], "float32")
        wanted = [[hit.id for hit in hits if hit.id not in gone] for hits in whole.search(QUERIES, 22)]
        assert [[hit.id for hit in hits] for hits in index.search(QUERIES, 22)] == wanted
        assert not {hit.id for hit in index.select(QUERIES, 22, combine="rrf", where="n < 9")} & set(gone)
        assert index.check() == []
    assert index.append(CORPUS[3:8]).added == 5  # what is deleted may come back
    assert index.ids[-5:] == gone[:5]


# Forms of the stored rows.


@pytest.mark.parametrize("storage", ["float16", "int8"])
@pytest.mark.parametrize("preset", ["paper", "similarity", GH])
def test_storage_types_agree(preset, storage, build):
    exact, found = (build(preset, bytes_per_row=None, storage=kind) for kind in ("float32", storage))
    assert_close(found.score(CORPUS), exact.score(CORPUS), storage)
    assert found.info()["signature"]["storage"] == storage


# Rows of which the longest signature is many times the shortest, which have scales of their own.
UNEQUAL = [
    {"id": f"row {n}", "text": " ".join([*TEXTS[n % 8 :], *TEXTS][: 1 + n % 4])[: 12 + 31 * n]} for n in range(12)
]


@pytest.mark.parametrize("n_bytes", [200, 400])
def test_triples_are_scored_alike_everywhere(n_bytes, build):
    """In every answer: a row's scale counts, and scores are those of the row up to rounding."""
    index = build(GH, rows=UNEQUAL, **{**FEW, "bytes_per_row": n_bytes}, **MANY_COMMITS)
    queries, ids = index.encode(QUERIES), index.ids
    flat = build(GH, rows=UNEQUAL, **IN_FULL)
    exact, rows = flat.score(QUERIES), flat.encode(UNEQUAL).vectors.norm(dim=1).numpy()
    asked = flat.encode(QUERIES).vectors.norm(dim=1).numpy()
    assert rows.max() > 4 * rows.min() and isinstance(index.long, Filled)
    found = index.score(queries)
    error = np.abs(found - exact) / rows / asked[:, None]  # each row in its own units, so that short ones count too
    assert error.max() < (0.25 if n_bytes == 200 else 0.1)
    order = np.stack([ranked(row) for row in found])
    for workers in (1, 2):
        hits_of = index.search(queries, 12, length="product", workers=workers)
        for hits, row, best in zip(hits_of, found, order, strict=True):
            assert [hit.id for hit in hits] == [ids[n] for n in best]
            assert [hit.score for hit in hits] == row[best].tolist()
    some = [5, 0, 11, 3]
    assert np.array_equal(index.scores_of(queries.vectors, np.array(some), length="product"), found[:, some].T)
    mean = (found / asked[:, None]).mean(0)
    chosen = {hit.id: hit.score for hit in index.select(queries, 12)}
    assert_close([chosen[id] for id in ids] / rows, mean / rows, "model float32")
    fused = (1 / (61 + np.argsort(order, axis=1))).sum(0)
    hits = index.select(queries, 12, combine="rrf")
    assert [hit.id for hit in hits] == [ids[n] for n in np.argsort(-np.round(fused, 14), kind="stable")]
    for n in some:
        explained = index.explain(QUERIES[1], ids[n], length="product")
        assert explained.stored_score == pytest.approx(found[1, n], rel=1e-3)
        assert_close([explained.score], [exact[1, n]], "explain")


@pytest.mark.parametrize("form", [{}, TRIPLES, IN_FULL], ids=["stored", "triples", "in full"])
def test_norms_are_the_lengths_of_parts(form, build):
    """Of every part, before anything is rounded, whatever form is stored."""
    index = build("default", **form, **MANY_COMMITS)
    norms = np.concatenate([segment.arrays()["norms"] for segment in index.store.segments()])
    rows = build("default", **IN_FULL).encode(CORPUS).vectors.double().numpy()
    parts = np.split(rows, np.cumsum([523 * 32, 32 * 48]), axis=1)
    assert norms.dtype == np.float32
    assert_close(norms, np.stack([np.sqrt((part**2).sum(1)) for part in parts], 1), "model float32")


# Selection.


@pytest.mark.parametrize("unwanted", [None, [TEXTS[5], TEXTS[6]]])
@pytest.mark.parametrize("where", [None, "source = 'book'"])
@pytest.mark.parametrize("combine", ["mean", "rrf"])
def test_select_equals_the_formula(combine, where, unwanted, build):
    index, exact = build("default", **IN_FULL, **MANY_COMMITS), build("default", **IN_FULL)
    rows, numbers = exact.encode(CORPUS).vectors.double().numpy(), np.arange(22)[1 if where else 0 :: 2 if where else 1]

    def value(texts):
        vectors = exact.encode(texts).vectors.double().numpy()
        if combine == "mean":
            return rows[numbers] @ np.mean([vector / np.linalg.norm(vector) for vector in vectors], 0)
        ranks = [[sum(other >= own for other in scores) for own in scores] for scores in vectors @ rows[numbers].T]
        return sum(1 / (60 + np.array(rank)) for rank in ranks)

    wanted = value(QUERIES) - (0 if unwanted is None else value(unwanted))
    hits = index.select(QUERIES, 5, unwanted=unwanted, combine=combine, where=where)
    order = np.argsort(-wanted, kind="stable")[:5]
    assert [hit.id for hit in hits] == [f"row {n}" for n in numbers[order]]
    assert_close([hit.score for hit in hits], wanted[order], "model float32")


# Explanations.


@pytest.mark.parametrize("form", [IN_FULL, TRIPLES], ids=["in full", "triples"])
@pytest.mark.parametrize("preset", [*PRESETS, replace(GH, length_power=1.0)])
def test_explanation_adds_up_to_the_score(preset, form, build):
    stored = form if isinstance(preset, str) else {**form, "bytes_per_row": form["bytes_per_row"] and 400}
    windows = {"window": 40, "stride": 30}
    rows = [*CORPUS, {"id": "chat", **RAW[4]}, {"id": "long", "text": RAW[6]}, {"id": "answer", **RAW[3]}]
    index = build(preset, rows=rows, **windows, **stored)
    exact = build(preset, rows=rows, **windows, **IN_FULL)
    for query, id in itertools.product([RAW[7], QUERIES[1]], ["row 3", "chat", "long", "answer"]):
        explained, n = index.explain(query, id, length="product"), index.ids.index(id)
        shape = len(explained.query_tokens), len(explained.row_tokens)
        assert explained.pairs.shape == shape and explained.id == id
        assert explained.pairs.sum() == pytest.approx(explained.score, rel=1e-4)
        vectors = exact.encode([query, rows[n]]).vectors.double()
        assert_close([explained.score], [float(vectors[0] @ vectors[1])], "explain")
        lengths = vectors.norm(dim=1).numpy()
        stored_score, score = np.array([[explained.stored_score]]), np.array([[explained.score]])
        if form is IN_FULL:
            assert_close(stored_score, score, "explain")
        else:
            assert_rounded(stored_score, score, [lengths[:1], lengths[1:]], index)
        assert_close(stored_score, index.score([query])[:1, n : n + 1], "one level")
        assert_close(explained.row_weights.sum(), explained.query_weights.sum(), "float64")
        assert "".join(explained.row_tokens).replace("<s>", "") == index.records([id])[0].text.replace("<s>", "")


def test_explanation_of_a_rounded_row_is_the_exact_product(build):
    exact, rounded = build("default", **IN_FULL), build("default")
    length = np.sqrt(np.diag(exact.score(CORPUS)))
    for n in (3, 8):
        explained = rounded.explain(CORPUS[0], f"row {n}", length="product")
        assert_close([explained.score], [exact.score(CORPUS[:1])[0, n]], "explain")
        assert explained.stored_score == pytest.approx(rounded.score(CORPUS[:1])[0, n], rel=1e-3)
        assert explained.stored_score != explained.score
        found, wanted = np.array([[explained.stored_score]]), np.array([[explained.score]])
        assert_rounded(found, wanted, [length[:1], length[n : n + 1]], rounded)


def test_explanation_marks_the_tokens_that_are_learned(build):
    index = build("default", rows=[*CORPUS, {"id": "answer", **RAW[3]}], **IN_FULL)
    explained = index.explain({"prompt": TEXTS[0], "completion": " Yes."}, "answer")
    learned = [piece for piece, weight in zip(explained.row_tokens, explained.row_weights, strict=True) if weight != 0]
    assert "".join(learned).strip() == TEXTS[5].strip()
    asked = [
        piece for piece, weight in zip(explained.query_tokens, explained.query_weights, strict=True) if weight != 0
    ]
    assert "".join(asked).strip() == "Yes."
