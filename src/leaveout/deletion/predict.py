"""What a model would be without some of its data: predictions with standard deviations, and curves."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from leaveout.errors import needs

UNCERTAIN = "cannot tell from zero"
NEVER = "never trained on"


@dataclass(frozen=True)
class Prediction:
    """Predicted values of queries without deletion sets.

    base     values under the model trained on everything [query, set]
    effect   predicted change [query, set], in the unit of the query (nats for a loss; positive: the loss rises)
    std      its standard deviation [query, set], times `factor`, the calibration by held-out retrainings
    actual   values of really retrained models [query, set], if there are any
    untrained   the units of each set that are in no step: nothing changes without them
    measured whether a set was measured before it was predicted [set], so that its actual value proves nothing
    """

    queries: tuple[str, ...]
    without: tuple[str, ...]
    base: np.ndarray
    effect: np.ndarray
    std: np.ndarray
    estimator: str
    factor: float = 1.0
    actual: np.ndarray | None = field(default=None)
    untrained: tuple[tuple[str, ...], ...] = ()
    never: tuple[bool, ...] = ()  # sets of nothing but such units
    measured: np.ndarray | None = field(default=None)

    @property
    def mean(self) -> np.ndarray:
        """Predicted values [query, set]."""
        return self.base + self.effect

    @property
    def uncertain(self) -> np.ndarray:
        """Where the 95 % interval of the effect holds zero [query, set]."""
        return np.abs(self.effect) < 1.959964 * self.std

    def interval(self, level: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
        """Lower and upper end of the central interval of the predicted value, both [query, set]."""
        from statistics import NormalDist

        if not 0 < level < 1:
            raise ValueError(f"level must be between 0 and 1, got {level}")
        reach = NormalDist().inv_cdf((1 + level) / 2) * self.std
        return self.mean - reach, self.mean + reach

    def lines(self) -> Iterator[dict[str, Any]]:
        """One JSON object per query and deletion set; an unknown standard deviation is null."""
        low, high = self.interval()
        for i, query in enumerate(self.queries):
            for j, without in enumerate(self.without):
                known, never = bool(np.isfinite(self.std[i, j])), bool(self.never and self.never[j])
                line: dict[str, Any] = {
                    "query": query, "without": without, "base": float(self.base[i, j]),
                    "predicted": float(self.mean[i, j]), "effect": float(self.effect[i, j]),
                    "std": 0.0 if never else float(self.std[i, j]) if known else None, "estimator": self.estimator,
                    "verdict": NEVER if never else UNCERTAIN if self.uncertain[i, j]
                    else "rises" if self.effect[i, j] > 0 else "falls",
                }  # fmt: skip
                if self.untrained and self.untrained[j]:
                    line["never_trained_on"] = list(self.untrained[j])
                if self.actual is not None:
                    actual = float(self.actual[i, j])
                    line |= {"actual": actual, "inside": bool(low[i, j] <= actual <= high[i, j]) if known else None}
                    line |= {"already_measured": self.measured is not None and bool(self.measured[j])}
                yield line


@dataclass(frozen=True)
class Curve:
    """A prediction at shares [points] removed of one deletion set; `prediction` has one column a share."""

    without: str
    shares: np.ndarray
    prediction: Prediction


def require_plots() -> None:
    """Raises: UnsupportedError without matplotlib (extra `plots`)."""
    needs("matplotlib", "A curve", extra="plots")


def draw_curves(curves: list[Curve], path: Path) -> None:
    """A picture of the curves with their 95 % bands: one panel per query, at most eight.

    Raises: UnsupportedError without matplotlib (extra `plots`).
    """
    require_plots()
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    queries = curves[0].prediction.queries[:8]
    figure, axes = pyplot.subplots(1, len(queries), figsize=(3.4 * len(queries), 3), squeeze=False)
    for i, (panel, query) in enumerate(zip(axes[0], queries, strict=True)):
        for curve in curves:
            low, high = curve.prediction.interval()
            panel.plot(curve.shares, curve.prediction.mean[i], label=curve.without)
            panel.fill_between(curve.shares, low[i], high[i], alpha=0.2, linewidth=0)
        panel.set(xlabel="share removed", title=query if len(query) < 40 else query[:39] + "…")
    axes[0][0].set_ylabel("value of the query")
    axes[0][0].legend(fontsize="small", frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
