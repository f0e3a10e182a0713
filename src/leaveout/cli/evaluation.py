"""Commands that score the rows of a training run for queries, and judge scores by retraining."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from itertools import compress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from leaveout.cli.program import (
    BehaviourFile,
    Columns,
    Device,
    Form,
    Json,
    Prompt,
    QueryFile,
    QueryText,
    RunPath,
    Workers,
    app,
    open_run,
    print_facts,
    read_queries,
    to_line,
)
from leaveout.errors import MismatchError
from leaveout.tables import Table, shorten

Out = Annotated[Path, typer.Option("--out", help="File of the scores: .npy, .csv, .jsonl, .parquet or .arrow.")]
OneMethod = Annotated[str, typer.Option(help="Name of a method such as default, paper@start or ek-fac.")]
SetsOut = Annotated[
    Path | None, typer.Option(help="Also write each query's best units as a set, for predict and verify --sets.")
]
TopUnits = Annotated[int, typer.Option(min=1, help="How many units such a set has.")]
MethodNames = Annotated[
    list[str] | None, typer.Option(help="Name of a method such as default, paper@start or ek-fac; again for more.")
]
ScoreFiles = Annotated[
    list[Path] | None, typer.Option(help="Scores of your own, .npy, .csv, .jsonl, .parquet or .arrow; again for more.")
]
Subsets = Annotated[
    int, typer.Option(min=0, help="Random subsets to retrain for all methods, twice with --ceiling; 0: no LDS.")
]
Removed = Annotated[float, typer.Option(min=0.01, max=0.99, help="Share that a subset leaves out.")]
Qld = Annotated[int, typer.Option(min=0, help="Queries of the QLD; each is one retraining a method.")]
Changes = Annotated[
    int, typer.Option(min=0, help="Queries whose answer should change; each is five retrainings a method.")
]
TailPatch = Annotated[
    bool, typer.Option("--tail-patch", help="One more training step on each of the top units; no retraining.")
]
Relevant = Annotated[
    Path | None, typer.Option(help="JSONL of known relevant rows, one {query, id} a line: retrieval metrics.")
]
Top = Annotated[int | None, typer.Option(min=1, help="k of the tail-patch and of the retrieval metrics; default 10.")]
WithControls = Annotated[
    bool,
    typer.Option("--controls", help="Also judge what knows nothing of what a row taught, such as its length alone."),
]
Ceiling = Annotated[bool, typer.Option(help="Retrain the subsets with a second seed: the noise ceiling.")]

SHOWN = 5
"""Best rows of a query that are printed, and queries."""
LOOKED_AT = 50
"""Best rows of a query of which is said how many stand out."""
EFFECTS = ("metagradient", "adamw-influence", "posterior")
"""Methods whose scores are predicted effects, in the unit of the query."""

if TYPE_CHECKING:
    import numpy as np

    from leaveout.training.recipe import Recipe


@app.command()
def attribute(
    run: RunPath,
    out: Out,
    query: QueryText = None,
    prompt: Prompt = None,
    form: Form = None,
    queries: QueryFile = None,
    columns: Columns = None,
    behaviour: BehaviourFile = None,
    method: OneMethod = "default",
    sets: SetsOut = None,
    top: TopUnits = 10,
    workers: Workers = 1,
    device: Device = "cpu",
    json_: Json = False,
) -> None:
    """Score every row of a run for every query by one method. The scores go to a file, the best rows are shown.

    Example: leaveout attribute run --queries queries.jsonl --method default --out scores.jsonl --sets suspects.jsonl
    """
    opened = open_run(run, device)
    from leaveout.deletion.measurements import MeasureSettings
    from leaveout.methods.registry import attribute
    from leaveout.methods.scores import numbers_of, require_place, save_scores

    require_place(out)
    if sets is not None:
        _require_sets(sets, out, top, len(opened.recipe.unit_names))
    asked = read_queries(opened, query, prompt, queries, form, columns, behaviour)
    names = list(numbers_of("query", [q.name for q in asked]))
    found = attribute(opened, asked, method, settings=MeasureSettings(workers=workers, progress=True))
    rows = next(ids for ids in (opened.recipe.ids, opened.recipe.unit_names) if len(ids) == found.scores.shape[1])
    save_scores(out, found.scores, names, rows)
    facts = {"method": method, "queries": len(names), "rows": len(rows), "cpu_seconds": found.cpu_seconds}
    if sets is not None:
        _save_best(sets, opened.recipe, found.scores, names, top)
        facts["sets"] = str(sets)
    if not json_:
        nats = [query.called == "loss" and method in EFFECTS for query in asked]
        _print_best(opened.recipe, found.scores, names, rows, nats)
    print_facts({**facts, "out": str(out)}, json_)


def _print_best(
    recipe: Recipe, scores: np.ndarray, queries: list[str], ids: Sequence[str], nats: Sequence[bool]
) -> None:
    """Each query's best rows or units, with the beginning of the first text of each; of many queries the first.

    nats  of each query: whether scores are the predicted rise of its loss without the row; else they have no unit
    """
    import numpy as np

    from leaveout.corpus import Row
    from leaveout.words import verdict

    texts: dict[str, str] = {}
    for example, id, unit in zip(recipe.examples, recipe.ids, recipe.units, strict=True):
        for name in (id, unit):
            texts.setdefault(name, example.text if isinstance(example, Row) else "")
    for query, line, known in list(zip(queries, scores, nats, strict=True))[:SHOWN]:
        order = np.argsort(-line, kind="stable")
        best = [ids[int(n)] for n in order[:SHOWN]]
        top = float(line[order[0]])
        if known:
            said = f"Removing {best[0]} would raise this answer's loss by {top:.3g} nats, more than any other."
            if top <= 0:
                said = "Nothing by itself would raise this answer's loss if it were removed."
        else:
            said = verdict(line[order[:LOOKED_AT]].tolist(), max(0.0, -float(line.min())))
        values = [
            float(f"{line[n]:.3g}") if known else f"{100 * line[n] / (abs(top) or 1.0):.0f} %" for n in order[:SHOWN]
        ]
        rows = [
            (rank, value, id, shorten(texts[id], 70))
            for rank, (value, id) in enumerate(zip(values, best, strict=True), 1)
        ]
        header = "rise of the loss (nats)" if known else "of the best score"
        print(Table(["rank", header, "id", "text"], rows, f"{shorten(query, 100)}: {said}"))
    if len(queries) > SHOWN:
        print(f"{len(queries) - SHOWN} more queries stand in the file.")


def _require_sets(sets: Path, out: Path, top: int, units: int) -> None:
    """Refuses what could only fail after the scoring."""
    if sets.resolve() == out.resolve():
        raise typer.BadParameter("--sets and --out name the same file: give two")
    if sets.is_dir() or not sets.parent.is_dir():
        raise typer.BadParameter(f"{sets} cannot be written: give a file in a directory that exists")
    if top >= units:
        raise typer.BadParameter(f"--top {top} of {units} units would leave nothing to train on: give less")


def _save_best(sets: Path, recipe: Recipe, scores: np.ndarray, queries: list[str], top: int) -> None:
    """Writes each query's best units as a set."""
    from leaveout.deletion.sets import save_sets
    from leaveout.methods.scores import by_unit
    from leaveout.metrics import top_rows

    best = top_rows(by_unit(recipe, scores, len(queries)), top)
    save_sets(sets, {name: list(compress(recipe.unit_names, b)) for name, b in zip(queries, best, strict=True)})


