"""What to measure: directions for jets, and deletion vectors for retrainings.

Every design is a sequence that does not depend on its length: the first rows of a longer one are the shorter one. A
deletion vector x means weights 1 - x; it may lie outside of [0, 1], as retraining allows any weight.
"""

from __future__ import annotations

import itertools

import numpy as np

from leaveout.deletion.kernels import similar_units

FEW = 64
"""Up to this many units, pairs of units can be measured one by one, and kernels count subsets."""
LARGEST_BASIS = 4096
DRAWS = 50
"""Random sets that are drawn for each that is wanted, before there are said to be no others."""


def complex_uniform(first: int, last: int, units: int, seed: int = 0) -> np.ndarray:
    """Rows first..last-1 of directions uniform on the complex unit sphere of all units: complex128 [rows, units].

    The design of arXiv 2604.07328; E[psi psi^H] = I / units.
    """
    rows = [_rng(seed, 1, j).standard_normal((units, 2)) for j in range(first, last)]
    psi = np.stack(rows).view(np.complex128)[..., 0] if rows else np.zeros((0, units), np.complex128)
    return psi / np.linalg.norm(psi, axis=1, keepdims=True)


def real_orthogonal(first: int, last: int, units: int, seed: int = 0) -> np.ndarray:
    """Rows first..last-1 of random orthonormal real directions, float64 [rows, units]: first order, exact at all units.

    Above LARGEST_BASIS units the rows are independent and of unit length, which is nearly orthogonal there.
    Raises: ValueError if there are more rows than units.
    """
    if last > units:
        raise ValueError(f"there are only {units} orthogonal directions over {units} units, {last} were asked for")
    if units > LARGEST_BASIS:
        rows = np.stack([_rng(seed, 2, j).standard_normal(units) for j in range(first, last)])
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)
    basis, _ = np.linalg.qr(_rng(seed, 2, 0).standard_normal((last, units)).T)
    return np.ascontiguousarray(basis.T[first:])


def singles(first: int, last: int, units: int) -> np.ndarray:
    """Deletion of one unit after another: [rows, units]; nothing beyond the last unit."""
    return np.eye(units)[first : min(last, units)]


def pairs(first: int, last: int, units: int) -> np.ndarray:
    """Deletion of two units, in lexicographic order: [rows, units]."""
    chosen = itertools.islice(itertools.combinations(range(units), 2), first, last)
    return _indicator([list(pair) for pair in chosen], units)


def random_sets(
    first: int, last: int, units: int, seed: int = 0, sizes: tuple[int, ...] = (), largest: float = 0.3
) -> np.ndarray:
    """Deletion of random sets [rows, units] of the given sizes in turn; else of log-uniform size up to a share."""
    out = []
    for j in range(first, last):
        rng = _rng(seed, 3, j)
        top = max(1.0, largest * units)
        size = sizes[j % len(sizes)] if sizes else int(np.exp(rng.uniform(0, np.log(top))).round())
        out.append(rng.choice(units, min(max(size, 1), units - 1), replace=False).tolist())
    return _indicator(out, units)


def halved(x: np.ndarray, seed: int = 0) -> np.ndarray:
    """Two halves of each deletion vector [sets, units], its units dealt at random: [vectors, units].

    A vector of one unit, or none, has no halves, and stays whole.
    """
    out = []
    for row in x:
        members = np.flatnonzero(row)
        dealt = _rng(seed, 5, *members.tolist()).permutation(members)
        for part in np.array_split(dealt, max(1, min(2, len(dealt)))):
            out.append(np.where(np.isin(np.arange(len(row)), part), row, 0.0))
    return np.array(out).reshape(-1, x.shape[1])


def subsets(first: int, last: int, units: int, seed: int = 0, share: float = 0.5) -> np.ndarray:
    """Deletion of a random share of all units [rows, units], as datamodels want it."""
    size = max(1, round(share * units))
    return _indicator([_rng(seed, 4, j).choice(units, size, replace=False).tolist() for j in range(first, last)], units)


