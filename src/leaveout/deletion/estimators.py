"""Estimators of the effect of a deletion, from stored measurements. Formulas: docs/explanation/methods.md; arXiv 2604.07328.

Each takes `Measurements` and gives a `Fitted`, whose `predict(x)` for deletion vectors x [sets, units] returns the mean
effect and its standard deviation, both [queries, sets], in the unit of the query. A standard deviation of infinity
means that the measurements do not say how wrong the mean may be.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from leaveout.deletion.calibration import Calibration, calibrate
from leaveout.deletion.kernels import Kernel
from leaveout.deletion.measurements import JetBlock, Measurements, Retrainings
from leaveout.deletion.posterior import Posterior
from leaveout.errors import UnsupportedError, choices, require_whole

SINGULAR = 1e-9
"""Relative size below which a singular value of the least-squares system counts as zero."""


MISFITS, BY_SIZE, LEAST_HELD = (1.0, 30.0, 1e3, 3e4), (1e-3, 0.03, 1.0, 30.0), 4
"""Of the posterior, beside none, of which held-out retrainings choose: alike for all sets, or times the squared size of each
one's effects; and how many held-out retrainings that takes."""


class Fitted(Protocol):
    def predict(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]: ...


# --- the paper's -------------------------------------------------------------------------------------------------


def _complex_blocks(data: Measurements, name: str) -> list[JetBlock]:
    blocks = [b for b in data.jets if not b.real]
    if not blocks:
        raise UnsupportedError(f"`{name}` needs jet runs along complex uniform directions: measure some first.")
    return blocks


def _terms(blocks: list[JetBlock], x: np.ndarray, degree: int) -> np.ndarray:
    """Each direction's unbiased guess of the effect of x up to a degree: [directions, queries, sets]."""
    out = []
    for block in blocks:
        if block.degree < degree:
            raise UnsupportedError(f"The jet runs have degree {block.degree}, lower than {degree}: measure again.")
        inner = np.conj(block.psi) @ x.T
        units = x.shape[1]
        total = np.zeros((len(block.psi), block.c.shape[2], len(x)))
        for r in range(1, degree + 1):
            scaled = math.comb(units + r - 1, r) * inner**r
            total += (block.c[r - 1][:, :, None] * scaled[:, None, :]).real
        out.append(total)
    return np.concatenate(out)


