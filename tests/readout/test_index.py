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
from leaveout.readout import scan as scan_module
from leaveout.readout.build import Pace
from leaveout.readout.codec import NUMBERS, Flat, low_rank
from leaveout.readout.index import Index
from leaveout.readout.opened import EncodedQueries
from leaveout.readout.settings import PRESETS
from leaveout.store import Store

from .conftest import GH, RAW, assert_close, ranked
from .tiny import TEXTS, built, make_model, make_tokenizer

CORPUS = [
    {"id": f"row {n}", "text": f"{TEXTS[n % 8][n:]} {n}", "source": ("web", "book")[n % 2], "n": n, "group": n // 4}
    for n in range(22)
]
QUERIES = [TEXTS[0], {"prompt": TEXTS[1], "completion": TEXTS[3]}, RAW[4]]
MANY_COMMITS = {"pace": Pace(chunk_rows=4, commit_bytes=1)}
IN_FULL = {"final_width": None, "rank": None, "storage": "float32"}
LOW_RANK = {**IN_FULL, "final_width": 1}  # narrower than any row, so that a rank applies


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


# Search and score.


@pytest.mark.parametrize("commits", [{}, MANY_COMMITS])
@pytest.mark.parametrize("preset", PRESETS)
def test_search_equals_sorting_the_scores(preset, commits, build, monkeypatch):
    index = build(preset, **commits)
    scores = index.score(QUERIES)
    assert scores.shape == (3, 22) and index.ids == [row["id"] for row in CORPUS]
    monkeypatch.setattr(scan_module, "BUFFER", 1)  # few rows at a time
    for k in (1, 3, 5, 100):
        for hits, row in zip(index.search(QUERIES, k), scores, strict=True):
            order = ranked(row)[:k]
            assert [hit.id for hit in hits] == [index.ids[n] for n in order]
            assert_close([hit.score for hit in hits], row[order], "float32")
            assert [hit.rank for hit in hits] == list(range(1, len(hits) + 1))
            assert [hit.meta["n"] for hit in hits] == order.tolist() and hits[0].text == CORPUS[order[0]]["text"]


@pytest.mark.parametrize("options", [{}, {"final_width": 300, "rank": None}])
@pytest.mark.parametrize("preset", PRESETS)
def test_scores_are_products_of_signatures(preset, options, build):
    """[query, train], whichever side a text stands on; the cosine of a text with itself is 1."""
    index = build(preset, **options)
    rows, queries = index.encode(CORPUS), index.encode(QUERIES)
    assert len(queries) == 3 and queries.texts[1] == TEXTS[1] + TEXTS[3]
    assert rows.vectors.shape == (22, options.get("final_width", rows.vectors.shape[1]))
    wanted = (queries.vectors @ rows.vectors.t()).numpy()
    assert_close(index.score(queries), wanted, index.settings.storage)
    assert_close(index.score(CORPUS), index.score(CORPUS).T, index.settings.storage)
    if index.settings.unit_length:
        assert_close(np.diag(index.score(CORPUS)), np.ones(22), index.settings.storage)


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
@pytest.mark.parametrize("form", [{}, {**LOW_RANK, "rank": 6}], ids=["flat", "low rank"])
def test_products_have_no_last_few_rows_or_queries(form, n_queries, build, monkeypatch):
    """Which a matrix product sums otherwise, so that a row's score would depend on where it stands."""
    index, seen, real = build("default", **form, **MANY_COMMITS), [], torch.Tensor.__matmul__
    texts = [f"{TEXTS[n % 8]} {n}" for n in range(n_queries)]
    queries, wanted = index.encode(texts), np.concatenate([index.score([text]) for text in texts])
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: seen.append((len(a), b.shape[1])) or real(a, b))
    found = index.score(queries)
    assert found.shape == (n_queries, 22)
    assert_close(found, wanted, "float32")
    assert seen and all(rows % 16 == 0 and (columns % 16 == 0 or columns == 1) for rows, columns in seen)


