"""The command line, in this process: answers on standard output, exit codes, and one sentence for every error."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import io
import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import typer.main

from command import run_command
from leaveout import cli
from leaveout.cli.program import GROUPS
from leaveout.readout import opened
from leaveout.readout.scan import at_resolution
from readout.tiny import TEXTS, make_model, make_tokenizer

ROWS = [
    {"id": "a", "prompt": TEXTS[0], "response": " " + TEXTS[1], "source": "web"},
    {"id": "b", "prompt": TEXTS[2], "response": " " + TEXTS[3], "source": "web"},
    {"id": "c", "text": TEXTS[5] + " <b>bold</b>", "source": "book"},
    {"id": "d", "messages": [{"role": "user", "content": TEXTS[6]}, {"role": "assistant", "content": TEXTS[7]}]},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny saved model with its tokenizer."""
    path = tmp_path_factory.mktemp("model")
    make_model("llama").float().save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs a command; gives exit code, standard output and standard error."""

    def run(*arguments):
        return run_command(monkeypatch, capsys, *arguments)

    return run


@pytest.fixture(scope="module")
def made(model, rows, tmp_path_factory):
    """An index of the four rows, by the command; not to be changed."""
    path, shown = tmp_path_factory.mktemp("made") / "idx", io.StringIO()
    silent = contextlib.redirect_stderr(io.StringIO())
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(shown), silent:
        patch.setattr(sys, "argv", ["leaveout", "index", model, str(rows), "--out", str(path), "--json"])
        with contextlib.suppress(SystemExit):
            cli.main()
    facts = json.loads(shown.getvalue())
    assert (facts["rows"], facts["added"], facts["skipped"], facts["repeated"]) == (4, 4, 0, 0)
    return path


@pytest.fixture
def idx(made, tmp_path):
    """A copy of that index."""
    return shutil.copytree(made, tmp_path / "idx")


def test_every_command_that_takes_rows_takes_tables_and_columns(run, model, tmp_path):
    pairs = [(TEXTS[at], " " + TEXTS[at + 1]) for at in (0, 2, 4)]
    for name, sign in (("rows.csv", ";"), ("more.tsv", "\t")):
        lines = [("Frage", "Antwort"), *pairs[: 2 if name == "rows.csv" else 3]]
        (tmp_path / name).write_text("".join(f'"{one}"{sign}"{other}"\n' for one, other in lines))
    idx, columns = tmp_path / "idx", ("--columns", "prompt=Frage, response=Antwort")
    code, _, err = run("index", model, tmp_path / "rows.csv", "--out", idx)
    assert code == 1 and "rows.csv, line 2: has only the fields `Frage`, `Antwort`" in err
    assert "--columns prompt=Frage,response=Antwort" in err
    assert run("index", model, tmp_path / "rows.csv", *columns, "--limit", 1, "--out", idx)[0] == 0
    code, out, _ = run("append", idx, tmp_path / "more.tsv", *columns, "--json")
    assert code == 0 and (json.loads(out)["added"], json.loads(out)["repeated"]) == (2, 1)
    code, out, _ = run("search", idx, "--queries", tmp_path / "rows.csv", *columns, "-k", 1, "--json")
    assert code == 0 and [json.loads(line)["hits"][0]["text"] for line in out.splitlines()] == list(
        map("".join, pairs[:2])
    )
    wanted = ("--wanted", tmp_path / "rows.csv", *columns, "--out", tmp_path / "best.jsonl")
    assert run("select", idx, "-n", 2, *wanted)[0] == 0
    code, _, err = run("search", idx, "--queries", tmp_path / "rows.csv", "--columns", "prompt")
    assert code == 2 and "--columns must be our name=its name, with commas, got 'prompt'" in " ".join(err.split())


def test_a_search_says_what_was_asked_and_what_a_filter_lets_through(run, idx, tmp_path):
    asked = ("search", idx, "--prompt", TEXTS[5], "--query", TEXTS[1])
    for form in ("messages", "prompt"):
        assert run(*asked, "--form", form)[1].startswith(f"Asked: {TEXTS[5]} {TEXTS[1]}\n")
    none = """No row satisfies "source = 'nowhere'": source has 'web', none, 'book'."""
    filtered = ("--where", "source = 'nowhere'")
    code, out, _ = run(*asked, *filtered, "--html", tmp_path / "page.html")
    assert code == 0 and " ".join(out.split()).endswith(none) and "rank" not in out
    assert "source has" in (tmp_path / "page.html").read_text()
    assert json.loads(run(*asked, *filtered, "--json")[1])["note"] == none
    wanted = ("--wanted", tmp_path / "rows.jsonl", "--out", tmp_path / "best.jsonl")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": TEXTS[1]}))
    for command in (("groups", idx, "--query", TEXTS[1]), ("select", idx, *wanted)):
        code, _, err = run(*command, *filtered)
        assert code == 1 and none in err
    assert not (tmp_path / "best.jsonl").exists()


def test_index_run_again_reopens_the_finished_index(run, idx, model, rows):
    code, out, _ = run("index", model, rows, "--out", idx, "--json")
    assert code == 0
    assert json.loads(out)["added"] == 0
    assert json.loads(out)["rows"] == 4


def test_index_refuses_other_settings_and_names_them(run, idx, model, rows):
    code, out, err = run("index", model, rows, "--out", idx, "--temperature", "2")
    assert (code, out) == (1, "")
    assert "temperature = 1.0, not 2.0" in err
    assert "Traceback" not in err


def test_search_shows_the_words_that_did_it(run, model, tmp_path, monkeypatch):
    """Of long rows the stretch whose words add most, where nothing of a prompt is learned."""
    monkeypatch.setenv("COLUMNS", "200")
    row = {"id": "a", "prompt": " ".join(TEXTS[:2]), "response": f" {TEXTS[3]}", "n": 1}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n" + json.dumps({"id": "b", "text": "short"}) + "\n")
    assert run("index", model, tmp_path / "rows.jsonl", "--out", tmp_path / "idx")[0] == 0
    code, out, _ = run("search", tmp_path / "idx", "--query", TEXTS[3])
    [[shown]] = [re.findall(r"│ (… .*?)\s*│", line) for line in out.splitlines() if "│ a " in line]
    assert code == 0 and shown.strip("… ") in TEXTS[3]
    assert "│ short " in out


def test_help_lists_every_command_once_in_a_group(run):
    from leaveout.cli.program import GROUPS

    assert sorted(name for names in GROUPS.values() for name in names) == sorted(
        typer.main.get_command(cli.app).commands
    )
    _, out, _ = run("--help")
    assert "Others:" not in out and "..." not in out.replace("[ARGS]...", "")


def test_search_holds_one_answer_against_another(run, idx):
    code, out, _ = run("search", idx, "--query", TEXTS[1], "--against", TEXTS[3], "-k", "4", "--json")
    lines = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and [line["query"] for line in lines] == [
        f"{TEXTS[1]} rather than {TEXTS[3]}", f"{TEXTS[3]} rather than {TEXTS[1]}",
    ]  # fmt: skip
    for line, first, last in zip(lines, "ab", "ba", strict=True):
        assert line["hits"][0]["id"] == first and line["hits"][-1]["id"] == last
        assert line["hits"][0]["score"] > 0 > line["hits"][-1]["score"]
    assert run("explain", idx, "--query", TEXTS[1], "--against", TEXTS[3], "--id", "a")[0] == 0
    two = ("--query", "x", "--against", "a", "--against", "b")
    assert "give one --against, or as many as --query: there are 2 and 1" in run("search", idx, *two)[2]
    assert "so that nothing tells them apart" in run("search", idx, "--query", "x", "--against", "x")[2]


def test_search_asks_about_a_behaviour_in_a_file(run, idx, tmp_path):
    file, lines = tmp_path / "refuses.jsonl", [{"text": TEXTS[1], "sign": 1}, {"text": TEXTS[3], "sign": -1}]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    line = json.loads(run("search", idx, "--behaviour", file, "-k", "4", "--json")[1])
    assert line["query"] == "refuses" and [hit["id"] for hit in line["hits"]][::3] == ["a", "b"]
    assert run("explain", idx, "--behaviour", file, "--id", "a")[0] == 0
    file.write_text("".join(json.dumps({"text": one["text"], "weight": one["sign"]}) + "\n" for one in lines))
    assert json.loads(run("search", idx, "--behaviour", file, "-k", "4", "--json")[1]) == line
    said = {
        None: "Row 2 of a behaviour has the weight None",
        "much": "field `weight` is text",
        True: "is true or false",
    }
    for wrong, sentence in said.items():
        file.write_text(json.dumps({"text": "y", "weight": 1}) + "\n" + json.dumps({"text": "x", "weight": wrong}))
        assert sentence in run("search", idx, "--behaviour", file)[2]
    file.write_text(json.dumps({"text": "x", "sign": 2}))
    assert "has the sign 2: give 1 or -1 as the sign of each row" in run("search", idx, "--behaviour", file)[2]
    assert "--behaviour" in run("search", idx, "--behaviour", file, "--query", "x")[2]


def test_search_asks_what_raises_hidden_states(run, idx, tmp_path):
    np.save(tmp_path / "probe.npy", np.arange(32.0))
    (tmp_path / "no.npy").write_text("no")
    asked = ("search", idx, "--query", TEXTS[1], "--json", "--probe")
    last, first = (json.loads(run(*asked, tmp_path / "probe.npy", *more)[1])["hits"] for more in ((), ("--block", "0")))
    assert [hit["score"] for hit in last] != [hit["score"] for hit in first]
    assert "no.npy is no array of numpy" in run(*asked, tmp_path / "no.npy")[2]
    assert "--block goes with --probe" in run("search", idx, "--query", "x", "--block", "1")[2]


def test_search_says_what_explains_its_hits(run, model, tmp_path):
    rows = [{"id": f"{n}", "prompt": f"{n}", "response": f" {TEXTS[n % 7][n % 5 : 20 + n % 9]}"} for n in range(52)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run("index", model, tmp_path / "rows.jsonl", "--out", tmp_path / "idx")[0] == 0
    asked = ("search", tmp_path / "idx", "--prompt", "3", "--query", rows[3]["response"], "-k", "1")
    found = json.loads(run(*asked, "--controls", "--json")[1])
    assert len(found["hits"]) == 1 and "other answer" not in {one["name"] for one in found["controls"]["of"]}
    assert found["controls"]["note"] == "There was no other answer to compare with."
    page = tmp_path / "page.html"
    code, out, _ = run(*asked, "--control-answer", " not this", "--html", page)
    assert code == 0 and "hits of another answer" in out and "hits of another answer" in page.read_text()
    sentence = "No control explains these hits." if "No control" in out else "These hits may say nothing of the query"
    assert sentence in page.read_text() and sentence in " ".join(out.split())


def test_groups_are_summed_with_intervals(run, idx):
    code, out, _ = run("groups", idx, "--query", TEXTS[1], "--by", "unit", "--together", "--json")
    found = json.loads(out)["groups"]
    assert code == 0 and len(found) == 4 and found[0]["total"] == max(group["total"] for group in found)
    assert all(group["rows"] == 1 and group["low"] is None and group["together"] is not None for group in found)
    shown = run("groups", idx, "--query", TEXTS[1], "--by", "unit")[1]
    assert "best row" in shown and "together" not in shown
    assert "by is 'nought'" in run("groups", idx, "--query", TEXTS[1], "--by", "nought")[2]


def test_sets_of_an_index_are_summed_and_called_not_calibrated(run, idx, tmp_path):
    asked = ("predict", idx, "--query", TEXTS[1])
    code, out, _ = run(*asked, "--without", "b", "--without", "a,c", "--without-where", "id = 'd'", "--json")
    found = json.loads(out)
    assert code == 0 and [group["name"] for group in found["groups"]] == ["b", "a, c", "id = 'd'"]
    assert found["groups"][1]["total"] == max(group["total"] for group in found["groups"])  # row a is the query
    assert "Not calibrated" in found["notes"][0]
    file = tmp_path / "sets.jsonl"
    file.write_text('{"name": "mine", "without": ["a", "b"]}\n')
    shown = run(*asked, "--sets", file)[1]
    assert "mine" in shown and "Not calibrated" in shown
    for more, told in (
        ((), "say what is left out"), (("--without", "z"), "'z'"), (("--without", "a,b,c,d"), "holds all rows"),
        (("--without", "a", "--degree", "2"), "--degree needs a training run"), (("--without-where", "id = 'q'"), "No row"),
    ):  # fmt: skip
        assert told in run(*asked, *more)[2]
    file.write_text('{"a": 0.5}\n')
    assert "of whole rows: leave shares out" in run(*asked, "--sets", file)[2]


def test_search_reranks_through_the_whole_model(run, idx):
    plain, refined = (
        json.loads(run("search", idx, "--query", TEXTS[1], "--json", *more)[1])["hits"]
        for more in (("--rerank", "3"), ("--rates", "0.5", "--optimizer", "sgd"))
    )
    assert plain[0]["id"] == refined[0]["id"] == "a" and plain[0]["score"] != refined[0]["score"]
    assert "needs the sum of the run's learning rates" in run("search", idx, "--query", "x", "--optimizer", "sgd")[2]


def test_search_prints_one_json_line_per_query(run, idx):
    code, out, _ = run("search", idx, "--query", TEXTS[1], "--query", TEXTS[3], "-k", "2", "--json")
    assert code == 0
    lines = [json.loads(line) for line in out.splitlines()]
    assert [line["query"] for line in lines] == [TEXTS[1], TEXTS[3]]
    assert [set(hit) for line in lines for hit in line["hits"]] == [{"rank", "id", "score", "text", "meta"}] * 4
    assert [hit["rank"] for hit in lines[0]["hits"]] == [1, 2]
    assert lines[0]["hits"][0]["id"] == "a"
    assert lines[1]["hits"][0]["id"] == "b"
    assert lines[0]["hits"][0]["meta"] == {"source": "web"}


def test_search_filters_and_masks_the_prompt(run, idx, tmp_path):
    file = tmp_path / "queries.jsonl"
    file.write_text(json.dumps({"prompt": TEXTS[0], "response": " " + TEXTS[1]}) + "\n")
    _, by_file, _ = run("search", idx, "--queries", file, "--where", "source = 'book'", "--json")
    _, by_option, _ = run(
        "search", idx, "--prompt", TEXTS[0], "--query", " " + TEXTS[1], "--where", "source = 'book'", "--json"
    )
    assert by_file == by_option
    assert [hit["id"] for hit in json.loads(by_file)["hits"]] == ["c"]


def test_search_table_and_page_show_the_rows(run, idx, tmp_path):
    code, out, _ = run("search", idx, "--query", TEXTS[5], "-k", "3", "--html", tmp_path / "hits.html")
    assert code == 0
    assert "rank" in out and "c" in out and out.splitlines()[1].startswith(("No row", "One row", "2 rows", "3 rows"))
    page = (tmp_path / "hits.html").read_text()
    assert "&lt;" in page and "<b>" not in page
    assert 'class="tint up"' in page and "adds to the score" in page  # with a legend


def test_explain_pairs_sum_to_the_score(run, idx, tmp_path):
    code, out, _ = run("explain", idx, "--query", TEXTS[5], "--id", "c", "--json", "--html", tmp_path / "why.html")
    found = json.loads(out)
    assert code == 0
    assert sum(map(sum, found["pairs"])) == pytest.approx(found["score"], rel=1e-9)
    assert found["score"] == pytest.approx(found["stored_score"], rel=0.02)
    assert "".join(found["row_tokens"]) == ROWS[2]["text"]
    assert 'class="heat"' in (tmp_path / "why.html").read_text()
    code, out, _ = run("explain", idx, "--query", TEXTS[5], "--id", "c", "--top", "3")
    assert code == 0 and "of the row answers" in " ".join(out.split()) and "[brackets]" in out and "of all pairs" in out
    assert out.count(" %") == 3  # pairs
    assert "[" in next(line for line in out.splitlines() if line.startswith("Query: "))
    (tmp_path / "told.jsonl").write_text(json.dumps({"said": TEXTS[5], "weight": 1}) + "\n")
    asked = ("explain", idx, "--behaviour", tmp_path / "told.jsonl", "--columns", "text=said", "--id", "c")
    assert run(*asked)[0] == 0


def test_every_command_has_one_whole_line_of_help(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    shown = run("--help")[1]
    for names in GROUPS.values():
        for name in names:
            assert f"\n  {name} " in shown, name
    commands = shown.split("Ask an index of rows:")[1].splitlines()
    assert all(not line or line.endswith((".", ":")) for line in commands)  # no line goes on below


def test_the_shell_completes_commands(tmp_path):
    def leaveout(*arguments, **environment):
        program = "import sys; sys.argv[0] = 'leaveout'; from leaveout.cli import main; main()"
        given = {
            **os.environ,
            "HOME": str(tmp_path),
            "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1",
            **environment,
        }
        command = [sys.executable, "-c", program, *arguments]
        return subprocess.run(command, env=given, check=False, capture_output=True, text=True)

    done = leaveout("--install-completion", "bash")
    script = tmp_path / ".bash_completions" / "leaveout.sh"
    assert done.returncode == 0 and "_LEAVEOUT_COMPLETE=complete_bash" in script.read_text(), done.stderr
    words = {"COMP_WORDS": "leaveout sea", "COMP_CWORD": "1"}
    assert leaveout(_LEAVEOUT_COMPLETE="complete_bash", **words).stdout.split() == ["search"]


def test_info_is_sentences_and_json_is_everything(run, idx):
    code, out, _ = run("info", idx)
    assert (
        code == 0 and "4 rows, from rows.jsonl" in out and "Fields to filter and group by: " in out and "{" not in out
    )
    assert "Made by: leaveout index" in out and "--json" in out.splitlines()[-1]


def test_columns_go_with_a_file(run, idx):
    code, _, err = run("mcp", idx, "--columns", "prompt=question")
    assert code == 2 and "--columns goes with rows of a file" in " ".join(err.replace("│", " ").split())


def test_select_writes_rows_that_can_be_indexed_again(run, idx, model, rows, tmp_path):
    out = tmp_path / "best.jsonl"
    code, text, _ = run("select", idx, "--wanted", rows, "-n", "3", "--out", out, "--json")
    assert code == 0 and json.loads(text)["selected"] == 3
    chosen = [json.loads(line) for line in out.read_text().splitlines()]
    scores = at_resolution(np.array([row["score"] for row in chosen])).tolist()
    assert scores == sorted(scores, reverse=True)
    by_id = {row["id"]: row for row in chosen}
    for id in set(by_id) & {"a", "b"}:
        assert {name: value for name, value in by_id[id].items() if name != "score"} == next(
            row for row in ROWS if row["id"] == id
        )
    code, text, _ = run("index", model, out, "--out", tmp_path / "again", "--json")
    assert code == 0 and json.loads(text)["rows"] == 3


def test_append_delete_purge_check_info(run, idx, rows, tmp_path):
    more = tmp_path / "more.jsonl"
    more.write_text(json.dumps({"id": "e", "text": TEXTS[4]}) + "\n" + json.dumps(ROWS[0]) + "\n")
    _, out, _ = run("append", idx, more, "--json")
    assert {"rows": 5, "added": 1, "repeated": 1}.items() <= json.loads(out).items()
    assert json.loads(run("delete", idx, "--id", "a", "--id", "e", "--json")[1]) == {"deleted": 2, "rows": 3}
    assert json.loads(run("delete", idx, "--where", "source = 'book'", "--json")[1]) == {"deleted": 1, "rows": 2}
    _, out, _ = run("search", idx, "--query", TEXTS[1], "--json")
    assert {hit["id"] for hit in json.loads(out)["hits"]} == {"b", "d"}
    assert run("purge", idx)[0] == 0
    assert run("check", idx)[:2] == (0, "all files are as they were written\n")
    assert json.loads(run("check", idx, "--json")[1]) == {"problems": []}
    info = json.loads(run("info", idx, "--json")[1])
    assert info["rows"] == 2 and info["signature"]["storage"] == "int8" and info["model"]["family"] == "llama"


def test_check_reports_a_flipped_byte_with_exit_1(run, idx):
    segment = max(idx.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    data = bytearray(segment.read_bytes())
    data[-1] ^= 1
    segment.write_bytes(data)
    code, out, _ = run("check", idx)
    assert code == 1
    assert segment.name in out


def test_doctor_passes_the_numbers_and_fails_an_untrained_model(run, model):
    code, out, _ = run("doctor", model, "--json")
    checks = {check["name"]: check for check in json.loads(out)["checks"]}
    assert code == 1
    assert [name for name, check in checks.items() if check["passed"] is False] == ["loss"]
    assert "untrained weights" in checks["loss"]["detail"]
    assert "FAIL" in run("doctor", model)[1]


@pytest.mark.parametrize(("rate", "verdict", "code"), [(0.01, "stable", 0), (100.0, "unstable", 1)])
def test_doctor_of_a_recipe_tells_whether_its_series_stay_bounded(run, tmp_path, rate, verdict, code):
    (tmp_path / "names.txt").write_text("anna\nbert\ncleo\ndora\n")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"kind: microgpt\ndata: names.txt\nsteps: 8\noptimizer: {{name: sgd, lr: {rate}}}\n")
    found = run("doctor", recipe, "--growth", "--json")
    assert found[0] == code, found
    assert json.loads(found[1])["verdict"] == verdict
    assert "growth check of degree 4 takes about" in found[2] or verdict == "unstable"
    assert verdict in run("doctor", recipe, "--degree", 3)[1]


def test_doctor_of_a_recipe_tries_a_few_steps_and_no_growth(run, tmp_path, monkeypatch):
    monkeypatch.setattr("leaveout.training.doctor.check_stability", lambda *_, **__: pytest.fail("growth was checked"))
    taken = []
    monkeypatch.setattr("leaveout.training.loop.Loop.run", _counted(taken))
    (tmp_path / "names.txt").write_text("anna\nbert\ncleo\ndora\n")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("kind: microgpt\ndata: names.txt\nsteps: 30\n")
    code, out, _ = run("doctor", recipe, "--json")
    checks = {c["name"]: c for c in json.loads(out)["checks"]}
    assert code == 0 and sum(taken) <= 10
    assert checks["randomness"]["passed"] and checks["exact first order"]["passed"]
    assert "30 steps" in checks["training"]["detail"] and "no kink" in checks["jets"]["detail"]


def _counted(taken):
    from leaveout.training.loop import Loop

    def counted(self, *arguments, true=Loop.run):
        taken.append(len(self.recipe.batches()))
        true(self, *arguments)

    return counted


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["search", "IDX", "--query", "x", "--where", "nosuch = 1"], 1, "nosuch"),
        (["search", "IDX", "--query", "x", "--where", "1); DROP TABLE rows"], 1, ""),
        (["search", "IDX"], 2, "give either --query or --queries"),
        (["search", "IDX", "--query", "x", "-k", "0"], 2, ""),
        (["search", "nowhere", "--query", "x"], 1, "no index in nowhere, which does not exist"),
        (["search", "ROWS", "--query", "x"], 1, "which is a file"),
        (["search", "IDX", "--query", ""], 2, "--query"),
        (["search", "IDX", "--query", "x y z", "--where", " "], 1, "where is ' ': give an SQL expression"),
        (["index", "MODEL", "ROWS", "--out", "ROWS"], 1, "is a file: give a directory"),
        (["explain", "IDX", "--query", "x y z", "--id", "zz"], 1, "zz"),
        (["delete", "IDX", "--id", "zz"], 1, "zz"),
        (["delete", "IDX"], 2, "give either --id or --where"),
        (["index", "MODEL", "missing.jsonl", "--out", "OUT"], 1, "missing.jsonl"),
        (["index", "MODEL", "ROWS", "--out", "OUT", "--preset", "best"], 1, "no preset 'best': give one of default"),
        (["index", "MODEL", "ROWS", "--out", "OUT", "--dtype", "int4"], 1, "int4"),
        (["index", "no/such/model", "ROWS", "--out", "OUT"], 1, "no/such/model does not load"),
        (["index", "none.gguf", "ROWS", "--out", "OUT"], 1, "no GGUF file"),
        (["frobnicate"], 2, "frobnicate"),
        (["search", "IDX", "--query", "x y z", "--shortlist", "9"], 1, "shortlist is 9, k 10: give a list of at least"),
        (["search", "IDX", "--query", "x y z", "--shortlist", "0"], 2, "--shortlist"),
        (["search", "IDX", "--query", "x y z", "--shortlist", "20", "--exact"], 1, "give one of them"),
        (["search", "IDX", "--query", "x y z", "--reencode", "-1"], 2, "--reencode"),
        (["index", "MODEL", "ROWS", "--out", "OUT", "--long", "no"], 1, "give one of stored, none"),
        (["index", "MODEL", "ROWS", "--out", "OUT", "--bytes-per-row", "0"], 2, "--bytes-per-row"),
        (["index", "MODEL", "ROWS", "--out", "OUT", "--bytes-per-row", "20"], 1, "20 bytes a row hold not one triple"),
        (
            ["search", "IDX", "--query", "x y z", "--group-by", "colour"],
            1,
            "give one of unit, source",
        ),
        (["search", "IDX", "--query", "x y z", "--group-by", "source", "--unique"], 1, "give one of them"),
        (["search", "IDX", "--query", "x y z", "--unique-above", "2"], 1, "give True, or a cosine between 0 and 1"),
        (["search", "IDX", "--query", "x y z", "--workers", "0"], 2, "--workers"),
        (["index", "MODEL", "ROWS", "--out", "OUT", "--shard", "1"], 2, "--shard must be auto or R/N"),
        (["index", "MODEL", "ROWS", "--out", "OUT", "--shard", "2/2"], 1, "shard is (2, 2)"),
        (["index", "MODEL", "ROWS", "--out", "OUT", "--shard", "auto"], 1, "start it with torchrun or srun"),
        (["index", "MODEL", "ROWS", "--out", "OUT", "--backend", "dask"], 1, "give one of processes, ray"),
        (["index", "MODEL", "ROWS", "--out", "OUT", "--statistics", "nowhere"], 1, "There is no index in nowhere"),
        (["append", "IDX", "ROWS", "--backend", "dask"], 1, "give one of processes, ray"),
        (["merge", "OUT"], 2, "PART"),
        (["merge", "OUT", "nowhere"], 1, "nowhere holds no index and no shards"),
        (["merge", "OUT", "IDX", "IDX"], 1, "is given twice"),
    ],
)
def test_errors_are_one_sentence(run, idx, model, rows, tmp_path, monkeypatch, arguments, code, message):
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    places = {"IDX": idx, "MODEL": model, "ROWS": rows, "OUT": tmp_path / "out"}
    found, out, err = run(*(places.get(argument, argument) for argument in arguments))
    assert (found, out) == (code, "")
    assert message in err
    assert "Traceback" not in err
    if code == 1:
        assert err.strip().startswith("leaveout: ") and len(err.strip().splitlines()) == 1


def test_bad_row_stops_with_its_line_and_skip_bad_lists_it(run, model, tmp_path):
    data = tmp_path / "bad.jsonl"
    data.write_text(
        '{"text": "A sound row."}\n{"prompt": "Q", "response": ""}\n{"text": 3}\n{"text": "Another sound row."}\n'
    )
    code, _, err = run("index", model, data, "--out", tmp_path / "stops")
    assert code == 1 and "line 2" in err and "response" in err
    code, out, err = run("index", model, data, "--out", tmp_path / "skips", "--skip-bad", "--json")
    assert code == 0
    assert {"rows": 2, "skipped": 2}.items() <= json.loads(out).items()
    assert err.count("skipped:") == 2 and "line 3" in err


def test_search_with_a_moved_model_says_where_to_name_it(run, rows, model, tmp_path):
    place = tmp_path / "model"
    shutil.copytree(model, place)
    assert run("index", place, rows, "--out", tmp_path / "idx")[0] == 0
    place.rename(tmp_path / "moved")
    code, _, err = run("search", tmp_path / "idx", "--query", TEXTS[0])
    assert code == 1 and "no longer loads from" in err and "--model" in err
    assert run("search", tmp_path / "idx", "--query", TEXTS[0], "--model", tmp_path / "moved")[0] == 0


def test_index_of_other_rows_is_refused_once_finished(run, idx, model, tmp_path):
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps(row) + "\n" for row in ROWS[:3]))
    code, _, err = run("index", model, other, "--out", idx)
    assert code == 1 and "finished index of other rows" in err


def test_index_by_workers_is_the_same(run, idx, model, rows, tmp_path):
    code, _, _ = run("index", model, rows, "--out", tmp_path / "two", "--workers", "2")
    assert code == 0
    answers = [run("search", where, "--query", TEXTS[5], "--json")[1] for where in (idx, tmp_path / "two")]
    assert answers[0] == answers[1]


# Parts that become one index.


def answer(run, idx):
    """Ids and scores that a query finds."""
    hits = json.loads(run("search", idx, "--query", TEXTS[5], "--json")[1])["hits"]
    return [hit["id"] for hit in hits], [hit["score"] for hit in hits]


def test_shards_are_merged(run, idx, model, rows, tmp_path, monkeypatch):
    parts, out = tmp_path / "parts", tmp_path / "all"
    code, text, err = run("index", model, rows, "--out", parts, "--shard", "0/2", "--json")
    assert (code, json.loads(text)["rows"]) == (0, 2) and f"leaveout merge IDX {parts}" in err
    code, text, err = run("merge", out, parts)
    assert (code, text) == (1, "") and "shard-00001-of-00002 is missing: run the build of that shard" in err
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, text, _ = run("index", model, rows, "--out", parts, "--shard", "auto", "--json")
    assert (code, json.loads(text)["index"]) == (0, str(parts / "shard-00001-of-00002"))
    code, text, _ = run("merge", out, parts, "--json")
    assert code == 0 and {"rows": 4, "added": 4, "repeated": 0, "index": str(out)}.items() <= json.loads(text).items()
    assert run("merge", tmp_path / "listed", *sorted(parts.iterdir()))[0] == 0
    (names, scores), one = answer(run, out), answer(run, idx)
    assert names == one[0] and scores == pytest.approx(
        one[1], rel=1e-3, abs=1e-4 * max(one[1])
    )  # one level of rounding
    assert answer(run, tmp_path / "listed") == (names, scores)
    code, _, err = run("merge", out, parts)
    assert code == 1 and "holds a finished index: give a new directory" in err


def test_indexes_of_other_rows_are_merged_if_they_whiten_alike(run, idx, model, tmp_path):
    more = tmp_path / "more.jsonl"
    more.write_text(json.dumps({"id": "e", "text": TEXTS[4]}) + "\n" + json.dumps(ROWS[0]) + "\n")
    assert run("index", model, more, "--out", tmp_path / "apart")[0] == 0
    code, text, err = run("merge", tmp_path / "all", idx, tmp_path / "apart")
    assert (code, text) == (1, "") and "another whitening" in err and "--statistics" in err and "--shard" in err
    assert run("index", model, more, "--out", tmp_path / "alike", "--statistics", idx)[0] == 0
    code, text, _ = run("merge", tmp_path / "all", idx, tmp_path / "alike", "--json")
    assert code == 0 and {"rows": 5, "added": 5, "repeated": 1}.items() <= json.loads(text).items()
    assert run("append", idx, more)[0] == 0
    (names, scores), one = answer(run, tmp_path / "all"), answer(run, idx)
    assert names == one[0] and scores == pytest.approx(
        one[1], rel=1e-3, abs=1e-4 * max(one[1])
    )  # one level of rounding


def test_backend_is_handed_on(run, idx, model, rows, tmp_path, monkeypatch):
    """`processes` changes nothing, and `ray` asks for the package."""
    monkeypatch.setitem(sys.modules, "ray", None)
    assert run("index", model, rows, "--out", tmp_path / "one", "--backend", "processes", "--workers", "1")[0] == 0
    assert answer(run, tmp_path / "one") == answer(run, idx)
    (tmp_path / "more.jsonl").write_text(json.dumps({"id": "e", "text": TEXTS[4]}) + "\n")
    for command in (["index", model, rows, "--out", tmp_path / "two"], ["append", idx, tmp_path / "more.jsonl"]):
        code, _, err = run(*command, "--backend", "ray")
        assert code == 1 and "The backend ray needs the package ray: pip install 'leaveout[ray]'" in err


# Ways to search.


def hits_of(run, idx, *options):
    code, out, err = run("search", idx, "--query", TEXTS[5], "--json", *options)
    assert code == 0, err
    return json.loads(out)["hits"]


def test_search_scores_a_short_list_and_says_so(run, idx):
    """The list and its exact scores, what is told before the hits, and rows that are encoded anew."""
    every = hits_of(run, idx)
    code, out, err = run("search", idx, "--query", TEXTS[5], "-k", "2", "--shortlist", "3", "--json")
    assert code == 0 and "leaveout: The 3 best of 4 rows by their short form are scored exactly (" in err
    assert "was not measured" in err
    hits = json.loads(out)["hits"]
    exact = {hit["id"]: hit["score"] for hit in every}
    assert len(hits) == 2 and all(hit["score"] == exact[hit["id"]] for hit in hits)
    for options in (["--exact"], ["--shortlist", "10"], ["--shortlist", "4", "-k", "4"]):
        assert hits_of(run, idx, *options) == every
        assert "short form" not in run("search", idx, "--query", TEXTS[5], *options)[2]
    assert "4 encoded anew by the model" in run("search", idx, "--query", TEXTS[5], "--reencode", "4")[2]
    anew = hits_of(run, idx, "--reencode", "4")
    assert [hit["score"] for hit in anew] == pytest.approx(
        [exact[hit["id"]] for hit in anew], abs=0.01 * anew[0]["score"]
    )
    assert [hit["score"] for hit in anew] != [exact[hit["id"]] for hit in anew]


def test_rows_have_the_bytes_that_are_asked_for(run, model, rows, tmp_path):
    """And none at all of the long form, whose scores the model gives."""
    facts = {}
    for name, options in {"few": ["--bytes-per-row", "3000"], "none": ["--long", "none"]}.items():
        code, _, err = run("index", model, rows, "--out", tmp_path / name, *options)
        assert code == 0, err
        facts[name] = json.loads(run("info", tmp_path / name, "--json")[1])
    assert facts["few"]["signature"]["bytes_per_row"] == 3000 and facts["none"]["signature"]["long"] == "none"
    assert facts["few"]["codec"]["long"]["n_bytes"] == 3000 and facts["few"]["codec"]["short"] is None
    assert facts["none"]["codec"]["long"] is None and facts["none"]["codec"]["short"]["bits"] == 1
    assert facts["none"]["recall"] is None  # four rows need no table
    assert {hit["id"] for hit in hits_of(run, tmp_path / "few")} == set("abcd")
    hits = hits_of(run, tmp_path / "none", "-k", "2", "--shortlist", "2")
    stored = {hit["id"]: hit["score"] for hit in hits_of(run, tmp_path / "few")}
    assert len(hits) == 2 and hits[0]["id"] in stored
    (tmp_path / "wanted.jsonl").write_text(json.dumps(ROWS[0]) + "\n")
    selected = run("select", tmp_path / "none", "--wanted", tmp_path / "wanted.jsonl", "--out", tmp_path / "out.jsonl")
    assert selected[0] == 0 and "4 encoded anew by the model" in selected[2]


def test_search_rolls_up(run, idx, tmp_path, monkeypatch):
    rows = [{**ROWS[2], "id": "c again"}, {**ROWS[2], "id": "near c", "text": ROWS[2]["text"] + "."}]
    (tmp_path / "more.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run("append", idx, tmp_path / "more.jsonl")[0] == 0
    every = [hit["id"] for hit in hits_of(run, idx)]
    assert set(every) == {"a", "b", "c", "d", "c again", "near c"}
    crews, scan = [], opened.scan
    monkeypatch.setattr(opened, "scan", lambda *given: crews.append(given[-2:]) or scan(*given))
    assert [hit["id"] for hit in hits_of(run, idx, "--workers", "3")] == every and crews == [(3, "threads")]
    code, _, err = run("search", idx, "--query", "rain", "--backend", "clouds")
    assert code != 0 and "threads, ray" in err
    once = [id for id in every if id != max("c", "c again", key=every.index)]
    assert [hit["id"] for hit in hits_of(run, idx, "--unique")] == once
    kept = [hit["id"] for hit in hits_of(run, idx, "--unique-above", "0.95")]
    assert kept == [id for id in every if id not in sorted({"c", "c again", "near c"}, key=every.index)[1:]]
    sources = [hit["meta"].get("source") for hit in hits_of(run, idx, "--group-by", "source")]
    assert len(sources) == 3 and set(sources) == {"web", "book", None}


def test_options_have_the_names_and_defaults_of_the_python_interface(run):
    from leaveout.readout.index import Index
    from leaveout.readout.search import SearchOptions
    from leaveout.readout.settings import PRESETS

    commands = {command.callback.__name__: command.callback for command in cli.app.registered_commands}
    given = {name: inspect.signature(command).parameters for name, command in commands.items()}
    own = {"search": {"refine"}, "index": {"progress", "tokenizer", "pace"}, "append": {"progress", "units", "pace"}}
    for command, call in (("search", Index.search), ("index", Index.build), ("append", Index.append)):
        for option in inspect.signature(call).parameters.values():
            if option.kind is option.KEYWORD_ONLY and option.name not in own[command]:
                assert given[command][option.name].default == option.default
    asked = inspect.signature(Index.search).parameters
    assert all(asked[option.name].default == option.default for option in dataclasses.fields(SearchOptions))
    wanted = PRESETS["default"].bytes_per_row
    assert f"(default: the preset's, {wanted} of `default`)" in " ".join(run("index", "--help")[1].split())


def test_help_needs_no_torch_and_the_version_is_printed():
    code = (
        "import sys; sys.argv = ['leaveout', '--version']; import leaveout.cli as c\n"
        "try: c.main()\nexcept SystemExit: pass\nassert 'torch' not in sys.modules, 'torch was imported'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    from leaveout import __version__

    assert done.stdout.strip() == __version__


def test_every_command_has_an_example():
    commands = cli.app.registered_commands
    assert len(commands) >= 16
    for command in commands:
        assert "Example: leaveout" in (command.callback.__doc__ or ""), command.callback


def test_builds_of_long_rows_tell_their_speed_in_tokens(run, model, rows, tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr("leaveout.readout.build.tqdm.set_postfix_str", lambda bar, text, refresh: told.append(text))
    for long, name in ((256, "short"), (1, "long")):
        monkeypatch.setattr("leaveout.readout.build.LONG", long)
        assert run("index", model, rows, "--out", tmp_path / name)[0] == 0
        assert bool(told) == (long == 1)
    assert told[-1].endswith(" tokens/s")
