"""The benchmark of what attention costs runs in its smoke form."""

import json


def test_smoke_measures_every_engine(script, tmp_path):
    benchmark = script("attention_forms")
    assert benchmark.main(["--out", str(tmp_path), "--smoke"]) == 0
    found = json.loads((tmp_path / benchmark.NAME).read_text())["tokens"]["16"]
    assert list(found) == ["plain", "retrainings", "jets", "reverse"]
    assert all(0 < one["memory"] < 1.2 and one["time"] > 0 for one in found.values())