@pytest.mark.parametrize("ask", ["search", "group_by", "unique", "simhash", "mean", "rrf"])
def test_rounding_does_not_change_a_ranking(ask, build, monkeypatch, tmp_path):
    """Scores of every row moved by rounding, in whatever direction: the rows come as if they had not been."""
    rows = [{**row, "text": TEXTS[n % 4]} for n, row in enumerate(CORPUS)]
    index = build("paper", rows=rows, path=tmp_path / "index", storage="float32", **MANY_COMMITS)
    index.prepare("simhash")
    options = {"group_by": {"group_by": "source"}, "unique": {"unique": True}, "simhash": {"approximate": "simhash"}}
    rng, real = np.random.default_rng(0), scan_module._segment_scores

    def answers(size):
        def scores(*args):
            steps = np.round(64 * real(*args)) / 64  # on steps of the resolution, where rounding moves none to another
            return (steps * (1 + size * rng.integers(-100, 101, steps.shape) / 100)).astype(np.float32)

        with monkeypatch.context() as patched:
            patched.setattr(scan_module, "_segment_scores", scores)
            if ask in ("mean", "rrf"):
                found = [index.select(QUERIES[:1], 22, combine=ask)]
            else:
                found = index.search(QUERIES, 22, **options.get(ask, {}))
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


@pytest.mark.parametrize("preset", ["paper", "default"])
def test_index_does_not_depend_on_commits(preset, build):
    one, many = build(preset, pace=Pace(chunk_rows=4)), build(preset, **MANY_COMMITS)
    assert len(Store.open(one.path).segments()) == 1 and len(Store.open(many.path).segments()) == 6
    assert contents(one.path) == contents(many.path)
    assert_close(build(preset).score(QUERIES), one.score(QUERIES), one.settings.storage)  # one chunk
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
        ({"final_width": 99}, f"final_width = {PRESETS['default'].final_width}, not 99"),
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


@pytest.mark.parametrize(("preset", "form"), [("paper", {}), ("default", {}), ("default", {"final_width": 1})])
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
    assert_close(index.score(QUERIES), healthy.score(QUERIES), index.settings.storage)  # its statistics are of the rest
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
        assert_close(index.score(QUERIES), whole.score(QUERIES), whole.settings.storage)


def test_append_keeps_the_whitening(build, tmp_path):
    index = build("default", rows=CORPUS[:9], path=tmp_path / "index")
    before = contents(index.path)[2]
    index.append(CORPUS[9:])
    assert contents(index.path)[2] == before and before
    wanted = index.encode(QUERIES).vectors @ index.encode(CORPUS).vectors.t()
    assert_close(index.score(QUERIES), wanted, "int4")


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


