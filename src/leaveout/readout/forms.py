"""What the numbers of a row mean before they are stored: a vector, or the singular triples of its outer products.

A *form* takes rows of float numbers [rows, width]. Of `Vectors` the inner product is the score. `Triples` are the largest
singular triples of each outer product, part after part [U sqrt(s), V sqrt(s)]: `rank` left vectors, then `rank` right ones.
A random projection keeps inner products up to about sqrt(2 / width) of the lengths, which is far more than whitened rows
of a wide model have in common; the largest triples keep what a row consists of.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from leaveout.projection import random_signs


@dataclass(frozen=True)
class Form(ABC):
    """What rows [rows, width] of numbers stand for."""

    degree: ClassVar[int]  # a row times s stands for s ** degree times as much

    @abstractmethod
    def products(self, rows: Tensor, queries: Tensor) -> Tensor:
        """Inner products [rows, queries] of what both stand for."""

    @abstractmethod
    def lengths(self, rows: Tensor) -> Tensor:
        """Lengths [rows] of what rows stand for."""

    def divided(self, rows: Tensor, by: Tensor) -> Tensor:
        """Rows that stand for as much divided by numbers [rows]."""
        return rows / (by if self.degree == 1 else by.sqrt())[:, None]


@dataclass(frozen=True)
class Vectors(Form):
    """Rows are vectors of `width` numbers."""

    width: int

    degree: ClassVar[int] = 1

    def products(self, rows: Tensor, queries: Tensor) -> Tensor:
        return rows @ queries.t()

    def lengths(self, rows: Tensor) -> Tensor:
        return rows.norm(dim=1)


@dataclass(frozen=True)
class Triples(Form):
    """Rows are singular triples of parts of `sizes` (left, right); how many of each follows from the width of the rows."""

    sizes: tuple[tuple[int, int], ...]

    degree: ClassVar[int] = 2

    def width(self, rank: int) -> int:
        """Numbers of rows with so many triples of each part."""
        return rank * sum(left + right for left, right in self.sizes)

    def rank(self, rows: Tensor) -> int:
        """Triples of each part of rows."""
        return rows.shape[1] // self.width(1)

    def factors(self, rows: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Per part, u [rows, rank, left] and v [rows, rank, right]."""
        rank, start = self.rank(rows), 0
        for left, right in self.sizes:
            middle, end = start + rank * left, start + rank * (left + right)
            yield rows[:, start:middle].unflatten(1, (rank, left)), rows[:, middle:end].unflatten(1, (rank, right))
            start = end

    def joined(self, factors: list[tuple[Tensor, Tensor]]) -> Tensor:
        """Rows of factors as `factors` gives them."""
        return torch.cat([x.flatten(1) for both in factors for x in both], 1)

    def add(self, first: Tensor, second: Tensor) -> Tensor:
        """The sum of two rows [width], cut to the largest triples again."""
        rank = self.rank(first[None])
        both = self.factors(torch.stack([first, second]))
        return torch.cat([low_rank(u.flatten(0, 1), v.flatten(0, 1), rank) for u, v in both])

    def widened(self, rows: Tensor, rank: int) -> Tensor:
        """The same rows with empty triples behind their own, `rank` of each part in all."""
        more = rank - self.rank(rows)
        pad = torch.nn.functional.pad
        return self.joined([(pad(u, (0, 0, 0, more)), pad(v, (0, 0, 0, more))) for u, v in self.factors(rows)])

    def part_lengths(self, rows: Tensor) -> Tensor:
        """Lengths [rows, parts] of the outer products."""
        squares = [((u @ u.transpose(1, 2)) * (v @ v.transpose(1, 2))).sum((1, 2)) for u, v in self.factors(rows)]
        return torch.stack(squares, 1).clamp_min(0).sqrt()

    def lengths(self, rows: Tensor) -> Tensor:
        return self.part_lengths(rows).norm(dim=1)

    def products(self, rows: Tensor, queries: Tensor) -> Tensor:
        """Ranks may differ. Cost: both ranks * (left + right) multiply-adds per row, query and part."""
        total = rows.new_zeros(len(rows), len(queries))
        for (u, v), (a, b) in zip(self.factors(rows), self.factors(queries), strict=True):
            for query in range(len(queries)):
                total[:, query] += ((u @ a[query].t()) * (v @ b[query].t())).sum((1, 2))
        return total


# ---------------------------------------------------------------- arithmetic of outer products


def pairs(left_a: Tensor, left_b: Tensor, right_a: Tensor, right_b: Tensor) -> Tensor:
    """Inner products [a, b] of the outer products left (x) right of positions a and b."""
    return (left_a @ left_b.t()) * (right_a @ right_b.t())


def squared_length(left: Tensor, right: Tensor) -> Tensor:
    """|left^T right|^2 of factors [positions, ...]: over pairs of positions, or over entries where those are fewer."""
    if len(left) * (left.shape[1] + right.shape[1]) < left.shape[1] * right.shape[1]:
        return pairs(left, left, right, right).sum().clamp_min(0)
    return (left.t() @ right).square().sum()


