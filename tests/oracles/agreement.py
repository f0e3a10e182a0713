"""Oracles and tolerances that the tests of the jets engine share. None of them uses the series arithmetic."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

TOLERANCES = {
    # Coefficient k of a polynomial fit over |z| <= 0.1 loses a factor 10^k of the 1e-16 of double precision.
    "fit": 1e-7,
    # The roots-of-unity engine: asked for by issue 3; met with 4 digits to spare.
    "roots": 1e-8,
    # Two orders of the same double-precision operations.
    "exact": 1e-10,
    # The same in single precision, relative to the largest entry.
    "single": 1e-4,
}


def assert_close(actual: Tensor, wanted: Tensor, kind: str) -> None:
    """Largest difference over the largest wanted entry (or 1) must be below the tolerance of this kind."""
    assert actual.shape == wanted.shape, f"shape {tuple(actual.shape)}, wanted {tuple(wanted.shape)}"
    scale = max(1.0, float(wanted.abs().max())) if wanted.numel() else 1.0
    error = float((actual - wanted).abs().max()) / scale if wanted.numel() else 0.0
    assert error <= TOLERANCES[kind], f"difference {error:.2e}, tolerance {TOLERANCES[kind]:.0e} ({kind})"


def taylor_by_fit(f: Callable[[float], Tensor], degree: int, radius: float = 0.1, points: int = 14) -> Tensor:
    """Taylor coefficients 0..degree at 0 of a smooth function of a real number, by Chebyshev interpolation."""
    nodes = np.cos(np.pi * (np.arange(points) + 0.5) / points)
    values = np.array([f(radius * t).detach().double().numpy() for t in nodes])
    fit = np.polynomial.chebyshev.chebfit(nodes, values.reshape(points, -1), points - 1)
    basis = [np.polynomial.chebyshev.cheb2poly(row) for row in np.eye(points)]
    powers = sum(np.pad(row, (0, points - len(row)))[:, None] * c[None] for row, c in zip(basis, fit, strict=True))
    scaled = powers[: degree + 1] / radius ** np.arange(degree + 1)[:, None]
    return torch.from_numpy(scaled.reshape(degree + 1, *values.shape[1:]))
