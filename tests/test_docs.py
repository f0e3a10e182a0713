"""The documents say what the code does: generated pages, commands, snippets and tables."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path

import typer.main

from leaveout.cli import app
from readout.tiny import make_model, make_tokenizer

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_cli_page_is_what_help_prints():
    generator = runpy.run_path(str(ROOT / "docs" / "generate_cli.py"))
    assert (ROOT / "docs" / "cli.md").read_text(encoding="utf-8") == generator["cli_page"]()


def test_readme_names_every_command_and_no_other():
    named = set(re.findall(r"^leaveout ([a-z|]+) ", README, re.MULTILINE))
    words = {word for group in named for word in group.split("|")} | {"demo"}
    assert words == set(typer.main.get_command(app).commands)


def test_readme_snippet_runs(tmp_path, monkeypatch, capsys):
    snippet = re.search(r"<!-- tested by .*?-->\n```python\n(.*?)```", README, re.DOTALL)
    assert snippet
    monkeypatch.chdir(tmp_path)
    exec(snippet[1], {"model": make_model("llama").float(), "tokenizer": make_tokenizer()})
    assert capsys.readouterr().out.startswith("a ")


def test_readme_links_and_tree_exist():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        if "://" not in target:
            assert (ROOT / target).exists(), target
    tree = re.search(r"^src/leaveout/\n(.*?)```", README, re.DOTALL | re.MULTILINE)
    assert tree
    for name in re.findall(r"\b([a-z_]+(?:/|\.py))\s{2,}", tree[1]):
        assert (ROOT / "src" / "leaveout" / name).exists(), name


def test_readme_tables_come_from_the_results():
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "tables.py", "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_source_files_are_short():
    long = {
        path.name: count
        for path in (ROOT / "src").rglob("*.py")
        if (count := len(path.read_text(encoding="utf-8").splitlines())) > 450 and "rules" not in path.name
    }
    assert long == {}
