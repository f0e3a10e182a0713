"""What an evaluation measures, and what it costs."""

from __future__ import annotations

from dataclasses import dataclass, field

from leaveout.deletion.measurements import MeasureSettings
from leaveout.errors import require_whole


@dataclass(frozen=True)
class EvaluationSettings:
    """What truth is bought. Costs are retrainings; those that the bank has already cost nothing.

    subsets, removed   random sets of which a share is removed (the datamodels' 1 - alpha): `subsets` retrainings; 0: no LDS
    second_order       the same again with the next seed: twice the retrainings, half the noise, and a ceiling
    removal_queries    queries of the QLD, spread evenly over all: so many retrainings a method; 0: no QLD
    removal_share      share of all units that the QLD removes for a query; draws: random removals it compares with
    brittleness        queries whose answer should change, spread evenly over those that the model answers; 0: none
    brittleness_shares shares of all units that are removed for each of them: as many retrainings a query and method
    tail_patch         one training step on each of the `top` best units of a query: no retraining, see `tail_patch`
    top                k of the tail-patch and of the retrieval metrics, at most half of the units; None: 10, or that half
    seed, level        of random sets and of intervals
    """

    subsets: int = 100
    removed: float = 0.5
    second_order: bool = True
    removal_queries: int = 10
    removal_share: float = 0.05
    draws: int = 8
    brittleness: int = 0
    brittleness_shares: tuple[float, ...] = (0.01, 0.02, 0.05, 0.1, 0.2)
    tail_patch: bool = False
    top: int | None = None
    seed: int = 0
    level: float = 0.95
    measure: MeasureSettings = field(default_factory=MeasureSettings)

    def top_of(self, units: int) -> int:
        """k for a run with so many units. Raises: ValueError if `top` is more than half of them."""
        most = units // 2
        if most < 1:
            raise ValueError(f"the run has {units} unit: the best and the worst can be told apart from two on")
        if self.top is not None and not 1 <= self.top <= most:
            raise ValueError(f"top is {self.top}: give 1 to {most}, half the number of units")
        return min(10, most) if self.top is None else self.top

    def __post_init__(self) -> None:
        for name in ("subsets", "removal_queries", "draws", "brittleness", "seed"):
            require_whole(name, getattr(self, name), 0)
        for name in ("removed", "removal_share", "level"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: give a number between 0 and 1.")
        if not self.brittleness_shares or not all(0 < share < 1 for share in self.brittleness_shares):
            raise ValueError(f"wanted shares between 0 and 1 to remove, got {list(self.brittleness_shares)}")
