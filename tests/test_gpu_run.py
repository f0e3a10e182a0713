"""What is to run on a GPU runs on a CPU: the script that a machine with a card is given."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

RUN = Path(__file__).parents[1] / "benchmarks" / "gpu" / "run.py"


def test_dry_run_finishes_every_stage(tmp_path):
    done = subprocess.run(
        [sys.executable, RUN, "--dry-run", "--out", tmp_path], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "gpu.json").read_text())
    assert result["card"] == "CPU" and result["dry"] is True and {"date", "commit", "versions"} <= result.keys()
    assert list(result["stages"]) == ["machine", "signatures", "index", "shape 1B"]
    for found in result["stages"]["signatures"].values():
        if isinstance(found, dict):
            assert found["scores"] == 0 and found["twice the same"] and found["scores in bfloat16"] < 0.05
    assert result["stages"]["shape 1B"]["rows"]["default"]["tokens/s"] > 0
