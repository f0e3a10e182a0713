"""A tiny index and a tiny run of the same rows, for all tests of the page."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from starlette.testclient import TestClient

from leaveout import Index, TrainingRun
from leaveout.training.queries import as_queries
from leaveout.web.api import application
from leaveout.web.workbench import Workbench
from readout.tiny import TEXTS, make_model, make_tokenizer

EVIL = "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'>\u202e{{7*7}} =1+1"
ROWS = [
    {"id": f"row {n}", "prompt": f"Question {n}:", "response": f" {TEXTS[n % len(TEXTS)]}", "source": f"s{n % 3}"}
    for n in range(12)
]
EXTRA = [
    {"id": "evil/../row", "prompt": "Say:", "response": f" {EVIL}", "source": EVIL},
    {"id": "row 1", "prompt": "Another", "response": " text under an id that the run has."},
    {"id": "the same", "prompt": ROWS[2]["prompt"], "response": ROWS[2]["response"], "source": "s2"},
]
QUERIES = [
    {"id": "copper", "prompt": "Question 1:", "response": " Copper conducts heat"},
    {"id": "ferry", "prompt": "Question 0:", "response": " The ferry left", "measure": "probability"},
]


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def place(tmp_path_factory) -> Path:
    """A directory with a model, an index `idx`, a run `run` and `queries.jsonl`."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("web")
    make_model(dtype=torch.float32).save_pretrained(out / "model")
    make_tokenizer().save_pretrained(out / "model")
    rows = [row for row in ROWS if row["id"] != "row 1"]
    Index.build(str(out / "model"), [*rows, *EXTRA], out / "idx", bytes_per_row=2048)
    write(out / "rows.jsonl", ROWS)
    write(out / "queries.jsonl", QUERIES)
    (out / "recipe.yaml").write_text(
        "kind: causal-lm\ndata: rows.jsonl\nmodel: model\nunits: source\nbatch_size: 4\nepochs: 2\n"
        "optimizer: {name: sgd, lr: 0.05}\n"
    )
    run = TrainingRun.train(out / "recipe.yaml", out / "run")
    run.measure(retrain=3, design="singles")
    return out


@pytest.fixture
def bench(place) -> Workbench:
    return Workbench(Index.open(place / "idx"), place / "run", as_queries(place / "queries.jsonl"))


@pytest.fixture
def client(bench):
    with TestClient(application(bench), base_url="http://127.0.0.1:8765") as found:
        yield found
