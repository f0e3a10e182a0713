"""The benchmark of what retrainings of adapters share runs in its smoke form."""

import json

import pytest


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_smoke_finds_equal_numbers(script, tmp_path):
    benchmark = script("adapter_shares")
    assert benchmark.main(["--out", str(tmp_path), "--smoke", "--repeats", "1"]) == 0
    found = json.loads((tmp_path / benchmark.NAME).read_text())
    assert found["queries_equal"] and found["difference_in_nats"] < 1e-4 and found["rows_left_out"] == 0.5
