"""One index built in parts: shards of a corpus, built by many machines, and indexes that are merged into one.

Process r of n writes OUT/shard-0000r-of-0000n, a complete index of rows [r N / n, (r + 1) N / n) of the N rows of the
corpus. Processes share nothing but the file system: process 0 runs the statistics pass, the others wait for its result.
Once merged, rows have the ids that a build in one process gives. A signature depends on the rows that are computed
beside it only by rounding of the model's float32 numbers, so that shards agree with a build in one process to that
rounding, and bit for bit with shards of the same number that were built anywhere else.

Each segment of a part is one transaction of a merge, so that a merge that was killed goes on where it was. The parts stay.
"""

from __future__ import annotations

import itertools
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import xxhash
from tqdm import tqdm

from leaveout.errors import FormatError, LeaveoutError, MismatchError
from leaveout.readout.build import BuildReport, open_or_create
from leaveout.readout.opened import KIND, read_codecs
from leaveout.readout.shortlist import worst
from leaveout.readout.signature import Signer
from leaveout.readout.whitening import whitening_digest
from leaveout.store import Record, Store
from leaveout.store.catalogue import CATALOGUE

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
        first = _opened_if_there(place)
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


def _opened_if_there(place: Path) -> Store | None:
    try:
        return Store.open(place)
    except (LeaveoutError, OSError):  # not there yet, or just being made
        return None


# ---------------------------------------------------------------- merging

Places = str | Path | Sequence[str | Path]


def merge_indexes(parts: Places, path: str | Path, progress: bool = False) -> BuildReport:
    """Makes one index of its parts, in their order; goes on with a merge that was killed.

    `parts`: the directory that shards were built in, or the directories of all of them; rows get the ids that one
    process would have given. Or directories of other indexes, built with the same `statistics`; then a row that an
    earlier part has under the same id and with the same content is counted as repeated, not added again.
    Memory: one segment (64 MiB) with its texts.
    Raises: MismatchError naming a part that is missing, unfinished, or of another model, setting or whitening.
            FormatError naming an id that two different rows have, or a part that is damaged.
    """
    began, path = time.monotonic(), Path(path)
    stores, sharded = _opened_parts(parts)
    _refuse_different(stores, sharded)
    corpus = _corpus_of(stores, sharded)
    with open_or_create(path, _settings_of(stores, sharded)) as store:
        _begin(store, corpus, stores[0])
        first = len(store)
        done = _last_number(store) if sharded else -1
        total = sum(len(part) for part in stores)
        with tqdm(total=total, desc="merge", unit="row", file=sys.stderr, disable=not progress, leave=False) as bar:
            for part in stores:
                choose = partial(_named, store, done) if sharded else partial(_fresh, store, part)
                for segment in part.segments():
                    store.take(part, segment, choose)
                    bar.update(segment.n_rows - segment.tombstones.size)
        if recall := worst([part.state("recall") for part in stores]):
            store.set_state("recall", recall)
        store.set_state("complete", True)
        return BuildReport(len(store) - first, repeated=total - len(store), seconds=time.monotonic() - began)


# ---------------------------------------------------------------- parts


def _opened_parts(parts: Places) -> tuple[list[Store], bool]:
    """The stores of all parts in order, and whether they are the shards of one corpus."""
    places = [Path(parts)] if isinstance(parts, (str, Path)) else [Path(part) for part in parts]
    if not places:
        raise ValueError("parts is empty: give the directory of shards, or the directories of indexes.")
    if len(places) == 1 and not (places[0] / CATALOGUE).exists():
        (whole,) = places
        places = sorted(place for place in (whole.iterdir() if whole.is_dir() else ()) if NAME.fullmatch(place.name))
        if not places:
            raise FormatError(f"{whole} holds no index and no shards: give the directory that a build wrote to.")
    for place, count in Counter(place.resolve() for place in places).items():
        if count > 1:
            raise ValueError(f"{place} is given twice: give every part once.")
    sharded = all(NAME.fullmatch(place.name) for place in places)
    return [_finished(place) for place in (_all_shards(places) if sharded else places)], sharded


def _all_shards(places: list[Path]) -> list[Path]:
    """The directories of all shards by number. Raises: MismatchError if one is missing or too many."""
    of = int(places[0].name[-5:])
    names = [Shard(number, of).name for number in range(of)]
    found = {place.name: place for place in places}
    for name in names:
        if name not in found:
            raise MismatchError(f"{name} is missing: run the build of that shard, or name its directory too.")
    if strange := [place for place in places if place != found[place.name] or place.name not in names]:
        raise MismatchError(f"{strange[0]} does not belong to the other {of} shards: leave it out.")
    return [found[name] for name in names]


