"""TracIn over checkpoints: sums of gradient products along the training run, weighted with its learning rates.

Source: arXiv 2002.08484, TracInCP.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from leaveout.methods.gradient_dot import GradientDot
from leaveout.methods.gradients import MEMORY
from leaveout.methods.scorer import Scorer, Snapshot, method
from leaveout.training.tasks import Task


@dataclass(frozen=True)
class TracIn:
    """Sum over snapshots of learning rate * <gradient of query, gradient of row>."""

    task: Task
    snapshots: Sequence[Snapshot]
    memory: int = MEMORY

    def __post_init__(self) -> None:
        if not self.snapshots:
            raise ValueError("TracIn needs at least one snapshot of the training run.")

    def score(self, queries: Sequence[Any], corpus: Sequence[Any]) -> np.ndarray:
        """Scores [query, train] float32, in nats for plain gradient descent; for Adam a rank only.

        Cost and memory: those of `GradientDot`, once for each snapshot, which are held in memory besides.
        """
        total = np.zeros((len(queries), len(corpus)))
        for snapshot in self.snapshots:
            total += snapshot.rate * GradientDot(self.task, snapshot.parameters, memory=self.memory).score(
                queries, corpus
            )
        return total.astype(np.float32)


@method()
def tracin(scorer: Scorer, at: str) -> np.ndarray:
    """Over the scorer's snapshots, whatever the checkpoint."""
    return TracIn(scorer.task, scorer.snapshots).score(scorer.query_rows, scorer.rows)