def low_rank(left: Tensor, right: Tensor, rank: int) -> Tensor:
    """The best rank-`rank` form of left^T right, as [U sqrt(s), V sqrt(s)] flattened [rank * (left + right)].

    Shapes: left [positions, l], right [positions, r]. Fewer positions than `rank` leave zero columns. Factors that are not
    finite have no such form: all its numbers are nan.
    """
    if not bool(torch.isfinite(left).all() & torch.isfinite(right).all()):
        return left.new_full((rank * (left.shape[1] + right.shape[1]),), torch.nan)
    positions, narrow = len(left), min(left.shape[1], right.shape[1])
    if positions <= min(narrow, POSITIONS):
        u, v = _by_positions(left, right, rank)
    elif narrow <= POSITIONS:
        u, v = _by_entries(left, right, rank)
    else:
        u, v = _by_iteration(left, right, rank)
    blank = max(rank - len(u), 0)
    return torch.cat([torch.nn.functional.pad(x.to(left.dtype), (0, 0, 0, blank)).flatten() for x in (u, v)])


POSITIONS = 256  # up to so many, eigendecompositions of positions x positions are cheaper than iterations
MORE, ROUNDS = 40, 4  # columns beyond the rank, and rounds, of the iteration: cosine with the exact form above .9999


def _by_positions(left: Tensor, right: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """From the inner products of the positions alone, in float64, so that squaring costs no digit of float32 factors.

    What is below 1e-7 of the largest counts as zero.
    """
    gram_left, gram_right = (x @ x.t() for x in (left.double(), right.double()))
    values, vectors = torch.linalg.eigh(gram_left)
    root = values.clamp_min(0).sqrt()  # gram_left = half half^T, and left^T = Q half^T with orthonormal Q
    half = vectors * root
    squares, turned = torch.linalg.eigh(half.t() @ gram_right @ half)
    s, turned = _largest(squares, turned, rank)
    by_left = vectors * _inverse(root) @ turned * s.sqrt()  # U sqrt(s) = left^T by_left
    by_right = half @ turned * _inverse(s).sqrt()  # V sqrt(s) = right^T by_right
    return by_left.t().to(left.dtype) @ left, by_right.t().to(right.dtype) @ right


def _by_entries(left: Tensor, right: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """From the matrix itself, in float64, by the inner products of its shorter side."""
    matrix = left.double().t() @ right.double()
    flipped = matrix.shape[0] > matrix.shape[1]
    matrix = matrix.t() if flipped else matrix
    squares, turned = torch.linalg.eigh(matrix @ matrix.t())
    s, short = _largest(squares, turned, rank)
    u, v = (short * s.sqrt()).t(), (short * _inverse(s).sqrt()).t() @ matrix
    return (v, u) if flipped else (u, v)


def _by_iteration(left: Tensor, right: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """By subspace iteration, of the matrix itself where it is cheaper than its factors: linear in the positions.

    Source: Halko, Martinsson, Tropp 2011, algorithm 4.4.
    """
    columns = min(rank + MORE, left.shape[1], right.shape[1], len(left))
    if len(left) * (left.shape[1] + right.shape[1]) > left.shape[1] * right.shape[1]:
        matrix = left.t() @ right
        forth, back = (lambda x: matrix @ x), (lambda x: matrix.t() @ x)
    else:
        forth, back = (lambda x: left.t() @ (right @ x)), (lambda x: right.t() @ (left @ x))
    basis = _orthonormal(forth(_start(right.shape[1], columns).to(right)))
    for _ in range(ROUNDS - 1):
        basis = _orthonormal(forth(_orthonormal(back(basis))))
    rest = back(basis)  # the matrix is basis rest^T
    squares, turned = torch.linalg.eigh(rest.double().t() @ rest.double())
    s, turned = _largest(squares, turned, rank)
    turned_left, turned_right = ((turned * by).to(left.dtype) for by in (s.sqrt(), _inverse(s).sqrt()))
    return (basis @ turned_left).t(), (rest @ turned_right).t()


def _orthonormal(x: Tensor) -> Tensor:
    """Columns that span those of x [size, columns], orthonormal; twice, as once leaves rounding where columns are alike."""
    for _ in range(2):
        values, vectors = torch.linalg.eigh(x.double().t() @ x.double())
        root = values.clamp_min(0).sqrt()
        x = x @ (vectors * _inverse(root)).to(x.dtype)
    return x


def _start(size: int, columns: int) -> Tensor:
    """A fixed start [size, columns] that no right factor is orthogonal to but by chance."""
    return random_signs(0, "low rank", size * columns).view(size, columns)


def _largest(squares: Tensor, vectors: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The largest singular values of squares as `eigh` gives them, and their vectors."""
    s = squares.flip(0)[:rank].clamp_min(0).sqrt()
    return torch.where(s > 1e-7 * s.max(), s, 0.0), vectors.flip(1)[:, :rank]


def _inverse(x: Tensor) -> Tensor:
    """1 / x where x is more than 1e-7 of the largest, else 0."""
    return torch.where(x > 1e-7 * x.max(), 1 / x.clamp_min(1e-300), 0.0)
