"""Which deletion sets are held out: of the kinds that are asked about later, so that intervals hold for them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from leaveout.corpus import Row
from leaveout.deletion.directions import DRAWS, random_sets
from leaveout.deletion.kernels import unit_length
from leaveout.training.recipe import Recipe

PATTERN = (
    "source", "random", "block", "top", "part", "random", "single", "top",
    "source", "union", "top", "block", "random", "single", "random", "source",
)  # fmt: skip
"""Kinds in the order in which they are held out, again from the start after the last: a whole source, half of one, two of
them; a random set; units that are alike; the units that help a query most by what is known so far; one unit."""
RANDOM, BLOCK, TOP, SOURCE = 1 / 3, 1 / 4, 1 / 8, 1 / 2
"""The largest sets of each kind, as parts of all units; sizes are log-uniform below."""
FEW_SOURCES = 2 / 5
"""Of the held-out sets, the part that whole sources may be for all of them to be held out."""
INSTEAD = {"source": "block", "part": "block", "union": "random", "block": "random", "top": "random"}
"""What takes the place of a kind for which something is not known."""


def kinds_of(n: int, features: bool, sources: int, effects: bool) -> list[str]:
    """The kinds of n held-out sets, where so many sources are known; others instead of those for which something is not.

    All sources come first where they are few enough, so that what is asked of a whole source was measured.
    """
    there = {"block": features, "source": sources > 0, "part": sources > 0, "union": sources > 2, "top": effects}

    def known(kind: str) -> str:
        return kind if there.get(kind, True) else known(INSTEAD[kind])

    first = sources if sources <= FEW_SOURCES * n else 0
    rest = [kind for kind in PATTERN if not (first and kind == "source")]
    return ["source"] * first + [known(rest[j % len(rest)]) for j in range(n - first)]


class HeldOut:
    """Draws different deletion vectors that are not among the fitted ones [any, units].

    sizes     of random sets, in turn, the largest first (default: log-uniform up to a third); features [units, k]: what says
              which units are alike (default: their effects); sources [any, units]: whole sources
    """

    def __init__(
        self, units: int, seed: int, sizes: tuple[int, ...], fitted: np.ndarray, features: np.ndarray | None,
        sources: np.ndarray,
    ) -> None:  # fmt: skip
        self.units, self.seed, self.sources = units, seed, sources
        self.sizes = sorted(sizes, reverse=True)
        self._taken = {row.tobytes() for row in np.asarray(fitted, np.float64)}
        self._alike = None if features is None else unit_length(features)

    def draw(self, kinds: Sequence[str], places: Sequence[int], effects: np.ndarray | None = None) -> dict[int, Any]:
        """(kind, vector) by place, where there is another set; effects [queries, units]: what each unit does, for
        `top`, and for `block` without features."""
        found: dict[int, Any] = {}
        for j in places:
            turn = sum(kind == "random" for kind in kinds[:j])
            for kind in (kinds[j], "random", *(() if self.sizes else ("any size",))):
                row = self._another(kind, j, turn, effects)
                if row is not None:
                    found[j] = ("random" if kind == "any size" else kind, row)
                    break
        return found

    def _another(self, kind: str, j: int, turn: int, effects: np.ndarray | None) -> np.ndarray | None:
        for attempt in range(DRAWS):
            rng = np.random.default_rng([self.seed, 5, j, attempt])
            row = self._set(kind, rng, j + attempt, turn + attempt, effects)
            if row.tobytes() not in self._taken and not row.all():
                self._taken.add(row.tobytes())
                return row
        return None

    def _set(self, kind: str, rng: np.random.Generator, j: int, turn: int, effects: np.ndarray | None) -> np.ndarray:
        units, row = self.units, np.zeros(self.units)
        if kind == "source":
            order = np.random.default_rng([self.seed, 6]).permutation(len(self.sources))
            return self.sources[order[j % len(order)]]
        if kind == "union":
            return np.maximum(*self.sources[rng.choice(len(self.sources), 2, replace=False)])
        if kind == "part":
            members = np.flatnonzero(self.sources[rng.integers(len(self.sources))])
            row[rng.permutation(members)[: len(members) // 2]] = 1
        elif kind == "block":
            alike = self._alike
            if alike is None:
                assert effects is not None
                alike = unit_length(effects.T)
            near = np.argsort(-(alike @ alike[rng.integers(units)]), kind="stable")
            row[near[: _size(rng, 2, BLOCK * units)]] = 1
        elif kind == "top":
            assert effects is not None
            best = np.argsort(-effects[rng.integers(len(effects))], kind="stable")
            row[best[: _size(rng, 1, TOP * units)]] = 1
        else:
            sizes = self.sizes[turn % len(self.sizes) :][:1] if self.sizes else ()
            wanted = {"single": (1,), "random": sizes, "any size": tuple(range(1, units))}[kind]
            (row,) = random_sets(j, j + 1, units, self.seed, wanted, RANDOM)
        return row


def _size(rng: np.random.Generator, least: int, most: float) -> int:
    return max(least, round(float(np.exp(rng.uniform(np.log(least), np.log(max(most, least)))))))


def sources_of(recipe: Recipe) -> np.ndarray:
    """Whole sources [sources, units]: the units whose examples all have one value of a field, or are of one class.

    Sources of two units, up to half of all; of fields that name at least two units each, on average.
    """
    found: dict[str, dict[int, set[str]]] = defaultdict(lambda: defaultdict(set))
    for example, unit in zip(recipe.examples, recipe.unit_of.tolist(), strict=True):
        classified = {"label": example[1]} if recipe.kind == "classifier" else {}
        for name, value in (example.meta if isinstance(example, Row) else classified).items():
            found[name][unit].add(str(value))
    units, out = len(recipe.unit_names), []
    for values in found.values():
        members = defaultdict(list)
        for unit, own in values.items():
            if len(own) == 1:
                members[min(own)].append(unit)
        if 2 * len(members) <= units:
            out += [np.isin(np.arange(units), m) for m in members.values() if 2 <= len(m) <= SOURCE * units]
    return np.unique(np.array(out, np.float64).reshape(-1, units), axis=0)
