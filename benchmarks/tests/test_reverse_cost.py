"""The benchmark of reverse mode runs in its smoke form, and goes on from kept parts."""

import json

import pytest


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_reverse_cost_runs_and_goes_on(script, tmp_path):
    reverse = script("reverse_cost")
    for case in ("smollm2", "names"):
        given = ["--case", case, "--out", str(tmp_path), "--smoke", "--work", str(tmp_path / "work"), "--queries", "3"]
        assert reverse.main(given) == 0
    found = json.loads((tmp_path / reverse.NAME).read_text())["cases"]
    assert found["smollm2"]["metagradient"]["disk"] > 0 and found["smollm2"]["spearman_with_exact"] > 0.5
    assert set(found["names"]["with_retrainings"]) == set(reverse.KINDS)
    kept = tmp_path / "work" / "6 rows, 3 queries" / "training.json"
    kept.write_text(json.dumps({"cpu_seconds": 1e9, "loading": 0.0}))
    reverse.main(
        ["--case", "smollm2", "--out", str(tmp_path), "--smoke", "--work", str(tmp_path / "work"), "--queries", "3"]
    )
    again = json.loads((tmp_path / reverse.NAME).read_text())["cases"]["smollm2"]
    assert again["trainings"]["metagradient"] < 1e-6
