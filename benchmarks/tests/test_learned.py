"""How lengths count, and rows that are learned: smoke runs, what the sets are made of, and their tables."""

from __future__ import annotations

import json
import math
import random

import numpy as np
import pytest

from .conftest import numbers


@pytest.mark.parametrize(("name", "file"), [("lengths", "readout_lengths"), ("learned_rows", "learned_rows")])
def test_smoke_runs_give_results_and_their_table(name, file, script, tmp_path):
    options = ["--smoke", "--out", f"{tmp_path}", "--work", f"{tmp_path}"]
    options += ["--kinds", "memorised", "duplicates"] if name == "learned_rows" else []
    assert script(name).main(options) == 0
    result = json.loads((tmp_path / f"{file}.json").read_text())
    assert result["question"].endswith("?") and result["smoke"] is True
    assert all(math.isfinite(number) for number in numbers(result))
    tables = script("tables_learned")
    made = (tables.lengths if name == "lengths" else tables.learned)(result).splitlines()
    assert len({line.count("|") for line in made if line}) == 1
    if name == "learned_rows":
        known = {file.name for file in tmp_path.glob("learned-*.json")}
        assert script(name).main(options) == 0 and {file.name for file in tmp_path.glob("learned-*.json")} == known


@pytest.mark.parametrize("kind", ["label flips", "refusals", "triggers", "memorised", "duplicates"])
def test_sets_are_as_they_say(kind, script):
    module = script("learned_rows")
    task, again, other = (module.KINDS[kind](random.Random(seed)) for seed in (3, 3, 4))
    assert task.rows == again.rows and task.queries == again.queries and task.rows != other.rows
    assert len(task.rows) == 125 and task.wanted.shape == (len(task.queries), 125) and task.wanted.any(1).all()
    assert task.wanted.sum(1).tolist() == [{"memorised": 1, "duplicates": 5}.get(kind, 25)] * len(task.queries)
    prompts = {row["prompt"] for row in task.rows}
    assert not prompts & {query["prompt"] for query in task.queries}  # held out
    answers = [{task.rows[at]["response"] for at in np.flatnonzero(own)} for own in task.wanted]
    if kind in ("label flips", "triggers", "duplicates", "memorised"):
        assert all(query["response"] in own for query, own in zip(task.queries, answers, strict=True))
    if kind == "label flips":
        assert {row["response"] for row in task.rows} == {" good", " bad"} and answers[0] == {" good"}


def test_controls_give_results_and_their_table(script, tmp_path):
    options = [
        "--smoke",
        "--out",
        f"{tmp_path}",
        "--work",
        f"{tmp_path}",
        "--kinds",
        "planted fact",
        "memorised",
        "words",
        "manner",
    ]
    script("controls").main(options)
    result = json.loads((tmp_path / "controls.json").read_text())
    assert all(math.isfinite(number) for number in numbers(result)) and len(result["tried"]) == 20
    lines = script("tables_learned").controls(result).splitlines()
    assert len(lines) == 2 + 4 + 2 and len({line.count("|") for line in lines}) == 1


def test_the_rule_of_controls_is_the_one_that_searches_use(script):
    from leaveout.readout.controls import CORRELATION, SHARED, Control

    told = [
        ("norm", 6, 0.1), ("words", 9, 0.79), ("length", 6, 0.8), ("length", 5, 0.8), ("length", 9, None),
        ("other answer", 6, None), ("other answer", 5, None),
    ]  # fmt: skip
    spoke = [bool(script("controls").speaks([one], CORRELATION, SHARED)) for one in told]
    explains = [Control(name, "", same, by, ()).explains for name, same, by in told]
    assert spoke == explains == [True, False, True, False, False, True, False]


def test_a_row_without_length_has_no_score(script):
    scores, norms = np.array([[2.0, 3.0, 0.0]]), np.array([4.0, 0.25, 0.0])
    assert script("lengths").divided(scores, norms, 0.5).tolist() == [[1.0, 6.0, 0.0]]
    assert script("lengths").divided(scores, norms, 1.0).tolist() == [[0.5, 12.0, 0.0]]