def _finished(place: Path) -> Store:
    store = Store.open(place, verify=True)
    if store.settings.get("kind") != KIND:
        raise MismatchError(f"{place} holds a {store.settings.get('kind', 'store')}, not an index: give an index.")
    read_codecs(store.settings.get("codec"))  # refuses what a development version stored otherwise
    if not store.state("complete"):
        raise MismatchError(f"{place} is unfinished: run the command that built it again to finish it.")
    return store


def _refuse_different(stores: list[Store], sharded: bool) -> None:
    """Refuses parts that differ from the first in what their rows' numbers depend on."""
    first, digests = stores[0], [whitening_digest(store.side("whitening") or {}) for store in stores]
    for store, digest in zip(stores, digests, strict=True):
        for name in ("signature", "model", "units", "codec", "preferences"):
            if store.settings.get(name) != first.settings.get(name):
                which = _first_difference(first.settings.get(name), store.settings.get(name))
                raise MismatchError(
                    f"{store.path} has another {name}{which} than {first.path}: build it again like that."
                )
        if sharded and store.state("corpus") != first.state("corpus"):
            raise MismatchError(f"{store.path} has another corpus than {first.path}: build it again.")
        if digest != digests[0]:
            raise MismatchError(
                f"{store.path} has another whitening than {first.path}, so that their scores cannot be compared: "
                "build it again with the statistics of that index (--statistics), or both as shards of one corpus (--shard)."
            )


def _first_difference(one: Any, other: Any) -> str:
    """The first field that differs, for a message."""
    if not isinstance(one, dict) or not isinstance(other, dict):
        return ""
    for name in one:
        if one[name] != other.get(name):
            return f" ({name} = {other.get(name)!r}, not {one[name]!r})"
    return ""


# ---------------------------------------------------------------- the merged index


def _settings_of(stores: list[Store], sharded: bool) -> dict[str, Any]:
    settings = stores[0].settings
    others = 0 if sharded else len(stores) - 1
    return {**settings, "corpus": f"{settings['corpus']} and {others} more"} if others else settings


def _corpus_of(stores: list[Store], sharded: bool) -> str:
    """Digest of the rows: of the whole corpus of shards, or over the digests of all parts."""
    digests = [store.state("corpus") for store in stores]
    return digests[0] if sharded or len(digests) == 1 else xxhash.xxh3_128("\n".join(digests).encode()).hexdigest()


def _begin(store: Store, corpus: str, first: Store) -> None:
    """Prepares a new store, or checks that an unfinished one was begun with the same parts."""
    if store.state("complete"):
        raise MismatchError(f"{store.path} holds a finished index: give a new directory.")
    begun, ours = store.state("corpus"), store.side("whitening")
    same = ours is None or whitening_digest(ours) == whitening_digest(first.side("whitening") or {})
    if not same or (begun != corpus and (begun is not None or store.n_rows)):
        raise MismatchError(f"{store.path} holds the unfinished index of other parts: give a new directory.")
    if begun is None:
        store.set_state("corpus", corpus)
    if ours is None:
        take_whitening(store, first)


def _last_number(store: Store) -> int:
    last = -1
    for record in store.iter_rows():
        last = record.extra["number"]
    return last


def _fresh(store: Store, part: Store, records: list[Record]) -> list[Record | None]:
    """The records whose ids no row has, None for the others, which must have the same content."""
    there = sorted(store.has([record.id for record in records]))
    known = {record.id: record.content_hash for record in store.rows(store.numbers(there))}
    for record in records:
        if known.get(record.id, record.content_hash) != record.content_hash:
            raise FormatError(
                f"The id {record.id!r} in {part.path} is that of another row of an earlier part: give every row its own id."
            )
    return [None if record.id in known else record for record in records]


def _named(store: Store, done: int, records: list[Record]) -> list[Record | None]:
    """The records with ids of their own, as a build in one process would have named them; None for those up to `done`."""
    taken: set[str] = set()
    named: list[Record | None] = []
    for record in records:
        if record.extra["number"] <= done:
            named.append(None)
            continue
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
        named.append(record)
    return named