@app.command()
def evaluate(
    run: RunPath,
    query: QueryText = None,
    prompt: Prompt = None,
    form: Form = None,
    queries: QueryFile = None,
    columns: Columns = None,
    behaviour: BehaviourFile = None,
    method: MethodNames = None,
    scores: ScoreFiles = None,
    subsets: Subsets = 64,
    removed: Removed = 0.5,
    qld: Qld = 10,
    brittleness: Changes = 0,
    tail_patch: TailPatch = False,
    relevant: Relevant = None,
    top: Top = None,
    ceiling: Ceiling = True,
    controls: WithControls = False,
    workers: Workers = 1,
    device: Device = "cpu",
    json_: Json = False,
) -> None:
    """Judge attribution methods by retraining. LDS, QLD, leave-one-out, brittleness, tail-patch, retrieval.

    Example: leaveout evaluate run --queries queries.jsonl --method default --method bm25 --subsets 64
    """
    opened = open_run(run, device)
    from leaveout.deletion.measurements import MeasureSettings
    from leaveout.evaluation import EvaluationSettings, evaluate
    from leaveout.evaluation.truth import load_relevant

    if not method and not scores:
        raise typer.BadParameter("say what is judged: --method or --scores")
    asked = read_queries(opened, query, prompt, queries, form, columns, behaviour)
    names = [q.name for q in asked]
    given = read_scores(scores or [], names, opened.recipe)
    known = None if relevant is None else load_relevant(relevant, names, opened.recipe.ids)
    settings = EvaluationSettings(
        subsets=subsets, removed=removed, second_order=ceiling, removal_queries=qld, brittleness=brittleness,
        tail_patch=tail_patch, top=top, measure=MeasureSettings(workers=workers, progress=True),
    )  # fmt: skip
    report = evaluate(opened, asked, method or [], given, settings, known, controls)
    print("\n".join(map(to_line, report.lines())) if json_ else report)


def read_scores(files: list[Path], queries: list[str], recipe: Recipe) -> dict[str, np.ndarray]:
    """Scores [query, example] of each file, or [query, unit] where it names units, under the name of the file.

    Raises: typer.BadParameter if two files have one name.
    """
    from leaveout.methods.scores import load_scores

    names = [file.stem for file in files]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise typer.BadParameter(f"two files of scores are called {twice[0]}: the name is that of the method")

    def read(file: Path) -> np.ndarray:
        try:
            return load_scores(file, queries, recipe.ids)
        except MismatchError:
            if recipe.unit_names != recipe.ids:
                with contextlib.suppress(MismatchError):
                    return load_scores(file, queries, recipe.unit_names)
            raise

    return {file.stem: read(file) for file in files}
