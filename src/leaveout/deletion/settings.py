"""How measurements are made; nothing here changes what they mean."""

from __future__ import annotations

from dataclasses import dataclass

from leaveout.errors import require_whole
from leaveout.executor import Crew

JETS_TOGETHER, RUNS_TOGETHER = 128, 256
"""Directions and retrainings of one task, at most: what a kill can lose, and what one transaction holds."""


@dataclass(frozen=True)
class MeasureSettings(Crew):
    """How measurements are made, and by whom (`Crew`).

    memory    bytes for all of them together (default half of what is free where each one runs)
    seed      of random designs; sizes: sizes of random sets, in turn (default: log-uniform up to 30 % of the units)
    dtype     of jets: complex64 or complex128 (default: the recipe's precision)
    real      jets along real orthogonal directions: half the cost, one number an order, at most as many as units
    check     refuse a recipe whose power series grow (see `leaveout doctor`) before jets are bought
    """

    memory: int | None = None
    seed: int = 0
    sizes: tuple[int, ...] = ()
    dtype: str | None = None
    real: bool = False
    check: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require_whole("seed", self.seed, 0)
        if self.memory is not None:
            require_whole("memory", self.memory, 1)
        if self.dtype not in (None, "complex64", "complex128"):
            raise ValueError(f"dtype must be complex64 or complex128, got {self.dtype!r}")
        if any(size < 1 for size in self.sizes):
            raise ValueError(f"sizes of random sets must be at least 1, got {list(self.sizes)}")
