"""Inner products, or cosines, of the loss gradients of query and row: the first-order change of one gradient step.

A step of gradient descent on a row lowers the query's loss by rate * <gradient of query, gradient of row>. The cosine
leaves out how large the two gradients are.
Source: arXiv 2002.08484 for the one-checkpoint form (TracIn); arXiv 2405.11724 for unit length.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from leaveout.methods.gradients import MEMORY, example_gradients, gathered, products, rows_within, unit_rows
from leaveout.methods.scorer import Scorer, method
from leaveout.training.examples import asked
from leaveout.training.tasks import Parameters, Task


@dataclass(frozen=True)
class GradientDot:
    """Gradient dot product (`cosine=False`) or cosine at one set of trained parameters.

    memory: bytes for gradients; more of them mean larger blocks of queries, and fewer passes over the corpus.
    """

    task: Task
    parameters: Parameters
    cosine: bool = False
    memory: int = MEMORY

    def score(self, queries: Sequence[Any], corpus: Sequence[Any]) -> np.ndarray:
        """Scores [query, train] float32: squared nats per unit of parameters, or cosines; 0 where a gradient is 0.

        Memory: `memory`, but never less than one query's and three rows' gradients; see `example_gradients`.
        Cost:   a forward and a backward pass for each query, and for each row as many times as there are blocks of queries.
        """
        result = np.zeros((len(queries), len(corpus)), np.float32)
        if not result.size:
            return result
        first = 0
        for left in gathered(self._gradients(asked(queries)), rows_within(self.memory // 4, self.parameters)):
            column = 0
            for right in self._gradients(corpus):
                places = slice(first, first + len(left)), slice(column, column + len(right))
                result[places] = products(left, right).numpy()
                column += len(right)
            first += len(left)
        return result

    def _gradients(self, rows: Sequence[Any]) -> Iterator[Tensor]:
        found = example_gradients(self.task, self.parameters, rows, self.memory)
        return map(unit_rows, found) if self.cosine else found


@method()
def gradient_dot(scorer: Scorer, at: str) -> np.ndarray:
    """Inner products at a checkpoint."""
    return GradientDot(scorer.task, scorer.parameters(at)).score(scorer.query_rows, scorer.rows)


@method()
def gradient_cosine(scorer: Scorer, at: str) -> np.ndarray:
    """Cosines at a checkpoint."""
    return GradientDot(scorer.task, scorer.parameters(at), cosine=True).score(scorer.query_rows, scorer.rows)
