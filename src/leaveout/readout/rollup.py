"""Rankings in which alike rows count as one: the best row of every document, source or content.

Conventions: a group or a set of near-duplicates is represented by its best row, whose score is the group's. A sum over a
group would grow with its size and so rank sources by how many rows they have, and needs memory for every group; the
best row needs that of k groups only, whatever the corpus.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import numpy as np
import torch
from torch import Tensor

from leaveout.readout.search import Best, Product, at_resolution

PAGE = 256  # rows whose entries are read at a time
VECTORS = 32  # rows whose vectors are read at a time: of the widest preset, 16 MiB


class BestGroups(Best):
    """The k groups with the highest best rows of each query, each as that row; equal scores (at the
    resolution of ranks) in order of row numbers.

    Cost: one catalogue entry for every row that beats the k-th group of its query so far; with fewer than k groups
    that is every row.
    """

    def __init__(self, n_queries: int, k: int, groups_of: Callable[[np.ndarray], Sequence[Hashable]]) -> None:
        super().__init__(n_queries, k)
        self.groups_of = groups_of
        self.held: list[dict[Hashable, tuple[float, int, float]]] = [{} for _ in range(n_queries)]  # see _consider
        self.known: dict[int, Hashable] = {}  # groups of the rows that are being added

    def add(self, numbers: np.ndarray, scores: np.ndarray) -> None:
        self.known.clear()
        super().add(numbers, scores)

    def add_one(self, query: int, numbers: np.ndarray, scores: np.ndarray) -> None:
        held, rounded = self.held[query], at_resolution(scores)
        order = np.argsort(-rounded, kind="stable")
        for start in range(0, len(order), PAGE):
            page = order[start : start + PAGE]
            if len(held) == self.k and rounded[page[0]] <= self._floor(query)[0]:
                break
            for at, group in zip(page, self._groups(numbers[page]), strict=True):
                self._consider(query, group, (float(rounded[at]), int(numbers[at]), float(scores[at])))
        ranked = sorted(held.values(), key=lambda row: (-row[0], row[1]))
        self.numbers[query] = np.array([number for _, number, _ in ranked], np.int64)
        self.scores[query] = np.array([score for _, _, score in ranked], np.float32)

    def _consider(self, query: int, group: Hashable, row: tuple[float, int, float]) -> None:
        """`row`: score at the resolution of ranks, row number, score."""
        held = self.held[query]
        if group in held:
            if row[0] > held[group][0]:
                held[group] = row
            return
        if len(held) == self.k:
            floor, worst = self._floor(query)
            if row[0] <= floor:
                return
            del held[worst]
        held[group] = row

    def _floor(self, query: int) -> tuple[float, Hashable]:
        """Rounded score and group of the last in the ranking."""
        group, row = min(self.held[query].items(), key=lambda item: (item[1][0], -item[1][1]))
        return row[0], group

    def _groups(self, numbers: np.ndarray) -> list[Hashable]:
        missing = [number for number in numbers.tolist() if number not in self.known]
        if missing:
            self.known.update(zip(missing, self.groups_of(np.array(missing)), strict=True))
        return [self.known[number] for number in numbers.tolist()]


def distinct(
    numbers: np.ndarray,
    k: int,
    threshold: float,
    vectors: Callable[[np.ndarray], Tensor],
    product: Callable[[Tensor], Product],
) -> list[int]:
    """Positions of the first k rows of a ranking, passing over each whose cosine with one kept is above the threshold.

    `vectors` gives the unit-length vectors [rows, width] of row numbers, `product` the function from rows to products
    with given vectors.
    """
    kept: list[int] = []
    chosen: list[Tensor] = []
    for start in range(0, len(numbers), VECTORS):
        for at, vector in enumerate(vectors(numbers[start : start + VECTORS]), start=start):
            if not chosen or float(product(vector[None])(torch.stack(chosen)).max()) <= threshold:
                kept.append(at)
                chosen.append(vector)
            if len(kept) == k:
                return kept
    return kept
