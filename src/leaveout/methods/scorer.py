"""What a method is, and what it gets: a training run, the queries, and what is made of them once for all methods."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch

from leaveout.corpus import Corpus, Row
from leaveout.deletion.measurements import MeasureSettings
from leaveout.deletion.run import TrainingRun
from leaveout.errors import UnsupportedError
from leaveout.training.loop import Loop, RunOptions, Steps
from leaveout.training.queries import Query
from leaveout.training.recipe import Recipe
from leaveout.training.tasks import Parameters, Task, task_of

Score = Callable[["Scorer", str], np.ndarray]
CHECKPOINTS = ("start", "third", "final")
NAMED_KINDS = ("microgpt", "causal-lm", "classifier")  # all but custom recipes, whose outputs have no name
SNAPSHOTS = 4  # of TracIn and Z0-Inf, evenly along the run


@dataclass(frozen=True)
class Method:
    """An attribution method: a function of a run and its queries, and what it asks of them.

    score      (scorer, checkpoint) -> scores [query, example] or [query, unit], positive where the row helps the query
    package    imports what the method needs beside leaveout. Raises: UnsupportedError without it
    kinds      of recipes that it takes; none: all
    text       whether it reads the rows, which must have text
    any_query  whether it takes queries that are not the loss of a row
    plain      whether it takes only rows that count by the mean loss of their tokens: no preference and no weighted rows
    """

    score: Score
    package: Callable[[], object] | None = None
    kinds: tuple[str, ...] = ()
    text: bool = False
    any_query: bool = False
    plain: bool = False

    def __call__(self, scorer: Scorer, at: str) -> np.ndarray:
        """Scores with the parameters of a checkpoint: start, third or final."""
        return self.score(scorer, at)

    def refuse(self, name: str, scorer: Scorer) -> None:
        """Refuses what can be known before the method works.

        Raises: UnsupportedError for a missing package, a recipe or a query that does not fit.
        """
        kind = scorer.run.recipe.kind
        if self.package is not None:
            self.package()
        if self.kinds and kind not in self.kinds:
            raise UnsupportedError(f"{name} takes no {kind} recipe, only {' or '.join(self.kinds)}: leave it out.")
        if self.plain and any(isinstance(row, Row) and (row.pair or row.weight != 1) for row in scorer.rows):
            raise UnsupportedError(
                f"{name} takes rows that count by the mean loss of their tokens, and this recipe has preference or weighted "
                "rows: leave it out."
            )
        if not self.any_query:
            rows = scorer.query_rows
            if self.text:
                scorer.texts([*rows, scorer.rows[0]])


def method(
    *,
    package: Callable[[], object] | None = None,
    kinds: Sequence[str] = (),
    text: bool = False,
    any_query: bool = False,
    plain: bool = False,
) -> Callable[[Score], Method]:
    """Makes a `Method` of a function `(scorer, at) -> scores`; see there for what it may say of itself."""
    return lambda score: Method(score, package, tuple(kinds), text, any_query, plain)


@dataclass
class Scorer:
    """What methods need of a training run. Memory: a copy of the trained parameters for each checkpoint and snapshot in use."""

    run: TrainingRun
    queries: Sequence[Query]
    seed: int = 0
    settings: MeasureSettings = field(default_factory=MeasureSettings)
    _parameters: dict[str, Parameters] = field(default_factory=dict, repr=False)

    @cached_property
    def task(self) -> Task:
        """The recipe's model with its loss; it may hold any parameters."""
        return task_of(self.run.recipe)

    @property
    def rows(self) -> tuple[Any, ...]:
        """The recipe's examples."""
        return self.run.recipe.examples

    @property
    def query_rows(self) -> list[Any]:
        """The queries in the form of the examples. Raises: UnsupportedError for one that is not the loss of a row."""
        for query in self.queries:
            if callable(query.row) or query.measure != "loss":
                raise UnsupportedError(
                    f"The query {query.name!r} is not the loss of a row, and only `metagradient`, `adamw-influence` and "
                    "`posterior` score others."
                )
        return [query.row for query in self.queries]

    def texts(self, rows: Sequence[Any]) -> list[str]:
        """What is learned of each row: its responses. Raises: UnsupportedError for examples without text."""
        found = [as_row(row) for row in rows]
        return ["".join(row.text[start:end] for start, end in row.responses) for row in found]

    def parameters(self, at: str) -> Parameters:
        """Trained parameters at a checkpoint."""
        if at not in self._parameters:
            n_steps = len(self.run.recipe.batches())
            steps = {"start": 0, "third": n_steps // 3}
            self._parameters[at] = self.run.parameters if at == "final" else self._snapshots([steps[at]])[0].parameters
        return self._parameters[at]

    def model(self, at: str) -> torch.nn.Module:
        """The task's model with the parameters of a checkpoint."""
        values, own = self.parameters(at), dict(self.task.model.named_parameters())
        with torch.no_grad():
            for name, value in values.items():
                own[name].copy_(value)
        return self.task.model

    @cached_property
    def snapshots(self) -> list[Snapshot]:
        """SNAPSHOTS of the run, evenly along its steps; the last one is its end."""
        n_steps = len(self.run.recipe.batches())
        return self._snapshots(sorted({-(-n_steps * (i + 1) // SNAPSHOTS) for i in range(SNAPSHOTS)}))

    def _snapshots(self, steps: Sequence[int]) -> list[Snapshot]:
        return take_snapshots(self.run.recipe, steps, RunOptions(device=self.run.device))


def as_row(row: Any) -> Row:
    """A row of text. Raises: UnsupportedError for examples without text."""
    if isinstance(row, (str, dict)):
        row = next(iter(Corpus.open([row])))
    if not isinstance(row, Row):
        raise UnsupportedError(
            "The examples of this recipe have no text: judge methods that need none, or scores of your own."
        )
    return row


@dataclass(frozen=True)
class Snapshot:
    """Trained parameters after `step` steps; rate: mean learning rate of the steps since the snapshot before."""

    step: int
    rate: float
    parameters: Parameters


def take_snapshots(recipe: Recipe, steps: Sequence[int], options: RunOptions | None = None) -> list[Snapshot]:
    """Train a recipe on everything and keep the parameters after these numbers of steps, on the CPU; 0 is the start.

    A snapshot at step 0 has the rate of the first step.

    Guarantee: a snapshot after the last step equals `train_plain`, bit for bit.
    Memory: one copy of the trained parameters for each snapshot. Cost: one training.
    Raises: ValueError unless the steps ascend within 0 ... the steps of the recipe.
    """
    n_steps = len(recipe.batches())
    if not steps or steps[0] < 0 or steps[-1] > n_steps or any(a >= b for a, b in itertools.pairwise(steps)):
        raise ValueError(f"snapshots need ascending steps within 0 ... {n_steps}, not {list(steps)}.")
    options = options or RunOptions()
    at_steps = Steps(recipe, task_of(recipe, options.device))
    params = at_steps.task.parameters()
    kept: list[Parameters] = []

    def keep(step: int) -> None:
        if step in steps:
            kept.append({name: p.detach().clone().cpu() for name, p in params.items()})

    keep(0)
    fused = at_steps.task.device.type != "cpu"
    loop = Loop(at_steps, params, lambda part: at_steps.loss(part).backward(), fused, after=keep)
    loop.run(None, "snapshots", options)
    rates = [recipe.rate(i, n_steps) for i in range(n_steps)]
    befores = [0, *steps[:-1]]
    return [
        Snapshot(at, sum(rates[before : max(at, 1)]) / (max(at, 1) - before), parameters)
        for before, at, parameters in zip(befores, steps, kept, strict=True)
    ]
