"""How measurements are made, and the numbers that estimators work on: what a bank knows about given queries."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from leaveout.errors import require_whole
from leaveout.executor import Crew

JETS_TOGETHER, RUNS_TOGETHER = 128, 256
"""Directions and retrainings of one task on a CPU, at most: what a kill can lose, and what one transaction holds."""
ON_DEVICE, ANSWER = 4096, 2**30
"""Of both on a GPU, where a step takes as long for few as for many; and bytes that one task gives back there."""


@dataclass(frozen=True)
class MeasureSettings(Crew):
    """How measurements are made, and by whom (`Crew`); nothing here changes what they mean.

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


def task_size(most: int, device: torch.device, each: int) -> int:
    """How many measurements make a task: on a CPU `most`; on a GPU more, as many as ANSWER holds at so many bytes each."""
    return most if device.type == "cpu" else max(most, min(ON_DEVICE, ANSWER // each))


@dataclass(frozen=True)
class JetBlock:
    """Jet runs of one degree.

    psi [m, units] complex128, c [degree, m, queries] complex128 (plain coefficients of z, z^2, ...); real: the
    directions are real, so that imaginary parts say nothing.
    """

    psi: np.ndarray
    c: np.ndarray
    real: bool = False

    @property
    def degree(self) -> int:
        return len(self.c)


@dataclass(frozen=True)
class Retrainings:
    """Retrained models: deletion vectors x [n, units] and effects y [n, queries], value minus base; the design of each."""

    x: np.ndarray
    y: np.ndarray
    kinds: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.x)

    def take(self, rows: Any) -> Retrainings:
        kinds = tuple(np.array(self.kinds)[rows].tolist()) if self.kinds else ()
        return Retrainings(self.x[rows], self.y[rows], kinds)

    def without(self, other: Retrainings) -> Retrainings:
        """Those whose deletion vectors another has not."""
        known = {row.tobytes() for row in np.ascontiguousarray(other.x)}
        return self.take(np.array([row.tobytes() not in known for row in np.ascontiguousarray(self.x)], bool))


@dataclass(frozen=True)
class NewRuns:
    """Models trained anew: deletion vectors x [n, units], values (not effects) y [n, queries], the seed of each order [n]."""

    x: np.ndarray
    y: np.ndarray
    seeds: np.ndarray


@dataclass(frozen=True)
class Measurements:
    """All that is known about some queries.

    base      values of the queries under the model trained on everything [queries]
    sizes     number of examples of each unit [units]
    jets, retrainings; heldout: retrainings kept for calibration; `posterior` learns from them after it
    noise     standard deviation of one retraining's value per query [queries]: 0 where training is deterministic
    gradient  exact first-order effects [queries, units], if they were computed
    scores    cheap scores [queries, units] in the direction of the effects, if any; their scale does not matter
    features  [units, k]: units with similar rows are expected to have similar effects
    """

    base: np.ndarray
    sizes: np.ndarray
    jets: tuple[JetBlock, ...] = ()
    retrainings: Retrainings = field(default_factory=lambda: Retrainings(np.zeros((0, 0)), np.zeros((0, 0))))
    heldout: Retrainings = field(default_factory=lambda: Retrainings(np.zeros((0, 0)), np.zeros((0, 0))))
    noise: np.ndarray | None = None
    gradient: np.ndarray | None = None
    scores: np.ndarray | None = None
    features: np.ndarray | None = None

    @property
    def units(self) -> int:
        return len(self.sizes)

    @property
    def measured(self) -> bool:
        """Whether there is anything that an estimator is fitted to."""
        return bool(self.jets) or len(self.retrainings) > 0 or self.gradient is not None

    def with_heldout(self) -> Measurements:
        """The same with the held-out retrainings among those that are fitted."""
        both = [r for r in (self.retrainings, self.heldout) if len(r)]
        joined = Retrainings(np.concatenate([r.x for r in both]), np.concatenate([r.y for r in both]))
        return replace(self, retrainings=joined, heldout=Retrainings(np.zeros((0, self.units)), joined.y[:0]))


def gathered(parts: list[tuple[Any, ...]], base: np.ndarray, trained: np.ndarray) -> Retrainings:
    """All retrainings of one role, each deletion vector once: it may have been measured for other queries as well.

    trained  bool [units]; the others are in no step, so that a vector says nothing about them, and one of them alone nothing
    """
    if not parts:
        return Retrainings(np.zeros((0, 0)), np.zeros((0, len(base))))
    x, y = np.concatenate([p[1] for p in parts]) * trained, np.concatenate([p[2] for p in parts])
    _, first = np.unique(x, axis=0, return_index=True)
    first.sort()
    first = first[x[first].any(1)]
    kinds: list[str] = [kind for p in parts for kind in p[3]]
    return Retrainings(x[first], y[first] - base, tuple(kinds[i] for i in first))


def distinct(blocks: list[JetBlock]) -> tuple[JetBlock, ...]:
    """Each direction once, at its highest degree."""
    seen: set[bytes] = set()
    out = []
    for block in sorted(blocks, key=lambda b: -b.degree):
        names = [row.tobytes() for row in block.psi]
        new = [i for i, name in enumerate(names) if name not in seen]
        seen |= set(names)
        if new:
            out.append(JetBlock(block.psi[new], block.c[:, new], block.real))
    return tuple(out)
