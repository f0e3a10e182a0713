"""The benchmark of new runs runs, and its ceiling is that of the formula."""

from __future__ import annotations

import json

import numpy as np
import pytest


def test_smoke(script, tmp_path):
    new_run = script("new_run")
    assert new_run.main(["--case", "digits", "--smoke", "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / new_run.NAME).read_text())["cases"]["digits"]
    assert found["meaning"] == "new run" and set(found["kinds"]) == {"single", "5 %", "20 %", "group", "block"}
    assert set(found["fitted in"]) == {"the same run", "orders of their own"}
    assert all(0 <= kind["coverage"] <= 1 for kind in found["kinds"].values())


@pytest.mark.parametrize("noise", [0.3, 1.0])
def test_ceiling_is_what_the_exact_effect_reaches(script, noise):
    new_run = script("new_run")
    chance = np.random.default_rng(0)
    effect = chance.standard_normal((30, 400))
    values = effect + noise * chance.standard_normal((3, 30, 400))
    reached = np.mean(new_run.spearman(effect, values.mean(0)))
    assert new_run.ceiling(values) == pytest.approx(reached, abs=0.02)
    assert new_run.ceiling(noise * chance.standard_normal((3, 30, 400))) < 0.2
