"""Truth by retraining: query values of models retrained without known sets of units, made once and kept in the bank.

All of it goes through `TrainingRun.retrain`: stored with the role "truth" (no estimator is fitted to it), resumed after a
kill, and shared by all methods that are judged. A second run with another seed tells how much of the truth is noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from leaveout.deletion import directions
from leaveout.deletion.bank import measurement_ids
from leaveout.deletion.run import TrainingRun
from leaveout.deletion.sets import DeletionSets
from leaveout.deletion.settings import MeasureSettings
from leaveout.errors import MismatchError, UnsupportedError
from leaveout.metrics import NoiseCeiling, noise_ceiling
from leaveout.training.queries import Query
from leaveout.training.recipe import Recipe
from leaveout.training.tasks import task_of


@dataclass(frozen=True)
class Truth:
    """Retrainings on random subsets.

    removed  [subset, unit] true where the subset lacks the unit
    values   query values [query, subset] in nats: the mean of both orders if there are two
    ceiling  what a perfect prediction would reach, None without a second order
    orders   the values of each of the two orders; empty without a second one
    """

    removed: np.ndarray
    values: np.ndarray
    ceiling: NoiseCeiling | None = None
    orders: tuple[np.ndarray, ...] = ()


def subset_truth(
    run: TrainingRun,
    queries: Sequence[Query],
    n: int,
    removed: float = 0.5,
    *,
    second: TrainingRun | None = None,
    seed: int = 0,
    settings: MeasureSettings | None = None,
) -> Truth:
    """Query values after retraining without n random shares `removed` of all units; with `second`, the mean of both runs.

    Cost: n retrainings of each run. Those that were made before are read.
    Raises: UnsupportedError if the second run gives the same numbers, which says nothing about noise.
    """
    refuse_subsets(n, removed)
    x = directions.subsets(0, n, len(run.recipe.unit_names), seed, removed)
    values = values_without(run, queries, x, settings)
    if second is None:
        return Truth(x > 0, values)
    other = values_without(second, queries, x, settings)
    if np.array_equal(values, other):
        raise UnsupportedError(SAME_MODEL)
    return Truth(x > 0, (values + other) / 2, noise_ceiling(values, other, seed), (values, other))


def refuse_subsets(n: int, removed: float) -> None:
    """Raises: ValueError for subsets that no rank correlation can be taken over."""
    if n < 2:
        raise ValueError(f"a rank correlation over {n} subset(s) is undefined: ask for at least 2, better 50 or more.")
    if not 0 < removed < 1:
        raise ValueError(f"the share removed is {removed}: give a number between 0 and 1.")


SAME_MODEL = (
    "Another seed trains the same model here, so that no noise can be measured: use `order: shuffled`, or judge without a "
    "ceiling (`second_order=False`, `--no-ceiling`)."
)


def refuse_second_order(run: TrainingRun) -> None:
    """Compares what the recipe would train on with the next seed: the order of its batches and where it starts.

    Raises: UnsupportedError if both are the same.
    """
    other = _reseeded(run)
    if run.recipe.batches() != other.batches():
        return
    starts = [dict(task_of(recipe).model.named_parameters()) for recipe in (run.recipe, other)]
    if all(torch.equal(starts[0][name], starts[1][name]) for name in starts[0]):
        raise UnsupportedError(SAME_MODEL)


def _reseeded(run: TrainingRun) -> Recipe:
    return replace(run.recipe, seed=run.recipe.seed + 1)


def second_order(run: TrainingRun, progress: bool = False) -> TrainingRun:
    """The same recipe with the next seed, which shuffles the data anew, trained in the directory `second` of the run."""
    return TrainingRun.train(_reseeded(run), run.path / "second", progress=progress)


def values_without(
    run: TrainingRun, queries: Sequence[Query], x: np.ndarray, settings: MeasureSettings | None = None
) -> np.ndarray:
    """Values [query, set] after retraining with deletion vectors x [set, unit]; equal vectors are trained once."""
    sets = DeletionSets(np.asarray(x, np.float64), tuple(f"set {i}" for i in range(len(x))))
    return run.retrain(queries, sets, settings)


def single_effects(run: TrainingRun, queries: Sequence[Query]) -> np.ndarray | None:
    """What leaving each unit out alone did to each query [query, unit], if the bank holds all these retrainings.

    Units: nats. Nothing is retrained here.
    """
    alone = np.eye(len(run.recipe.unit_names))
    if not run.bank.missing(measurement_ids("retraining", alone, queries, "truth")):
        return run.bank.truth(queries, alone) - run.bank.base(queries)[:, None]
    try:
        found = run.bank.measurements(queries).retrainings
    except MismatchError:  # nothing was measured for these queries
        return None
    if not len(found):
        return None
    single = np.flatnonzero((found.x == 1).sum(1) * (found.x != 0).sum(1) == 1)
    effects = {int(found.x[row].argmax()): found.y[row] for row in single}
    return None if len(effects) < len(alone) else np.stack([effects[unit] for unit in range(len(alone))], 1)
