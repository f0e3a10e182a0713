"""What the numbers of a row mean before they are stored: a vector, or the singular triples of its outer products.

A *form* takes rows of float numbers [rows, width]. Of `Vectors` the inner product is the score. `Triples` are the largest
singular triples of each outer product, part after part [U sqrt(s), V sqrt(s)]: `rank` left vectors, then `rank` right ones.
A random projection keeps inner products up to about sqrt(2 / width) of the lengths, which is far more than whitened rows
of a wide model have in common; the largest triples keep what a row consists of.
"""

from __future__ import annotations

import functools
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
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
    def beside(self, count: int) -> Form:
        """What so many rows stand for, one behind the other: the sum."""

    @abstractmethod
    def products(self, rows: Tensor, queries: Tensor) -> Tensor:
        """Inner products [rows, queries] of what both stand for."""

    @abstractmethod
    def lengths(self, rows: Tensor) -> Tensor:
        """Lengths [rows] of what rows stand for."""

    @abstractmethod
    def negated(self, rows: Tensor) -> Tensor:
        """Rows that stand for the opposite."""

    def divided(self, rows: Tensor, by: Tensor) -> Tensor:
        """Rows that stand for as much divided by numbers [rows]."""
        return rows / (by if self.degree == 1 else by.sqrt())[:, None]

    def times(self, rows: Tensor, by: Tensor) -> Tensor:
        """Rows that stand for as much times numbers [rows], none below 0."""
        return rows * (by if self.degree == 1 else by.sqrt())[:, None]


@dataclass(frozen=True)
class Vectors(Form):
    """Rows are vectors of `width` numbers."""

    width: int

    degree: ClassVar[int] = 1

    def beside(self, count: int) -> Vectors:
        return Vectors(count * self.width)

    def products(self, rows: Tensor, queries: Tensor) -> Tensor:
        return rows @ queries.t()

    def lengths(self, rows: Tensor) -> Tensor:
        return rows.norm(dim=1)

    def negated(self, rows: Tensor) -> Tensor:
        return -rows


@dataclass(frozen=True)
class Triples(Form):
    """Rows are singular triples of parts of `sizes` (left, right); how many of each follows from the width of the rows."""

    sizes: tuple[tuple[int, int], ...]

    degree: ClassVar[int] = 2

    def beside(self, count: int) -> Triples:
        return Triples(count * self.sizes)

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
        """The sums of rows [rows, width], each cut to the largest triples again."""
        both = zip(self.factors(first), self.factors(second), strict=True)
        factors = [tuple(torch.cat(sides, 1) for sides in zip(*pair, strict=True)) for pair in both]
        return low_ranks([(u, v) for u, v in factors], [2 * self.rank(first)] * len(first), self.rank(first))[0]

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

    def negated(self, rows: Tensor) -> Tensor:
        return self.joined([(-u, v) for u, v in self.factors(rows)])

    def products(self, rows: Tensor, queries: Tensor) -> Tensor:
        """Ranks may differ. Cost: both ranks * (left + right) multiply-adds per row, query and part."""
        total = rows.new_zeros(len(rows), len(queries))
        for (u, v), (a, b) in zip(self.factors(rows), self.factors(queries), strict=True):
            for query in range(len(queries)):
                total[:, query] += ((u @ a[query].t()) * (v @ b[query].t())).sum((1, 2))
        return total


# ---------------------------------------------------------------- arithmetic of outer products

Factors = tuple[
    Tensor, Tensor
]  # left [rows, positions, l] and right [rows, positions, r]: zero behind a row's positions


def low_ranks(factors: Sequence[Factors], counts: Sequence[int], rank: int) -> tuple[Tensor, Tensor]:
    """Rows [rows, rank * (left + right) of all parts] of parts with these factors, as `low_rank` gives them, and the squared
    lengths [rows, parts] of their outer products. `counts`: positions of each row.

    On a CPU one by one, elsewhere all together.
    """
    if factors[0][0].device.type == "cpu" or max(counts) > LONGEST:
        pieces = [[(left[row, :n], right[row, :n]) for left, right in factors] for row, n in enumerate(counts)]
        rows = torch.stack([torch.cat([low_rank(*both, rank) for both in parts]) for parts in pieces])
        return rows, torch.stack([torch.stack([squared_length(*both) for both in parts]) for parts in pieces])
    return _all_low_ranks(factors, rank)


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
    if not len(left):
        return left.new_zeros(rank * (left.shape[1] + right.shape[1]))
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


LONGEST = 2048  # positions up to which rows are computed together: their inner products are in memory
TOGETHER = 4  # rounds for them, with MORE columns: factors of SmolLM2 within 4e-5 of their exact forms
# Of what is decomposed, in units of the largest it can be: well above rounding, as a device does not say whether it failed.
DAMPING = 1e-13