@pytest.mark.parametrize(
    ("storage", "relative", "absolute"), [("float32", 0, 0), ("float16", 2**-11, 2**-25), ("int8", 0, 1 / 254)]
)
def test_stored_numbers_are_rounded_to_the_nearest(storage, relative, absolute):
    """Relative to a number, and absolute in units of the largest of its row; rows of any size, zero included."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 500, generator=generator) ** 3 * torch.tensor([1e-30, 1e-3, 1.0, 70_000.0, 1e30, 0.0])[:, None]
    codec = Flat(NUMBERS[storage], 500)
    arrays = codec.encode(x)
    assert arrays["signature"].dtype.name == storage and arrays["scale"].dtype == np.float32
    bound = relative * x.abs() + absolute * x.abs().amax(1, keepdim=True)
    assert ((codec.decode(arrays) - x).abs() <= 1.001 * bound).all()


@pytest.mark.parametrize("width", [1, 31, 32, 64, 100, 500])
def test_int4_is_what_its_bytes_say(width):
    """Read number by number, as the module describes the bytes."""
    generator = torch.Generator().manual_seed(width)
    x = torch.randn(5, width, generator=generator) ** 3 * torch.tensor([1e-30, 1e-3, 1.0, 1e30, 0.0])[:, None]
    codec = Flat(NUMBERS["int4"], width)
    arrays = codec.encode(x)
    found = codec.decode(arrays)
    stored, size = arrays["signature"], -(-width // 64)
    assert stored.shape == (5, 32 * size) and stored.dtype == np.int8
    assert arrays["block_scale"].shape == (5, size) and arrays["block_scale"].dtype == np.float16
    for row, at in itertools.product(range(5), range(64 * size)):
        byte = int(stored[row, at // 64 * 32 + at % 32]) % 256
        code = byte % 16 if at % 64 < 32 else byte // 16
        code -= 16 * (code > 7)
        unit = float(arrays["block_scale"][row, at // 64]) * float(arrays["scale"][row])
        assert code == -8 if at >= width else found[row, at].item() == pytest.approx(code * unit, rel=1e-6)
    assert found.shape == x.shape
    largest = torch.stack([part.abs().amax(1) for part in x.split(64, 1)], 1).repeat_interleave(64, 1)[:, :width]
    assert ((found - x).abs() <= 1.001 / 14 * largest).all()
    assert ((found - x).abs() > 0.5 / 14 * largest).any() or width == 1


@pytest.mark.parametrize("storage", ["float32", "float16", "int8", "int4"])
def test_rows_are_read_in_any_pieces(storage):
    """Blocks, chosen rows and read-only memory give the same numbers as all rows at once."""
    x = torch.randn(9, 75, generator=torch.Generator().manual_seed(1))
    codec = Flat(NUMBERS[storage], 75)
    arrays = codec.encode(x)
    whole = codec.decode(arrays)
    assert whole.shape == (9, 75) and torch.equal(torch.cat(list(codec.blocks(arrays, 4))), whole)
    for value in arrays.values():
        value.flags.writeable = False
    buffer = torch.full((9 * codec.buffer_width,), torch.nan)
    for at in (slice(2, 7), np.array([8, 0, 3])):
        rows = codec.widen(arrays, at, buffer) * torch.from_numpy(arrays["scale"][at].copy())[:, None]
        assert torch.equal(rows, whole[at])


@pytest.mark.parametrize("storage", ["float16", "int8", "int4"])
@pytest.mark.parametrize(
    ("preset", "form"),
    [("paper", {}), ("default", {}), ("residual", {}), ("default", {"final_width": None, "rank": 12})],
)
def test_storage_types_agree(preset, form, storage, build):
    exact = build(preset, storage="float32", **form)
    found = build(preset, storage=storage, **form)
    assert_close(found.score(CORPUS), exact.score(CORPUS), storage)
    assert found.info()["signature"]["storage"] == storage


@pytest.mark.parametrize("preset", ["default", "similarity", "residual"])
def test_low_rank_of_all_positions_is_exact(preset, build):
    windows = {"window": 24, "stride": 18}
    exact = build(preset, **IN_FULL, **windows)
    assert_close(
        build(preset, **{**LOW_RANK, **windows, "rank": 60}).score(QUERIES), exact.score(QUERIES), "model float32"
    )
    assert (
        np.abs(build(preset, **{**LOW_RANK, **windows, "rank": 2}).score(QUERIES) - exact.score(QUERIES)).max() > 1e-3
    )


def test_low_rank_keeps_the_largest_singular_values(build):
    rows, queries = (build(GH, **IN_FULL).encode(x).vectors.reshape(-1, 32, 32).double() for x in (CORPUS, QUERIES))
    u, s, vh = np.linalg.svd(rows.numpy())
    s[:, 3:] = 0
    wanted = np.einsum("nik,nk,nkj,qij->qn", u, s, vh, queries.numpy())
    assert_close(build(GH, **{**LOW_RANK, "rank": 3}).score(QUERIES), wanted, "model float32")


@pytest.mark.parametrize(
    ("positions", "left", "right", "rank", "decades"),
    [
        (60, 64, 172, 24, 0),
        (100, 16, 40, 24, 0),
        (5, 30, 30, 24, 2),
        (40, 64, 64, 64, 12),
        (3, 8, 8, 2, 30),
        (1, 8, 9, 4, 0),
    ],
)
def test_triples_of_factors_of_any_shape_and_spread(positions, left, right, rank, decades):
    generator = torch.Generator().manual_seed(positions)
    a = torch.randn(positions, left, generator=generator) * torch.logspace(0, -decades, positions)[:, None]
    b = torch.randn(positions, right, generator=generator)
    u, v = low_rank(a, b, rank).double().split([rank * left, rank * right])
    found = u.view(rank, left).t() @ v.view(rank, right)
    one, s, other = np.linalg.svd(a.double().t().numpy() @ b.double().numpy())
    s[rank:] = 0
    wanted = one[:, : len(s)] * s @ other[: len(s)]
    assert np.abs(found.numpy() - wanted).max() <= 2e-6 * s[0]
    lengths = u.view(rank, left).norm(dim=1), v.view(rank, right).norm(dim=1)
    assert (lengths[0] - lengths[1]).abs().max() <= 1e-3 * s[0] ** 0.5  # the root of s on both sides
    assert not low_rank(0 * a, b, rank).any()


def test_low_rank_is_for_rows_above_the_final_width(build):
    exact = build(GH, **IN_FULL).score(QUERIES)
    for final_width, same in ((1024, True), (1023, False)):
        scores = build(GH, **{**IN_FULL, "final_width": final_width, "rank": 3}).score(QUERIES)
        assert np.allclose(scores, exact, rtol=1e-4) == same


# Rows of which the longest signature is many times the shortest, which have scales of their own.
UNEQUAL = [
    {"id": f"row {n}", "text": " ".join([*TEXTS[n % 8 :], *TEXTS][: 1 + n % 4])[: 12 + 31 * n]} for n in range(12)
]


@pytest.mark.parametrize("storage", ["float16", "int8", "int4"])
def test_rounded_low_rank_rows_are_scored_as_the_exact_ones(storage, build):
    """In every answer: a row's scale counts on both of its sides."""
    form = {**LOW_RANK, "rank": 60, **MANY_COMMITS}
    index = build(GH, rows=UNEQUAL, **{**form, "storage": storage})
    queries, ids = index.encode(QUERIES), index.ids
    exact = build(GH, rows=UNEQUAL, **form).score(QUERIES)
    length = np.sqrt(np.diag(build(GH, rows=UNEQUAL, **form).score(UNEQUAL)))
    assert length.max() > 4 * length.min()
    scale = np.concatenate([segment.arrays()["scale"] for segment in index.store.segments()])
    assert scale.max() > 1.5 * scale.min()
    found = index.score(queries)
    assert_close(found / length, exact / length, storage)  # each row in its own units, so that short ones count too
    assert (np.argsort(-found / scale) != np.argsort(-exact)).any()  # one factor of the scale decides
    order = np.stack([ranked(row) for row in found])
    for workers in (1, 2):
        for hits, row, best in zip(index.search(queries, 12, workers=workers), found, order, strict=True):
            assert [hit.id for hit in hits] == [ids[n] for n in best]
            assert [hit.score for hit in hits] == row[best].tolist()
    some = [5, 0, 11, 3]
    assert np.array_equal(index.scores_of(queries.vectors, np.array(some)), found[:, some].T)
    mean = (exact / index.codec.lengths(queries.vectors).numpy()[:, None]).mean(0)
    chosen = {hit.id: hit.score for hit in index.select(queries, 12)}
    assert_close([chosen[id] for id in ids] / length, mean / length, storage)
    fused = (1 / (61 + np.argsort(order, axis=1))).sum(0)
    hits = index.select(queries, 12, combine="rrf")
    assert [hit.id for hit in hits] == [ids[n] for n in np.argsort(-np.round(fused, 14), kind="stable")]
    for n in some:
        explained = index.explain(QUERIES[1], ids[n])
        assert explained.stored_score == pytest.approx(found[1, n], rel=1e-5)
        assert_close([explained.score], [exact[1, n]], "explain")


