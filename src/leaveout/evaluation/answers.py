"""Queries about an answer: how likely the model gives it, and whether greedy decoding does.

The answer is what is learned of a query's row: its response, or the label of a classifier.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch.nn.functional as F
from torch import Tensor

from leaveout.errors import UnsupportedError
from leaveout.training.queries import Query
from leaveout.training.recipe import Recipe


def answer_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Loss of the whole answer in nats: minus the log of its probability."""
    return F.cross_entropy(logits, targets, reduction="sum")


def answer_lead(logits: Tensor, targets: Tensor) -> Tensor:
    """The smallest lead of a target's logit over the best other one.

    Above 0 exactly where greedy decoding gives the whole answer: as long as it does, it has read the same tokens.
    """
    chosen = F.one_hot(targets, logits.shape[-1]).bool()
    others = logits.masked_fill(chosen, float("-inf")).amax(-1)
    return (logits.gather(1, targets.unsqueeze(1)).squeeze(1) - others).min()


def of_answers(recipe: Recipe, queries: Sequence[Query], measure: Callable[[Tensor, Tensor], Tensor]) -> list[Query]:
    """The queries with another measure, whatever they asked before.

    Raises: UnsupportedError where a query has no answer.
    """
    for query in queries:
        if recipe.kind == "custom" or callable(query.row):
            raise UnsupportedError(
                f"The query {query.name!r} has no answer with logits: leave tail-patch and brittleness out, or ask rows "
                "of a recipe that is not custom."
            )
    return [replace(query, measure=measure) for query in queries]