def _all_low_ranks(factors: Sequence[Factors], rank: int) -> tuple[Tensor, Tensor]:
    """By subspace iteration among the positions, where the parts are of one size: of left^T right all that takes part is
    the inner products of its rows, gram_left and gram_right, and u = left^T x and v = right^T y for x, y [positions, columns].

    Each round takes x to gram_right gram_left x, and makes vectors orthonormal by a Cholesky factor of their inner products:
    R^T y for y = gram_left x, then L^T x for x = gram_right y.
    All of it is float64: inner products in float32 of vectors that are much alike are no longer those of any vectors. Nothing
    is asked of the device but by the last step, `_eigenvectors`; what rounding spoiled nevertheless is not a number.
    """
    n_rows, positions = factors[0][0].shape[:2]
    grams = _inner_products(factors)
    squares = (grams[0] * grams[1]).sum((2, 3))
    finite = squares < torch.inf
    left, right = grams.masked_fill_(~finite[:, :, None, None], 0.0).flatten(1, 2)
    sizes = torch.where(finite, squares, 0.0).flatten()
    columns = min(rank + MORE, positions)
    one, start = _constants(rank + MORE, left.device)
    one = (sizes + 1e-300)[:, None, None] * one[:columns, :columns]
    y = left @ start[:positions, :columns]
    damping = one * (left.diagonal(dim1=1, dim2=2).sum(1) + 1e-300)[:, None, None]  # the signs are not orthonormal
    beta = DAMPING * columns
    for gram in (right, left) * TOGETHER:
        upper = torch.linalg.cholesky_ex(torch.baddbmm(damping, y.mT, gram @ y, beta=beta))[0].mT
        x = torch.linalg.solve_triangular(upper, y, upper=True, left=False)
        y, damping, beta = gram @ x, one, DAMPING
    inner = y.mT @ (right @ y)
    sound = (inner.diagonal(dim1=1, dim2=2).sum(1) <= 1.001 * sizes) & finite.flatten()  # no more than there is
    values, vectors = _eigenvectors(torch.where(sound[:, None, None], inner, 0.0))
    s = values.flip(1)[:, :rank].clamp_min(0).sqrt()
    s = torch.where(s > 1e-7 * s[:, :1], s, 0.0).masked_fill(~sound[:, None], torch.nan)
    inverse = torch.where(s <= 0, 0.0, 1 / s)
    chosen = torch.stack([x, y], 1) @ vectors.flip(2)[:, None, :, :rank]
    by = chosen * torch.stack([s, inverse], 1).sqrt()[:, :, None]
    by = by.to(factors[0][0].dtype).unflatten(0, (len(factors), n_rows))
    rows = by.new_zeros(n_rows, rank * sum(x.shape[2] for both in factors for x in both))
    at = 0
    for part, pair in enumerate(factors):
        for side, x in enumerate(pair):
            end = at + by.shape[-1] * x.shape[2]  # triples that are not there stay zero, behind the others
            torch.bmm(by[part, :, side].mT, x, out=rows[:, at:end].unflatten(1, (by.shape[-1], x.shape[2])))
            at += rank * x.shape[2]
    return rows, squares.t().to(rows.dtype)


def _inner_products(factors: Sequence[Factors]) -> Tensor:
    """Inner products [sides, parts, rows, positions, positions] of the positions' vectors; one factor of several parts once."""
    n_rows, positions, _ = factors[0][0].shape
    grams = factors[0][0].new_empty(2, len(factors), n_rows, positions, positions, dtype=torch.float64)
    known: dict[int, Tensor] = {}
    for part, pair in enumerate(factors):
        for side, x in enumerate(pair):
            if id(x) in known:
                grams[side, part].copy_(known[id(x)])
            else:
                wide = x.double()
                known[id(x)] = torch.bmm(wide, wide.mT, out=grams[side, part])
    return grams


@functools.lru_cache(8)
def _constants(columns: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The identity, and where iterations begin, for up to so many columns and `LONGEST` positions."""
    one, start = torch.eye(columns, dtype=torch.float64), _start(LONGEST, columns).double()
    return one.to(device), start.to(device)


def _eigenvectors(symmetric: Tensor) -> tuple[Tensor, Tensor]:
    """Of matrices [matrices, size, size], as `eigh` gives them: the one place where a batch of rows waits for its device."""
    if symmetric.device.type == "cpu" or BATCHED:
        return torch.linalg.eigh(symmetric)
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # torch lets other threads run meanwhile
        found = list(pool.map(torch.linalg.eigh, symmetric.cpu().tensor_split(os.cpu_count() or 1)))
    values, vectors = (torch.cat([one[which] for one in found]) for which in range(2))
    return values.to(symmetric.device), vectors.to(symmetric.device)


# Before torch 2.12 matrices of more than 32 columns were decomposed one after the other on a CUDA device, 1.8 ms each
# (issue 174674 of PyTorch); a core of the host takes .5 ms for one of 88.
BATCHED = tuple(int(number) for number in torch.__version__.split(".")[:2]) >= (2, 12)


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
