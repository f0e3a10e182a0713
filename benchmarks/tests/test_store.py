"""The benchmark of the store runs in its smoke form and says what its numbers depend on."""

from __future__ import annotations

import json

from leaveout.store import snapshot


def test_speed_benchmark_runs(script, tmp_path, monkeypatch):
    monkeypatch.setattr(snapshot, "_PAGE", 2_000)
    assert script("store_speed").main(["--smoke", "--json", str(tmp_path / "speed.json")]) == 0
    result = json.loads((tmp_path / "speed.json").read_text())
    assert result["question"].endswith("?") and result["smoke"] is True and result["repeats"] == 2
    assert {"commit", "versions", "processor", "date", "goals"} <= result.keys()
    assert result["select_1_percent_seconds"]["rows"] == 30
