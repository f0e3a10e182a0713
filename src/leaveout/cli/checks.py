"""Commands about either engine: info, check and doctor, and the demo."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from leaveout.cli.program import (
    Columns,
    Device,
    Dtype,
    Json,
    Workers,
    app,
    is_run,
    one_thread,
    open_rows,
    open_run,
    remembered,
    to_line,
)
from leaveout.cli.readout import open_index
from leaveout.tables import Diagnosis, terminal_width, wrapped

Place = Annotated[Path, typer.Argument(metavar="IDX|RUN", help="Directory of an index or of a training run.")]


@app.command()
def info(place: Place, json_: Json = False) -> None:
    """Say what an index or a run is: rows, model, units, measurements. All its settings: with --json.

    Example: leaveout info idx --json
    """
    from leaveout.words import index_sentences, run_sentences

    facts = _run_facts(place) if is_run(place) else open_index(place).info()
    if json_:
        print(to_line({**facts, "commands": remembered(place)}))
        return
    sentences = run_sentences(facts) if is_run(place) else index_sentences(facts)
    made = [f"Made by: {one['command']} ({one['date']}, in {one['in']})" for one in remembered(place)]
    for line in [*sentences, *(f"Note: {note}" for note in facts["notes"]), *made]:
        print(*wrapped(line, terminal_width()), sep="\n")
    print("All settings: the same with --json.")


@app.command()
def check(place: Place, json_: Json = False) -> None:
    """Compare every file of an index or a run with its hashes. Exit 1 if something is wrong.

    Example: leaveout check idx
    """
    if is_run(place):
        from leaveout.store import Store

        parts = [part for part in (place / "examples", place / "bank") if part.is_dir()]
        problems = [f"{part.name}: {found}" for part in parts for found in Store.open(part).check()]
    else:
        problems = open_index(place).check()
    if json_:
        print(to_line({"problems": problems}))
    else:
        print("\n".join(problems) or "all files are as they were written")
    if problems:
        raise typer.Exit(1)


@app.command()
def doctor(
    model: Annotated[
        str,
        typer.Argument(help="Path or id of a causal language model, a .gguf file, an index, or a recipe (.yaml)."),
    ],
    rows: Annotated[
        str | None, typer.Option(help="Rows in any form that `index` takes: has the model learned them already?")
    ] = None,
    columns: Columns = None,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    growth: Annotated[
        bool, typer.Option("--growth", help="Of a recipe: whether its power series grow, up to --degree.")
    ] = False,
    degree: Annotated[int | None, typer.Option(min=2, help="Of that check, which it asks for (default 4).")] = None,
    json_: Json = False,
) -> None:
    """Check a model, an index or a recipe before the work. Of a model: head, numbers, batch and padding invariance,
    tokenizer. Of an index, or with --rows: has the model learned most rows to almost no loss, and how are they ranked
    then? Of a recipe a few steps are tried: seconds, randomness, kinks, what can be measured. --growth takes far longer and
    says how long.

    Example: leaveout doctor EleutherAI/pythia-70m
    """
    one_thread(device)
    if model.endswith((".yaml", ".yml")):
        if rows is not None:
            raise typer.BadParameter("a recipe has its own rows: leave --rows out")
        _diagnose_recipe(Path(model), (degree or 4) if growth or degree else None, device, json_)
        return
    if growth or degree:
        raise typer.BadParameter("--growth and --degree go with a recipe (.yaml)")
    from leaveout.readout.doctor import doctor as diagnosed

    given = None if rows is None else open_rows(rows, columns)
    _print_checks(diagnosed(model, rows=given, dtype=dtype, device=device), json_)


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", help="Directory for indexes, run and report.")] = Path("demo"),
    workers: Workers = 1,
    json_: Json = False,
) -> None:
    """Find planted culprits, leave sources out, retrain to see. Culprits of a few answers, with SmolLM2-135M; then a small
    model is trained, predicted without each of its sources, and retrained.

    Example: leaveout demo --out demo
    """
    from leaveout.demo.run import run_demo

    one_thread()
    result = run_demo(out, workers)
    if json_:
        print(to_line(result))


def _run_facts(path: Path) -> dict[str, Any]:
    run = open_run(path)
    recipe, measured = run.recipe, run.bank.info()
    notes = [*run.notes, *measured.pop("notes", [])]
    return {
        "run": str(path), "recipe": recipe.hash(), "kind": recipe.kind, "examples": len(recipe.examples),
        "units": len(recipe.unit_names), "steps": len(recipe.batches()), "optimizer": recipe.optimizer.name,
        "parameters": sum(p.numel() for p in run.parameters.values()), "forms": recipe.forms, **measured,
        "notes": notes, "never_trained_on": list(recipe.untrained_units()),
    }  # fmt: skip


def _diagnose_recipe(path: Path, degree: int | None, device: str, json_: bool) -> None:
    from leaveout.training.doctor import check_stability, growth_seconds, probe_recipe
    from leaveout.training.loop import RunOptions
    from leaveout.training.recipe import Recipe

    recipe, options = Recipe.from_yaml(path), RunOptions(progress=True, device=device)
    if degree is None:
        _print_checks(probe_recipe(recipe, device), json_)
        return
    seconds = growth_seconds(recipe, degree, RunOptions(device=device))
    print(
        f"leaveout: the growth check of degree {degree} takes about {seconds:.3g} s, up to four times as long if it is not "
        "stable",
        file=sys.stderr,
    )
    found = check_stability(recipe, options, degree=degree)
    if json_:
        growth = [value if value < float("inf") else None for value in found.growth]
        print(to_line({"verdict": found.verdict, "growth": growth, "advice": found.advice}))
    else:
        print(found)
    if found.verdict == "unstable":
        raise typer.Exit(1)


def _print_checks(found: Diagnosis, json_: bool) -> None:
    if json_:
        print(to_line({"checks": [{"name": c.name, "passed": c.passed, "detail": c.detail} for c in found.checks]}))
    else:
        print(found)
    if not found.passed:
        raise typer.Exit(1)
