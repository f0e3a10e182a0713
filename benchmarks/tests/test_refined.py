"""Refined queries and coherent sets: smoke runs and their tables."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from .conftest import numbers


@pytest.mark.parametrize(("name", "file"), [("refined", "readout_refined_smoke"), ("coherent_sets", "coherent_sets")])
def test_smoke_runs_give_results_and_their_table(name, file, script, tmp_path):
    assert script(name).main(["--smoke", "--out", f"{tmp_path}"]) == 0
    result = json.loads((tmp_path / f"{file}.json").read_text())
    assert result["question"].endswith("?") and result["smoke"] is True
    assert all(math.isfinite(number) for number in numbers(result))
    tables = script("tables_influence")
    made = (tables.refined if name == "refined" else tables.coherent)(result).splitlines()
    assert len({line.count("|") for line in made if line}) == 1 and len(made) > 5


def test_sets_that_leave_together_weigh_more_where_their_rows_are_alike(script):
    """Two equal rows of five: without both, (1 - 2h)^-1 of the sum is lost, h their leverage; alone nobody counts more."""
    predicted = script("coherent_sets").predicted
    rows = np.array([[1.0, 0], [1, 0], [0, 1], [0, -1], [0, 0.5]])
    gram, scores = rows @ rows.T, rows[:1] @ rows.T
    sets = np.array([[1.0, 1, 0, 0, 0], [1, 0, 0, 0, 0]])
    longest = 2.25 / 5  # of the second axis
    h = 0.25 / 5 / longest  # a quarter of the curvature
    np.testing.assert_allclose(predicted(scores, gram, sets, "plain", 0.25), [[2, 1]])
    np.testing.assert_allclose(predicted(scores, gram, sets, "leverage", 0.25), [[2 / (1 - h), 1 / (1 - h)]])
    np.testing.assert_allclose(predicted(scores, gram, sets, "Woodbury", 0.25), [[2 / (1 - 2 * h), 1 / (1 - h)]])
