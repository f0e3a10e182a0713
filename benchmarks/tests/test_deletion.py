"""The benchmarks of jets and deletion run in a small form, and what `make bench` runs exists."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest

from .conftest import BENCHMARKS


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    """A file of made-up names, "max" among their letters."""
    rng, syllables = (
        random.Random(0),
        ["ma", "xi", "re", "lo", "an", "ti", "su", "be", "zo", "qu", "ky", "jd", "fg", "hw", "vp", "c"],
    )
    made = {"".join(rng.choices(syllables, k=rng.randint(2, 4))) for _ in range(400)}
    path = tmp_path_factory.mktemp("names") / "names.txt"
    path.write_text("\n".join(sorted(made)) + "\n")
    return str(path)


SMALL = {
    "figure1": "--data {names} --json {out} --picture {picture} --steps 3 --degree 10 --directions 2 --radii 1 0.5",
    "figure2": "--data {names} --json {out} --picture {picture} --n 60",
    "loo_retraining": "--data {names} --json {out} --n 200 --runs 6",
    "jet_speed": "--degree 1 --directions 4 --repeats 1 --json {out}",
    "deletion_accuracy": "--names {names} --json {out} --n 60 --smoke",
    "prior_choices": "--names {names} --json {out} --n 60 --seeds 1",
}


@pytest.mark.parametrize("name", SMALL)
def test_benchmark_runs(script, name, names, tmp_path, monkeypatch):
    module = script(name)
    if name == "prior_choices":
        monkeypatch.setattr(module, "RUNS", 12)
    out, picture = tmp_path / "result.json", tmp_path / "picture.png"
    assert module.main(SMALL[name].format(names=names, out=out, picture=picture).split()) == 0
    result = json.loads(out.read_text())
    assert {"commit", "versions", "processor", "threads", "date", "command"} <= result.keys()
    assert picture.exists() == ("{picture}" in SMALL[name])
    if name == "deletion_accuracy":
        picture = tmp_path / "regimes.png"
        options = (
            f"--names {names} --accuracy {out} --n 60 --smoke --json {tmp_path / 'regimes.json'} --picture {picture}"
        )
        assert script("regimes").main(options.split()) == 0
        found = json.loads((tmp_path / "regimes.json").read_text())
        assert picture.exists() and len(found["small_shares"]["relative_error"]["jets"]) == 4


def test_a_circle_outside_of_the_analytic_region_is_refused(script, names, tmp_path):
    """A large learning rate at a large radius: coefficients at the circle do not fall."""
    options = f"--data {names} --json {tmp_path / 'out.json'} --steps 40 --degree 20 --directions 1 --radii 40"
    with pytest.raises(SystemExit, match="no circle is narrow enough"):
        script("figure1").main(options.split())


def test_everything_has_its_script_and_its_options(script):
    """`make bench` names scripts that exist, options that they have, and every result file that a table needs."""
    run_all, tables = script("run_all"), script("tables")
    for step in run_all.STEPS.values():
        source = (BENCHMARKS / f"{step.script}.py").read_text() + (BENCHMARKS / "measuring.py").read_text()
        assert all(f'"{option}"' in source for option in re.findall(r"--[a-z-]+", step.arguments)), step
    written = " ".join(f"{step.script} {step.arguments}" for step in run_all.STEPS.values())
    scripts = {"run_all", *(step.script for step in run_all.STEPS.values())}
    sources = "".join((BENCHMARKS / f"{name}.py").read_text() for name in sorted(scripts))
    for file in {file for name in tables.TABLES for file in tables.files_of(name)}:
        stem = re.sub(r"_(stories|neox|qwen|gemma|olmo|olmo-sgd|lds|recall)$", "", Path(file).stem)
        assert file in written or stem in sources, file


def test_bench_resumes_and_tells_what_failed(script, tmp_path, monkeypatch, capsys):
    module = script("run_all")
    bench = tmp_path / "benchmarks"
    bench.mkdir()
    for name in ("fine", "tables", "scale_cost", "influence_picture"):
        (bench / f"{name}.py").write_text("open('ran', 'a').write('x')\n")
    (bench / "broken.py").write_text("raise SystemExit(3)\n")
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "STEPS", {"fine": module.Step("fine"), "broken": module.Step("broken", place="there")})
    for turn in (1, 2):
        assert module.main(["--work", str(tmp_path / "work")]) == 1
        printed = capsys.readouterr()
        assert ("fine: done" in printed.out) == (turn == 1)
        assert "failed: broken" in printed.err
    seconds = json.loads((tmp_path / module.RESULTS / "bench_steps.json").read_text())
    assert list(seconds["steps"]) == ["fine"] and seconds["cpu_seconds_of_the_rest"] > 0 == seconds["cpu_seconds_alone"]
    assert (tmp_path / "ran").read_text() == "x" * 7  # once, and three scripts after each turn
