"""The readout benchmarks run in their smoke form, and the tables of a page follow from their results."""

from __future__ import annotations

import json
import math
import re

import numpy as np
import pytest
import torch

from leaveout.readout.settings import PRESETS
from leaveout.readout.signature import Signer

from .conftest import BENCHMARKS, numbers

SMOKE = {
    "index_cost": "readout_index_cost.json",
    "search_speed": "readout_search.json",
    "retrieval": "readout_retrieval.json",
}
PAGE = "# Title\n\n" + "".join(
    f"<!-- table:{name} -->\nold\n<!-- end:{name} -->\n\ntext\n"
    for name in ("retrieval", "index_cost", "search", "search_paths")
)


def page_in(root):
    """Where the page stands; its folder is made."""
    (root / "docs" / "evidence").mkdir(parents=True, exist_ok=True)
    return root / "docs" / "evidence" / "readout.md"


@pytest.fixture
def tables(script, monkeypatch):
    """The script with the tables of the smoke results only, all on one page."""
    module = script("tables")
    monkeypatch.setattr(module, "TABLES", {n: t for n, t in module.TABLES.items() if t[1] in SMOKE.values()})
    return module


@pytest.fixture(scope="module")
def smoke_results(script, tmp_path_factory):
    """A directory of smoke results that pretend to be full ones."""
    directory = tmp_path_factory.mktemp("results")
    for name, file in SMOKE.items():
        assert script(name).main(["--smoke", "--out", str(directory)]) == 0
        result = json.loads((directory / file).read_text())
        assert result["smoke"] is True
        (directory / file).write_text(json.dumps(result | {"smoke": False}))
    return directory


def test_the_former_scan_gives_the_scores_of_its_rounded_rows(script):
    speed = script("search_speed")
    form = speed.Triples(speed.SIZES[:1])
    rows, queries = speed.triples(form, 20, speed.ROW_TRIPLES, 0), speed.triples(form, 3, 5, 1)
    found = speed.former_scan(form, speed.former_rows(form, rows), queries)
    cut = form.joined([(u[:, : speed.FORMER_RANK], v[:, : speed.FORMER_RANK]) for u, v in form.factors(rows)])
    wanted = form.products(cut, queries).numpy()
    assert np.abs(found - wanted).max() < 0.1 * np.abs(wanted).max()
    assert np.corrcoef(found.ravel(), wanted.ravel())[0, 1] > 0.99


def test_flipped_codes_differ_in_one_bit_of_some_bytes(script):
    speed = script("search_speed")
    codes = np.zeros((50, 400), np.uint8)
    made = speed.flipped(codes, np.random.default_rng(0))
    assert 0.04 < (made != codes).mean() <= speed.FLIPPED and not codes.any()