# Selection.


@pytest.mark.parametrize("unwanted", [None, [TEXTS[5], TEXTS[6]]])
@pytest.mark.parametrize("where", [None, "source = 'book'"])
@pytest.mark.parametrize("combine", ["mean", "rrf"])
@pytest.mark.parametrize("rank", [None, 60])
def test_select_equals_the_formula(rank, combine, where, unwanted, build):
    form = IN_FULL if rank is None else {**LOW_RANK, "rank": rank}
    index, exact = build("default", **form, **MANY_COMMITS), build("default", **IN_FULL)
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


@pytest.mark.parametrize(
    ("preset", "rank"),
    [
        *((preset, None) for preset in PRESETS),
        *((preset, 60) for preset in PRESETS if preset != "paper"),
        *((replace(GH, length_power=1.0), rank) for rank in (None, 60)),
    ],
)
def test_explanation_adds_up_to_the_score(preset, rank, build):
    stored = {} if preset == "paper" else IN_FULL if rank is None else {**LOW_RANK, "rank": rank}
    windows = {"window": 40, "stride": 30}
    rows = [*CORPUS, {"id": "chat", **RAW[4]}, {"id": "long", "text": RAW[6]}, {"id": "answer", **RAW[3]}]
    index = build(preset, rows=rows, **windows, **stored)
    exact = build(preset, rows=rows, **windows, **(IN_FULL if stored else {}))
    for query, id in itertools.product([RAW[7], QUERIES[1]], ["row 3", "chat", "long", "answer"]):
        explained, n = index.explain(query, id), index.ids.index(id)
        shape = len(explained.query_tokens), len(explained.row_tokens)
        assert explained.pairs.shape == shape and explained.id == id
        assert explained.pairs.sum() == pytest.approx(explained.score, rel=1e-4)
        vectors = exact.encode([query, rows[n]]).vectors.double()
        assert_close([explained.score], [float(vectors[0] @ vectors[1])], "explain")
        assert_close([explained.stored_score], [explained.score], "explain" if stored else "float16")
        assert explained.stored_score == pytest.approx(index.score([query])[0, n], rel=1e-5)
        assert_close(explained.row_weights.sum(), explained.query_weights.sum(), "float64")
        assert "".join(explained.row_tokens).replace("<s>", "") == index.records([id])[0].text.replace("<s>", "")


