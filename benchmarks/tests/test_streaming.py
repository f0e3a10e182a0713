"""The benchmark of streaming runs in its smoke form, and its table follows from the result."""

import json

import pytest


@pytest.mark.slow
def test_benchmark_smoke(script, tmp_path):
    assert script("streaming").main(["--smoke", "--out", str(tmp_path), "--work", str(tmp_path / "work")]) == 0
    result = json.loads((tmp_path / "streaming.json").read_text())
    assert result["time"]["equal"] and result["index"]["equal"]
    assert "| streamed over whole |" in script("tables").streaming(result)