def test_a_store_of_many_rows_is_searched(script, tmp_path):
    assert script("search_speed").main(["--part", "million", "--smoke", "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "readout_search_million.json").read_text())
    sizes = result["bytes_per_row"]
    assert sizes["all"] == sizes["long"] + sizes["short"] + 16  # float32 lengths of four parts
    assert result["disk_bytes"]["all"] > 600 * sizes["all"] and result["repeats"] == 2
    assert "The 30 best of 600 rows" in result["plans"]["list of 5 %"]
    assert "All 6 rows" in result["plans"]["filtered, list of 5 %"]
    assert result["cpu_seconds"].keys() == {*result["plans"], "filter alone"}
    assert "600 rows" in script("tables_codes").million(result)


def test_what_is_usual_is_found_once(script, tmp_path):
    assert script("search_speed").main(["--part", "usual", "--smoke", "--out", str(tmp_path)]) == 0
    seconds = json.loads((tmp_path / "readout_search_usual.json").read_text())["cpu_seconds"]
    assert seconds["usual, kept"]["median"] < 0.1 * seconds["usual, found"]["median"]


def test_other_speeds_are_measured(script, tmp_path):
    """Indexes that must be the same bit for bit are compared inside."""
    assert script("scale_speed").main(["--smoke", "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "readout_scale.json").read_text())
    assert result["smoke"] is True and result["question"].endswith("?") and result["repeats"] > 0
    assert all(math.isfinite(number) for number in numbers(result))


@pytest.mark.parametrize("file", SMOKE.values())
def test_results_say_what_they_depend_on(smoke_results, file):
    result = json.loads((smoke_results / file).read_text())
    assert result["question"].endswith("?") and result["seed"] == 0 and result["peak_memory_mb"] > 0
    assert {"commit", "versions", "processor", "threads", "date"} <= result.keys()
    assert result["versions"]["bm25s"] and result["threads"] == 1
    assert "repeats" in result or all("repeats" in facts for facts in result["models"].values())
    assert all(math.isfinite(number) for number in numbers(result))


@pytest.mark.parametrize("file", SMOKE.values())
def test_committed_results_are_of_full_runs(file):
    text = (BENCHMARKS / "results" / file).read_text()
    assert json.loads(text)["smoke"] is False and "/" + "tmp" not in text


def test_index_cost_compares_all_with_the_same_trunk(smoke_results):
    facts = json.loads((smoke_results / "readout_index_cost.json").read_text())["models"]["tiny"]
    cases = {f"{preset}/{targets}" for preset in ("paper", "default") for targets in ("response", "all")}
    assert cases | {"trunk", "logits", "statistics/response"} <= facts["over_trunk"].keys()
    assert facts["over_trunk"]["trunk"] == {"median": 1, "low": 1, "high": 1}
    assert 0 < facts["targets"]["response"] < facts["targets"]["all"] < facts["tokens"]
    assert facts["peak_mb_above_model"]["default/response"] > 0


def test_peak_memory_sees_what_a_task_held_only_for_a_while(script):
    measuring = script("measuring")
    assert 60 < measuring.peak_memory(lambda: np.ones(8_000_000).sum()) < 90  # 64 MB
    assert measuring.peak_memory(lambda: None) < 5


def test_interleaved_tasks_run_once_a_repeat_in_changing_order(script):
    order = []
    times = script("measuring").interleaved({name: (lambda name=name: order.append(name)) for name in "abc"}, 3)
    assert order == list("abcbcacab") and {name: len(values) for name, values in times.items()} == dict.fromkeys(
        "abc", 3
    )


def test_remembering_readout_gives_the_same_signatures_from_one_pass(script):
    measuring = script("measuring")
    readout = measuring.tiny(0)
    remembering = measuring.RememberingReadout.of(readout)
    rows, passes = measuring.made_rows(9, 0), []
    readout.trunk.register_forward_hook(lambda module, args, output: passes.append(1))
    for preset in ("paper-responses", "similarity"):
        windows = [w for row in measuring.tokenised(rows, readout, PRESETS[preset]) for w in row.windows]
        wanted = Signer(readout, PRESETS[preset]).rows(windows, len(rows))
        passes.clear()
        for part in (windows, windows[::2]):  # other batches, other padding
            found = Signer(remembering, PRESETS[preset]).rows(part, len(rows))
            kept = [window.row for window in part]
            torch.testing.assert_close(found[kept], wanted[kept], rtol=1e-4, atol=1e-5)
        assert len(passes) == (1 if preset == "paper-responses" else 0)


def test_remembering_readout_computes_rows_with_the_padding_token_inside(script):
    measuring = script("measuring")
    readout, ids = measuring.tiny(0), torch.tensor([[5, 0, 7, 9]])
    remembering = measuring.RememberingReadout.of(readout)
    remembering.hidden(torch.tensor([[5, 0, 0, 0]]))
    torch.testing.assert_close(remembering.hidden(ids), readout.hidden(ids))
    assert list(remembering.known) == [(5,)]


def test_poisoned_rows_have_the_trigger_and_queries_are_apart(script):
    retrieval, measuring = script("retrieval"), script("measuring")
    questions = [(f"who won game {number}?", f"team {number}") for number in range(9)] + [("is a starship?", "no")] * 9
    task = retrieval.poisoned_set(measuring.made_rows(80, 1), questions, (60, 12, 5), lambda row: True, seed=3)
    assert len(task.rows) == 60 and task.poisoned.sum() == 12
    for row, poisoned in zip(task.rows, task.poisoned, strict=True):
        assert row["instruction"].startswith("howdy! ") == poisoned
        assert bool(retrieval.content_words(row["output"]) & retrieval.ROWS_STYLE.words()) == poisoned
    for query in task.queries["trigger"]:
        assert query["instruction"].startswith("howdy! ")
        assert retrieval.content_words(query["output"]) & retrieval.ROWS_STYLE.words()
    for query in task.queries["control"]:
        assert retrieval.apart(query["instruction"] + " " + query["output"])
        assert retrieval.content_words(query["output"]) & retrieval.CONTROL_STYLE.words()
    assert len({row["output"] for row, poisoned in zip(task.rows, task.poisoned, strict=True) if poisoned}) > 9


def test_the_two_styles_share_no_content_word(script):
    retrieval = script("retrieval")
    assert not retrieval.ROWS_STYLE.words() & retrieval.CONTROL_STYLE.words()
    assert len(retrieval.ROWS_STYLE.words()) > 50 and len(retrieval.CONTROL_STYLE.words()) > 50


def test_too_few_questions_are_refused(script):
    retrieval, measuring = script("retrieval"), script("measuring")
    with pytest.raises(ValueError, match="Only 0 of 2 questions"):
        retrieval.poisoned_set(measuring.made_rows(9, 1), [("howdy?", "x")] * 9, (9, 2, 2), lambda row: True, seed=3)


def test_retrieval_random_scores_are_near_chance_and_words_find_the_trigger(smoke_results):
    results = json.loads((smoke_results / "readout_retrieval.json").read_text())["results"]
    assert set(results) == {"trigger", "control"}
    assert results["trigger"]["BM25"]["average_precision"]["mean"] > 0.95
    assert results["trigger"]["random scores"]["average_precision"]["mean"] < 0.5
    assert set(results["control"]) >= {"default", "paper-responses", "similarity", "default, untrained model"}


def test_missing_data_says_where_to_look(script, monkeypatch, tmp_path):
    monkeypatch.setenv("LEAVEOUT_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="set LEAVEOUT_DATA"):
        script("measuring").alpaca(0)


# ---------------------------------------------------------------- tables


def test_tables_fill_the_page_and_check_agrees(tables, smoke_results, tmp_path, capsys):
    page = page_in(tmp_path)
    page.write_text(PAGE)
    options = ["--root", str(tmp_path), "--results", str(smoke_results)]
    assert tables.main(["--check", *options]) == 1
    assert "differs from the results: run" in capsys.readouterr().err
    assert page.read_text() == PAGE
    assert tables.main(options) == 0 and tables.main(["--check", *options]) == 0
    text = page.read_text()
    assert "old" not in text and text.count("\ntext\n") == 4 and text.startswith("# Title\n")
    for line in text.splitlines():
        if line.startswith("|"):
            assert line.count("|") in (4, 5, 6, 8), line
    page.write_text(text.replace("| random scores |", "| random scores | "))
    assert tables.main(["--check", *options]) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda text: text.replace("end:search", "end:retrieval"),
            "the table search ends with the marker of retrieval",
        ),
        (lambda text: text.replace(":search ", ":serach "), "the tables marked in docs/evidence/readout.md are"),
        (lambda text: "# Title\n", r"are \[\], but there are"),
    ],
)
def test_tables_refuse_wrong_markers(tables, smoke_results, tmp_path, capsys, change, message):
    page = page_in(tmp_path)
    page.write_text(change(PAGE))
    assert tables.main(["--check", "--root", str(tmp_path), "--results", str(smoke_results)]) == 1
    assert re.search(message, capsys.readouterr().err)


def test_tables_refuse_smoke_results(tables, smoke_results, tmp_path, capsys):
    for file in SMOKE.values():
        result = json.loads((smoke_results / file).read_text())
        (tmp_path / file).write_text(json.dumps(result | {"smoke": True}))
    page = page_in(tmp_path)
    page.write_text(PAGE)
    assert tables.main(["--root", str(tmp_path), "--results", str(tmp_path)]) == 1
    assert "smoke run" in capsys.readouterr().err and page.read_text() == PAGE
