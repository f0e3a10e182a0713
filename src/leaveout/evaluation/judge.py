"""Judge attribution scores by retraining: any array of scores, or methods by name.

Conventions: scores [query, example] or [query, unit], positive where removing the row raises the query's value (its loss,
in nats, unless the query asks for something else). Scores of examples are summed over their unit.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from leaveout.deletion.run import TrainingRun
from leaveout.errors import require_list
from leaveout.evaluation.report import Brittleness, Judged, Report
from leaveout.evaluation.tail_patch import tail_patches
from leaveout.evaluation.truth import (
    EvaluationSettings,
    Truth,
    answer_lead,
    answer_loss,
    of_answers,
    refuse_second_order,
    refuse_subsets,
    second_order,
    single_effects,
    subset_truth,
    values_without,
)
from leaveout.methods.registry import CONTROLS, Scored, controls_for, refuse_methods, score_methods
from leaveout.methods.scores import by_unit
from leaveout.metrics import (
    auprc_top_bottom,
    average_precision,
    brittleness,
    lds,
    leave_one_out_correlation,
    precision_at,
    qld,
    recall_at,
    top_rows,
)
from leaveout.training.queries import Query, as_queries


def evaluate(
    run: TrainingRun | str | os.PathLike[str],
    queries: Any,
    methods: Sequence[str] = (),
    scores: Mapping[str, ArrayLike] | None = None,
    settings: EvaluationSettings | None = None,
    relevant: ArrayLike | None = None,
    controls: bool = False,
) -> Report:
    """Judges methods by name (see `methods.METHODS`) and given scores against retrained models.

    run      a training run, or the directory of one
    queries  see `as_queries`
    scores   name -> [query, example] or [query, unit], for instance from `load_scores`
    relevant [query, example] or [query, unit], true for rows that are known to be relevant, for instance from
             `load_relevant`: retrieval metrics, for which nothing is trained; a unit is relevant if one of its rows is
    controls also judge what knows nothing of what a row taught, `norm`, `length`, `bm25`, `embedding` and `untrained`, as far
             as the recipe has them, and what each method says of the next query; the notes say which methods are no better
    Cost:    settings.subsets retrainings (twice with a second order), settings.draws, and for each method removal_queries
             and brittleness times its sizes; what was retrained before a kill is not done again. See `patched_losses`
             for the tail-patch.
    Raises:  ValueError if there is nothing to judge or to judge with, or a name stands twice; MismatchError for scores of
             another shape; UnsupportedError for a tail-patch or brittleness of queries without an answer.
    """
    run = run if isinstance(run, TrainingRun) else TrainingRun.open(run)
    settings, asked = settings or EvaluationSettings(), as_queries(queries)
    given = {name: Scored(by_unit(run.recipe, values, len(asked))) for name, values in (scores or {}).items()}
    require_list("methods", methods, "names of methods")
    names = [*given, *methods]
    if not names:
        raise ValueError("there is nothing to judge: give methods or scores")
    if len(set(names)) != len(names):
        raise ValueError(f"a name stands twice among {', '.join(names)}: every method is judged once")
    known = None if relevant is None else by_unit(run.recipe, relevant, len(asked), "relevant rows") > 0
    beside = controls_for(run, names) if controls else []
    refuse_methods(run, asked, [*methods, *beside])
    _refuse(run, asked, settings, known)
    made = score_methods(run, asked, [*methods, *beside], settings.seed, settings.measure)
    made = {name: Scored(by_unit(run.recipe, s.scores, len(asked)), s.cpu_seconds) for name, s in made.items()}
    scored, own = {**given, **made}, [name for name in names if name not in (*CONTROLS, "random")]
    next_one = {f"{name} of the next query": Scored(np.roll(scored[name].scores, -1, 0)) for name in own}
    if controls and len(asked) > 1:
        scored |= next_one
    report = judge(run, asked, scored, _truth(run, asked, settings), settings, known)
    return replace(report, controls=tuple(name for name in scored if name not in own)) if controls else report


def _refuse(run: TrainingRun, asked: Sequence[Query], settings: EvaluationSettings, known: np.ndarray | None) -> None:
    """Refuses what could only fail after all the retraining."""
    if settings.subsets:
        refuse_subsets(settings.subsets, settings.removed)
        if settings.second_order:
            refuse_second_order(run)
    if settings.tail_patch or known is not None:
        settings.top_of(len(run.recipe.unit_names))
    if settings.tail_patch or settings.brittleness:
        of_answers(run.recipe, asked, answer_loss)
    if known is not None and not known.any():
        raise ValueError("no query has a relevant row: give some, or leave `relevant` out")
    wanted = settings.subsets or settings.removal_queries or settings.brittleness or settings.tail_patch
    if not wanted and known is None and single_effects(run, asked) is None:
        raise ValueError(
            "there is nothing to judge with: ask for subsets, QLD, brittleness, tail-patch or relevant rows"
        )


def _truth(run: TrainingRun, asked: Sequence[Query], settings: EvaluationSettings) -> Truth | None:
    if not settings.subsets:
        return None
    second = second_order(run, settings.measure.progress) if settings.second_order else None
    return subset_truth(
        run, asked, settings.subsets, settings.removed, second=second, seed=settings.seed, settings=settings.measure
    )


def judge(
    run: TrainingRun,
    queries: Sequence[Query],
    scored: Mapping[str, Scored],
    truth: Truth | None,
    settings: EvaluationSettings,
    relevant: np.ndarray | None = None,
) -> Report:
    """The report on scores [query, unit] of several methods, with a truth that is there already (None: no LDS).

    relevant: true where a unit is known to be relevant [query, unit]
    """
    effects = single_effects(run, queries)
    chosen = removal_queries(len(queries), settings.removal_queries)
    differences = loss_differences(run, queries, scored, chosen, settings) if len(chosen) else {}
    changes = answer_changes(run, queries, scored, settings) if settings.brittleness else None
    top = settings.top_of(len(run.recipe.unit_names)) if settings.tail_patch or relevant is not None else 0
    patches = tail_patches(run, queries, scored, top, settings.measure.progress) if settings.tail_patch else {}
    judged = tuple(
        Judged(
            name,
            cpu_seconds=found.cpu_seconds,
            **({} if truth is None else _against_subsets(found.scores, truth)),
            qld=differences.get(name),
            leave_one_out=None if effects is None else leave_one_out_correlation(found.scores, effects),
            **patches.get(name, {}),
            changed=None if changes is None else changes.changed(name),
            **({} if relevant is None else _retrieval(found.scores, relevant, top)),
        )
        for name, found in scored.items()
    )
    names = tuple(q.name for q in queries)
    return Report(
        judged,
        names,
        subsets=0 if truth is None else len(np.unique(truth.removed, axis=0)),
        removal_queries=tuple(names[i] for i in chosen),
        removed_units=removed_units(settings.removal_share, len(run.recipe.unit_names)),
        ceiling=None if truth is None else truth.ceiling,
        seed=settings.seed,
        level=settings.level,
        top=top,
        brittleness=changes,
    )


def _against_subsets(scores: np.ndarray, truth: Truth) -> dict[str, Any]:
    """LDS of scores [query, unit] against the truth, and against each of its orders."""
    by_seed = tuple(lds(scores, truth.removed, values) for values in truth.orders)
    return {"lds": lds(scores, truth.removed, truth.values), "lds_by_seed": by_seed}


RETRIEVAL: dict[str, Callable[[np.ndarray, np.ndarray, int], np.ndarray]] = {
    "average_precision": lambda scores, relevant, k: average_precision(scores, relevant),
    "precision": precision_at,
    "recall": recall_at,
    "auprc": auprc_top_bottom,
}


def _retrieval(scores: np.ndarray, relevant: np.ndarray, k: int) -> dict[str, Any]:
    """Each metric [query] of scores [query, unit]; nan for a query without a relevant unit."""
    known = relevant.any(1)
    out = {name: np.full(len(scores), np.nan) for name in RETRIEVAL}
    for name, metric in RETRIEVAL.items():
        out[name][known] = metric(scores[known], relevant[known], k)
    return out


# --- what really happens when the top units of a method are removed: QLD and brittleness, both by retraining --------


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
