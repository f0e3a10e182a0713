"""The benchmarks that judge by retraining run in their smoke form, on one truth bank, and say what they depend on."""

from __future__ import annotations

import json
import math

import pytest

from .conftest import numbers


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("bank")


@pytest.fixture(scope="module")
def influence(script, work):
    assert script("influence").main(["--smoke", "--work", str(work), "--out", str(work)]) == 0
    return json.loads((work / "readout_influence_stories.json").read_text())


def test_every_method_is_judged_and_nothing_is_trained_twice(influence, script, work, monkeypatch):
    assert influence["smoke"] is True and influence["question"].endswith("?")
    assert {"commit", "versions", "processor", "threads", "date", "seed", "cpu_seconds"} <= influence.keys()
    judged = {line["method"]: line["lds"] for line in influence["lds"]}
    assert set(script("influence").CHEAP) | set(script("influence").variants()) == judged.keys()
    assert all(-1 <= found["mean"] <= 1 for found in judged.values())
    assert {line["method"] for line in influence["qld"]} == set(script("influence").REMOVED)
    assert {"metagradient", "default@third"} <= {line["method"] for line in influence["on_few_queries"]["lines"]}
    assert len(influence["stored_forms"]) == len(script("influence").forms())
    assert all(math.isfinite(number) for number in numbers(influence))
    monkeypatch.setattr(script("influence"), "signature_scores", None)
    assert script("influence").main(["--smoke", "--work", str(work), "--out", str(work)]) == 0
    again = json.loads((work / "readout_influence_stories.json").read_text())
    assert again["lds"] == influence["lds"] and again["cpu_seconds"] == influence["cpu_seconds"]


def test_the_tables_follow_from_the_result(influence, script):
    tables = script("tables_influence")
    found = {line["method"]: line["lds"] for line in influence["lds"]}
    assert f"{found['default@third']['mean']:.3f}" in tables.by_method(influence)
    few = {line["method"]: line["lds"]["mean"] for line in influence["on_few_queries"]["lines"]}
    line = tables.shares_reached(influence).splitlines()[-1]
    assert line.endswith(f"| {few['metagradient']:.3f} | {few['default@third'] / few['metagradient']:.0%} |")
    for made in (tables.changes, tables.removals, tables.stored_forms):
        assert len({row.count("|") for row in made(influence, influence).splitlines()}) == 1


def test_priors_are_judged_on_the_same_bank(influence, script, work):
    assert script("influence_priors").main(["--smoke", "--work", str(work), "--out", str(work)]) == 0
    result = json.loads((work / "readout_priors_stories.json").read_text())
    for by_prior in result["by_retrainings"].values():
        assert {"identity", "default signatures", "update vectors"} <= by_prior.keys()
        assert by_prior["identity"]["minus_identity"]["mean"] == 0
    assert all(math.isfinite(number) for number in numbers(result))


def test_a_truth_bank_is_timed(script, tmp_path):
    assert script("truth_bank").main(["--smoke", "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "truth_bank.json").read_text())
    assert result["smoke"] is True and result["halves"] == 3 and result["rows"] == 24
    assert result["minutes"] > 0 and result["cpu_seconds"] > 0 and result["deviation_of_query_losses"] > 0
    assert "| 24 | 6 | 3 | 1 |" in script("tables_influence").truth_bank(result)
