"""From the effect in the same run to the mean effect over new ones."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from leaveout.deletion.measurements import Retrainings
from leaveout.deletion.noise import RunNoise


@dataclass(frozen=True)
class Shift:
    slope: float
    apart: np.ndarray

    def shifted(self, x: np.ndarray, effect: np.ndarray, std: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self.slope * effect, np.hypot(self.slope * std, self.apart[:, None] * np.abs(effect))


def fit_shift(held: Retrainings, effect: np.ndarray, std: np.ndarray, noise: RunNoise) -> Shift:
    return Shift(1.0, np.zeros(len(noise.mean)))