def test_explanation_of_a_projected_row_is_the_exact_product(build):
    exact, projected = build("default", **IN_FULL), build("default", final_width=300, rank=None)
    length = np.sqrt(np.diag(exact.score(CORPUS)))
    for n in (3, 8):
        explained = projected.explain(CORPUS[0], f"row {n}")
        assert_close([explained.score], [exact.score(CORPUS[:1])[0, n]], "explain")
        assert explained.stored_score == pytest.approx(projected.score(CORPUS[:1])[0, n], rel=1e-5)
        error = abs(explained.score - explained.stored_score)
        assert 0 < error < 5 * np.sqrt(2 / 300) * length[0] * length[n]


def test_explanation_marks_the_tokens_that_are_learned(build):
    index = build("default", rows=[*CORPUS, {"id": "answer", **RAW[3]}], **IN_FULL)
    explained = index.explain({"prompt": TEXTS[0], "completion": " Yes."}, "answer")
    learned = [piece for piece, weight in zip(explained.row_tokens, explained.row_weights, strict=True) if weight != 0]
    assert "".join(learned).strip() == TEXTS[5].strip()
    asked = [
        piece for piece, weight in zip(explained.query_tokens, explained.query_weights, strict=True) if weight != 0
    ]
    assert "".join(asked).strip() == "Yes."
