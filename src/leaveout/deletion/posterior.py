"""The posterior: a Gaussian process over jet coefficients and retrainings together (docs/explanation/methods.md).

The effect of a deletion x is f(x) = beta m(x) + sum over orders of A_r(x) with the prior covariance of a kernel. A jet
along psi measures the complex numbers A_r(psi) one order at a time, a retraining the real sum. One factorisation of the
Gram matrix of all measurements serves all queries; queries differ by their scale tau_q.
"""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from leaveout.deletion.directions import FEW, different, halved
from leaveout.deletion.kernels import ORDERS, FewUnits, Kernel, ManyUnits, similar_units
from leaveout.deletion.measurements import JetBlock, Measurements
from leaveout.errors import UnsupportedError

JET_NUGGET = 1e-6
"""Variance of a jet coefficient's own error, relative to its prior variance: rounding in complex64."""
NUGGET = 1e-4
"""Variance of a retraining's own error, relative to the prior variance of one unit's first order, at least."""
KNOWN = 1e-3
"""Prior variance of the first order when it is known exactly, instead of 1: its own error in single precision."""
SECOND, SQUARES = 5e-3, 2e-3
"""Of the kernel of many units where the first order is known: what pairs do together, and each unit by itself where
retrainings tell of it (found on digits and names, see benchmarks/LOG.md)."""
CONCENTRATED = 16.0
"""Relative error that is added for a set which removes all that helps a query, falling with the cube of that share
(found on names, see docs/evidence/deletion.md)."""
WHOLE = 8
"""A set that contains this share of a retrained one bends as that did by this power of the share (found on digits and cnn)."""
WITH_HALVES, MOST_SETS = 300, 1500
"""Deletion sets among which the most telling ones are looked for, with halves and without, at most."""
LARGEST = 12_000
"""Measurements in one Gram matrix: 1.2 GB in float64."""
BLOCK = 1024
"""Rows of it that misfits are added to at a time."""


def default_kernel(sizes: np.ndarray, features: np.ndarray | None, exact: bool = False, alone: bool = False) -> Kernel:
    """Subsets for few units, similar units by their features for many; `exact`: the first order is known already; `alone`: and
    nothing else, so that a wide guess of what bends stays.

    sizes [units]: examples of each unit; features [units, k]: see `Measurements`.
    """
    if len(sizes) <= FEW:
        return FewUnits(sizes, first=KNOWN if exact else 1.0)
    similar = similar_units(features, len(sizes))
    if not exact:
        return ManyUnits(*similar)
    return ManyUnits(*similar, first=KNOWN, second=SECOND, **({} if alone else {"squares": SQUARES}))


@dataclass(frozen=True)
class _Rows:
    """Measurements of one kind: jets of one block at one order (part real or imaginary), or retrainings (order 0)."""

    points: np.ndarray
    order: int
    part: str = "real"


