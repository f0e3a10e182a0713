"""Intervals scaled by held-out retrainings."""

from __future__ import annotations

import numpy as np

from leaveout.deletion.calibration import calibrate
from leaveout.deletion.measurements import Measurements, Retrainings
from leaveout.deletion.posterior import Posterior

from .test_posterior import problem


def test_calibration_repairs_standard_deviations():
    data, kernel, x, y = problem(4, runs=40)

    class Overconfident:
        def __init__(self, inner):
            self.inner = inner

        def predict(self, sets):
            mean, std = self.inner.predict(sets)
            return mean, std / 5

    held = Measurements(**{**vars(data), "heldout": Retrainings(x[:16], y[:16])})
    fitted = Overconfident(Posterior(data, kernel))
    mean, std = fitted.predict(x[16:])
    factor = calibrate(held, fitted).factor(x[16:], mean, std).T
    assert 3 < np.median(factor) < 8
    assert (
        (np.abs(mean.T - y[16:]) < 1.96 * factor * std.T).mean()
        > 0.88
        > (np.abs(mean.T - y[16:]) < 1.96 * std.T).mean()
    )
    assert (calibrate(data, fitted).factor(x, *fitted.predict(x)) == 1.0).all()