@dataclass(frozen=True)
class Mean:
    """The paper's estimator: the mean over directions; its standard deviation is the standard error of that mean.

    degree: orders that are summed; degree 1 is the least noisy at few directions.
    """

    data: Measurements
    degree: int = 1

    def predict(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        blocks = _complex_blocks(self.data, "mean")
        parts = [self._part(blocks, chunk) for chunk in _chunks(x)]
        return _side_by_side(parts)

    def _part(self, blocks: list[JetBlock], x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        terms = _terms(blocks, x, self.degree)
        return terms.mean(0), terms.std(0, ddof=1) / math.sqrt(len(terms)) if len(terms) > 1 else np.inf * terms[0]


@dataclass(frozen=True)
class MedianOfMeans:
    """The median over groups of the mean over each group's directions.

    With probability 1 - delta it is nearer than epsilon deviations of one direction's guess, if 8 ln(1 / delta) groups
    have 4 / epsilon^2 directions each (the usual bound).
    """

    data: Measurements
    degree: int = 1
    groups: int = 8

    def predict(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        blocks = _complex_blocks(self.data, "median_of_means")
        if sum(len(b.psi) for b in blocks) < 2 * self.groups:
            raise UnsupportedError(f"`median_of_means` needs {2 * self.groups} directions for {self.groups} groups.")
        return _side_by_side([self._part(blocks, chunk) for chunk in _chunks(x)])

    def _part(self, blocks: list[JetBlock], x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        means = np.stack([g.mean(0) for g in np.array_split(_terms(blocks, x, self.degree), self.groups)])
        # The standard error of a median of k normal numbers is about sqrt(pi / 2k) of their deviation.
        return np.median(means, 0), means.std(0, ddof=1) * math.sqrt(math.pi / 2 / self.groups)


def _chunks(x: np.ndarray, size: int = 64) -> list[np.ndarray]:
    return [x[i : i + size] for i in range(0, len(x), size)]


def _side_by_side(parts: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    return np.concatenate([m for m, _ in parts], 1), np.concatenate([s for _, s in parts], 1)


# --- least squares -----------------------------------------------------------------------------------------------


class LeastSquares:
    """Minimum-norm solution of the linear equations that the jets give for each order's coefficients.

    Exact for order r once twice the directions reach C(units + r - 1, r). The standard deviation is that of a Gaussian
    process with the same kernel (x . y)^r, whose scale per query is the mean square of the whitened coefficients, for
    what the directions leave open, plus for the orders above `degree` the error on the bank's retrainings; with fewer than
    two retrainings nothing is known of those orders, and it is infinite.
    degree: highest order used; None: all that are measured and either exact or third of the way to it.
    """

    def __init__(self, data: Measurements, degree: int | None = None) -> None:
        if not data.jets:
            raise UnsupportedError("`least_squares` needs jet runs: measure some directions first.")
        highest = max(b.degree for b in data.jets)
        if degree is not None and degree > highest:
            raise UnsupportedError(f"The jet runs have degree {highest}, lower than {degree}: measure again.")
        orders = range(1, (degree or highest) + 1)
        self._orders = [_Order(data, r) for r in orders if degree or r == 1 or _covered(data, r) > 1 / 3]
        others = _joined(data.retrainings, data.heldout, data.units)
        self._spread = _spread(others, self._parts(others.x)[0], len(data.base))

    def predict(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        mean, variance = self._parts(x)
        return mean, np.hypot(np.sqrt(variance), _in_proportion(self._spread, x))

    def _parts(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean, and variance of what the directions leave open."""
        found = [order.predict(x) for order in self._orders]
        return np.sum([m for m, _ in found], 0), np.sum([v for _, v in found], 0)


def _covered(data: Measurements, r: int) -> float:
    """Equations over unknowns of one order."""
    rows = sum((1 if b.real else 2) * len(b.psi) for b in data.jets if b.degree >= r)
    return rows / math.comb(data.units + r - 1, r)


class _Order:
    """One order: the dual problem by eigenvectors of the Gram matrix, or for order 1 the primal one by an SVD."""

    def __init__(self, data: Measurements, r: int) -> None:
        blocks = [b for b in data.jets if b.degree >= r]
        self.r, self._blocks = r, blocks
        values = np.concatenate([b.c[r - 1] for b in blocks])
        real = np.concatenate([np.full(len(b.psi), b.real) for b in blocks])
        psi = np.concatenate([b.psi for b in blocks])
        self._psi, self._keep = psi, np.concatenate([np.ones(len(real), bool), ~real])
        right = np.concatenate([np.real(values), np.imag(values)])[self._keep]
        if r == 1:
            rows = np.concatenate([np.real(psi), np.imag(psi)])[self._keep]
            left, size, basis = np.linalg.svd(rows, full_matrices=False)
            good = size > SINGULAR * size[0]
            whitened = (left[:, good].T @ right) / size[good, None]
            self._basis, self._solution = basis[good], basis[good].T @ whitened
        else:
            size, vectors = np.linalg.eigh(self._gram(psi))
            good = size > math.sqrt(SINGULAR) * size[-1]
            self._root = vectors[:, good] / np.sqrt(size[good])
            whitened = self._root.T @ right
            self._solution = self._root @ whitened
        self._tau = (whitened**2).mean(0)

    def _gram(self, psi: np.ndarray) -> np.ndarray:
        plain, barred = (psi @ psi.T) ** self.r, (psi @ np.conj(psi).T) ** self.r
        rr, ii = np.real(plain + barred) / 2, np.real(barred - plain) / 2
        ri = np.imag(plain - barred) / 2
        return np.block([[rr, ri], [ri.T, ii]])[np.ix_(self._keep, self._keep)]

    def predict(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        prior = (x**2).sum(1) ** self.r
        if self.r == 1:
            known = ((x @ self._basis.T) ** 2).sum(1)
            mean = (x @ self._solution).T
        else:
            cross = (self._psi @ x.T) ** self.r
            rows = np.concatenate([cross.real, cross.imag])[self._keep]
            known = ((self._root.T @ rows) ** 2).sum(0)
            mean = self._solution.T @ rows
        return mean, self._tau[:, None] * np.clip(prior - known, 0, None)[None]


# --- on retrainings alone ----------------------------------------------------------------------------------------


class LeaveOneOut:
    """The sum of the effects of leaving out each unit alone. Needs the retraining of every unit that a set names.

    Standard deviation: the error on the bank's other retrainings, in proportion to the root of the removed shares.
    """

    def __init__(self, data: Measurements) -> None:
        runs = data.retrainings
        single = ((runs.x != 0).sum(1) == 1) & ((runs.x == 1).sum(1) == 1)
        self._effects = np.full((len(data.base), data.units), np.nan)
        if single.any():
            self._effects[:, runs.x[single].argmax(1)] = runs.y[single].T
        others = _joined(runs.take(~single), data.heldout, data.units)
        whole = others.take(np.isfinite(self._mean(others.x)).all(0)) if len(others) else others
        self._spread = _spread(whole, self._mean(whole.x), len(data.base))

    def predict(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        mean = self._mean(x)
        if not np.isfinite(mean).all():
            n = int((np.isnan(self._effects[0]) & (x != 0).any(0)).sum())
            raise UnsupportedError(
                f"`leave_one_out` needs the retraining of each unit alone, {n} of these sets' units have none: "
                "measure them with `measure --retrain N --design singles`."
            )
        return mean, _in_proportion(self._spread, x)

    def _mean(self, x: np.ndarray) -> np.ndarray:
        known = np.where(np.isnan(self._effects), 0.0, self._effects)
        missing = (np.isnan(self._effects[:1]).astype(float) @ (x != 0).T.astype(float)) > 0
        return np.where(missing, np.nan, known @ x.T)


class Pairwise:
    """Inclusion and exclusion to second order: sums over units and over pairs. For few units, all pairs retrained."""

    def __init__(self, data: Measurements) -> None:
        runs, units = data.retrainings, data.units
        sizes = (runs.x != 0).sum(1)
        whole = (runs.x == 1).sum(1) == sizes
        self._first = np.full((units, len(data.base)), np.nan)
        self._second = np.full((units, units, len(data.base)), np.nan)
        for x, y in zip(runs.x[whole & (sizes == 1)], runs.y[whole & (sizes == 1)], strict=True):
            self._first[int(x.argmax())] = y
        for x, y in zip(runs.x[whole & (sizes == 2)], runs.y[whole & (sizes == 2)], strict=True):
            i, j = np.flatnonzero(x)
            self._second[i, j] = self._second[j, i] = y - self._first[i] - self._first[j]
        self._second[np.arange(units), np.arange(units)] = 0
        if not np.isfinite(self._first).all() or not np.isfinite(self._second).all():
            raise UnsupportedError(
                f"`pairwise` needs the retrainings of all {units} units and all {math.comb(units, 2)} pairs: measure them "
                "with `measure --design singles` and `--design pairs`."
            )
        others = _joined(runs.take(~(whole & (sizes <= 2))), data.heldout, units)
        self._spread = _spread(others, self._mean(others.x), len(data.base))

    def predict(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self._mean(x), _in_proportion(self._spread, x)

    def _mean(self, x: np.ndarray) -> np.ndarray:
        return self._first.T @ x.T + np.einsum("si,sj,ijq->qs", x, x, self._second) / 2


def _joined(a: Retrainings, b: Retrainings, units: int) -> Retrainings:
    parts = [r for r in (a, b) if len(r)]
    if not parts:
        return Retrainings(np.zeros((0, units)), a.y[:0])
    return Retrainings(np.concatenate([r.x for r in parts]), np.concatenate([r.y for r in parts]))


def _spread(runs: Retrainings, mean: np.ndarray, queries: int) -> np.ndarray:
    """Root mean square error per unit of root removed share; infinite when nothing was held against it."""
    if len(runs) < 2:
        return np.full(queries, np.inf)
    return np.sqrt((((runs.y.T - mean) ** 2) / np.maximum((runs.x**2).sum(1), 1e-12)).mean(1))


def _in_proportion(spread: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Spread [queries] times the root of each set's removed share [queries, sets]; 0 for an empty set."""
    root = np.sqrt((x**2).sum(1))
    return np.where(root > 0, spread[:, None] * np.where(root > 0, root, 1.0), 0.0)


class Datamodels:
    """Ridge regression of the effects on which units were removed (arXiv 2202.00622), over the bank's retrainings.

    The penalty is the one of least leave-one-out error, by the closed form; the standard deviation is that error's root
    mean square, in proportion to the root of the removed shares.
    """

    def __init__(self, data: Measurements) -> None:
        runs = data.retrainings
        if len(runs) < 4:
            raise UnsupportedError("`datamodels` needs at least 4 retrainings on random sets: measure them first.")
        size, vectors = np.linalg.eigh(runs.x @ runs.x.T)
        rotated = vectors.T @ runs.y
        norms = np.sqrt((runs.x**2).sum(1))[:, None]
        best = (np.inf, np.zeros((0, 0)), np.zeros(0))
        for penalty in size[-1] * np.geomspace(1e-8, 10, 19):
            weight = 1 / (np.maximum(size, 0) + penalty)
            dual = vectors @ (weight[:, None] * rotated)
            errors = dual / ((vectors**2) @ weight)[:, None] / norms
            score = float((errors**2 / np.maximum((runs.y**2).mean(0), 1e-300)).mean())
            if score < best[0]:
                best = (score, dual, np.sqrt((errors**2).mean(0)))
        self._effects, self._spread = (runs.x.T @ best[1]).T, best[2]

    def predict(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self._effects @ x.T, _in_proportion(self._spread, x)


class FirstOrder:
    """The exact first order by reverse mode: the metagradient of arXiv 2503.13751 and 2504.16430.

    Standard deviation: the error on the bank's retrainings, in proportion to the root of the removed shares.
    """

    def __init__(self, data: Measurements) -> None:
        if data.gradient is None:
            raise UnsupportedError("`first_order` needs the metagradient: measure with `--gradient`.")
        self._gradient = data.gradient
        others = _joined(data.retrainings, data.heldout, data.units)
        self._spread = _spread(others, self._gradient @ others.x.T, len(data.base))

    def predict(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self._gradient @ x.T, _in_proportion(self._spread, x)


# --- by name -----------------------------------------------------------------------------------------------------


ESTIMATORS: dict[str, Any] = {
    "posterior": Posterior,
    "mean": Mean,
    "median_of_means": MedianOfMeans,
    "least_squares": LeastSquares,
    "leave_one_out": LeaveOneOut,
    "pairwise": Pairwise,
    "datamodels": Datamodels,
    "first_order": FirstOrder,
}
OPTIONS = {
    "degree": ("posterior", "mean", "median_of_means", "least_squares"),
    "groups": ("median_of_means",),
    "kernel": ("posterior",),
}
"""Whose option it is."""


@dataclass(frozen=True, eq=False)
class EstimatorSettings:
    """Which estimator predicts, and what it is told beside the measurements.

    name       one of ESTIMATORS
    degree     highest order of jets used (default: the estimator's own); groups: of median_of_means
    kernel     of posterior: the prior covariance; default by the number of units
    calibrate  scale standard deviations by the held-out retrainings, if there are any
    steps      of sets that remove most of what helps a query: Gauss-Newton steps from the trained model, which need no
               retraining; None: where they take less than retraining a set
    noise, features, scores   see `Bank.measurements`

    Example: run.predict(queries, without, EstimatorSettings("least_squares", degree=1))
    """

    name: str = "posterior"
    degree: int | None = None
    groups: int | None = None
    kernel: Kernel | None = None
    calibrate: bool = True
    steps: bool | None = None
    noise: float | np.ndarray | None = None
    features: np.ndarray | None = None
    scores: np.ndarray | None = None

    def __post_init__(self) -> None:
        if self.name not in ESTIMATORS:
            raise ValueError(f"there is no estimator {self.name!r}: {choices(self.name, ESTIMATORS)}")
        if self.steps and self.name != "posterior":
            raise ValueError(f"steps go with posterior, not with {self.name}")
        for option in self.given():
            if self.name not in OPTIONS[option]:
                raise ValueError(f"{option} goes with {', '.join(OPTIONS[option])}, not with {self.name}")
        for option in ("degree", "groups"):
            if getattr(self, option) is not None:
                require_whole(option, getattr(self, option), 1)

    def given(self) -> dict[str, Any]:
        """The options of the estimator itself that are not left to it."""
        return {option: value for option in OPTIONS if (value := getattr(self, option)) is not None}


def fit(data: Measurements, settings: EstimatorSettings) -> tuple[Fitted, Calibration]:
    """The estimator fitted to measurements, and what the held-out ones say of its standard deviations.

    A set that is fitted as well says nothing: `posterior`, which learns from held-out sets later, leaves it out until
    then; for others it is not held out any more.
    """
    if settings.name != "posterior":
        data = replace(data, heldout=data.heldout.without(data.retrainings))
        fitted = ESTIMATORS[settings.name](data, **settings.given())
        return fitted, calibrate(data, fitted) if settings.calibrate else Calibration()
    if not len(data.heldout):
        return Posterior(data, **settings.given()), Calibration()
    data = replace(data, retrainings=data.retrainings.without(data.heldout))
    if not data.measured:
        return Posterior(data.with_heldout(), **settings.given()), Calibration()
    before, chosen = _best_of(data, settings)
    after = _learned(data, chosen, settings)
    if not settings.calibrate:
        return after, Calibration()
    found = calibrate(data, before)
    learned = data.heldout.x if found.sets else None
    return after, replace(found, fitted=after, held=learned)  # the numbers stay those of the smaller, worse fit


@dataclass(frozen=True)
class _Misfit:
    """What a kernel is taken not to know of retrainings: so much of each, or so much times the square of its effects' size.

    Sets that change a query most follow rules of their own (a class that is gone), and would mislead about all others. A
    size is a mean over queries, of each in units of its usual effect.
    """

    much: float = 0.0
    by_size: bool = False

    def of(self, runs: Retrainings, usual: Retrainings) -> np.ndarray:
        """Of each retraining, beside the usual ones [retrainings]."""
        if not self.by_size:
            return np.full(len(runs), self.much)
        scale = np.maximum(np.median(np.square(usual.y), 0), 1e-300)
        middle = np.median((np.square(usual.y) / scale).mean(1))
        return self.much * (np.square(runs.y) / scale).mean(1) / max(float(middle), 1e-300)


CHOICES = (*(_Misfit(much) for much in MISFITS), *(_Misfit(much, by_size=True) for much in BY_SIZE))


def _best_of(data: Measurements, settings: EstimatorSettings) -> tuple[Posterior, _Misfit]:
    """The posterior of the misfit that foretells the held-out retrainings best; none where others are no clearer."""
    plain, runs = Posterior(data, **settings.given()), data.retrainings
    if len(data.heldout) < LEAST_HELD or not len(runs):
        return plain, _Misfit()
    choices = [_Misfit(), *CHOICES]
    misfits = [choice.of(runs, runs) for choice in choices]
    best, place = _clearest(data, plain, misfits, lambda tried: data.heldout.y.T - tried.predict(data.heldout.x)[0])
    return best, choices[place]


def _learned(data: Measurements, chosen: _Misfit, settings: EstimatorSettings) -> Posterior:
    """The same with the held-out retrainings among those that are fitted, if need be with a misfit of their own.

    It is that by which each of them is foretold best by all others.
    """
    runs, held = data.retrainings, data.heldout
    enough = len(held) >= LEAST_HELD and len(runs) > 0
    own = [choice.of(held, runs) for choice in ((chosen, *CHOICES) if enough else (chosen,))]
    misfits = [np.concatenate([chosen.of(runs, runs), more]) for more in own]
    plain = Posterior(data.with_heldout(), misfit=misfits[0], **settings.given())
    return _clearest(data, plain, misfits, lambda tried: tried.left_out(len(held)))[0]


def _clearest(
    data: Measurements, plain: Posterior, misfits: Sequence[np.ndarray], errors: Callable[[Posterior], np.ndarray]
) -> tuple[Posterior, int]:
    """Of the posteriors of these misfits the one with the least errors [queries, sets], and its place.

    The first, which is `plain`, unless another is clearly better. Sets count alike, large or small: by the logarithm of their
    squared errors over all queries, in units of each query's usual effect.
    """
    size = np.maximum(np.median(np.square(data.heldout.y), 0)[:, None], 1e-300)

    def wrong(fitted: Posterior) -> np.ndarray:
        return np.log(np.maximum((np.square(errors(fitted)) / size).mean(0), 1e-12))

    before, best, place, least = wrong(plain), plain, 0, 0.0
    for number, misfit in enumerate(misfits[1:], 1):
        tried = plain.with_misfit(misfit)
        better = before - wrong(tried)
        clear = float(better.mean() - better.std(ddof=1) / len(better) ** 0.5)
        if clear > least:
            best, place, least = tried, number, clear
    return best, place
