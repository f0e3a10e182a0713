"""Rows stored by the largest singular triples of their outer products, and products with such rows.

A random projection keeps inner products up to about sqrt(2 / width) of the lengths, which is far more than whitened
rows of a wide model have in common; the largest triples keep what a row consists of. A row is, part after part,
[U sqrt(s), V sqrt(s)]: `rank` left vectors, then `rank` right ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


def pairs(left_a: Tensor, left_b: Tensor, right_a: Tensor, right_b: Tensor) -> Tensor:
    """Inner products [a, b] of the outer products left (x) right of positions a and b."""
    return (left_a @ left_b.t()) * (right_a @ right_b.t())


def low_rank(left: Tensor, right: Tensor, rank: int) -> Tensor:
    """The best rank-`rank` form of left^T right, as [U sqrt(s), V sqrt(s)] flattened [rank * (left + right)].

    Shapes: left [positions, l], right [positions, r]. Fewer positions than `rank` leave zero columns. Factors that are not
    finite have no such form: all its numbers are nan.
    """
    if not bool(torch.isfinite(left).all() & torch.isfinite(right).all()):
        return left.new_full((rank * (left.shape[1] + right.shape[1]),), torch.nan)
    q_left, r_left = torch.linalg.qr(left.t())
    q_right, r_right = torch.linalg.qr(right.t())
    u, s, vh = torch.linalg.svd(r_left @ r_right.t(), full_matrices=False)
    root = s[:rank].sqrt()
    u, v = q_left @ u[:, :rank] * root, q_right @ vh[:rank].t() * root
    blank = rank - u.shape[1]
    u, v = (torch.nn.functional.pad(x, (0, max(blank, 0))) for x in (u, v))
    return torch.cat([u.t().flatten(), v.t().flatten()])


@dataclass(frozen=True)
class LowRank:
    """The sizes (left, right) of all parts, which say how a row of a given rank is laid out."""

    sizes: tuple[tuple[int, int], ...]

    def width(self, rank: int) -> int:
        """Numbers per row."""
        return sum(rank * (left + right) for left, right in self.sizes)

    def factors(self, rows: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Per part, u [rows, rank, left] and v [rows, rank, right]; the rank follows from the width of the rows."""
        rank, start = rows.shape[1] // self.width(1), 0
        for left, right in self.sizes:
            middle, end = start + rank * left, start + rank * (left + right)
            yield rows[:, start:middle].unflatten(1, (rank, left)), rows[:, middle:end].unflatten(1, (rank, right))
            start = end

    def add(self, first: Tensor, second: Tensor, rank: int) -> Tensor:
        """The sum of two rows [width], cut to `rank` again."""
        both = self.factors(torch.stack([first, second]))
        return torch.cat([low_rank(u.flatten(0, 1), v.flatten(0, 1), rank) for u, v in both])

    def norm(self, rows: Tensor) -> Tensor:
        """Lengths [rows] of the outer products that rows stand for."""
        square = torch.zeros(len(rows), dtype=rows.dtype, device=rows.device)
        for u, v in self.factors(rows):
            square += ((u @ u.transpose(1, 2)) * (v @ v.transpose(1, 2))).sum((1, 2))
        return square.clamp_min(0).sqrt()

    def product(self, queries: Tensor) -> Callable[[Tensor], Tensor]:
        """A function from rows [rows, width] to scores [rows, queries].

        Shapes: queries [queries, width], of any rank; their empty triples cost nothing.
        Cost:   rank * (non-empty triples of all queries) * (left + right) multiply-adds per row and part.
        """
        tables = []
        for u, v in self.factors(queries):
            query, triple = (u.abs().sum(2) > 0).nonzero(as_tuple=True)
            owner = torch.zeros(len(query), len(queries))
            owner[torch.arange(len(query)), query] = 1.0
            tables.append((u[query, triple].t().contiguous(), v[query, triple].t().contiguous(), owner))

        def scores(rows: Tensor) -> Tensor:
            total = torch.zeros(len(rows), len(queries))
            for (u, v), (a, b, owner) in zip(self.factors(rows), tables, strict=True):
                both = (u.flatten(0, 1) @ a) * (v.flatten(0, 1) @ b)
                total += both.unflatten(0, (len(rows), u.shape[1])).sum(1) @ owner
            return total

        return scores
