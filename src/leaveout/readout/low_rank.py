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

from leaveout.readout.search import evened


def pairs(left_a: Tensor, left_b: Tensor, right_a: Tensor, right_b: Tensor) -> Tensor:
    """Inner products [a, b] of the outer products left (x) right of positions a and b."""
    return (left_a @ left_b.t()) * (right_a @ right_b.t())


def low_rank(left: Tensor, right: Tensor, rank: int) -> Tensor:
    """The best rank-`rank` form of left^T right, as [U sqrt(s), V sqrt(s)] flattened [rank * (left + right)].

    Shapes: left [positions, l], right [positions, r]. Fewer positions than `rank` leave zero columns. Factors that are not
    finite have no such form: all its numbers are nan.
    From the inner products of the positions alone, in float64, so that squaring costs no digit of float32 factors; what is
    below 1e-7 of the largest counts as zero.
    """
    if not bool(torch.isfinite(left).all() & torch.isfinite(right).all()):
        return left.new_full((rank * (left.shape[1] + right.shape[1]),), torch.nan)
    gram_left, gram_right = (x @ x.t() for x in (left.double(), right.double()))
    values, vectors = torch.linalg.eigh(gram_left)
    root = values.clamp_min(0).sqrt()  # gram_left = half half^T, and left^T = Q half^T with orthonormal Q
    half = vectors * root
    squares, turned = torch.linalg.eigh(half.t() @ gram_right @ half)
    s, turned = squares.flip(0)[:rank].clamp_min(0).sqrt(), turned.flip(1)[:, :rank]
    s = torch.where(s > 1e-7 * s.max(), s, 0.0)
    by_left = vectors * _inverse(root) @ turned * s.sqrt()  # U sqrt(s) = left^T by_left
    by_right = half @ turned * _inverse(s).sqrt()  # V sqrt(s) = right^T by_right
    u, v = by_left.t().to(left.dtype) @ left, by_right.t().to(right.dtype) @ right
    blank = max(rank - len(u), 0)
    return torch.cat([torch.nn.functional.pad(x, (0, 0, 0, blank)).flatten() for x in (u, v)])


def _inverse(x: Tensor) -> Tensor:
    """1 / x where x is more than 1e-7 of the largest, else 0."""
    return torch.where(x > 1e-7 * x.max(), 1 / x.clamp_min(1e-300), 0.0)


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
            left, right = (evened(x[query, triple]).t().contiguous() for x in (u, v))
            owner = torch.zeros(left.shape[1], len(evened(queries)))
            owner[torch.arange(len(query)), query] = 1.0
            tables.append((left, right, owner))

        def scores(rows: Tensor) -> Tensor:
            total = torch.zeros(len(rows), len(evened(queries)))
            for (u, v), (a, b, owner) in zip(self.factors(rows), tables, strict=True):
                both = (u.flatten(0, 1) @ a) * (v.flatten(0, 1) @ b)
                total += both.unflatten(0, (len(rows), u.shape[1])).sum(1) @ owner
            return total[:, : len(queries)]

        return scores
