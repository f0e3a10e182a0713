"""Codes are judged in their smoke form, and the tables of stored forms follow from results."""

from __future__ import annotations

import json
import math

import pytest

from .conftest import numbers


@pytest.fixture(scope="module")
def recall(script, tmp_path_factory):
    directory = tmp_path_factory.mktemp("codes")
    assert script("codes").main(["--smoke", "--part", "recall", "--out", str(directory)]) == 0
    return json.loads((directory / "readout_codes_recall.json").read_text())


def interval(mean):
    return {"mean": mean, "low": mean - 0.1, "high": mean + 0.1}


def bank(name, preset, share):
    kinds = (("code", "one stage"), ("code, short queries", "list 1%"), ("code, short queries", "list 5%"))
    lines = [{"bytes": 2048, "code": code, "stage": stage, "share": share} for code, stage in kinds]
    lines.append({"bytes": 2048, "code": "signs", "stage": "one stage", "share": share - 0.3})
    return {"bank": name, "preset": preset, "exact": interval(0.6), "lines": lines}


def test_recall_by_codes_is_measured(recall):
    assert recall["smoke"] is True and recall["question"].endswith("?") and recall["repeats"] == 8
    assert all(math.isfinite(number) for number in numbers(recall))
    for line in recall["lines"]:
        shares = [line[f"in the best {share}"]["mean"] for share in ("1%", "2%", "5%", "10%")]
        assert shares == sorted(shares) and shares[-1] <= 1


def test_the_table_of_recall_has_every_code(recall, script):
    made = script("tables_codes").codes_recall(recall).splitlines()
    assert len(made) == 2 + len(recall["lines"]) and {line.count("|") for line in made} == {8}


def test_shares_of_lds_stand_by_preset_and_stage(script):
    tables = script("tables_codes")
    banks = [bank("stories", "default", 0.95), bank("neox", "default", 0.85), bank("neox", "residual", 0.5)]
    default, residual = tables.codes_lds({"banks": banks}).split("\n\n")
    assert "| 2,048 bytes, two stages, list of 5 % | 95.0% | 85.0% | 90.0% |" in default
    assert "| 2,048 bytes, one stage | 50.0% | 50.0% |" in residual
    others = tables.codes_others({"banks": banks}).splitlines()
    line = next(line for line in others if "SimHash" in line)
    assert line.endswith("|  |  | 60.0% |  |  |  |") and len({line.count("|") for line in others}) == 1


def test_bytes_by_formula_are_those_of_the_preset(script):
    made = script("tables_codes").row_bytes().splitlines()
    assert made[2].startswith("| SmolLM2-135M | 576 | 3,244,032 | 16,384 | 8 | 3 and 0.0625 | 1024 x 576, 576 x 1536 |")
    assert len(made) == 6 and len({line.count("|") for line in made}) == 1


def test_cost_by_length_is_told_a_token(script):
    line = {"tokens": 2000, "learned": 1000, "ms_a_row": 500.0}
    line["index_over_trunk"] = {"median": 1.2, "low": 1.1, "high": 1.3}
    made = script("tables_codes").index_lengths({"models": {"tiny": [line]}})
    assert "| 2,000 | 1,000 | 1.20 [1.10, 1.30] | 500 | 0.50 |" in made


def test_a_table_without_its_result_stays_and_is_named(script, tmp_path, monkeypatch, capsys):
    tables = script("tables")
    monkeypatch.setattr(tables, "TABLES", {"codes_recall": ("page.md", "none.json", tables.TABLES["codes_recall"][2])})
    text = "<!-- table:codes_recall -->\nold\n<!-- end:codes_recall -->\n"
    assert tables.filled(text, tmp_path, "page.md") == text
    assert "the table codes_recall stays as it is, as there is no none.json" in capsys.readouterr().err
