"""How measurements are made; nothing here changes what they mean."""

from __future__ import annotations

from dataclasses import dataclass

JETS_TOGETHER, RUNS_TOGETHER = 128, 256
"""Directions and retrainings of one task, at most: what a kill can lose, and what one transaction holds."""


@dataclass(frozen=True)
class MeasureSettings:
    """How measurements are made.

    workers   processes, one torch thread each; memory: bytes for all of them together (default half of what is free)
    seed      of random designs; sizes: sizes of random sets, in turn (default: log-uniform up to 30 % of the units)
    dtype     of jets: complex64 or complex128 (default: the recipe's precision)
    check     refuse a recipe whose power series grow (see `leaveout doctor`) before jets are bought
    """

    workers: int = 1
    memory: int | None = None
    seed: int = 0
    sizes: tuple[int, ...] = ()
    dtype: str | None = None
    check: bool = True
    progress: bool = False
