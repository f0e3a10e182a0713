"""Judge attribution scores by retraining: any array of scores, or methods by name.

Conventions: scores [query, example] or [query, unit], positive where removing the row raises the query's value (its loss,
in nats, unless the query asks for something else). Scores of examples are summed over their unit.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from leaveout.deletion.run import TrainingRun
from leaveout.deletion.settings import MeasureSettings
from leaveout.errors import FormatError, MismatchError
from leaveout.evaluation.methods import Scored, score_methods
from leaveout.evaluation.report import Judged, Report
from leaveout.evaluation.truth import Truth, second_order, single_effects, subset_truth, values_without
from leaveout.metrics import lds, leave_one_out_correlation, qld, top_rows
from leaveout.training.queries import Query, as_queries
from leaveout.training.recipe import Recipe


@dataclass(frozen=True)
class EvaluationSettings:
    """What truth is bought. Costs are retrainings; those that the bank has already cost nothing.

    subsets, removed   random sets of which a share is removed (the datamodels' 1 - alpha): `subsets` retrainings
    second_order       the same again with the next seed: twice the retrainings, half the noise, and a ceiling
    removal_queries    queries of the QLD, spread evenly over all: so many retrainings a method; 0: no QLD
    removal_share      share of all units that the QLD removes for a query; draws: random removals it compares with
    seed, level        of random sets and of intervals
    """

    subsets: int = 100
    removed: float = 0.5
    second_order: bool = True
    removal_queries: int = 10
    removal_share: float = 0.05
    draws: int = 8
    seed: int = 0
    level: float = 0.95
    measure: MeasureSettings = field(default_factory=MeasureSettings)


def evaluate(
    run: TrainingRun | str | os.PathLike[str],
    queries: Any,
    methods: Sequence[str] = (),
    scores: Mapping[str, ArrayLike] | None = None,
    settings: EvaluationSettings | None = None,
) -> Report:
    """Judges methods by name (see `methods.METHODS`) and given scores against retrained models.

    run      a training run, or the directory of one
    queries  see `as_queries`
    scores   name -> [query, example] or [query, unit], for instance from `load_scores`
    Cost:    settings.subsets retrainings (twice with a second order), settings.draws, and removal_queries for each method;
             what was retrained or trained before a kill is not done again.
    Raises:  ValueError if there is nothing to judge or a name stands twice; MismatchError for scores of another shape.
    """
    run = run if isinstance(run, TrainingRun) else TrainingRun.load(run)
    settings, asked = settings or EvaluationSettings(), as_queries(queries)
    given = {name: Scored(by_unit(run.recipe, values, len(asked))) for name, values in (scores or {}).items()}
    names = [*given, *methods]
    if not names:
        raise ValueError("there is nothing to judge: give methods or scores")
    if len(set(names)) != len(names):
        raise ValueError(f"a name stands twice among {', '.join(names)}: every method is judged once")
    made = score_methods(run, asked, methods, settings.seed, settings.measure)
    made = {name: Scored(by_unit(run.recipe, s.scores, len(asked)), s.cpu_seconds) for name, s in made.items()}
    second = second_order(run, settings.measure.progress) if settings.second_order else None
    truth = subset_truth(
        run, asked, settings.subsets, settings.removed, second=second, seed=settings.seed, settings=settings.measure
    )
    return judge(run, asked, {**given, **made}, truth, settings)


def judge(
    run: TrainingRun,
    queries: Sequence[Query],
    scored: Mapping[str, Scored],
    truth: Truth,
    settings: EvaluationSettings,
) -> Report:
    """The report on scores [query, unit] of several methods, with a truth that is there already."""
    effects = single_effects(run, queries)
    chosen = removal_queries(len(queries), settings.removal_queries)
    count = max(1, round(settings.removal_share * truth.removed.shape[1]))
    differences = _differences(run, queries, scored, chosen, count, settings) if len(chosen) else {}
    judged = [
        Judged(
            name,
            lds(found.scores, truth.removed, truth.values),
            differences.get(name),
            None if effects is None else leave_one_out_correlation(found.scores, effects),
            found.cpu_seconds,
        )
        for name, found in scored.items()
    ]
    names = tuple(q.name for q in queries)
    return Report(
        tuple(judged), names, len(truth.removed), tuple(names[i] for i in chosen), count, truth.ceiling, settings.seed,
        settings.level,
    )  # fmt: skip


def removal_queries(n: int, wanted: int) -> np.ndarray:
    """Numbers of the queries that removals are made for, spread evenly."""
    return np.unique(np.linspace(0, n - 1, min(wanted, n)).round().astype(int)) if wanted else np.zeros(0, int)


def _differences(
    run: TrainingRun,
    queries: Sequence[Query],
    scored: Mapping[str, Scored],
    chosen: np.ndarray,
    count: int,
    settings: EvaluationSettings,
) -> dict[str, np.ndarray]:
    """QLD [chosen query] of each method: its top units removed, against random ones; all sets are retrained together."""
    units = len(run.recipe.unit_names)
    random = np.random.default_rng(settings.seed).random((settings.draws, units))
    sets = [top_rows(random, count), *(top_rows(s.scores[chosen], count) for s in scored.values())]
    values = values_without(run, queries, np.concatenate(sets), settings.measure)[chosen]
    chance = values[:, : settings.draws]
    places = np.arange(len(chosen))
    return {
        name: qld(values[places, settings.draws + number * len(chosen) + places], chance)
        for number, name in enumerate(scored)
    }


def by_unit(recipe: Recipe, scores: ArrayLike, n_queries: int) -> np.ndarray:
    """Scores [query, unit] from those of units, or of examples, which are summed over each unit.

    Raises: MismatchError for another shape; FormatError for a score that is not finite.
    """
    values = np.asarray(scores, np.float64)
    examples, units = len(recipe.examples), len(recipe.unit_names)
    if values.ndim != 2 or len(values) != n_queries or values.shape[1] not in (examples, units):
        raise MismatchError(
            f"The scores have the shape {values.shape}: give [query, example], here [{n_queries}, {examples}]"
            + (f", or [query, unit], here [{n_queries}, {units}]." if units != examples else ".")
        )
    if not np.isfinite(values).all():
        raise FormatError("A score is not finite: give a number for every query and row.")
    if values.shape[1] == units:
        return values
    out = np.zeros((n_queries, units))
    np.add.at(out.T, recipe.unit_of.numpy(), values.T)
    return out
