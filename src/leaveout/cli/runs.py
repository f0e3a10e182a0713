"""What commands about a training run share: the options that name it, its queries and its deletion sets."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from leaveout.cli.program import one_thread, query_rows
from leaveout.errors import FormatError

if TYPE_CHECKING:
    from leaveout.deletion.run import TrainingRun
    from leaveout.deletion.sets import DeletionSets

RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="Directory of a training run.")]
QueryFile = Annotated[
    Path | None, typer.Option("--queries", help="Queries: rows in any form, with a field `measure`; or .npz with x, y.")
]
Without = Annotated[
    list[str] | None, typer.Option("--without", help="Ids of units or examples, with commas; again for another set.")
]
WithoutWhere = Annotated[str | None, typer.Option(help="A set by SQL over id, unit, text and the examples' fields.")]
SetsFile = Annotated[
    Path | None,
    typer.Option(
        "--sets", help="One set a line: ids with commas, a JSON list, id -> share removed, or {name, without}."
    ),
]
Memory = Annotated[str | None, typer.Option(help="For all workers, such as 4GB (default: half of what is free).")]


def is_run(path: Path) -> bool:
    """Whether a directory holds a training run (and not an index)."""
    return (path / "examples").is_dir()


def open_run(path: Path) -> TrainingRun:
    """The run in a directory, with one torch thread."""
    one_thread()
    from leaveout.deletion.run import TrainingRun

    return TrainingRun.open(path)


def read_queries(
    run: TrainingRun, query: list[str] | None, prompt: str | None, file: Path | None, form: str | None
) -> list[Any]:
    """Queries of --query (with --prompt) or --queries; exactly one of the two must be given."""
    from leaveout.training.queries import Query, as_queries

    if file is not None and query is None and prompt is None and form is None:
        if file.suffix != ".npz":
            return as_queries(file)
        from leaveout.training.examples import read_arrays

        return [Query(row, source=f"{file}, example {i}") for i, row in enumerate(read_arrays(file)[0])]
    rows = query_rows(query, prompt, file, form, run.recipe)
    return [Query(row, name=f"{prompt or ''}{text}") for row, text in zip(rows, query or [], strict=True)]


def read_sets(run: TrainingRun, without: list[str] | None, where: str | None, file: Path | None) -> DeletionSets:
    """All sets of --without, --without-where and --sets, in this order."""
    import numpy as np

    from leaveout.deletion.sets import DeletionSets, deletion_sets

    found = []
    if without is not None:
        entries = [[id.strip() for id in entry.split(",") if id.strip()] for entry in without]
        found.append(deletion_sets(run.recipe, entries))
    if where is not None:
        ids = run.ids_where(where)
        if not ids:
            raise FormatError(f"No example satisfies {where!r}: nothing would be left out.")
        found.append(DeletionSets(deletion_sets(run.recipe, ids).x, (where,)))
    if file is not None:
        found.append(deletion_sets(run.recipe, file))
    if not found:
        raise typer.BadParameter("say what is left out: --without, --without-where or --sets")
    return DeletionSets(np.concatenate([s.x for s in found]), tuple(label for s in found for label in s.labels))
