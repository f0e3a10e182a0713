"""The benchmark of the store runs in its smoke form and says what its numbers depend on."""

import json
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

from leaveout.store import Record, Store, catalogue, reader


def test_speed_benchmark_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    monkeypatch.setattr(reader, "_PAGE", 2_000)
    assert import_module("store_speed").main(["--smoke", "--json", str(tmp_path / "speed.json")]) == 0
    result = json.loads((tmp_path / "speed.json").read_text())
    assert result["question"].endswith("?") and result["smoke"] is True and result["repeats"] == 2
    assert {"commit", "versions", "processor", "date", "goals"} <= result.keys()
    assert result["select_1_percent_seconds"]["rows"] == 30


def test_put_writes_a_whole_number_of_batches_and_the_rest(tmp_path: Path) -> None:
    n_rows = 2 * catalogue._LINES + 1
    with Store.create(tmp_path / "store", {}) as store:
        records = [Record(str(n), f"text {n}", "unit") for n in range(n_rows)]
        store.put(records, {"x": np.arange(n_rows)})
        assert list(store.iter_rows()) == records and store.check() == []
