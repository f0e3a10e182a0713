"""Coverage-guided fuzzing of what a store reads from strangers: only our own errors may come out.

    pip install atheris
    python tests/store/fuzz_atheris.py header|record|catalogue -max_total_time=150

Options are those of libFuzzer. The corpus starts from valid files; new inputs are kept in memory only. Half of the
changes are to bytes, half to a value in JSON, which bytes alone seldom leave sound. An input that fails is written to the
working directory as crash-*, and is replayed by giving its name.
"""

from __future__ import annotations

import functools
import json
import os
import random
import shutil
import sqlite3
import sys
import tempfile
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import atheris  # pyright: ignore[reportMissingImports]
import numpy as np

with atheris.instrument_imports(include=["leaveout.store"]):
    from leaveout.store import Record, Store, catalogue, segment

from leaveout.errors import LeaveoutError

ODD = [
    0,
    -1,
    2,
    2**31,
    2**32,
    2**63,
    10**30,
    0.5,
    1e400,
    "",
    "../x",
    "F64",
    "x" * 300,
    "\ud800",
    None,
    True,
    [],
    [0, 8],
]
SEPARATOR = b"\xff"  # of the strings of a row


def changed_json(value: Any, chance: random.Random) -> Any:
    """The value with one of its parts replaced, renamed or left out."""
    if not isinstance(value, (dict, list)) or not value or chance.random() < 0.1:
        return chance.choice(ODD)
    key = chance.choice(list(value) if isinstance(value, dict) else range(len(value)))
    step = chance.random()
    if step < 0.1:
        del value[key]
    elif step < 0.2 and isinstance(value, dict):
        value[str(chance.choice(ODD))] = value[key]
    elif step < 0.3 and isinstance(value, list):
        value.append(value[key])
    else:
        value[key] = changed_json(value[key], chance)
    return value


def json_places(target: str, data: bytes) -> list[tuple[int, int]]:
    """First and last + 1 byte of every piece of JSON in an input."""
    if target == "record":
        ends = [at for at in range(len(data) + 1) if data[at : at + 1] in (SEPARATOR, b"")]
        return [(ends[at - 1] + 1, ends[at]) for at in (3, 5, 6) if at < len(ends)]
    if target == "header":
        return [(8, 8 + int.from_bytes(data[:8], "little"))]
    return []


def mutated(target: str, data: bytes, max_size: int, seed: int) -> bytes:
    """An input with one value of its JSON changed, or with changed bytes."""
    chance = random.Random(seed)
    places = json_places(target, data)
    if places and chance.random() < 0.5:
        start, end = chance.choice(places)
        with suppress(ValueError, RecursionError):
            text = json.dumps(changed_json(json.loads(data[start:end].decode()), chance)).encode()
            before = data[:start]
            if target == "header":
                before = before[:-8] + len(text).to_bytes(8, "little")
            return (before + text + data[end:])[:max_size]
    return bytes(atheris.Mutate(data, max_size))


class Place:
    """A valid store, and where changed ones are put."""

    def __init__(self, root: Path) -> None:
        self.store, self.changed = root / "store", root / "changed"
        with Store.create(self.store, {"width": 2}) as store:
            for ids in (["a", "b"], ["c"]):
                rows = [Record(id, f"text of {id}", id, {"source": "web", "n": 1}, f"hash {id}", {}) for id in ids]
                store.put(rows, {"vector": np.ones((len(ids), 2), np.float16), "n": np.ones(len(ids), np.int64)})
            store.put_side("whitening", {"mean": np.arange(3.0)})
            store.set_state("cursor", {"rows": 3})
            store.delete(["b"])

    def seeds(self, target: str) -> list[bytes]:
        """Valid inputs of a target."""
        if target == "header":
            return [file.read_bytes() for file in sorted(self.store.glob("*.safetensors"))]
        if target == "record":
            return [
                SEPARATOR.join([b"a", b"u", b"text", b'{"n": 1, "f": null}', b"h", b'{"spans": [[0, 1.5]]}', b"{}"])
            ]
        return [bytes([n]) + (self.store / catalogue.CATALOGUE).read_bytes() for n in (0, 1, 2)]

    def header(self, data: bytes) -> None:
        """The header of a segment: what is accepted lies inside the file."""
        file = self.changed.with_suffix(".safetensors")
        file.write_bytes(data)
        part = segment.Segment(1, file, 0, 1, len(data), b"", np.empty(0, np.int64), is_side=True)
        with suppress(LeaveoutError):
            arrays = part.arrays()
            assert sum(array.nbytes for array in arrays.values()) + 8 <= len(data)
            assert all(array.tobytes() in data for array in arrays.values())

    def record(self, data: bytes) -> None:
        """The columns of a row with their checksum: what is accepted is stored and read as the same again."""
        try:
            id, unit, text, meta, content_hash, extra, raw = strings = [part.decode() for part in data.split(SEPARATOR)]
        except ValueError:
            return
        digest = catalogue.checksum(id, unit, text, meta, content_hash, extra, raw)
        with suppress(LeaveoutError):
            found = catalogue.deserialized([*strings, digest])
            assert catalogue.deserialized(catalogue.serialized(found)) == found

    def catalogue(self, data: bytes) -> None:
        """A changed catalogue, as it is or with its digests made right."""
        if not data:
            return
        shutil.rmtree(self.changed, ignore_errors=True)
        shutil.copytree(self.store, self.changed)
        (self.changed / catalogue.CATALOGUE).write_bytes(data[1:])
        if data[0] & 1:
            with suppress(Exception), closing(sqlite3.connect(self.changed / catalogue.CATALOGUE)) as db:
                for key, text in db.execute("SELECT key, value FROM store").fetchall():
                    db.execute("UPDATE store SET checksum = ? WHERE key = ?", (catalogue.checksum(key, text), key))
                catalogue._seal(db)
                db.commit()
        with suppress(LeaveoutError):
            assert isinstance(Store.open(self.changed).check(), list)
        with suppress(LeaveoutError), Store.open(self.changed, write=bool(data[0] & 2)) as store:
            ids = store.ids()
            list(store.iter_rows()), store.info(), store.side("whitening"), store.state("cursor"), store.has(ids)
            for part in store.segments():
                part.live(), part.arrays()
            with suppress(ValueError):  # of a row that is deleted, or that only one of table and index has
                store.rows(range(min(9, store.n_rows))), store.numbers_where("n > 0"), store.numbers(ids)
            if data[0] & 2:
                store.delete(ids[:1])
                store.purge()


def main() -> None:
    target, options = sys.argv[1], sys.argv[2:]
    os.fsync = lambda fd: None  # nothing here cuts the power
    catalogue.SYNCHRONOUS = "OFF"
    with tempfile.TemporaryDirectory() as name:
        place = Place(Path(name))
        run: dict[str, Callable[[bytes], None]] = {
            "header": place.header,
            "record": place.record,
            "catalogue": place.catalogue,
        }
        seeds = Path(name) / "seeds"
        seeds.mkdir()
        for number, seed in enumerate(place.seeds(target)):
            (seeds / str(number)).write_bytes(seed)
        longest = max(map(len, place.seeds(target)))
        given = [] if any(not option.startswith("-") for option in options) else [str(seeds)]
        # Valid files take the same path, of which one would be kept; and the longest must be changed from the start.
        fixed = [f"-max_len={2 * longest}", "-keep_seed=1", "-len_control=0"]
        mutator = functools.partial(mutated, target)
        atheris.Setup([sys.argv[0], *fixed, *options, *given], run[target], custom_mutator=mutator)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
