"""Deletion sets: which units are left out, as vectors of the share removed."""

from __future__ import annotations

import json
import reprlib
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from leaveout.errors import FormatError, choices
from leaveout.files import replacing
from leaveout.training.recipe import Recipe

SHOWN = 4  # ids in the label of a set


@dataclass(frozen=True)
class DeletionSets:
    """x [sets, units] float64, the share of each unit that is removed (1: all of it), a label for each set, and the name of the
    query that it was chosen for, where it was for one."""

    x: np.ndarray
    labels: tuple[str, ...]
    chosen: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)


Without = DeletionSets | Path | str | Mapping[str, float] | Iterable[str | Iterable[str] | Mapping[str, float]]
"""What says which units are left out: see `deletion_sets`."""


def deletion_sets(recipe: Recipe, without: Without) -> DeletionSets:
    """Reads deletion sets.

    without: one set (an id, a list or array of ids), several (a list of lists), sets with shares (id -> share removed, 0 to
        1), or the path of a file with one set a line: JSON (a list, an object, or `{"without": ...}`, which may have a
        `name` to be called by, and the `query` that it was chosen for), or ids separated by commas. An id is that of a
        unit, or of an example; naming some but not all examples of a unit is refused.
    Raises: FormatError for an unknown id, an empty set, two shares of one unit, a set that leaves nothing to train on.
    """
    if isinstance(without, DeletionSets):
        return without
    listed = [(name, [entry] if isinstance(entry, str) else entry, of) for name, entry, of in listed_sets(without)]
    if not listed:
        raise FormatError("There is no deletion set: name at least one id.")
    units = {name: g for g, name in enumerate(recipe.unit_names)}
    members: dict[int, set[str]] = defaultdict(set)
    unit_of = {}
    for id, g in zip(recipe.ids, recipe.unit_of.tolist(), strict=True):
        members[g].add(id)
        unit_of[id] = g
    rows = [_vector(entry, units, unit_of, members) for _, entry, _ in listed]
    labels = tuple(name or label(entry) for name, entry, _ in listed)
    return DeletionSets(np.stack(rows), labels, tuple(of for *_, of in listed) if any(of for *_, of in listed) else ())


def listed_sets(without: Any) -> list[tuple[str, Any, str]]:
    """The name, if any, what is left out, and the query that it was chosen for, if it was for one, for each set."""
    if isinstance(without, Path):
        return list(_from_file(without))
    if isinstance(without, (str, Mapping)):
        return [("", without, "")]
    if isinstance(without, Iterable):
        entries = list(without.tolist() if isinstance(without, np.ndarray) else without)
    if not isinstance(without, Iterable) or not all(isinstance(entry, (str, Iterable)) for entry in entries):
        raise TypeError(
            f"without is {reprlib.repr(without)}: give ids as texts, a list of them, or a list of such lists."
        )
    if entries and all(isinstance(entry, str) for entry in entries):
        return [("", entries, "")]
    return [("", entry, "") for entry in entries]


def save_sets(path: Path, sets: Mapping[str, Collection[str]]) -> None:
    """Writes sets of ids with the query that each was chosen for, one a line, as `deletion_sets` reads them.

    A file that is there is replaced by a whole one.
    """
    lines = (json.dumps({"query": query, "without": list(ids)}) + "\n" for query, ids in sets.items())
    with replacing(path) as part:
        part.write_text("".join(lines), encoding="utf-8")


def label(entry: Collection[str]) -> str:
    """Ids of a set, shortened."""
    ids = [f"{id}={share:g}" for id, share in entry.items()] if isinstance(entry, Mapping) else list(entry)
    rest = len(ids) - SHOWN
    return ", ".join(ids) if rest <= 0 else f"{', '.join(ids[:SHOWN])} and {rest} more"


def _vector(
    entry: Any, units: Mapping[str, int], unit_of: Mapping[str, int], members: Mapping[int, set[str]]
) -> np.ndarray:
    shares: dict[str, float] = dict(entry) if isinstance(entry, Mapping) else dict.fromkeys(entry, 1.0)
    if not shares:
        raise FormatError("A deletion set is empty: name at least one id.")
    x = np.zeros(len(units))
    named: dict[int, set[str]] = defaultdict(set)
    given: dict[int, float] = {}
    for id, share in shares.items():
        if not isinstance(share, (int, float)) or not 0 <= share <= 1:
            raise FormatError(f"The share of {id!r} that is removed is {share!r}: it must be a number between 0 and 1.")
        if id not in units and id not in unit_of:
            known = dict.fromkeys([*units, *unit_of])
            raise FormatError(f"There is no unit and no example with the id {id!r}: {choices(id, known)}.")
        unit = units[id] if id in units else unit_of[id]
        if given.setdefault(unit, share) != share:
            raise FormatError(f"{id!r} and others of its unit have two shares, {given[unit]} and {share}: give one.")
        x[unit] = share
        if id not in units:
            named[unit].add(id)
    names = list(units)
    for g, found in named.items():
        if found != members[g] and names[g] not in shares:
            missing = sorted(members[g] - found)[0]
            raise FormatError(
                f"{sorted(found)[0]!r} belongs to the unit {names[g]!r} together with {missing!r}: name the whole unit, "
                "or give the recipe smaller units."
            )
    if not x.any():
        raise FormatError("A deletion set removes nothing: give a share above 0.")
    if bool((x == 1).all()):
        raise FormatError("A deletion set removes everything: leave something to train on.")
    return x


def _from_file(path: Path) -> Iterable[tuple[str, Any, str]]:
    if not path.is_file():
        raise FileNotFoundError(f"There is no file of deletion sets at {path}: give one with a set a line.")
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        if line.lstrip()[0] not in "[{":
            yield "", [part.strip() for part in line.split(",")], ""
            continue
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise FormatError(f"Line {number} of {path} is no JSON: {error}.") from None
        wrapped = isinstance(entry, dict) and "without" in entry and set(entry) <= {"without", "name", "query"}
        found = entry if wrapped else {"without": entry}
        yield str(found.get("name") or ""), found["without"], str(found.get("query") or "")
