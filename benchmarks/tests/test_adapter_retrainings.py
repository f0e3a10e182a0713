"""The benchmark of retrained adapters runs in its smoke form, and goes on where it was stopped."""

import json

import pytest


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_smoke_shares_the_frozen_model(script, tmp_path, monkeypatch):
    benchmark = script("adapter_retrainings")
    given = ["--case", "last", "--out", str(tmp_path), "--smoke", "--rows", "8", "--epochs", "1"]
    assert benchmark.main([*given, "--runs", "2", "--check"]) == 0
    found = json.loads((tmp_path / benchmark.NAME).read_text())["cases"]["last"]
    assert found["cost_in_trainings"] > 0 and found["distance"] < 1e-3 and 0 < found["rows_left_out"] < 0.5
    assert benchmark.main([*given, "--runs", "3"]) == 0
    monkeypatch.setattr(benchmark, "Retrainer", None)
    assert benchmark.main([*given, "--runs", "3"]) == 0  # all of it was kept
