"""What is wrong with a store: anything that is not what the last transaction committed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from sqlite3 import Connection
from typing import Any

import numpy as np

import leaveout.store.catalogue as catalogue
from leaveout.errors import FormatError, LeaveoutError
from leaveout.store.catalogue import CATALOGUE, COLUMNS, PROOF, SHIFT, SOURCE, deserialized
from leaveout.store.snapshot import POSITION, Snapshot

_BATCH = 10_000  # checksums that are put into the digest at once


def problems(path: Path) -> list[str]:
    """Everything that is wrong with the newest version of the store in a directory; [] if nothing is."""
    try:
        newest = Snapshot.load(path)
        found = list(catalogue_problems(newest))
        if newest.entries["purging"] is not False:
            proof: dict[str, Any] = newest.entries.get(PROOF) or {}
            problem = proof.get("problem")
            text = "the last purge is not proved" if problem else "a purge was stopped before its end"
            found.append(f"{text}; open the store for writing once" + (f": {problem}" if problem else ""))
        found += [problem for part in newest.files for problem in part.problems()]
        strays = newest.strays()
    except (LeaveoutError, OSError) as error:
        return [str(error)]
    return found + [f"{file.name} belongs to no version; open the store for writing once" for file in strays]


def catalogue_problems(snapshot: Snapshot) -> Iterator[str]:
    """What is wrong with the catalogue at a version; a writer may be at work.

    Cost: reads the whole catalogue, a page of rows at a time.
    """
    with snapshot.reading() as db:
        catalogue.inspect_tables(snapshot.path, db)
        found = [f"{CATALOGUE}: {text}" for (text,) in db.execute("PRAGMA integrity_check") if text != "ok"]
        found += _count_problems(db, snapshot) + _tombstone_problems(db)
    yield from found
    keys: list[int] = []
    checksums: list[bytes] = []
    digest = 0
    for key, *strings in snapshot.stream(COLUMNS, SOURCE, f"rows.key < {(snapshot.version + 1) << SHIFT}"):
        try:
            deserialized(strings)
        except FormatError as error:
            yield f"{error} (key {key})"
            continue
        keys.append(key)
        checksums.append(strings[-1])
        if len(keys) == _BATCH:
            digest += catalogue.digest_of_pairs(keys, catalogue.as_numbers(checksums))
            keys, checksums = [], []
    digest += catalogue.digest_of_pairs(keys, catalogue.as_numbers(checksums))
    if digest % 2**64 != snapshot.entries["digests"]["rows"]:
        yield f"{CATALOGUE} does not hold the rows that were committed; restore it from a copy"


def _tombstone_problems(db: Connection) -> list[str]:
    """Rows whose tombstone is not what was committed: of all rows, not of those in the index of tombstones."""
    entries = catalogue.entries(db)
    lines = db.execute("SELECT key, deleted FROM rows NOT INDEXED WHERE deleted IS NOT 0").fetchall()
    wrong = [key for key, version in lines if type(version) is not int or not 0 < version <= entries["version"]]
    if wrong:
        return [f"{len(wrong)} rows were deleted in a version that does not exist"]
    found = np.fromiter(lines, np.dtype((np.int64, 2)))
    if catalogue.digest_of_pairs(found[:, 0], found[:, 1]) != entries["digests"]["tombstones"]:
        return [f"{CATALOGUE} does not hold the tombstones that were committed; restore it from a copy"]
    return []


def _count_problems(db: Connection, snapshot: Snapshot) -> list[str]:
    """Rows that no segment has, segments without their rows, rows without contents."""
    counts = f"SELECT key >> {SHIFT}, count(*), min(key & {POSITION}), max(key & {POSITION}) FROM rows"
    counts += f" WHERE key < {(snapshot.version + 1) << SHIFT} GROUP BY 1"
    found: dict[int, list[Any]] = {number: rest for number, *rest in db.execute(counts)}
    wanted: dict[int, list[Any]] = {part.id: [part.n_rows, 0, part.n_rows - 1] for part in snapshot.segments}
    wrong = [
        f"segment {number} has {wanted.get(number, [0])[0]} rows but the catalogue lists {found.get(number, [0])[0]}"
        for number in sorted(found.keys() | wanted.keys())
        if found.get(number) != wanted.get(number)
    ]
    for one, other in (("rows", "contents"), ("contents", "rows")):
        query = f"SELECT count(*) FROM {one} WHERE key NOT IN (SELECT key FROM {other})"
        if count := db.execute(query).fetchone()[0]:
            wrong.append(f"{count} rows of table {one} are not in table {other}")
    return wrong
