"""The benchmark of coverage keeps its sets apart, and runs in its smoke form."""

from __future__ import annotations

import json

import numpy as np
import pytest


def test_benchmark_reserves_sets_of_every_kind_and_tests_the_others(script):
    coverage = script("coverage")
    sets = {"a": [[str(i)] for i in range(30)], "b": [["x", str(i)] for i in range(10)], "again": [["3"], ["y"], ["z"]]}
    reserved, test = coverage.reserve(sets, 8, seed=0)
    tested = [frozenset(s) for found in test.values() for s in found]
    kept = {frozenset(s) for s in reserved}
    assert len(reserved) == 8 and not kept & set(tested)
    assert len(tested) + 8 == len(set(tested)) + 8 == 30 + 10 + 2  # the set of two kinds counts once
    assert any("x" in s for s in kept) and kept & {frozenset("y"), frozenset("z")}


def test_benchmark_smoke(script, tmp_path, capsys):
    pytest.importorskip("sklearn")
    coverage = script("coverage")
    out = tmp_path / "digits.json"
    assert coverage.main(["--case", "digits", "--json", str(out), "--smoke"]) == 0
    result = json.loads(out.read_text())
    assert result["smoke"] is True and result["reserved"] == 16
    for found in result["measurements"].values():
        pooled = sum(s["sets"] * s["coverage"] for s in found["kinds"].values()) / result["test_sets"]
        assert found["all"]["coverage"] == pytest.approx(pooled)
        assert 0.5 < found["all"]["coverage"] <= 1
    assert "coverage" not in capsys.readouterr().err


def test_coverage_by_own_half_of_equal_errors_is_the_level(script):
    coverage = script("coverage")
    z = np.abs(np.random.default_rng(0).standard_normal((10, 400)))
    assert coverage.by_own_half(7 * z) == pytest.approx(0.95, abs=5 * (0.05 * 0.95 * 2 / 4000) ** 0.5)
    assert coverage.by_own_half(z[:, :3]) is None
