"""RapidIn: gradients of unit length, compressed by a random shuffle, random signs and sums of blocks.

A row becomes `width` numbers of float16 (65,536 numbers: 131 kB). The shuffles that follow each other there are one
permutation here, drawn uniformly. The weights of the layers and of the tokens are not part of this form.
Source: arXiv 2405.11724, the retrieval score and its gradient compression.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from leaveout.methods.gradients import MEMORY, example_gradients, products, unit_rows
from leaveout.methods.scorer import Scorer, method
from leaveout.projection import random_bits, random_signs
from leaveout.training.examples import asked
from leaveout.training.tasks import Parameters, Task


@dataclass(frozen=True)
class RapidIn:
    """Dot products of compressed unit gradients; a function of the seed.

    A model of at most `width` trained parameters is not compressed: then the score is the gradient cosine in float16.
    """

    task: Task
    parameters: Parameters
    width: int = 65536
    seed: int = 0
    memory: int = MEMORY
    _order: Tensor = field(init=False, repr=False)
    _signs: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.width < 1:
            raise ValueError(f"width is {self.width}: give at least 1 number a row.")
        size = sum(self.parameters[name].numel() for name in self.task.trained)
        order = np.argsort(random_bits(self.seed, "rapidin/shuffle", size), kind="stable")
        object.__setattr__(self, "_order", torch.from_numpy(order))
        object.__setattr__(self, "_signs", random_signs(self.seed, "rapidin/signs", size))

    def sketches(self, rows: Sequence[Any]) -> Iterator[Tensor]:
        """Compressed unit gradients [some rows, width] float16, in order.

        Memory: `memory` for gradients, and 12 bytes for each trained parameter besides.
        Cost:   a forward and a backward pass and one gather of the gradient for each row.
        """
        for chunk in example_gradients(self.task, self.parameters, rows, self.memory):
            yield self.compress(unit_rows(chunk)).half()

    def compress(self, x: Tensor) -> Tensor:
        """Shuffle, signs and sums of equal blocks: [rows, parameters] -> [rows, width], fewer for a smaller model.

        Guarantee: inner products are kept in expectation over the seed.
        """
        size = x.shape[1]
        if size <= self.width:
            return x
        block = -(-size // self.width)
        mixed = x.new_zeros(len(x), self.width * block)
        mixed[:, :size] = x[:, self._order] * self._signs.to(x.dtype)
        return mixed.view(len(x), self.width, block).sum(2)

    def score(self, queries: Sequence[Any], corpus: Sequence[Any]) -> np.ndarray:
        """Scores [query, train] float32 in -1 ... 1, up to the error of the compression, about 1 / sqrt(width).

        Memory: that of `sketches`, and 4 bytes times the width for each query.
        Cost:   each query and row once.
        """
        result = np.zeros((len(queries), len(corpus)), np.float32)
        if not result.size:
            return result
        left = torch.cat(list(self.sketches(asked(queries)))).float()
        column = 0
        for right in self.sketches(corpus):
            result[:, column : column + len(right)] = products(left, right.float()).numpy()
            column += len(right)
        return result


@method()
def rapidin(scorer: Scorer, at: str) -> np.ndarray:
    """At the parameters of a checkpoint."""
    return RapidIn(scorer.task, scorer.parameters(at), seed=scorer.seed).score(scorer.query_rows, scorer.rows)
