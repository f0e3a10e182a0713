"""How far off an estimator is on retrainings that were held out, and what that says of the intervals of other sets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from leaveout.deletion.measurements import Measurements

LEVEL = 0.95
LEAST_FACTOR = 1.0
"""A few held-out sets are no reason to make intervals narrower than the prior says (docs/explanation/deletion.md)."""


@dataclass(frozen=True)
class Calibration:
    """What held-out retrainings say of the standard deviations of one estimator.

    sets    how many were held out, each with all queries
    scale   what all standard deviations are multiplied by
    """

    sets: int = 0
    scale: float = 1.0

    def factor(self, x: np.ndarray, mean: np.ndarray, std: np.ndarray) -> np.ndarray:
        """What the standard deviations of predictions are multiplied by [queries, sets].

        x [sets, units]: deletion vectors; mean, std [queries, sets]: the estimator's own predictions of them
        """
        return np.full(mean.shape, self.scale)

    def outside(self, x: np.ndarray, mean: np.ndarray) -> np.ndarray:
        """Whether a set is larger, more alike, or takes more of a query's help than all that were held out [queries, sets].

        Nowhere where nothing was held out.
        """
        return np.zeros(mean.shape, bool)


def calibrate(data: Measurements, fitted: Any) -> Calibration:
    """What the held-out retrainings of the data, to which `fitted` was not fitted, say of its standard deviations.

    Nothing without held-out retrainings, or where a standard deviation is unknown.
    """
    if not len(data.heldout):
        return Calibration()
    mean, std = fitted.predict(data.heldout.x)
    if not np.isfinite(std).all():
        return Calibration()
    z = np.abs(data.heldout.y.T - mean) / np.maximum(std, 1e-300)
    return Calibration(len(data.heldout), max(LEAST_FACTOR, float(np.quantile(z, LEVEL) / 1.959964)))
