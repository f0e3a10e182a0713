"""Cosine of mean hidden states: what a search by the model's own embeddings finds, with no gradient at all.

The hidden state is what goes into the linear layer that runs last: the head of a language model or a classifier.
A row's embedding is its mean over all positions, learned or not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from leaveout.errors import UnsupportedError
from leaveout.methods.gradients import example_losses, unit_rows
from leaveout.methods.scorer import Scorer, method
from leaveout.training.examples import asked
from leaveout.training.tasks import Parameters, Task


@dataclass(frozen=True)
class EmbeddingCosine:
    """Cosine of the mean inputs of the last layer, at one set of trained parameters."""

    task: Task
    parameters: Parameters

    def score(self, queries: Sequence[Any], corpus: Sequence[Any]) -> np.ndarray:
        """Scores [query, train] float32 in -1 ... 1; 0 for an embedding of zeros. Positive means alike, not helpful.

        Memory: one embedding for each query and row. Cost: one forward pass for each.
        """
        if not len(queries) or not len(corpus):
            return np.zeros((len(queries), len(corpus)), np.float32)
        left, right = (unit_rows(self.embeddings(rows)) for rows in (asked(queries), corpus))
        return (left @ right.T).float().numpy()

    def embeddings(self, rows: Sequence[Any]) -> Tensor:
        """Mean hidden states [rows, hidden].

        Raises: UnsupportedError if no linear layer runs.
        """
        seen: list[Tensor] = []
        layers = [m for m in self.task.model.modules() if isinstance(m, nn.Linear)]
        hooks = [m.register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[0])) for m in layers]
        found = []
        try:
            for row in rows:
                example_losses(self.task, self.parameters, [row])
                if not seen:
                    raise UnsupportedError(
                        "The model runs no linear layer whose input could be an embedding: give scores of your own."
                    )
                found.append(seen[-1].flatten(0, -2).mean(0))
                seen.clear()
        finally:
            for hook in hooks:
                hook.remove()
        return torch.stack(found)


@method()
def embedding(scorer: Scorer, at: str) -> np.ndarray:
    """At the parameters of a checkpoint."""
    return EmbeddingCosine(scorer.task, scorer.parameters(at)).score(scorer.query_rows, scorer.rows)
