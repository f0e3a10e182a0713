"""Attribution methods by name: scores [query, example] or [query, unit] of one training run.

A name may end in `@start`, `@third` or `@final` (default): the parameters that a model-based method looks at, before
training, after a third of its steps, and after all of them. Other packages add methods by the hook `method` of
`leaveout.plugins`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import EntryPoint
from typing import Any, cast

import numpy as np

import leaveout.plugins as plugins
from leaveout.corpus.behaviour import summed
from leaveout.deletion.measurements import MeasureSettings
from leaveout.deletion.run import TrainingRun
from leaveout.errors import MismatchError, UnsupportedError, choices
from leaveout.methods.scorer import CHECKPOINTS, Method, Score, Scorer
from leaveout.methods.scores import checked_scores
from leaveout.training.queries import Query, as_queries, in_sides

METHODS: dict[str, str] = {
    "random": "random_scores:random",
    "bm25": "bm25:bm25",
    "embedding": "embedding:embedding",
    "norm": "controls:norm",
    "length": "controls:length",
    "untrained": "controls:untrained",
    "gradient dot": "gradient_dot:gradient_dot",
    "gradient cosine": "gradient_dot:gradient_cosine",
    "tracin": "tracin:tracin",
    "z0-inf": "z0_inf:z0_inf",
    "rapidin": "rapidin:rapidin",
    "ek-fac": "ekfac:ek_fac",
    "ek-fac blocks": "ekfac:ek_fac_blocks",
    "trak": "trak:trak",
    "trackstar": "trackstar:trackstar",
    "default": "signatures:default",
    "default cosine": "signatures:default_cosine",
    "residual": "signatures:residual",
    "residual cosine": "signatures:residual_cosine",
    "similarity": "signatures:similarity",
    "paper": "signatures:paper",
    "paper-responses": "signatures:paper_responses",
    "influence": "influence:influence",
    "adamw-influence": "effects:adamw_influence",
    "metagradient": "effects:metagradient",
    "posterior": "effects:posterior",
}
"""Name -> module of this folder and object in it, imported when the method is used."""


CONTROLS = ("norm", "length", "bm25", "embedding", "untrained")
"""Methods that know nothing of what a row taught."""


@dataclass(frozen=True)
class Scored:
    """Scores of one method, [query, example] or [query, unit], and the CPU seconds that they took."""

    scores: np.ndarray
    cpu_seconds: float | None = None


def known() -> dict[str, EntryPoint]:
    """All methods by name, not imported yet: those of this folder, then those of other packages.

    Raises: MismatchError if a package adds a name that is taken, or that would be read as one with a checkpoint.
    """
    own = {name: EntryPoint(name, f"leaveout.methods.{place}", plugins.GROUP) for name, place in METHODS.items()}
    added = plugins.found("method")
    if taken := sorted(own.keys() & added.keys()):
        entry = added[taken[0]]
        raise MismatchError(
            f"The method {taken[0]!r} is leaveout's own, and {entry.value} adds one of the same name: rename or uninstall that."
        )
    if unread := [name for name in added if "@" in name]:
        entry = added[unread[0]]
        raise MismatchError(
            f"The method {unread[0]!r} ({entry.value}) has an @, behind which a checkpoint stands: rename or uninstall it."
        )
    return own | added


def load(name: str) -> Method:
    """The method of a name without a checkpoint.

    Raises: ValueError for an unknown name; UnsupportedError if it does not import or is no function.
    """
    methods = known()
    if name not in methods:
        raise ValueError(f"there is no method {name!r}: {choices(name, methods)}")
    found = plugins.load(methods[name])
    if isinstance(found, Method):
        return found
    if callable(found):
        return Method(cast(Score, found))
    raise UnsupportedError(
        f"The method {name!r} ({methods[name].value}) is {found!r}: make it a function (scorer, at) -> scores."
    )


def controls_for(run: TrainingRun, but: Sequence[str] = ()) -> list[str]:
    """Names of the controls that take the run's recipe, but for those that are there already."""
    kind, methods = run.recipe.kind, {name: load(name) for name in CONTROLS if name not in but}
    return [
        name
        for name, method in methods.items()
        if (not method.kinds or kind in method.kinds) and not (method.text and kind == "classifier")
    ]


def parse(name: str) -> tuple[str, str]:
    """Method and checkpoint of a name. Raises: ValueError for an unknown one."""
    if not isinstance(name, str):
        raise TypeError(f"the method is {name!r}: give the name of one, such as 'default'")
    method, _, at = name.partition("@")
    at, methods = at or "final", known()
    if method not in methods:
        raise ValueError(f"there is no method {method!r}: {choices(method, methods)}")
    if at not in CHECKPOINTS:
        raise ValueError(f"there is no checkpoint {at!r} in {name!r}: {choices(at, CHECKPOINTS)}")
    return method, at


def refuse_methods(run: TrainingRun, queries: Sequence[Query], names: Sequence[str]) -> None:
    """Refuses what can be known of methods before the first of them works.

    Raises: ValueError for an unknown name; UnsupportedError for a missing package, a recipe or a query that does not fit.
    """
    for name in [parse(name)[0] for name in names]:
        method = load(name)
        method.refuse(name, Scorer(run, queries if method.any_query else in_sides(queries)))


def score_methods(
    run: TrainingRun,
    queries: Sequence[Query],
    names: Sequence[str],
    seed: int = 0,
    settings: MeasureSettings | None = None,
) -> dict[str, Scored]:
    """Scores of methods by name, such as "default@start".

    Raises: ValueError for an unknown name, before anything is computed; UnsupportedError where a method does not fit the
            recipe or a package is missing; MismatchError or FormatError where it gives no scores of all rows.
    """
    refuse_methods(run, queries, names)
    scorer = Scorer(run, in_sides(queries), seed, settings or MeasureSettings())
    whole = scorer if len(scorer.queries) == len(queries) else replace(scorer, queries=queries)
    out = {}
    for name in names:
        method, at = load(parse(name)[0]), parse(name)[1]
        scorer.parameters(at)  # training up to a checkpoint is no cost of the first method that looks there
        began = time.process_time()
        scores = method(whole if method.any_query else scorer, at)
        spent = time.process_time() - began
        if whole is not scorer and not method.any_query:
            parts = checked_scores(run.recipe, scores, len(scorer.queries), f"scores of {name}")
            scores = np.stack(summed([query.row for query in queries], parts))
        out[name] = Scored(checked_scores(run.recipe, scores, len(queries), f"scores of {name}"), spent)
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
