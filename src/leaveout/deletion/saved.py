"""What a training run keeps on disk beside its bank: examples, trained parameters, and the recipe that they are of."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from leaveout.corpus import Row
from leaveout.corpus.rows import row_json
from leaveout.errors import MismatchError
from leaveout.store import Record, Store
from leaveout.training.batching import Parameters
from leaveout.training.recipe import Recipe
from leaveout.training.tasks import task_of

PYTHON = ".".join(platform.python_version_tuple()[:2])
"""Whose bytecode the functions of a recipe are hashed by."""


def save_trained(path: Path, recipe: Recipe, source: Path | None, parameters: Parameters, notes: list[str]) -> None:
    """Writes the examples of a run with what they trained; the run is there once the last state is set."""
    with Store.create(path / "examples", {"what": "training examples"}) as store:
        for records in _chunks(recipe):
            store.put(records, {"unit": np.array([int(r.extra["unit"]) for r in records])})
        # The store's names are narrower than torch's: parameters are numbered, in the order of the task.
        store.put_side("parameters", {f"p{i}": p.numpy() for i, p in enumerate(parameters.values())})
        store.set_state("source", None if source is None else str(source.resolve()))
        store.set_state("recipe", {"digests": recipe.digests(), "python": PYTHON})
        store.set_state("notes", notes)
        store.set_state("trained", True)


def _chunks(recipe: Recipe, size: int = 10_000) -> Iterator[list[Record]]:
    places = recipe.unit_of.tolist()
    found = []
    for i, (example, id) in enumerate(zip(recipe.examples, recipe.ids, strict=True)):
        extra = {"unit": places[i]}
        if isinstance(example, Row):
            raw = row_json(example)
            found.append(
                Record(id, example.text, recipe.units[i], dict(example.meta), example.content_hash, extra, raw)
            )
        else:
            meta = {"label": int(example[1])} if recipe.kind == "classifier" else {}
            found.append(Record(id, "", recipe.units[i], meta, "", extra))
        if len(found) == size:
            yield found
            found = []
    if found:
        yield found


def saved_parameters(store: Store, recipe: Recipe, path: Path) -> Parameters:
    """The parameters that a run trained. Raises: MismatchError, naming the fields, for a run of another recipe."""
    stored = store.state("recipe")
    if not isinstance(stored, dict):
        raise MismatchError(f"{path} was trained by an older leaveout: train into a new directory.")
    if difference := recipe.difference(stored["digests"]):
        python = stored["python"]
        other = "" if python == PYTHON else f" (a function is hashed as bytecode, and this was Python {python})"
        raise MismatchError(
            f"{path} was trained by another recipe, or the recipe or its data changed since: {difference}{other}. Restore "
            "it, or train into a new directory."
        )
    side = store.side("parameters")
    if side is None or "p0" not in side:
        raise MismatchError(f"{path} was trained by an older leaveout: train into a new directory.")
    return {name: torch.from_numpy(np.array(side[f"p{i}"])) for i, name in enumerate(task_of(recipe).trained)}
