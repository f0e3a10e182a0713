"""One index built by many machines: each process builds the index of its range of rows; `merging` makes one of them.

Process r of n writes OUT/shard-0000r-of-0000n, a complete index of rows [r N / n, (r + 1) N / n) of the N rows of the
corpus. Processes share nothing but the file system: process 0 runs the statistics pass, the others wait for its result.
Once merged, rows have the ids that a build in one process gives. A signature depends on the rows that are computed
beside it only by rounding of the model's float32 numbers, so that shards agree with a build in one process to that
rounding, and bit for bit with shards of the same number that were built anywhere else.
"""

from __future__ import annotations

import os
import re
import time
from dataclasses import dataclass
from pathlib import Path

from leaveout.errors import FormatError, LeaveoutError, MismatchError
from leaveout.readout.signature import Signer
from leaveout.readout.whitening import whitening_digest
from leaveout.store import Store

RANKS = (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS"))  # torchrun first: it runs inside Slurm, too
NAME = re.compile(r"shard-(\d{5})-of-(\d{5})")
PATIENCE = 3600.0  # seconds that a process waits for the statistics of process 0
Ask = str | tuple[int, int] | None


@dataclass(frozen=True)
class Shard:
    """Part `number`, from 0, of `of` equal ranges of rows."""

    number: int = 0
    of: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.number < self.of <= 99_999:
            raise ValueError(f"shard is {(self.number, self.of)}: give (number, count) with 0 <= number < count.")

    @property
    def name(self) -> str:
        return f"shard-{self.number:05d}-of-{self.of:05d}"

    def place(self, path: str | Path) -> Path:
        """Where the index of this shard is."""
        return Path(path) if self.of == 1 else Path(path) / self.name

    def bounds(self, n_rows: int) -> tuple[int, int]:
        """First row, and the row after the last."""
        return n_rows * self.number // self.of, n_rows * (self.number + 1) // self.of


def shard_of(ask: Ask) -> Shard:
    """The shard that is asked for: none, (number, count), or "auto", what torchrun or Slurm say in the environment.

    Raises: ValueError if nothing in the environment says which process this is.
    """
    if ask is None:
        return Shard()
    if isinstance(ask, tuple):
        return Shard(*ask)
    if ask != "auto":
        raise ValueError(f"shard is {ask!r}: give 'auto', or (number, count).")
    for rank, size in RANKS:
        if rank in os.environ and size in os.environ:
            return Shard(int(os.environ[rank]), int(os.environ[size]))
    raise ValueError("shard is 'auto', but no variable says which process this is: start it with torchrun or srun.")


def copy_statistics(store: Store, signer: Signer, shard: Shard) -> None:
    """Takes the whitening from shard 0 once that has it.

    Raises: MismatchError if it does not come within an hour.
    """
    if not signer.settings.whitens or store.side("whitening") is not None:
        return
    place, end = store.path.parent / Shard(0, shard.of).name, time.monotonic() + PATIENCE
    while True:
        first = _opened(place)
        arrays = None if first is None else first.side("whitening")
        if first is not None and arrays is not None:
            take_whitening(store, first)
            return
        if time.monotonic() > end:
            raise MismatchError(
                f"There are no statistics in {place} after {PATIENCE:.0f} s: start the process of shard 0 as well."
            )
        time.sleep(0.2)


def share_statistics(store: Store, path: str | Path) -> None:
    """Takes the whitening of another index, so that the rows of both can be scored together and merged.

    Raises: MismatchError if the other index has another model or setting, or the store has another whitening already;
            FormatError if the whitening is damaged; ValueError if the other index has none.
    """
    other = Store.open(path)
    for name in ("kind", "signature", "model"):
        if other.settings.get(name) != store.settings[name]:
            raise MismatchError(
                f"{path} was built with another {name} than this index: "
                "give an index of the same model and settings, or leave statistics out."
            )
    theirs, ours = other.side("whitening"), store.side("whitening")
    if theirs is None:
        raise ValueError(f"{path} has no whitening: leave statistics out, or finish that index first if it whitens.")
    if ours is None:
        take_whitening(store, other)
    elif whitening_digest(ours) != whitening_digest(theirs):
        raise MismatchError(f"{store.path} has another whitening than {path} already: give a new directory.")


def take_whitening(store: Store, other: Store) -> None:
    """Copies the whitening of another index, if that has one. Raises: FormatError if it is not as it was computed."""
    if (arrays := other.side("whitening")) is not None:
        if whitening_digest(arrays) != (other.state("statistics") or {}).get("digest"):
            raise FormatError(f"The whitening of {other.path} is damaged: restore that index from a copy.")
        store.set_state("statistics", other.state("statistics"))
        store.put_side("whitening", arrays)  # last: a build that finds it skips the statistics pass


def _opened(place: Path) -> Store | None:
    try:
        return Store.open(place)
    except (LeaveoutError, OSError):  # not there yet, or just being made
        return None
