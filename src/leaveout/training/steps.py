"""What a step trains on: its micro-batches, and what the loss of each example counts in the loss of the step.

The loss of a step is the sum over its examples of weight * size * loss, divided by the sum of all their sizes. The size
is 1, or the number of learned tokens (`loss_per: token`). Weights do not enter the divisor, so that the trained model is
a smooth function of them: an example of weight 0 adds nothing, and what the others add stays as it was.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from leaveout.training.recipe import Recipe
from leaveout.training.tasks import Batch, Task


@dataclass(frozen=True)
class Part:
    """A micro-batch of a step.

    numbers  its examples
    sizes    what the loss of each counts [examples], None where all count alike
    divisor  of the whole step, whatever this part and the weights are
    """

    numbers: tuple[int, ...]
    sizes: Tensor | None
    divisor: float

    def loss(self, losses: Any, weights: Any = None) -> Any:
        """What this part adds to the loss of its step. Shapes: losses and weights [..., examples]."""
        sized = losses if self.sizes is None else losses * self.sizes
        return (sized if weights is None else sized * weights).sum() / self.divisor

    def only(self, kept: Sequence[int]) -> Part:
        """The same without some of its examples, for where the weights of these are 0."""
        places = [i for i, number in enumerate(self.numbers) if number in set(kept)]
        sizes = None if self.sizes is None else self.sizes[places]
        return Part(tuple(self.numbers[i] for i in places), sizes, self.divisor)


class Steps:
    """The steps of a recipe. Sizes are counted when they are first needed, each example once."""

    def __init__(self, recipe: Recipe, task: Task) -> None:
        self.recipe, self.task, self.batches = recipe, task, recipe.batches()
        self._sizes: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self.batches)

    def parts(self, step: int) -> list[Part]:
        """The micro-batches of a step."""
        return self.parts_of(self.batches[step], self.recipe.accumulate)

    def parts_of(self, numbers: Sequence[int], n: int) -> list[Part]:
        """Those of a step on these examples, at most n."""
        numbers = tuple(numbers)
        if self.task.sizes is None:
            return [Part(part, None, len(numbers)) for part in micro_batches(numbers, n)]
        divisor = sum(map(self._size, numbers))
        dtype = self.recipe.real_dtype
        return [
            Part(part, torch.tensor([self._size(i) for i in part], dtype=dtype), divisor)
            for part in micro_batches(numbers, n)
        ]

    def encoded(self, numbers: Sequence[int]) -> Batch:
        """The batch of these examples."""
        return self.task.encode([self.recipe.examples[i] for i in numbers])

    def loss(self, part: Part, weights: Any = None) -> Any:
        """What a part adds to the loss of its step, under the model's present parameters."""
        return part.loss(self.task.loss(self.task.model, self.encoded(part.numbers)), weights)

    def _size(self, number: int) -> int:
        if number not in self._sizes:
            assert self.task.sizes is not None
            self._sizes[number] = int(self.task.sizes(self.task.encode([self.recipe.examples[number]])))
        return self._sizes[number]


def micro_batches(batch: tuple[int, ...], n: int) -> Iterator[tuple[int, ...]]:
    """The parts of a step's example numbers whose gradients are accumulated: n, or as few as hold them at the same size.

    Each holds a n-th of the examples, rounded up, but the last, which holds what is left.
    """
    size = -(-len(batch) // n)
    return (batch[i : i + size] for i in range(0, len(batch), size))
