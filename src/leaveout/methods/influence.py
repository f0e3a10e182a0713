"""Influence through the whole model in the metric of the run's optimizer: see `leaveout.influence`."""

from __future__ import annotations

import numpy as np
import torch

from leaveout.influence import Along, Batch, refined, row_scores
from leaveout.methods.scorer import NAMED_KINDS, Scorer, method
from leaveout.training.examples import asked
from leaveout.training.whole import batches_of, run_of, whole_model

SAMPLE = 200  # rows whose curvature and second moments count


@method(kinds=NAMED_KINDS, plain=True)
def influence(scorer: Scorer, at: str) -> np.ndarray:
    """Scores of all rows along the refined directions of all queries."""
    task, rows = scorer.task, list(scorer.rows)
    model = whole_model(task, scorer.parameters(at))
    chosen = np.random.default_rng(scorer.seed).permutation(len(rows))[:SAMPLE]
    sample = [rows[i] for i in np.sort(chosen)]
    run = run_of(scorer.run.recipe, model, task, sample, scorer.seed)
    gradients = [model.gradient([Batch(task.encode(asked([row])), 1)]) for row in scorer.query_rows]
    directions = refined(model, batches_of(task, sample), gradients, run)
    batches = batches_of(task, rows)
    along = [Along.of(model, x, batches[0]) for x in directions]
    return torch.cat(list(row_scores(model, batches, along)), 1).numpy()
