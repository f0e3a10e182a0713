"""Attribution methods by name: scores [query, example] or [query, unit] of one training run.

A name may end in `@start`, `@third` or `@final` (default): the parameters that a model-based method looks at, before
training, after a third of its steps, and after all of them.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from leaveout.corpus import Corpus, Row
from leaveout.corpus.chat import Template, chosen_template
from leaveout.corpus.tokens import tokens_of
from leaveout.deletion.run import TrainingRun
from leaveout.deletion.sets import DeletionSets
from leaveout.deletion.settings import MeasureSettings
from leaveout.errors import UnsupportedError, choices
from leaveout.methods import bm25, ekfac, random_scores, trackstar, trak
from leaveout.methods.ekfac import EkFac
from leaveout.methods.embedding import EmbeddingCosine
from leaveout.methods.gradient_dot import GradientDot
from leaveout.methods.rapidin import RapidIn
from leaveout.methods.snapshots import Snapshot, take_snapshots
from leaveout.methods.tracin import TracIn
from leaveout.methods.trackstar import TrackStar
from leaveout.methods.trak import Trak
from leaveout.methods.z0_inf import Z0Inf
from leaveout.models import load_tokenizer
from leaveout.readout.index import Index
from leaveout.readout.model import Readout, load_readout
from leaveout.readout.settings import PRESETS, SignatureSettings
from leaveout.training.queries import Query, as_queries
from leaveout.training.tasks import Parameters, Task, task_of

CHECKPOINTS = ("start", "third", "final")
SNAPSHOTS = 4  # of TracIn and Z0-Inf, evenly along the run


@dataclass(frozen=True)
class Scored:
    """Scores of one method, [query, example] or [query, unit], and the CPU seconds that they took."""

    scores: np.ndarray
    cpu_seconds: float | None = None


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
        return task_of(self.run.recipe)

    @property
    def rows(self) -> tuple[Any, ...]:
        return self.run.recipe.examples

    @property
    def query_rows(self) -> list[Any]:
        """The queries in the form of the examples. Raises: UnsupportedError for one that is not the loss of a row."""
        for query in self.queries:
            if callable(query.row) or query.measure != "loss":
                raise UnsupportedError(
                    f"The query {query.name!r} is not the loss of a row, and only `metagradient` and `posterior` score others."
                )
        return [query.row for query in self.queries]

    def parameters(self, at: str) -> Parameters:
        """Trained parameters at a checkpoint."""
        if at not in self._parameters:
            n_steps = len(self.run.recipe.batches())
            steps = {"start": 0, "third": n_steps // 3}
            self._parameters[at] = (
                self.run.parameters if at == "final" else take_snapshots(self.run.recipe, [steps[at]])[0].parameters
            )
        return self._parameters[at]

    def texts(self, rows: Sequence[Any]) -> list[str]:
        """What is learned of each row: its responses."""
        found = [as_row(row) for row in rows]
        return ["".join(row.text[start:end] for start, end in row.responses) for row in found]

    def readout(self, at: str) -> Readout:
        """The language model of the run at a checkpoint."""
        values, own = self.parameters(at), dict(self.task.model.named_parameters())
        with torch.no_grad():
            for name, value in values.items():
                own[name].copy_(value)
        return load_readout(self.task.model, tokenizer_of(self.run))

    def trunk_layers(self) -> tuple[str, ...]:
        """The pattern of all layers below the head, which is as wide as the vocabulary."""
        return (f"{getattr(self.task.model, 'base_model_prefix', '')}.*",)

    def signatures(self, preset: str | SignatureSettings, at: str) -> np.ndarray:
        """Scores of the readout engine [query, example], from an index in a temporary directory."""
        asked, readout = self.query_rows, self.readout(at)
        template = chosen_template(self.run.recipe.template, readout.tokenizer)
        rows = [
            replace(trained_part(row, readout.tokenizer, template, self.run.recipe.max_tokens), id=str(i), unit=str(i))
            for i, row in enumerate(map(as_row, self.rows))
        ]
        with tempfile.TemporaryDirectory() as place:
            index = Index.build(readout, rows, Path(place) / "index", preset, template=template)
            return index.score([as_row(row) for row in asked])

    def of_units(self, estimator: str) -> np.ndarray:
        """Predicted effects of leaving out each unit alone [query, unit], nats."""
        names = self.run.recipe.unit_names
        return self.run.bank.predict(self.queries, DeletionSets(np.eye(len(names)), names), estimator).effect

    def metagradient(self) -> np.ndarray:
        self.run.measure(gradient=True, queries=self.queries, settings=self.settings)
        return self.of_units("first_order")

    @cached_property
    def snapshots(self) -> list[Snapshot]:
        n_steps = len(self.run.recipe.batches())
        return take_snapshots(self.run.recipe, sorted({-(-n_steps * (i + 1) // SNAPSHOTS) for i in range(SNAPSHOTS)}))


METHODS: dict[str, Callable[[Scorer, str], np.ndarray]] = {
    "random": lambda s, at: random_scores.score([""] * len(s.queries), [""] * len(s.rows), s.seed),
    "bm25": lambda s, at: bm25.score(s.texts(s.query_rows), s.texts(s.rows)),
    "embedding": lambda s, at: EmbeddingCosine(s.task, s.parameters(at)).score(s.query_rows, s.rows),
    "gradient dot": lambda s, at: GradientDot(s.task, s.parameters(at)).score(s.query_rows, s.rows),
    "gradient cosine": lambda s, at: GradientDot(s.task, s.parameters(at), cosine=True).score(s.query_rows, s.rows),
    "tracin": lambda s, at: TracIn(s.task, s.snapshots).score(s.query_rows, s.rows),
    "z0-inf": lambda s, at: Z0Inf(s.task, s.snapshots).score(s.query_rows, s.rows),
    "rapidin": lambda s, at: RapidIn(s.task, s.parameters(at), seed=s.seed).score(s.query_rows, s.rows),
    "ek-fac": lambda s, at: EkFac(s.task, s.parameters(at), seed=s.seed).score(s.query_rows, s.rows),
    "ek-fac blocks": lambda s, at: EkFac(s.task, s.parameters(at), s.trunk_layers(), seed=s.seed).score(
        s.query_rows, s.rows
    ),
    "trak": lambda s, at: Trak(s.task, s.parameters(at), seed=s.seed).score(s.query_rows, s.rows),
    "trackstar": lambda s, at: TrackStar(s.task, s.parameters(at)).score(s.query_rows, s.rows),
    **{name: lambda s, at, name=name: s.signatures(name, at) for name in PRESETS},
    "metagradient": lambda s, at: s.metagradient(),
    "posterior": lambda s, at: s.of_units("posterior"),
}
"""Name -> scores. `metagradient` is measured into the run's bank; `posterior` uses what the bank has, and adds nothing."""


