"""What is to run on a GPU runs on a CPU: the script that a machine with a card is given."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import torch

RUN = Path(__file__).parents[1] / "benchmarks" / "gpu" / "run.py"


def test_dry_run_finishes_every_stage(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))  # which the script changes
    spec = importlib.util.spec_from_file_location("gpu_run", RUN)
    assert spec is not None and spec.loader is not None
    script, threads = importlib.util.module_from_spec(spec), torch.get_num_threads()
    monkeypatch.setitem(sys.modules, "gpu_run", script)
    spec.loader.exec_module(script)
    assert script.main(["--device", "cpu", "--tiny", "--out", str(tmp_path)]) == 0
    assert torch.get_num_threads() == threads
    result = json.loads((tmp_path / "gpu.json").read_text())
    assert result["card"] == "CPU" and result["dry"] is True and {"date", "commit", "versions"} <= result.keys()
    stages = result["stages"]
    assert list(stages) == [
        "machine", "signatures", "index", "training", "shape 1B", "search", "streaming", "training speed",
    ]  # fmt: skip
    for found in stages["signatures"].values():
        if isinstance(found, dict):
            assert found["scores"] == 0 and found["twice the same"] and found["scores in bfloat16"] < 0.05
    assert all(
        value == 0
        for found in (stages["training"]["microgpt"], stages["training"]["language model"])
        for value in found.values()
    )
    assert 0 < stages["shape 1B"]["rows"]["default"]["of the trunk's best rate"] < 1
    assert stages["search"]["16 queries, cpu"]["rows/s"] > 0 and stages["streaming"]["both s"] > 0
    assert stages["training speed"]["jets, degree 3, 8"]["seconds a step"] > 0
