"""The deletion engine as methods: the predicted effect of leaving out each unit alone, in nats."""

from __future__ import annotations

import numpy as np

from leaveout.deletion.sets import DeletionSets
from leaveout.methods.scorer import Scorer, method
from leaveout.training.loop import RunOptions
from leaveout.training.reverse import adamw_influence as unrolled


@method(any_query=True)
def metagradient(scorer: Scorer, at: str) -> np.ndarray:
    """The exact first order, which is measured into the run's bank."""
    scorer.run.measure(gradient=True, queries=scorer.queries, settings=scorer.settings)
    return _effects(scorer, "first_order")


@method(any_query=True)
def adamw_influence(scorer: Scorer, at: str) -> np.ndarray:
    """The first order with gradients' products in the place of Hessians; gradients stand on disk while it works."""
    options = RunOptions(
        scorer.run.path / "work", scorer.settings.progress, scorer.settings.memory, device=scorer.run.device
    )
    return unrolled.adamw_influence(scorer.run.recipe, scorer.queries, options).effects


@method(any_query=True)
def posterior(scorer: Scorer, at: str) -> np.ndarray:
    """What the bank has, by its posterior; nothing is measured."""
    return _effects(scorer, "posterior")


def _effects(scorer: Scorer, estimator: str) -> np.ndarray:
    names = scorer.run.recipe.unit_names
    single = DeletionSets(np.eye(len(names)), names)
    return scorer.run.predict(scorer.queries, single, estimator, meaning="same-run").effect  # as truth is retrained
