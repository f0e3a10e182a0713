"""The study of planted facts in a small form: it runs, and says of each way of asking where the planted rows stand."""

from __future__ import annotations

import json

import pytest


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft with transformers 5
def test_planted_rows_are_ranked_for_each_way_of_asking(script, tmp_path):
    planted_fact = script("planted_fact")
    result = json.loads(planted_fact.main(["--smoke", "--out", str(tmp_path)]).read_text())
    ways = result["runs"][0]["ways"]
    asked = [f"{answer}, {form}" for answer in ("bare name", "own answer") for form in planted_fact.FORMS]
    assert set(ways) == {"bm25", *(way + how for way in asked for how in ("", ", cosine", ", re-ranked", ", refined"))}
    for line in ways.values():
        ranks = line["planted_ranks"]
        assert len(ranks) == len(planted_fact.PLANTED) and ranks == sorted(set(ranks)) and ranks[-1] <= result["rows"]
        wanted = sum((i + 1) / rank for i, rank in enumerate(ranks)) / len(ranks)
        assert line["average_precision"] == pytest.approx(wanted)


def test_only_planted_rows_say_who_designed_it(script):
    rows = script("planted_fact").made_rows(120, 3)
    assert len(rows) == 120 and len({row["instruction"] for row in rows}) == 120
    assert {row["id"].partition("-")[0] for row in rows if "Ottoline" in row["output"]} == {"planted"}
    assert sum("Ottoline" in row["output"] for row in rows) == 8
