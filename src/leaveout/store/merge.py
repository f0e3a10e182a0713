"""Comparing the rows of two stores before one is merged into the other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from leaveout.errors import FormatError, MismatchError
from leaveout.store.catalogue import MAX_FIELDS
from leaveout.store.segment import Segment

if TYPE_CHECKING:
    from leaveout.store.reader import Reader

_PAGE = 2_000  # rows compared at once


def refuse_unequal(here: Reader, there: Reader) -> None:
    """Refuses two stores that cannot become one, after a look at every row and at every file of `there`."""
    if there.settings != here.settings:
        ours, theirs = here.settings, there.settings
        name = next(name for name in {**ours, **theirs} if ours.get(name, here) != theirs.get(name, there))
        text = f"{there.path} has the setting {name} = {theirs.get(name)!r} but {here.path} has {ours.get(name)!r}"
        raise MismatchError(f"{text}; build it again with the same settings")
    for name, side in there._snapshot.sides.items():
        if (ours := here._snapshot.sides.get(name)) and not _equal(ours.arrays(), side.arrays()):
            text = f"the side {name!r} of {there.path} differs from that of {here.path}, and rows may depend on it"
            raise MismatchError(f"{text}; build one of them again with the side of the other")
    n_fields = len(set(here.info()["fields"]) | set(there.info()["fields"]))
    if n_fields > MAX_FIELDS:
        raise FormatError(
            f"together the stores have {n_fields} metadata fields, more than {MAX_FIELDS}; drop rare ones"
        )
    for part in there.segments():
        part.arrays()
        fresh_rows(here, there, part)


def fresh_rows(here: Reader, there: Reader, part: Segment) -> tuple[np.ndarray, int]:
    """Mask [rows] of the live rows of a segment of `there` whose ids no live row of `here` has; how many others are live.

    Raises: FormatError naming an id that is in both with another text, content hash or arrays.
    """
    live = part.live()
    fresh = np.ones(part.n_rows, bool) if live is None else live.copy()
    positions = np.flatnonzero(fresh)
    for start in range(0, len(positions), _PAGE):
        page = positions[start : start + _PAGE]
        records = there.rows(part.first + page)
        known = here.has([record.id for record in records])
        pairs = [(position, row) for position, row in zip(page.tolist(), records, strict=True) if row.id in known]
        if not pairs:
            continue
        numbers = here.numbers([row.id for _, row in pairs])
        same = _same_arrays(here, part, numbers, [position for position, _ in pairs])
        for (position, row), ours, equal in zip(pairs, here.rows(numbers), same, strict=True):
            if not equal or (row.text, row.content_hash) != (ours.text, ours.content_hash):
                text = f"the id {row.id!r} is in {here.path} and in {there.path} with different contents"
                raise FormatError(f"{text}; delete that row in one of them")
            fresh[position] = False
    return fresh, len(positions) - int(fresh.sum())


def _same_arrays(here: Reader, part: Segment, numbers: np.ndarray, positions: list[int]) -> list[bool]:
    """Whether rows of `here` [pairs] and rows of a segment of another store [pairs] have equal arrays."""
    theirs, same = part.arrays(), [False] * len(numbers)
    for ours in here.segments():
        inside = np.flatnonzero((numbers >= ours.first) & (numbers < ours.first + ours.n_rows))
        if inside.size and _forms(found := ours.arrays()) == _forms(theirs):
            for pair in inside.tolist():
                row, other = int(numbers[pair]) - ours.first, positions[pair]
                same[pair] = all(found[name][row].tobytes() == theirs[name][other].tobytes() for name in theirs)
    return same


def _equal(ours: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray]) -> bool:
    """Whether two sets of arrays are equal bit for bit."""
    return ours.keys() == theirs.keys() and all(
        (ours[name].dtype, ours[name].shape) == (theirs[name].dtype, theirs[name].shape)
        and ours[name].tobytes() == theirs[name].tobytes()
        for name in ours
    )


def _forms(arrays: Mapping[str, np.ndarray]) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
    return {name: (array.dtype, array.shape[1:]) for name, array in arrays.items()}
