"""Z0-Inf: products of loss differences between consecutive snapshots of a run; no gradient is taken.

Along the step d between two snapshots, (loss after - loss before) / |d| stands for a loss's slope in the direction of d.
The score is the sum over steps of the query's slope times the row's slope.

What is uncertain: this follows the abstract of the paper and summaries of it, not its formulas. That the slope is per unit
of length (division by |d|^2) is our reading; whether steps are weighted besides, for instance by the learning rate, and
which snapshots the authors take, we do not know. Compare with published numbers only with that in mind.
Source: arXiv 2510.11832.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from leaveout.methods.gradients import example_losses
from leaveout.methods.scorer import Scorer, Snapshot, method
from leaveout.training.examples import asked
from leaveout.training.tasks import Task


@dataclass(frozen=True)
class Z0Inf:
    """Sum over consecutive snapshots of (loss difference of query) * (loss difference of row) / |step|^2."""

    task: Task
    snapshots: Sequence[Snapshot]

    def __post_init__(self) -> None:
        if len(self.snapshots) < 2:
            raise ValueError("Z0-Inf needs at least two snapshots of the training run.")

    def score(self, queries: Sequence[Any], corpus: Sequence[Any]) -> np.ndarray:
        """Scores [query, train] float32; of rank at most the number of steps, so that few snapshots rank alike.

        Memory: the snapshots, and 8 bytes for each query and row. Cost: one forward pass for each query, row and snapshot.
        Raises: ValueError if two snapshots that follow each other are equal.
        """
        total = np.zeros((len(queries), len(corpus)))
        queries = asked(queries)
        before = self._losses(self.snapshots[0], queries, corpus)
        for last, snapshot in itertools.pairwise(self.snapshots):
            after = self._losses(snapshot, queries, corpus)
            length = _squared_distance(last, snapshot)
            if length == 0:
                raise ValueError(f"the snapshots after {last.step} and {snapshot.step} steps are equal: leave one out.")
            total += np.outer(after[0] - before[0], after[1] - before[1]) / length
            before = after
        return total.astype(np.float32)

    def _losses(self, snapshot: Snapshot, *rows: Sequence[Any]) -> list[np.ndarray]:
        return [example_losses(self.task, snapshot.parameters, part).double().numpy() for part in rows]


def _squared_distance(first: Snapshot, second: Snapshot) -> float:
    parts = [(second.parameters[name] - p).double().square().sum() for name, p in first.parameters.items()]
    return float(torch.stack(parts).sum())


@method()
def z0_inf(scorer: Scorer, at: str) -> np.ndarray:
    """Over the scorer's snapshots, whatever the checkpoint."""
    return Z0Inf(scorer.task, scorer.snapshots).score(scorer.query_rows, scorer.rows)