def along(first: int, last: int, vectors: np.ndarray, length: float = 4.0) -> np.ndarray:
    """Weightings 1 - length * v along unit vectors [k, units]: deletion vectors [rows, units], +v, then -v."""
    signed = np.concatenate([vectors, -vectors])
    return length * signed[first : min(last, len(signed))]


def extremes(first: int, last: int, vectors: np.ndarray, share: float = 0.1) -> np.ndarray:
    """Deletion of the most extreme units of a vector, highest, then lowest: [rows, units]."""
    units = vectors.shape[1]
    size = max(1, round(share * units))
    order = np.argsort(vectors, axis=1)
    sets = [part for row in order for part in (row[-size:].tolist(), row[:size].tolist())]
    return _indicator(sets[first:last], units)


def mixture(
    n: int, units: int, seed: int = 0, sizes: tuple[int, ...] = (), vectors: np.ndarray | None = None,
    exact: bool = False,
) -> np.ndarray:  # fmt: skip
    """A mixture for many units: n deletion vectors [n, units] for predicting any set.

    Few units: each alone, then random sets of the sizes asked. Many: 70 % weightings along the strongest of the vectors
    [k, units] in which similar units act together, 15 % extremes of them, 15 % random sets; each alone first where n is
    near the number of units. exact: the first order is known, which weightings tell, and random sets take their place.
    """
    single = singles(0, n, units)
    if units <= FEW or vectors is None:
        return np.concatenate([single, random_sets(0, n - len(single), units, seed, sizes)])
    parts, rest = ([single], n - len(single)) if n >= 0.7 * units else ([], n)
    extreme = int(0.15 * rest)
    if not exact:
        parts.append(along(0, rest - 2 * extreme, vectors))
    parts.append(extremes(0, extreme, vectors))
    found = sum(len(p) for p in parts)
    return np.concatenate([*parts, random_sets(0, n - found, units, seed, sizes)])


SIMILAR = ("auto", "along", "extremes")
"""Designs that ask which units are alike, where there are more than FEW."""
DESIGNS = ("auto", "singles", "pairs", "all pairs", "random", "subsets", "along", "extremes")


def design(
    name: str, n: int, units: int, seed: int = 0, sizes: tuple[int, ...] = (), features: np.ndarray | None = None,
    exact: bool = False,
) -> np.ndarray:  # fmt: skip
    """The first n deletion vectors [n, units] of a design by name; fewer where it ends. `auto` is the mixture;

    "all pairs" is each unit, each pair of units, then random sets of the sizes asked.
    features [units, k]: what says which units are alike, for `auto`, `along` and `extremes` of more than FEW units
    exact: the first order is known, see `mixture`
    """
    vectors = None if features is None or units <= FEW else similar_units(features, units)[0].T
    if name in ("along", "extremes"):
        if vectors is None:
            raise ValueError(f"the design `{name}` is for more than {FEW} units: use `auto`")
        return along(0, n, vectors) if name == "along" else extremes(0, n, vectors)
    if name in ("singles", "pairs"):
        return singles(0, n, units) if name == "singles" else pairs(0, n, units)
    if name == "all pairs":
        both = np.concatenate([singles(0, n, units), pairs(0, max(0, n - units), units)])
        return np.concatenate([both, random_sets(0, n - len(both), units, seed, sizes)])
    if name == "auto":
        return mixture(n, units, seed, sizes, vectors, exact)
    return subsets(0, n, units, seed) if name == "subsets" else random_sets(0, n, units, seed, sizes)


def different(x: np.ndarray) -> np.ndarray:
    """Each row [rows, units] once, in the order in which they come."""
    return x[np.sort(np.unique(x, axis=0, return_index=True)[1])]


def _indicator(sets: list[list[int]], units: int) -> np.ndarray:
    x = np.zeros((len(sets), units))
    for row, members in zip(x, sets, strict=True):
        row[members] = 1
    return x


def _rng(*parts: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(parts)))
