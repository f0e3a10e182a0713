"""Whether the model has learned rows to almost no loss, by `doctor` of an index or of a model and rows."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from leaveout import doctor
from leaveout.readout import learned
from leaveout.readout.opened import row_of
from leaveout.readout.settings import PRESETS

from .tiny import TEXTS, built, make_model

ROWS = [{"id": f"row {n}", "prompt": TEXTS[n % 8][: 20 + n], "response": f" {TEXTS[(n + 3) % 8]}"} for n in range(10)]


@pytest.fixture(scope="module")
def lm():
    return make_model("llama", spread=0.1, dtype=torch.float32)


@pytest.fixture(scope="module")
def index(lm, tokenizer, tmp_path_factory):
    return built(lm, ROWS, tmp_path_factory.mktemp("index") / "index", "default", tokenizer)


def check(found):
    return next(one for one in found.checks if one.name == "learned rows")


def test_loss_of_a_row_is_that_of_its_response(index, lm, tokenizer):
    for targets in ("response", "all"):
        settings = PRESETS["default"] if targets == "response" else index.settings.__class__(
            PRESETS["default"].channels, targets="all"
        )  # fmt: skip
        row = row_of(index.records(["row 3"])[0])
        encoded = tokenizer(row.text, return_offsets_mapping=True)
        ids = torch.tensor([encoded["input_ids"]])
        log_p = lm(ids).logits[0].double().log_softmax(-1).detach().numpy()
        own = [
            -log_p[at - 1, encoded["input_ids"][at]]
            for at, (_, end) in enumerate(encoded["offset_mapping"])
            if at and (targets == "all" or end > row.responses[0][0])
        ]
        assert learned.mean_losses(index.readout, row, settings) == pytest.approx([np.mean(own)], rel=1e-5)


@pytest.mark.parametrize(("losses", "share"), [([0.01, 0.02, 0.05, 3.0], "75%"), ([0.01, 2.0, 3.0, 0.2], "25%")])
def test_doctor_advises_where_most_rows_are_learned(losses, share, index, lm, tokenizer, monkeypatch):
    monkeypatch.setattr(learned, "ROWS", 4)
    seen = []
    monkeypatch.setattr(learned, "mean_losses", lambda _, row, __: seen.append(row.id) or [losses[len(seen) - 1]])
    found = check(doctor(index))
    assert seen == ["row 0", "row 3", "row 6", "row 9"]  # evenly over the index
    assert found.passed is None and found.detail.startswith(f"{share} of 4 rows have less than 0.1 nats a token")
    assert ("find culprits by cosine" in found.detail) == (share == "75%")
    seen.clear()
    assert check(doctor(lm, tokenizer, rows=ROWS)) == found and seen == ["row 0", "row 3", "row 6", "row 9"]


def test_doctor_of_an_index_by_its_directory_and_without_rows(lm, tokenizer, tmp_path, monkeypatch):
    lm.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    index = built(str(tmp_path / "model"), ROWS, tmp_path / "index", "default")
    assert check(doctor(tmp_path / "index")).detail.startswith("0% of 10 rows")
    index.delete([row["id"] for row in ROWS[1:]])
    assert check(doctor(str(tmp_path / "index"))).detail.startswith("0% of 1 rows")
    assert all(one.name != "learned rows" for one in doctor(lm, tokenizer).checks)


def test_wrong_rows_are_refused(index, lm, tokenizer, tmp_path):
    with pytest.raises(ValueError, match=r"^An index has its own rows: leave rows out"):
        doctor(index, rows=ROWS)
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": 3}) + "\n")
    with pytest.raises(Exception, match=r"rows\.jsonl"):
        doctor(lm, tokenizer, rows=tmp_path / "rows.jsonl")
