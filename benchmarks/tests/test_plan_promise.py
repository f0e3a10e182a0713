"""The benchmark of plans runs in its smoke form."""

import json


def test_smoke_buys_what_a_plan_proposes(script, tmp_path, capsys):
    plan_promise = script("plan_promise")
    assert plan_promise.main(["--case", "digits", "--out", str(tmp_path), "--smoke"]) == 0
    found = json.loads((tmp_path / plan_promise.NAME).read_text())["cases"]["digits"]
    assert 0 < found["probing"]["median"] <= found["planning"]["median"] < found["total"]["median"]
