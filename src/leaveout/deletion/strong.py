"""Sets that remove most of what helps a query: what is said of them beside the posterior.

No prior over units foresees how far such a set bends an effect. Two things do: parts of the set that were retrained, which show
all but how the parts act together, and Gauss-Newton steps from the trained model (`newton`), which show that and need no
retraining. Where there are no parts, the steps' own effect is taken; where there are, the sum of the parts' effects plus what the
steps say of the whole less the parts.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from leaveout.deletion.measurements import Retrainings

STRONG = 0.4
"""Share of a query's help that a set must remove to be called strong; below it actual effects are about as predicted
(docs/evidence/deletion.md)."""
DOUBT = 0.5
"""Standard deviation of what the steps say, as a part of it (found on names, seed 42)."""

Pair = tuple[np.ndarray, np.ndarray]
Effects = Callable[[np.ndarray], np.ndarray]
"""Deletion vectors [sets, units] -> effects [queries, sets]."""


def parts_of(x: np.ndarray, known: Retrainings) -> list[tuple[int, int] | None]:
    """The places of two retrainings that each set [sets, units] is the sum of, None where there are no such two."""
    if not len(known):
        return [None] * len(x)
    place = {row.tobytes(): i for i, row in enumerate(known.x)}
    found: list[tuple[int, int] | None] = []
    for row in x:
        inside = np.flatnonzero((known.x <= row).all(1) & (known.x >= 0).all(1) & known.x.any(1))
        pairs = ((i, place.get(np.ascontiguousarray(row - known.x[i]).tobytes())) for i in inside.tolist())
        found.append(next(((i, j) for i, j in pairs if j is not None), None))
    return found


def mended(
    predicted: Pair, unbent: Pair, x: np.ndarray, strong: np.ndarray, known: Retrainings, steps: Effects
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation [queries, sets] of the posterior, mended where a set is strong.

    unbent  the same without what the posterior adds to intervals for such sets; steps: effects by Gauss-Newton steps, NaN
            where they are not known
    Shapes: x [sets, units], strong [queries, sets].
    """
    mean, std = predicted[0].copy(), predicted[1].copy()
    columns = np.flatnonzero(strong.any(0))
    for column, parts in zip(columns, parts_of(x[columns], known), strict=True):
        row, asked = x[column : column + 1], strong[:, column]
        if parts is None:
            more = whole = steps(row)[:, 0]
            own = unbent[1][:, column]
        else:
            more = (steps(row) - steps(known.x[list(parts)]).sum(1, keepdims=True))[:, 0]
            whole = known.y[list(parts)].sum(0) + more
            own = predicted[1][:, column]  # parts make it narrower; the steps' doubt alone was too narrow on names
        if not np.isfinite(whole).all():  # steps that do not settle: the posterior's own answer stays
            continue
        mean[asked, column] = whole[asked]
        std[asked, column] = np.hypot(own, DOUBT * np.abs(more))[asked]
    return mean, std
