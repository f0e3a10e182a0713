"""Z0-Inf: gradients guessed from the losses at the snapshots of a run; none is taken.

Between two snapshots, (difference of a loss) * (step) / |step|^2 is the part of its gradient that lies along the step. At
each snapshot a row's gradient is the mean of these over the snapshots near it, and the score is the product of query's and
row's, averaged over snapshots. Losses are taken less the mean of the corpus at each snapshot first, as all of them fall
together.

This follows the abstract and the authors' public code; the paper itself could not be opened. That code takes the last two
snapshots as the neighbours of all and divides by |step|^2 once more, which we read as slips and do not follow: products of
differences of losses would count by |step|^-6, and only the last snapshots would be heard. It also multiplies by the rank
correlation of both losses along the run (`correlated`), which has the sign of the product itself, so that rows that harm rank
beside rows that help; here that is only done on request.
Source: arXiv 2510.11832.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.stats import rankdata

from leaveout.methods.gradients import example_losses
from leaveout.methods.scorer import Scorer, Snapshot, method
from leaveout.training.examples import asked
from leaveout.training.tasks import Task

NEAR = 2  # snapshots before and after


@dataclass(frozen=True)
class Z0Inf:
    """Products of gradients guessed from losses at snapshots, see the head of this file.

    correlated   times the rank correlation of query's and row's losses over the snapshots
    """

    task: Task
    snapshots: Sequence[Snapshot]
    correlated: bool = False

    def __post_init__(self) -> None:
        if len(self.snapshots) < 2:
            raise ValueError("Z0-Inf needs at least two snapshots of the training run.")

    def score(self, queries: Sequence[Any], corpus: Sequence[Any]) -> np.ndarray:
        """Scores [query, train] float32; of rank at most the number of steps, unless `correlated`.

        Memory: the snapshots, and 8 bytes for each query and row. Cost: one forward pass for each query, row and snapshot.
        Raises: ValueError if two snapshots near each other are equal.
        """
        of_queries, of_rows = self.losses(asked(queries)), self.losses(corpus)
        return self.products(of_queries, of_rows).astype(np.float32)

    def losses(self, rows: Sequence[Any]) -> np.ndarray:
        """Losses [snapshot, row]: all that is kept of a row."""
        return np.stack([example_losses(self.task, s.parameters, rows).double().numpy() for s in self.snapshots])

    def products(self, of_queries: np.ndarray, of_rows: np.ndarray) -> np.ndarray:
        """Scores [query, train] from losses [snapshot, query] and [snapshot, train]."""
        inner, n = _inner_products(self.snapshots), len(self.snapshots)
        total = np.zeros((of_queries.shape[1], of_rows.shape[1]))
        if not total.size:
            return total
        queries, rows = (found - of_rows.mean(1, keepdims=True) for found in (of_queries, of_rows))
        for here in range(n):
            near = [other for other in range(max(0, here - NEAR), min(n, here + NEAR + 1)) if other != here]
            steps = inner[here, here] - inner[here][near][:, None] - inner[here][near] + inner[np.ix_(near, near)]
            squared = np.diag(steps)
            if not squared.min() > 1e-12 * np.trace(inner):
                raise ValueError(f"two snapshots near {self.snapshots[here].step} steps are equal: leave one out.")
            weights = steps / np.outer(squared, squared) / len(near) ** 2
            total += (queries[here] - queries[near]).T @ weights @ (rows[here] - rows[near]) / n
        return total * _rank_correlations(of_queries, of_rows) if self.correlated and n > 2 else total


def _inner_products(snapshots: Sequence[Snapshot]) -> np.ndarray:
    """Inner products [snapshot, snapshot] of the parameters, counted from the first snapshot."""
    first = snapshots[0].parameters
    total = torch.zeros(len(snapshots), len(snapshots), dtype=torch.float64)
    for name, origin in first.items():
        moved = torch.stack([(s.parameters[name] - origin).double().flatten() for s in snapshots])
        total += moved @ moved.T
    return total.numpy()


def _rank_correlations(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Spearman's [query, train] over the first axis; 0 where a loss never changes."""
    ranks = [rankdata(found, axis=0) - (len(found) + 1) / 2 for found in (left, right)]
    lengths = [np.linalg.norm(found, axis=0) for found in ranks]
    return (ranks[0].T @ ranks[1]) / np.maximum(np.outer(*lengths), 1e-300)


@method()
def z0_inf(scorer: Scorer, at: str) -> np.ndarray:
    """Over the scorer's snapshots, whatever the checkpoint."""
    return Z0Inf(scorer.task, scorer.snapshots).score(scorer.query_rows, scorer.rows)
