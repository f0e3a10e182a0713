"""Prior covariances of an effect as a polynomial in the deletion vector, order by order (docs/explanation/methods.md).

A kernel gives, for points x [n, units] and y [k, units], real or complex, one matrix [n, k] per order r: the covariance
of the order-r parts A_r(x) and A_r(y), bilinear (no conjugate). A retraining sees the sum over orders, a jet one each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

ORDERS = 4
"""Orders that kernels know; higher coefficients of jets are not used."""


class Kernel(Protocol):
    def orders(self, x: np.ndarray, y: np.ndarray) -> list[np.ndarray]: ...

    def diagonal(self, x: np.ndarray) -> np.ndarray:
        """Sum over orders of the prior variance at real points x: [n]."""
        ...


@dataclass(frozen=True)
class ManyUnits:
    """lin + s2 lin^2 + s3 lin^3 + d sum_i x_i^2 y_i^2, with lin a mixture of the identity and of similar units.

    directions [units, k] (orthonormal columns V) and shrunk [k] (w / (w + c)) come from `similar_units`; lin is scaled
    so that the mean variance of one unit's first order is `first`.
    """

    directions: np.ndarray
    shrunk: np.ndarray
    identity: float = 0.05
    second: float = 5e-4
    third: float = 3e-6
    squares: float = 0.2
    first: float = 1.0

    def orders(self, x: np.ndarray, y: np.ndarray) -> list[np.ndarray]:
        linear = self._linear(x, y)
        squares = self.squares * ((x**2) @ (y**2).T)
        return [self.first * linear, self.second * linear**2 + squares, self.third * linear**3]

    def diagonal(self, x: np.ndarray) -> np.ndarray:
        linear = (self._scaled(x) ** 2).sum(1) + self._own * (x**2).sum(1)
        return self.first * linear + self.second * linear**2 + self.third * linear**3 + self.squares * (x**4).sum(1)

    @property
    def _norm(self) -> float:
        return self.identity + float(self.shrunk.sum()) / len(self.directions)

    @property
    def _own(self) -> float:
        return self.identity / self._norm

    def _scaled(self, x: np.ndarray) -> np.ndarray:
        return (x @ self.directions) * np.sqrt(self.shrunk / self._norm)

    def _linear(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return self._own * (x @ y.T) + self._scaled(x) @ self._scaled(y).T


def unit_length(features: np.ndarray) -> np.ndarray:
    """Features of units [units, k], each of length 1; of nothing nothing."""
    return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-30)


def similar_units(features: np.ndarray | None, units: int, offset: float = 0.5) -> tuple[np.ndarray, np.ndarray]:
    """Directions V [units, k] and shrunk eigenvalues w / (w + offset) [k] of the cosines between units' features.

    Without features: no similarity (k = 0).
    """
    if features is None:
        return np.zeros((units, 0)), np.zeros(0)
    vectors, size, _ = np.linalg.svd(unit_length(np.asarray(features, np.float64)), full_matrices=False)
    eigenvalues = size**2
    good = eigenvalues > 1e-9 * eigenvalues[0]
    return vectors[:, good], eigenvalues[good] / (eigenvalues[good] + offset)


@dataclass(frozen=True)
class FewUnits:
    """Subsets of few units: power sums p_j = sum_i (g_i x_i y_i)^j, g_i = size_i / mean size.

    Elementary symmetric polynomials e_2, e_3, e_4 of g x y say which pairs, triples and quadruples act together; for
    deletions (x in {0, 1}) squares would repeat the first order, and get only the share `squares`, for jets.
    """

    sizes: np.ndarray
    second: float = 0.02
    third: float = 1e-3
    fourth: float = 1e-3
    squares: float = 0.05
    first: float = 1.0

    def orders(self, x: np.ndarray, y: np.ndarray) -> list[np.ndarray]:
        g = self.sizes / self.sizes.mean()
        p1, p2, p3, p4 = ((((g * x) ** j) @ (y**j).T) for j in range(1, 5))
        e2 = (p1**2 - p2) / 2
        e3 = (p1**3 - 3 * p1 * p2 + 2 * p3) / 6
        e4 = (p1**4 - 6 * p1**2 * p2 + 3 * p2**2 + 8 * p1 * p3 - 6 * p4) / 24
        return [
            self.first * p1,
            self.second * e2 + self.squares * p2,
            self.third * e3 + self.squares**2 * p3,
            self.fourth * e4 + self.squares**3 * p4,
        ]

    def diagonal(self, x: np.ndarray) -> np.ndarray:
        return np.array([sum(float(k[0, 0]) for k in self.orders(row[None], row[None])) for row in x])
