"""States of a run that are kept, in memory or in files, and the order in which its steps are visited backwards."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from leaveout.training.loop import Checkpoint


class Kept:
    """Copies of states by their step, at most `places` of them: in memory, or one file each in a directory.

    Files of a run that was killed are taken over. key: says which run they belong to
    """

    def __init__(self, places: int, directory: Path | None = None, key: str = "") -> None:
        self.places, self.directory, self.key = places, directory, key
        self._states: dict[int, Any] = {}
        if directory is not None:
            found = sorted(int(path.stem.removeprefix("state-")) for path in directory.glob("state-*.safetensors"))
            self._states = dict.fromkeys(found[:places])

    def __len__(self) -> int:
        return len(self._states)

    def __contains__(self, step: int) -> bool:
        return step in self._states

    def last(self, step: int) -> int:
        """The last kept step up to this one."""
        return max(at for at in self._states if at <= step)

    def put(self, step: int, state: Any) -> None:
        """Keeps a copy."""
        if self.directory is None:
            self._states[step] = state.clone()
        else:
            self._file(step).save(step, {"state": state})
            self._states[step] = None

    def read(self, step: int, into: Any) -> None:
        """Copies a kept state. Raises: MismatchError or FormatError for a file that is not of this run."""
        if self.directory is None:
            into.copy_(self._states[step])
            return
        found = self._file(step).load()
        assert found is not None
        into.copy_(found[1]["state"])

    def drop(self, step: int) -> None:
        """Gives a place back."""
        del self._states[step]
        if self.directory is not None:
            self._file(step).path.unlink(missing_ok=True)

    def drop_after(self, step: int) -> None:
        """Gives back the places of all later states."""
        for at in [at for at in self._states if at > step]:
            self.drop(at)

    def _file(self, step: int) -> Checkpoint:
        assert self.directory is not None
        return Checkpoint(self.directory / f"state-{step:07d}.safetensors", self.key)


def walk_back(run: Any, kept: Kept, visit: Callable[[int], None], last: int | None = None) -> None:
    """Call visit(step) for step = last (default: of the run) .. 0 with the state before it in `run`, which is at its start
    before and after.

    Where there are places for all states they stay kept, for another walk.
    """
    end: int = run.steps if last is None else last
    whole = kept.places > run.steps
    if not whole:
        kept.drop_after(end)
    if 0 not in kept:
        kept.put(0, run.state)
    for step in range(end, -1, -1):
        at = kept.last(step)
        kept.read(at, run.state)
        while at < step:
            free = kept.places - len(kept)
            until = at + next_kept(step + 1 - at, free)
            for number in range(at, until):
                run.advance(number)
            at = until
            if free:
                kept.put(at, run.state)
        if not whole and step in kept:
            kept.drop(step)
        visit(step)


def next_kept(length: int, free: int) -> int:
    """How far to run before the next state is kept, with `length` states to visit and `free` places left.

    Source: Griewank and Walther, Algorithm 799 (ACM TOMS 26, 2000): s places and r repetitions reach C(s + r, s) states.
    """
    if free == 0:
        return length - 1
    repeats = 1
    while math.comb(free + 1 + repeats, repeats) < length:
        repeats += 1
    late = length - math.comb(free + repeats - 1, repeats - 1)
    return min(math.comb(free + repeats, repeats - 1), max(1, late))