PACKAGES = {"bm25": bm25, "ek-fac": ekfac, "ek-fac blocks": ekfac, "trak": trak, "trackstar": trackstar}
"""What methods need beside leaveout."""
ANY_QUERY = ("random", "metagradient", "posterior")
"""Methods that do not ask for the loss of a row."""


def refuse_methods(run: TrainingRun, queries: Sequence[Query], names: Sequence[str]) -> None:
    """Refuses what can be known of methods before the first of them works.

    Raises: ValueError for an unknown name; UnsupportedError for a missing package, a recipe or a query that does not fit.
    """
    methods = [parse(name)[0] for name in names]
    for method in methods:
        if method in PACKAGES:
            PACKAGES[method].package()
        if method in PRESETS and run.recipe.kind != "causal-lm":
            raise UnsupportedError(NO_MODEL.format(run.recipe.kind))
        if method not in ANY_QUERY:
            rows = Scorer(run, queries).query_rows
            if method == "bm25":
                for row in (*rows, run.recipe.examples[0]):
                    as_row(row)


NO_MODEL = "A {} recipe has no language model to index: leave the readout presets out."


def score_methods(
    run: TrainingRun,
    queries: Sequence[Query],
    names: Sequence[str],
    seed: int = 0,
    settings: MeasureSettings | None = None,
) -> dict[str, Scored]:
    """Scores of methods by name, such as "default@start".

    Raises: ValueError for an unknown name, before anything is computed; UnsupportedError where a method does not fit the
            recipe or a package is missing.
    """
    refuse_methods(run, queries, names)
    parsed = {name: parse(name) for name in names}
    scorer = Scorer(run, queries, seed, settings or MeasureSettings())
    out = {}
    for name, (method, at) in parsed.items():
        scorer.parameters(at)  # training up to a checkpoint is no cost of the first method that looks there
        began = time.process_time()
        out[name] = Scored(METHODS[method](scorer, at), time.process_time() - began)
    return out


def attribute(
    run: TrainingRun | str | os.PathLike[str],
    queries: Any,
    method: str = "default",
    seed: int = 0,
    settings: MeasureSettings | None = None,
) -> Scored:
    """Scores of one method by name, such as "default@third": positive where training on the row helped the query.

    run      a training run, or the directory of one; its rows are scored
    queries  see `as_queries`
    Shapes:  scores [query, example] in the order of the recipe; of `metagradient` and `posterior` [query, unit]
    Raises:  as `score_methods`.
    """
    run = run if isinstance(run, TrainingRun) else TrainingRun.open(run)
    return score_methods(run, as_queries(queries), [method], seed, settings)[method]


def parse(name: str) -> tuple[str, str]:
    """Method and checkpoint of a name. Raises: ValueError for an unknown one."""
    if not isinstance(name, str):
        raise TypeError(f"the method is {name!r}: give the name of one, such as 'default'")
    method, _, at = name.partition("@")
    at = at or "final"
    if method not in METHODS:
        raise ValueError(f"there is no method {method!r}: {choices(method, METHODS)}")
    if at not in CHECKPOINTS:
        raise ValueError(f"there is no checkpoint {at!r} in {name!r}: {choices(at, CHECKPOINTS)}")
    return method, at


def as_row(row: Any) -> Row:
    """A row of text. Raises: UnsupportedError for examples without text."""
    if isinstance(row, (str, dict)):
        row = next(iter(Corpus.open([row])))
    if not isinstance(row, Row):
        raise UnsupportedError(
            "The examples of this recipe have no text: judge methods that need none, or scores of your own."
        )
    return row


def trained_part(row: Row, tokenizer: Any, template: Template, limit: int) -> Row:
    """A row as it was trained on, of which the tokens count that the recipe takes.

    Its text stays whole: a text that ends within a word or a sign has other tokens.
    """
    tokens = tokens_of(row, tokenizer, template, limit)
    return replace(tokens.row, kept=limit) if tokens.cut else tokens.row


def tokenizer_of(run: TrainingRun) -> Any:
    """The tokenizer of a language-model recipe. Raises: UnsupportedError for another kind."""
    if run.recipe.kind != "causal-lm":
        raise UnsupportedError(NO_MODEL.format(run.recipe.kind))
    source: Any = run.recipe.model() if callable(run.recipe.model) else run.recipe.model
    return source[1] if isinstance(source, tuple) else load_tokenizer(str(source))