class Posterior:
    """Mean and standard deviation of effects given all measurements; see the module.

    kernel: default `default_kernel`; degree: highest order of jets that is used, default all that the kernel knows.
    misfit: what the kernel does not know of a retraining, over the prior variance of one unit's first order, of all or of each
    [retrainings]; the larger, the less is told from one set to others, while a set that was retrained itself is as it was. What
    the kernel does not know of a set, it does again where that set goes with others: a union has it of all its parts.
    The scores of the data are a prior mean beta * x . scores, with beta found from the data; an exact first order is
    the mean itself, and may be all that is known.
    Memory: 24 bytes times the square of the number of real measurements, at most LARGEST of them.
    """

    def __init__(
        self,
        data: Measurements,
        kernel: Kernel | None = None,
        degree: int | None = None,
        misfit: float | np.ndarray = 0.0,
    ) -> None:
        if degree is not None:
            data = replace(data, jets=tuple(JetBlock(b.psi, b.c[:degree], b.real) for b in data.jets))
        alone = not len(data.retrainings) and not data.jets
        self.kernel = kernel or default_kernel(data.sizes, data.features, data.gradient is not None, alone)
        self._rows = [rows for block in data.jets for rows in _rows_of(block)]
        if len(data.retrainings) or not self._rows:
            self._rows.append(_Rows(data.retrainings.x.reshape(-1, data.units), 0))
        count = self._count = sum(len(r.points) for r in self._rows)
        if not count and data.gradient is None:
            raise UnsupportedError("`posterior` needs measurements: buy some with `measure` (`plan` says which).")
        if count > LARGEST:
            raise UnsupportedError(f"`posterior` can use {LARGEST:,} numbers, the bank has {count:,}: lower `degree`.")
        self._gram = _gram(self.kernel, self._rows)
        self._y = _targets(data)
        self._gradient = data.gradient
        slope = data.gradient if data.gradient is not None else data.scores
        self._slope = np.zeros((len(data.base), data.units)) if slope is None else np.asarray(slope, np.float64)
        self._helps: np.ndarray | None
        self._noise = None if data.noise is None or not len(data.retrainings) else data.noise
        self._retrained = np.asarray(data.retrainings.x, np.float64)
        self._curved = replace(self.kernel, first=0.0) if isinstance(self.kernel, ManyUnits | FewUnits) else self.kernel
        self._settle(misfit)

    def with_misfit(self, misfit: float | np.ndarray) -> Posterior:
        """The same with another misfit."""
        _ = self._bends  # which the other has, too
        other = copy.copy(self)
        other._settle(misfit)
        return other

    def _settle(self, misfit: float | np.ndarray) -> None:
        self.misfit, self._helps = np.broadcast_to(np.asarray(misfit, np.float64), len(self._retrained)), None
        self._fit(NUGGET)
        if self._noise is not None and (self._noise > 0).any():
            scale = np.median(self._noise**2 / np.maximum(self.tau, 1e-300))
            self._fit(max(NUGGET, float(scale)))
        if isinstance(self.kernel, ManyUnits):  # few units each hold a large share of every query's help
            self._helps = np.maximum(self.predict(np.eye(self._slope.shape[1]))[0], 0)

    def _fit(self, nugget: float) -> None:
        matrix = self._gram.copy()
        matrix[np.diag_indices_from(matrix)] += _own_error(self._rows, self._gram, nugget)
        if self.misfit.any():
            bends, first = self._bends, self._count - len(self.misfit)
            for start in range(0, len(bends), BLOCK):
                rows = slice(first + start, min(first + start + BLOCK, self._count))
                matrix[rows, first:] += (bends[start : start + BLOCK] * self.misfit) @ bends.T
        try:
            self._lower = np.linalg.cholesky(matrix)
        except np.linalg.LinAlgError:
            matrix[np.diag_indices_from(matrix)] += 1e-6 * np.trace(matrix) / len(matrix)
            self._lower = np.linalg.cholesky(matrix)
        if not self._count:  # the scale of the first order foretells that of the rest
            self.beta, self.tau, self._dual = 1.0, (self._slope**2).mean(1), self._y
            return
        shape = np.stack([_apply(self._rows, row) for row in self._slope], 1)  # [measurements, queries]
        white_y = _solved(self._lower, self._y)
        white_m = _solved(self._lower, shape)
        self.beta = 1.0 if self._gradient is not None else _shared_slope(white_y, white_m)
        residual = white_y - self.beta * white_m
        self.tau = (residual**2).mean(0)
        self._dual = _solved(self._lower.T, residual, upper=True)

    def predict(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean effect and standard deviation, both [queries, sets]."""
        mean, variance, left = self._gaussian(x)
        if self._helps is None:
            return mean, np.sqrt(variance)
        # A set that removes most of what helps a query bends its effect more than any prior over units foresees.
        extra = CONCENTRATED * np.abs(self.share(x)) ** 3 * np.abs(mean) * self._open(x, left)[None]
        return mean, np.sqrt(variance + extra**2)

    def predict_unbent(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The same where something else says how far strong sets bend: intervals are not widened for them."""
        mean, variance, _ = self._gaussian(x)
        return mean, np.sqrt(variance)

    def _gaussian(self, x: np.ndarray, first: int | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Mean and variance [queries, sets], and the part [sets] of the prior variance that is left by the first measurements.

        first: so many of them, all by default
        """
        sets = _Rows(x, 0)
        cross = np.concatenate([_covariance(self.kernel, rows, sets) for rows in self._rows])
        prior, known = self.kernel.diagonal(x), self._count if first is None else first
        if self.misfit.any():
            heard = self._within(x) * (np.arange(len(self.misfit)) < known - (self._count - len(self.misfit)))
            cross[-len(self.misfit) :] += self._bends @ (heard * self.misfit).T
            prior = prior + np.square(heard) @ self.misfit
        mean = self.beta * (self._slope @ x.T) + self._dual.T @ cross
        # A factor of the first rows is the first rows of the factor.
        told = (_solved(self._lower, cross)[:known] ** 2).sum(0)
        left = np.clip(prior - told, 0, None)
        return mean, self.tau[:, None] * left[None], left

    @functools.cached_property
    def _bends(self) -> np.ndarray:
        """How far each retrained set bends as another did [retrainings, retrainings]."""
        return self._within(self._retrained)

    def _within(self, x: np.ndarray) -> np.ndarray:
        """How far sets bend as each retrained one did [sets, retrainings]: 1 for those that contain it."""
        lengths = np.maximum(np.square(self._retrained).sum(1), 1e-300)
        return np.clip(x @ self._retrained.T / lengths, 0, 1) ** WHOLE

    def share(self, x: np.ndarray) -> np.ndarray:
        """Share of what helps each query that sets remove [queries, sets]; 0 for few units, whose kernel knows their sets."""
        if self._helps is None:
            return np.zeros((len(self._slope), len(x)))
        return (self._helps @ x.T) / np.maximum(self._helps.sum(1, keepdims=True), 1e-300)

    def unknown(self, x: np.ndarray) -> np.ndarray:
        """What is open of the effect of each set beyond its first order [sets]: 0 where it was measured, 1 at most."""
        return self._open(x, self._gaussian(x)[2])

    @property
    def exact(self) -> bool:
        """Whether the first order is known exactly."""
        return self._gradient is not None

    def left_out(self, n: int) -> np.ndarray:
        """Errors of each of the last n retrainings, were it foretold by all other measurements [queries, n]."""
        last = np.arange(self._count - n, self._count)
        inverse = np.square(_solved(self._lower, np.eye(self._count)[:, last])).sum(0)
        return self._dual[last].T / inverse

    def before_last(self, x: np.ndarray, n: int) -> np.ndarray:
        """How many times as large deviations were before the last n retrainings [sets]."""
        _, _, left = self._gaussian(x)
        _, _, more = self._gaussian(x, self._count - n)
        return np.sqrt(more / np.maximum(left, 1e-300))

    def _open(self, x: np.ndarray, left: np.ndarray) -> np.ndarray:
        return np.sqrt(np.minimum(1, left / np.maximum(self._curved.diagonal(x), 1e-300)))


def _solved(triangle: np.ndarray, right: np.ndarray, upper: bool = False) -> np.ndarray:
    """The solution of a triangular system."""
    a, b = torch.from_numpy(np.ascontiguousarray(triangle)), torch.from_numpy(np.ascontiguousarray(right))
    return torch.linalg.solve_triangular(a, b, upper=upper).numpy()


def expected_error(
    kernel: Kernel, jets: list[tuple[np.ndarray, int]], x: np.ndarray, sets: np.ndarray, nugget: float = NUGGET
) -> np.ndarray:
    """Standard deviation left by planned measurements, relative to that of the effect itself: [sets].

    jets: (directions psi [m, units], degree); x: planned retrainings [n, units]; nugget: variance of a retraining's own
    error over that of one unit's effect. Needs no measured value.
    """
    blocks = [JetBlock(psi, np.zeros((degree, len(psi), 1))) for psi, degree in jets]
    rows = [r for block in blocks for r in _rows_of(block)] + ([_Rows(x, 0)] if len(x) else [])
    prior = kernel.diagonal(sets)
    if not rows:
        return np.ones(len(sets))
    gram = _gram(kernel, rows)
    gram[np.diag_indices_from(gram)] += _own_error(rows, gram, nugget)
    cross = np.concatenate([_covariance(kernel, r, _Rows(sets, 0)) for r in rows])
    known = (cross * np.linalg.solve(gram, cross)).sum(0)
    return np.sqrt(np.clip(1 - known / prior, 0, 1))


def telling(x: np.ndarray, n: int, kernel: Kernel, seed: int = 0) -> np.ndarray:
    """Of sets x [sets, units], and of halves of them, the n whose retraining says most about all of x: [at most n, units].

    They are chosen one after the other, each where the mean deviation that is left, relative to that of the effect itself,
    falls most; that takes no measured value. Of more than WITH_HALVES sets no halves are tried.
    Raises: ValueError for more than MOST_SETS.
    """
    if len(x := different(x[x.any(1)])) > MOST_SETS:  # of a set of nothing all is known
        raise ValueError(
            f"there are {len(x):,} sets to choose from, and at most {MOST_SETS:,} can be compared: name fewer"
        )
    tried = different(np.concatenate([x, halved(x, seed) if len(x) <= WITH_HALVES else x[:0]]))  # which begins with x
    left, prior = _covariance(kernel, _Rows(tried, 0), _Rows(tried, 0)), kernel.diagonal(x)
    chosen: list[int] = []
    while len(chosen) < min(n, len(tried)):
        own, cross = np.diag(left) + NUGGET, left[:, : len(x)]
        after = np.sqrt(np.maximum(np.diag(left)[: len(x)] - cross**2 / own[:, None], 0) / prior).mean(1)
        after[chosen] = np.inf
        chosen.append(best := int(after.argmin()))
        left -= np.outer(left[best], left[best]) / own[best]
    return tried[chosen]


def _own_error(rows: list[_Rows], gram: np.ndarray, nugget: float) -> np.ndarray:
    """Variance of each measured number's own error, [measurements]."""
    retraining = np.concatenate([np.full(len(r.points), r.order == 0) for r in rows])
    return np.where(retraining, nugget, JET_NUGGET * np.diag(gram)) + 1e-10 * np.trace(gram) / max(1, len(gram))


def _rows_of(block: JetBlock) -> list[_Rows]:
    orders = range(1, min(block.degree, ORDERS) + 1)
    parts = ("real",) if block.real else ("real", "imaginary")
    return [_Rows(block.psi, r, part) for r in orders for part in parts]


def _targets(data: Measurements) -> np.ndarray:
    """The measured numbers [measurements, queries], in the order of the rows."""
    out: list[np.ndarray] = []
    for block in data.jets:
        for r in range(min(block.degree, ORDERS)):
            out.append(block.c[r].real)
            if not block.real:
                out.append(block.c[r].imag)
    if len(data.retrainings) or not out:
        out.append(data.retrainings.y.reshape(-1, len(data.base)))
    return np.concatenate(out)


def _apply(rows: list[_Rows], slope: np.ndarray) -> np.ndarray:
    """The linear function x . slope at every measurement: jets see it at order 1 only."""
    out = []
    for r in rows:
        value = r.points @ slope if r.order <= 1 else np.zeros(len(r.points))
        out.append(np.imag(value) if r.part == "imaginary" else np.real(value))
    return np.concatenate(out)


def _shared_slope(white_y: np.ndarray, white_m: np.ndarray) -> float:
    """Generalised least squares for one beta of all queries, each weighted by its own scale."""
    if not (white_m**2).sum() > 0:
        return 0.0
    weight = 1 / np.maximum((white_y**2).mean(0), 1e-300)
    return float((weight * white_y * white_m).sum() / (weight * white_m**2).sum())


def _gram(kernel: Kernel, rows: list[_Rows]) -> np.ndarray:
    blocks: list[list[Any]] = [[None] * len(rows) for _ in rows]
    for i, a in enumerate(rows):
        for j in range(i, len(rows)):
            blocks[i][j] = _covariance(kernel, a, rows[j])
            blocks[j][i] = blocks[i][j].T
    return np.block(blocks)


def _covariance(kernel: Kernel, a: _Rows, b: _Rows) -> np.ndarray:
    """Prior covariance [len a, len b] of two kinds of measurements."""
    if a.order and b.order and a.order != b.order:
        return np.zeros((len(a.points), len(b.points)))
    order = a.order or b.order

    def part(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        orders = kernel.orders(x, y)
        if order > len(orders):
            return np.zeros((len(x), len(y)))
        return np.asarray(orders[order - 1] if order else sum(orders[1:], orders[0]))

    plain = part(a.points, b.points)
    if a.order == 0 or b.order == 0:
        return np.imag(plain) if "imaginary" in (a.part, b.part) else np.real(plain)
    barred = part(a.points, np.conj(b.points))
    if a.part == b.part:
        return np.real(barred + plain) / 2 if a.part == "real" else np.real(barred - plain) / 2
    # cov(Re f, Im g) = Im[k(x, y) - k(x, y~)] / 2, and the same with the roles of the two exchanged.
    return np.imag(plain - barred) / 2 if a.part == "real" else np.imag(plain + barred) / 2
