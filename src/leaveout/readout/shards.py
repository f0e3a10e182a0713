"""One index built by many machines: each process builds the index of its range of rows, and a merge makes one of them.

Process r of n writes OUT/shard-0000r-of-0000n, a complete index of rows [r N / n, (r + 1) N / n) of the N rows of the
corpus. Processes share nothing but the file system: process 0 runs the statistics pass, the others wait for its result.
Rows get the ids that a build in one process gives. A signature depends on the rows that are computed beside it only by
rounding of the model's float32 numbers, so that shards agree with a build in one process to that rounding, and bit for
bit with shards of the same number that were built anywhere else.
"""

from __future__ import annotations

import itertools
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from leaveout.errors import FormatError, LeaveoutError, MismatchError
from leaveout.readout.signature import Signer
from leaveout.store import Record, Segment, Store

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
            store.set_state("statistics", first.state("statistics"))
            store.put_side("whitening", arrays)
            return
        if time.monotonic() > end:
            raise MismatchError(
                f"There are no statistics in {place} after {PATIENCE:.0f} s: start the process of shard 0 as well."
            )
        time.sleep(0.2)


def _opened(place: Path) -> Store | None:
    try:
        return Store.open(place)
    except (LeaveoutError, OSError):  # not there yet, or just being made
        return None


def merge_shards(shards: str | Path, path: str | Path) -> None:
    """Makes one index of all shards in a directory; goes on with a merge that was killed. The shards stay.

    Memory: one segment (64 MiB) with its texts.
    Raises: MismatchError naming a shard that is missing, unfinished, or of another corpus, model or setting.
            FormatError naming an id that two rows have.
    """
    parts = _complete(Path(shards))
    first, path = parts[0], Path(path)
    fresh = not path.exists() or not any(path.iterdir())
    with Store.create(path, first.settings) if fresh else Store.open(path, write=True) as store:
        if store.settings != first.settings:
            raise MismatchError(f"{path} holds an index with other settings than {first.path}: give a new directory.")
        if store.state("complete"):
            raise MismatchError(f"{path} holds a finished index: give a new directory.")
        whitening = first.side("whitening")
        if whitening is not None and store.side("whitening") is None:
            store.set_state("statistics", first.state("statistics"))
            store.put_side("whitening", whitening)
        done = _last_number(store)
        for part in parts:
            for segment in part.segments():
                _add(store, part, segment, done)
        store.set_state("corpus", first.state("corpus"))
        store.set_state("complete", True)


def _complete(path: Path) -> list[Store]:
    """The stores of all shards, in order."""
    names = sorted(match[0] for match in map(NAME.fullmatch, (os.listdir(path) if path.is_dir() else [])) if match)
    if not names:
        raise FormatError(f"{path} holds no shards: give the directory that a build with shard wrote to.")
    of = int(names[0][-5:])
    parts = [_opened(path / Shard(number, of).name) for number in range(of)]
    for number, part in enumerate(parts):
        if part is None or not part.state("complete"):
            raise MismatchError(
                f"{Shard(number, of).name} is missing or unfinished: run the build of that shard again."
            )
    found: list[Store] = [part for part in parts if part is not None]
    if strange := set(names) - {part.path.name for part in found}:
        raise MismatchError(f"{path} also holds {min(strange)}, of another count: move it away.")
    for part in found:
        facts = [_facts(store) for store in (found[0], part)]
        for name in facts[0]:
            if facts[0][name] != facts[1][name]:
                raise MismatchError(f"{part.path.name} has another {name} than {found[0].path.name}: build it again.")
    return found


def _facts(store: Store) -> dict[str, Any]:
    settings, statistics = store.settings, store.state("statistics") or {}
    rest = {name: settings[name] for name in ("kind", "signature", "model", "units", "low_rank")}
    return {**rest, "corpus": store.state("corpus"), "statistics": statistics.get("digest")}


def _last_number(store: Store) -> int:
    last = -1
    for record in store.iter_rows():
        last = record.extra["number"]
    return last


def _add(store: Store, part: Store, segment: Segment, done: int) -> None:
    """Puts the live rows of a segment that come after source row `done`."""
    live = segment.live()
    positions = np.arange(segment.n_rows) if live is None else np.flatnonzero(live)
    records = part.rows(segment.first + positions)
    kept = [at for at, record in enumerate(records) if record.extra["number"] > done]
    if kept:
        arrays = {name: values[positions[kept]] for name, values in segment.arrays().items()}
        store.put(list(_named(store, [records[at] for at in kept])), arrays)


def _named(store: Store, records: list[Record]) -> Iterator[Record]:
    """The records with ids of their own, as a build in one process would have named them."""
    taken: set[str] = set()
    for record in records:
        own = record.content_hash[:16]
        if record.id == own or re.fullmatch(rf"{own}-\d+", record.id):
            names = itertools.chain([own], (f"{own}-{count}" for count in itertools.count(2)))
            id = next(name for name in names if name not in taken and not store.has([name]))
            record = replace(record, id=id, unit=id if record.unit == record.id else record.unit)
        elif record.id in taken or store.has([record.id]):
            number = record.extra["number"] + 1
            raise FormatError(
                f"The id {record.id!r} of row {number} is that of an earlier row of another shard: give every row its own id."
            )
        taken.add(record.id)
        yield record
