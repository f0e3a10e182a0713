"""What really happens when the top units of a method are removed: QLD and brittleness, both by retraining."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from leaveout.deletion.run import TrainingRun
from leaveout.evaluation.report import Brittleness
from leaveout.evaluation.settings import EvaluationSettings
from leaveout.evaluation.truth import answer_lead, of_answers, values_without
from leaveout.methods.registry import Scored
from leaveout.metrics import brittleness, qld, top_rows
from leaveout.training.queries import Query


def removal_queries(n: int, wanted: int) -> np.ndarray:
    """Numbers of the queries that removals are made for, spread evenly."""
    return np.unique(np.linspace(0, n - 1, min(wanted, n)).round().astype(int)) if wanted else np.zeros(0, int)


def removed_units(share: float, units: int) -> int:
    """How many units a share of all is, at least 1."""
    return max(1, round(share * units))


def loss_differences(
    run: TrainingRun,
    queries: Sequence[Query],
    scored: Mapping[str, Scored],
    chosen: np.ndarray,
    settings: EvaluationSettings,
) -> dict[str, np.ndarray]:
    """QLD [chosen query] of each method: its top units removed, against random ones; all sets are retrained together."""
    units = len(run.recipe.unit_names)
    count = removed_units(settings.removal_share, units)
    random = np.random.default_rng(settings.seed).random((settings.draws, units))
    sets = [top_rows(random, count), *(top_rows(s.scores[chosen], count) for s in scored.values())]
    values = values_without(run, queries, np.concatenate(sets), settings.measure)[chosen]
    own = _own_sets(values[:, settings.draws :], len(scored))
    return {name: qld(own[:, i], values[:, : settings.draws]) for i, name in enumerate(scored)}


def answer_changes(
    run: TrainingRun, queries: Sequence[Query], scored: Mapping[str, Scored], settings: EvaluationSettings
) -> Brittleness:
    """How many of the top units must go until greedy decoding no longer gives a query's answer.

    Only queries whose answer the model trained on everything gives can lose it; the others are counted.

    Cost: a retraining for each size, query and method.
    """
    asked = of_answers(run.recipe, queries, answer_lead)
    answered = np.flatnonzero(run.bank.base(asked) > 0)
    chosen = answered[removal_queries(len(answered), settings.brittleness)]
    units = len(run.recipe.unit_names)
    sizes = tuple(sorted({removed_units(share, units) for share in settings.brittleness_shares}))
    names = tuple(asked[i].name for i in chosen)
    if not len(chosen):
        return Brittleness(sizes, names, 0, {})
    sets = [top_rows(s.scores[chosen], size) for s in scored.values() for size in sizes]
    leads = values_without(run, asked, np.concatenate(sets), settings.measure)[chosen]
    changed = _own_sets(leads, len(scored) * len(sizes)).reshape(len(chosen), len(scored), len(sizes)) <= 0
    found = {name: brittleness(changed[:, i], sizes) for i, name in enumerate(scored)}
    return Brittleness(sizes, names, len(answered), found)


def _own_sets(values: np.ndarray, groups: int) -> np.ndarray:
    """Each query's value for its own set in every group [query, group], from values [query, group x query]."""
    return np.einsum("qgq->qg", values.reshape(len(values), groups, len(values)))
