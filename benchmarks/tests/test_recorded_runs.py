"""The benchmark of recorded runs runs in its smoke form, case by case into one file."""

import json

import pytest


@pytest.mark.filterwarnings("ignore")
def test_smoke_replays_a_run_and_says_what_each_setting_is_worth(script, tmp_path, capsys):
    recorded_runs = script("recorded_runs")
    for case in ("gpt2", "settings"):
        assert recorded_runs.main(["--case", case, "--out", str(tmp_path), "--smoke"]) == 0
    found = json.loads((tmp_path / recorded_runs.NAME).read_text())["cases"]
    assert found["gpt2"]["equal"] and found["gpt2"]["distance"] < 1e-5
    settings = found["settings"]
    assert settings["as recorded"] < 1e-4
    assert all(settings[name] > 1e-3 for name in ("no dropout", "loss per example", "warm-up that starts above 0"))
