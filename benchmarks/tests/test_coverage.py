"""The benchmark of coverage counts what it says, and its cases run in their smoke form."""

from __future__ import annotations

import json

import numpy as np
import pytest

from leaveout.deletion.predict import Prediction


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft with transformers 5
@pytest.mark.parametrize("case", ["digits", "smollm2"])
def test_benchmark_smoke(case, script, tmp_path, capsys):
    if case != "smollm2":
        pytest.importorskip("sklearn")
    coverage = script("coverage")
    given = ["--cases", case, "--out", str(tmp_path), "--smoke", "--work", str(tmp_path)]
    assert coverage.main(given) == 0
    result = json.loads((tmp_path / f"deletion_coverage_{case}.json").read_text())
    assert result["smoke"] is True and {"20 %", "source", "own top rows"} <= set(result["kinds"])
    for kind in result["kinds"].values():
        assert 0 <= kind["interval"][0] <= kind["inside"] <= kind["interval"][1] <= 1
    assert result["mean_inside"] == pytest.approx(np.mean([k["inside"] for k in result["kinds"].values()]))
    assert case in capsys.readouterr().out


def test_summary_counts_only_the_chosen_pairs(script):
    """Two queries, three sets: errors of 1, reaches of 2 and of 0.5; the last column is judged on the first query."""
    coverage = script("coverage")
    base, one = np.zeros((2, 3)), np.ones((2, 3))
    std = np.array([[2.0, 0.5, 2.0], [2.0, 2.0, 0.5]]) / 1.959964
    p = Prediction(("a", "b"), ("x", "y", "z"), base, base, std, "posterior", one * 4, np.zeros((2, 3), bool))
    found = coverage.summary(p, one, np.array([[1, 1, 1], [1, 1, 0]], bool), 0)
    assert (found["sets"], found["pairs"], found["inside"]) == (3, 5, 0.8)
    assert found["width_over_constant"] == pytest.approx(2) and found["inside_not_calibrated"] == 0
    assert found["interval"][0] < 0.8 < found["interval"][1] <= 1
