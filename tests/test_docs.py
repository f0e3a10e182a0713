"""The documents say what the code does: generated pages, commands, snippets and tables."""

from __future__ import annotations

import json
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import typer.main

import leaveout
from command import run_command
from leaveout import Corpus, Recipe
from leaveout.cli import app
from leaveout.deletion.directions import DESIGNS
from leaveout.deletion.estimators import ESTIMATORS
from leaveout.errors import FormatError
from leaveout.training.train import train_plain
from readout.tiny import make_model, make_tokenizer

ROOT = Path(__file__).parent.parent
OUTPUTS = runpy.run_path(str(ROOT / "docs" / "outputs.py"))
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [
    *sorted(ROOT.glob("*.md")),
    *sorted(p for f in ("docs", "examples", "benchmarks") for p in (ROOT / f).rglob("*.md")),
]


def test_cli_page_is_what_help_prints():
    generator = runpy.run_path(str(ROOT / "docs" / "reference" / "generate_cli.py"))
    assert (ROOT / "docs" / "reference" / "cli.md").read_text(encoding="utf-8") == generator["cli_page"]()


def test_readme_is_short():
    assert README.count("\n") <= 90


def test_snippets_of_the_page_of_python_run(tmp_path, monkeypatch, capsys):
    page = (ROOT / "docs" / "reference" / "python.md").read_text(encoding="utf-8")
    find, leave_out = re.findall(r"<!-- tested by .*?-->\n```python\n(.*?)```", page, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(leave_out, names)
    found, truth = names["p"], names["truth"]
    assert found.mean.shape == truth.shape == (2, 2)
    assert (truth - found.base).diagonal().min() > 0  # each query needs its own unit
    capsys.readouterr()
    exec(find, {"model": make_model("llama").float(), "tokenizer": make_tokenizer()})
    assert capsys.readouterr().out.startswith("a ")


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_commands_of_the_first_hour_run(tmp_path, monkeypatch, capsys):
    """With a tiny model in the place of SmolLM2, whose answers mean nothing."""
    page = (ROOT / "docs" / "tutorial" / "first-hour.md").read_text(encoding="utf-8")
    page = page.replace("smollm2.gguf", "tiny").replace("layers.29", "layers.1")
    page = page.replace("--retrain 30 --heldout 8", "--retrain 4 --heldout 2")
    make_model("llama", spread=0.1).float().save_pretrained(tmp_path / "tiny")
    make_tokenizer().save_pretrained(tmp_path / "tiny")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", str(OUTPUTS["WIDTH"]))
    ran = []

    def run(command: str, place: Path) -> str:
        program, *arguments = shlex.split(command)
        if program != "leaveout":
            return ""
        code, out, err = run_command(monkeypatch, capsys, *arguments)
        assert code == 0 or arguments[0] == "doctor", err  # this model knows no English
        ran.append(arguments[0])
        return out + err

    shown = OUTPUTS["refreshed"](page, tmp_path, run)
    assert len(ran) >= 14 and shown.count("$ leaveout") == page.count("$ leaveout") == len(ran)
    for command in ("search", "explain"):  # else: python docs/outputs.py
        assert _columns(command, shown) == _columns(command, page)
    predicted = "$ leaveout predict " + shown.partition("$ leaveout predict ")[2]
    assert _columns("predict", predicted) == _columns("predict", README)


def _columns(command: str, page: str) -> list[str]:
    """Words in the head of the table that a page shows below the first `leaveout COMMAND`."""
    output = page.partition(f"$ leaveout {command} ")[2].partition("```")[0].partition("$ leaveout")[0]
    return sorted(re.findall(r"\w+", " ".join(re.findall(r"^┃(.*)┃$", output, re.MULTILINE))))


def test_outputs_are_written_below_what_printed_them(tmp_path):
    page = """```txt title="a.txt"
one
```
```console
$ cat a.txt
old
$ touch b
$ head -c 3 a.txt \\
    && ls
old
```
```python
print("one\\n" * 2)
```

```text
old
```
"""
    new = OUTPUTS["refreshed"](page, tmp_path)
    assert new == page.replace("old", "one", 1).replace("old", "onea.txt\nb", 1).replace("old", "one\none", 1)
    assert OUTPUTS["form"]("a 0.12  -3e-05 ─── b") == OUTPUTS["form"]("a 7.9 12 ─ b") != OUTPUTS["form"]("a 7.9 b")
    with pytest.raises(RuntimeError, match="false"):
        OUTPUTS["refreshed"]("```console\n$ false\n```\n", tmp_path)


def test_rows_are_read_as_the_page_says(tmp_path, monkeypatch, capsys):
    page = (ROOT / "docs" / "how-to" / "rows.md").read_text(encoding="utf-8")
    shown, code = re.findall(r"<!-- tested by .*?-->\n```\w*\n(.*?)```", page, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    Path("questions.csv").write_text("Frage;Antwort;Jahr\nWer?;Ada;1843\n")
    with pytest.raises(FormatError) as refused:
        list(Corpus.open("questions.csv"))
    assert shown.splitlines()[1] == f"leaveout: {refused.value}"
    exec(code, {})
    assert capsys.readouterr().out == "1843 Wer?Ada\n"


def test_tutorial_runs(tmp_path, monkeypatch, capsys):
    page = (ROOT / "docs" / "tutorial" / "first-run.md").read_text(encoding="utf-8")
    blocks = re.findall(r"<!-- tested by .*?-->\n```python\n(.*?)```", page, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for block in blocks:
        exec(block, names)
    assert len(blocks) == 3 and (names["truth"] - names["prediction"].base).diagonal().min() > 0
    assert "test" in capsys.readouterr().out


def test_tutorial_finds_predicts_and_proves(tmp_path, monkeypatch, capsys):
    page = (ROOT / "docs" / "tutorial" / "suspects-prediction-proof.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec("\n".join(re.findall(r"```python\n(.*?)```", page, re.DOTALL)), names)
    assert {id.partition("-")[0] for _, id in names["suspects"]} == {"Halvern"}
    effects = names["truth"].actual - names["truth"].base
    assert effects[0, 0] > 1 and abs(effects[0, 2]) < 1  # nats: only one of the sets holds what taught the answer
    assert names["truth"].measured.tolist() == [True, False, False]
    told = capsys.readouterr()
    assert "1 more set had been measured before" in told.out and not told.err


def test_a_contrast_finds_what_flips_the_answer(tmp_path, monkeypatch, capsys):
    page = (ROOT / "docs" / "how-to" / "why-this-answer.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec("\n".join(re.findall(r"```python\n(.*?)```", page, re.DOTALL)), names)
    shown = re.search(r"```\n(for Ada.*?)```", page, re.DOTALL)
    assert shown and capsys.readouterr().out.startswith(shown[1])  # the nats may differ by rounding, not by sign
    assert names["without_others"] < -0.5 and names["without"] > 0.5


def test_preferences_are_found_and_left_out(tmp_path, monkeypatch, capsys):
    page = (ROOT / "docs" / "how-to" / "preferences.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec("\n".join(re.findall(r"```python\n(.*?)```", page, re.DOTALL)), names)
    assert capsys.readouterr().out == "".join(re.findall(r"```\n((?:for|curt).*?)```", page, re.DOTALL))
    make_model("llama").float().save_pretrained(tmp_path / "out" / "before")
    make_tokenizer().save_pretrained(tmp_path / "out" / "before")
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in names["rows"]))
    (tmp_path / "recipe.yaml").write_text(re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)[0])
    assert Recipe.from_yaml(tmp_path / "recipe.yaml").loss == {"kind": "dpo", "beta": 0.1}


def test_a_behaviour_is_asked_by_texts_functions_and_probes(tmp_path, monkeypatch, capsys):
    page = (ROOT / "docs" / "how-to" / "ask-about-a-behaviour.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    exec("\n".join(re.findall(r"```python\n(.*?)```", page, re.DOTALL)), {})
    assert capsys.readouterr().out == "".join(re.findall(r"```\n((?:make|towards|last).*?)```", page, re.DOTALL))


def test_recipes_of_the_reference_train(tmp_path):
    make_model("llama").float().save_pretrained(tmp_path / "my-model")
    make_tokenizer().save_pretrained(tmp_path / "my-model")
    (tmp_path / "words.txt").write_text("tees\ntyne\n")
    (tmp_path / "units.json").write_text(json.dumps({f"{i}:{w}": w for i in (0, 1) for w in ("tees", "tyne")}))
    rows = [{"id": str(i), "prompt": "Who? ", "response": "Ottoline Marsh.", "source": "ab"[i]} for i in (0, 1)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    np.savez(
        tmp_path / "digits.npz", x=np.eye(4, dtype=np.float32), y=np.arange(4), writer=np.array(["a", "a", "b", "b"])
    )
    page = (ROOT / "docs" / "reference" / "recipe.md").read_text(encoding="utf-8").partition("## All fields")[0]
    kinds = []
    for text in re.findall(r"```yaml\n(.*?)```", page, re.DOTALL):
        (tmp_path / "recipe.yaml").write_text(text)
        recipe = Recipe.from_yaml(tmp_path / "recipe.yaml")
        assert len(recipe.unit_names) == 2
        trained = train_plain(recipe)
        assert all(bool(p.isfinite().all()) for p in trained.values())
        kinds.append(recipe.kind)
    assert sorted(kinds) == ["causal-lm", "classifier", "microgpt"]


@pytest.mark.filterwarnings("ignore")
def test_runs_of_the_trainer_page_are_replayed(tmp_path, monkeypatch, capsys):
    page = (ROOT / "docs" / "how-to" / "connect-to-trainer.md").read_text(encoding="utf-8")
    trainer, loop = re.findall(r"<!-- tested by .*?-->\n```python\n(.*?)```", page, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    tokenizer = make_tokenizer()
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.decode([0])
    rows = [
        {"id": f"r{i}", **tokenizer(text)}
        for i, text in enumerate(["The mill burns.", "Tees flows.", "A jar.", "Who?"])
    ]
    names = {"model": make_model("llama", spread=0.1).float(), "tokenizer": tokenizer, "rows": rows}
    exec(trainer, names)
    line = re.findall(r"^\d steps replayed: .*$", page, re.MULTILINE)[0]
    said = "Losses and gradients are alike in all steps; the rest is rounding"
    told = capsys.readouterr().out
    for text in (line, told):
        assert re.search(rf"\d steps replayed: equal, \S+ of the whole movement apart.*{said}", text)
    assert names["proof"].equal
    exec(loop, {name: names[name] for name in ("model", "tokenizer", "lo")})
    assert "2 steps replayed: equal" in capsys.readouterr().out


def test_commands_that_find_learned_rows_run(tmp_path, monkeypatch, capsys):
    for name in ("my-model", "model-before"):
        make_model("llama", spread=0.1).float().save_pretrained(tmp_path / name)
        make_tokenizer().save_pretrained(tmp_path / name)
    rows = [{"id": f"row-{n}", "prompt": f"Film {n}?", "response": " good", "source": "ab"[n % 2]} for n in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "how-to" / "find-learned-rows.md").read_text(encoding="utf-8")
    lines = [line for block in re.findall(r"```sh\n(.*?)```", page, re.DOTALL) for line in block.splitlines()]
    shown = []
    for line in lines:
        program, *arguments = shlex.split(line)
        code, out, err = run_command(monkeypatch, capsys, *arguments)
        assert program == "leaveout" and (code == 0 or arguments[0] == "doctor"), err  # this model knows no English
        shown.append(out)
    assert len(lines) >= 14 and "0% of 8 rows have less than 0.1 nats a token" in " ".join(shown[0].split())
    assert shown[2] != shown[3]  # by cosine, and by product
    both = [out for line, out in zip(lines, shown, strict=True) if line.startswith("leaveout search both")]
    assert len(set(both)) == len(both) == 3  # by both sides, prompts alone, responses alone


def test_deletion_page_names_every_estimator_and_design():
    page = (ROOT / "docs" / "explanation" / "deletion.md").read_text(encoding="utf-8")
    assert [name for name in (*ESTIMATORS, *DESIGNS) if f"`{name}`" not in page] == []


def test_tree_of_the_architecture_exists():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    tree = re.search(r"^src/leaveout/\n(.*?)```", page, re.DOTALL | re.MULTILINE)
    assert tree
    for name in re.findall(r"\b([a-z_]+(?:/|\.pyi?))\s{2,}", tree[1]):
        assert list((ROOT / "src" / "leaveout").rglob(name.rstrip("/"))), name


def test_links_of_all_pages_resolve():
    broken = []
    for page in PAGES:
        for place, anchor in re.findall(r"\]\(([^)#]*)(?:#([^)]*))?\)", page.read_text(encoding="utf-8")):
            if "://" in place:
                continue
            target = page.parent / place if place else page
            if not target.exists() or (anchor and anchor not in _anchors(target)):
                broken.append(f"{page.name}: {place}#{anchor}")
    assert broken == []


def _anchors(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def test_documented_commands_have_the_options_they_are_given():
    """In the pages, in examples of --help, and in sentences of the program that name a command."""
    known = {
        name: {option for part in command.params for option in (*part.opts, *part.secondary_opts)} | {"--help", "-h"}
        for name, command in typer.main.get_command(app).commands.items()
    }
    strange = []
    for file in [*PAGES, *(ROOT / "src").rglob("*.py"), *(ROOT / "examples").glob("*.md")]:
        for words in re.findall(r"leaveout ([a-z|]+ [^`\n#]*)", file.read_text(encoding="utf-8")):
            names, _, arguments = words.partition(" ")
            for name in set(names.split("|")) & set(known):
                given = set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", arguments))
                strange += [f"{file.name}: {name} {option}" for option in sorted(given - known[name])]
    assert strange == []


def test_documented_benchmarks_have_the_options_they_are_given():
    shared = (ROOT / "benchmarks" / "measuring.py").read_text(encoding="utf-8")
    strange = []
    for page in PAGES:
        for place, arguments in re.findall(r"python (benchmarks/\w+\.py)([^`\n]*)", page.read_text(encoding="utf-8")):
            source = (ROOT / place).read_text(encoding="utf-8") + shared
            given = re.findall(r"(?<![\w-])--[a-z][a-z-]+", arguments)
            strange += [f"{page.name}: {place} {option}" for option in given if f'"{option}"' not in source]
    assert strange == []


def test_advice_on_the_temperature_is_what_was_measured():
    lost: dict[str, list[float]] = {"start": [], "third": [], "final": []}
    for file in sorted((ROOT / "benchmarks" / "results").glob("readout_influence_*.json")):
        lds = {line["method"]: line["lds"]["mean"] for line in json.loads(file.read_text(encoding="utf-8"))["lds"]}
        if "temperature 2@third" in lds and "before" not in file.name:
            for at, found in lost.items():
                found.append(lds[f"default@{at}"] - lds[f"temperature 2@{at}"])
    page = (ROOT / "docs" / "reference" / "presets.md").read_text(encoding="utf-8")
    told = re.search(r"\*\*Which temperature\?\*\* 1\..*", page)
    assert told and "all four banks" in told[0] and {len(found) for found in lost.values()} == {4}
    numbers = [float(number) for number in re.findall(r"\.\d\d", told[0])]
    gained, *harmed = sorted(lost["start"])
    ranges = [lost["third"], lost["final"], [-gained], harmed]
    assert numbers == [round(end, 2) for part in ranges for end in sorted({min(part), max(part)})]
    option = next(o for o in typer.main.get_command(app).commands["index"].params if o.name == "temperature")
    assert "worse" in option.help and "try" not in option.help


@pytest.mark.parametrize("script", ["tables.py", "scale_cost.py"])
def test_tables_come_from_the_results(script):
    command = [sys.executable, ROOT / "benchmarks" / script, "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_public_name_is_on_the_page_of_python():
    page = (ROOT / "docs" / "reference" / "python.md").read_text(encoding="utf-8")
    shown = [place.rpartition(".")[2] for place in re.findall(r"^::: ([\w.]+)$", page, re.MULTILINE)]
    assert sorted(shown) == sorted(set(leaveout.__all__) - {"__version__"})


def test_every_page_stands_in_the_site():
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:")[2]
    pages = {str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")}
    shown = set(re.findall(r"([\w./-]+\.md)$", nav, re.MULTILINE))
    notebooks = {page for page in shown if page.startswith("notebooks/")}
    assert shown - notebooks == pages
    assert all((ROOT / "docs" / page).with_suffix(".ipynb").exists() for page in notebooks)
