"""Damage is reported."""

import os
import re
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from leaveout.errors import FormatError, LeaveoutError, MismatchError
from leaveout.store import Store, catalogue, segment, snapshot

from .stores import edit, entry, flip, overwritten, put, record, sql

DAMAGES: dict[str, tuple[str, Callable[[Path], object]]] = {
    "data": (r"block 0 \(from byte 0\) is damaged", lambda path: flip(path / "00000001-00000001.safetensors", -1)),
    "header": ("block 0 .* is damaged", lambda path: flip(path / "00000001-00000001.safetensors", 40)),
    "header length": ("bad header", lambda path: flip(path / "00000001-00000001.safetensors", 5)),
    "side": ("00000003-00000003.safetensors: block 0", lambda path: flip(path / "00000003-00000003.safetensors", -1)),
    "shorter": (r"bytes but the catalogue says", lambda path: os.truncate(path / "00000001-00000001.safetensors", 99)),
    "missing": ("is not there: .*lost", lambda path: (path / "00000001-00000001.safetensors").unlink()),
    "orphan": ("belongs to no version", lambda path: (path / "00000006-00000006.safetensors").touch()),
    "temporary": ("belongs to no version", lambda path: (path / "00000006-00000006.safetensors.tmp").touch()),
    "text": (r"entry of row 'a' is damaged; restore .* \(key 4294967296\)", sql("UPDATE contents SET text = upper(text)")),
    "settings": ("entry 'settings' of the catalogue is damaged", sql("UPDATE store SET value = '{}' WHERE key = 'settings'")),
    "row": ("segment 1 has 3 rows but the catalogue lists 2", sql("DELETE FROM rows WHERE id = 'a'")),
    "contents": ("1 rows of table rows are not in table contents", sql("DELETE FROM contents WHERE text LIKE '%of b'")),
    "future": ("its tombstones differ", sql("UPDATE rows SET deleted = 99 WHERE id = 'a'")),
    "hashes": ("is damaged", sql("UPDATE segments SET hashes = zeroblob(8) WHERE segment = 2")),
    "page": ("catalogue.sqlite is damaged", overwritten(4096, b"\xff" * 4096)),
    "no catalogue": ("catalogue.sqlite cannot be read", lambda path: (path / "catalogue.sqlite").unlink()),
    "purge": ("a purge was stopped", entry("purging", '{"rows": 1, "segments": 1}')),
}  # fmt: skip


@pytest.mark.parametrize(("match", "damage"), DAMAGES.values(), ids=DAMAGES)
def test_check_reports(filled: Store, path: Path, match: str, damage: Callable[[Path], object]) -> None:
    assert filled.check() == []
    damage(path)
    problems = filled.check()
    assert any(re.search(match, problem) for problem in problems), problems
    filled.close()


def test_check_finds_a_flip_in_each_block(path: Path) -> None:
    with Store.create(path, {}) as store:
        store.put([record("a")], {"x": np.zeros((1, 2 * segment.BLOCK + 999), np.int8)})
    for at, block in ((segment.BLOCK - 1, 0), (segment.BLOCK, 1), (-1, 2)):
        flip(path / "00000001-00000001.safetensors", at)
        assert [problem.split(": ")[1] for problem in store.check()] == [
            f"block {block} (from byte {block * segment.BLOCK}) is damaged"
        ]
        flip(path / "00000001-00000001.safetensors", at)


def test_open_for_writing_tidies_up_but_never_past_the_catalogue(filled: Store, path: Path) -> None:
    filled.close()
    leftovers = ["00000006-00000006.safetensors", "00000006-00000006.safetensors.tmp", "00000001-00000004.safetensors"]
    for name in leftovers:
        (path / name).touch()
    (path / "config.yaml").touch()
    Store.open(path, write=True).close()
    assert not any((path / name).exists() for name in leftovers) and (path / "config.yaml").exists()
    (path / "00000007-00000007.safetensors").touch()
    with pytest.raises(MismatchError, match="newer than the catalogue, which is at version 5; restore"):
        Store.open(path, write=True)
    assert (path / "00000007-00000007.safetensors").exists()


def readable(store: Store) -> object:
    """All that a store shows, by every way of asking."""
    ids = store.ids()
    sides = {name: {n: a.tobytes() for n, a in (store.side(name) or {}).items()} for name in store.info()["sides"]}
    arrays = [{n: (a.dtype, a.tobytes()) for n, a in part.arrays().items()} for part in store.segments()]
    found = [store.numbers_where(where).tolist() for where in ("source = 'web'", "year > 1000", "length(text) > 12")]
    info = {name: value for name, value in store.info().items() if name != "bytes"}
    asked = store.numbers(ids).tolist(), sorted(store.has([*ids, "b"])), list(store.iter_rows())
    live = [part.tombstones.tolist() for part in store.segments()]
    return ids, sides, arrays, found, info, asked, live, store.settings, store.state("cursor"), store.state("purge")


def flips(path: Path, n: int, seed: int) -> Iterator[tuple[Path, int, int]]:
    """Random bits: half of them in the catalogue, the others in all files by their sizes."""
    chance = np.random.default_rng(seed)
    files = [file for file in sorted(path.iterdir()) if file.stat().st_size]
    sizes = np.array([file.stat().st_size for file in files])
    for number in range(n):
        file = path / catalogue.CATALOGUE if number % 2 else files[chance.choice(len(files), p=sizes / sizes.sum())]
        yield file, int(chance.integers(file.stat().st_size)), int(chance.integers(8))


@pytest.mark.parametrize("n", [400, pytest.param(4000, marks=pytest.mark.nightly)])
def test_every_flipped_bit_is_reported_or_changes_nothing(
    filled: Store, path: Path, monkeypatch: pytest.MonkeyPatch, n: int
) -> None:
    """So many bits, one at a time: in free space a flip is harmless, anywhere else `check` and `verify` must see it."""
    monkeypatch.setattr(snapshot, "_PAGE", 100)
    monkeypatch.setattr(snapshot, "_BATCH", 100)
    put(filled, *(f"row {k}" for k in range(150)), year=2001)
    filled.delete([f"row {k}" for k in range(0, 150, 7)])
    filled.purge()
    filled.delete(["row 1", "c"])
    filled.close()
    before, reader = readable(Store.open(path)), Store.open(path)
    n_reported = 0
    for file, at, bit in flips(path, n, seed=n):
        data = bytearray(file.read_bytes())
        data[at] ^= 1 << bit
        with open(file, "r+b") as opened:
            opened.seek(at)
            opened.write(data[at : at + 1])
        try:
            assert readable(Store.open(path, verify=True)) == before, (file.name, at, bit)
            seen = None
        except LeaveoutError as error:
            seen = error
        problems = reader.check()
        assert (seen is None) == (problems == []), (file.name, at, bit, seen, problems)
        n_reported += seen is not None
        data[at] ^= 1 << bit
        file.write_bytes(data)
    assert reader.check() == [] and n / 4 < n_reported < n


def test_verify_reads_each_file_once_and_names_the_block(
    filled: Store, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, plain = Store.open(path, verify=True), Store.open(path)
    hashed: list[int] = []
    real = segment._block_hashes
    monkeypatch.setattr(segment, "_block_hashes", lambda fd: hashed.append(fd) or real(fd))
    first, second = store.segments()
    for _ in range(3):
        first.arrays(), store.info(), store.rows([0])
    assert len(hashed) == 2
    filled.put_side("late", {"x": np.zeros(3)})
    store.refresh()
    assert store.side("late") and store.segments()[0].arrays() and len(hashed) == 3
    flip(second.path, -1)
    assert plain.segments()[1].arrays()  # not seen
    message = r"00000002-00000002\.safetensors: block 0 \(from byte 0\) is damaged; restore the file from a copy"
    with pytest.raises(FormatError, match=message):
        Store.open(path, verify=True).segments()[1].arrays()
    edit(path, "UPDATE rows SET meta = '{}' WHERE id = 'a'")
    with pytest.raises(FormatError, match="entry of row 'a' is damaged"):
        Store.open(path, verify=True)
    with pytest.raises(FormatError, match="entry of row 'a' is damaged"):
        store.refresh()


@pytest.mark.parametrize("statement", [
    "DELETE FROM contents WHERE key = 4294967298",
    "UPDATE rows SET key = 3 + (2 << 32) WHERE id = 'd'",
    "UPDATE segments SET hashes = zeroblob(8) WHERE segment = 1",
    "UPDATE rows SET deleted = 4 WHERE id = 'b'",
    "UPDATE rows SET deleted = 'x' WHERE id = 'a'",
    "UPDATE rows SET deleted = -1 WHERE id = 'a'",
    "DELETE FROM store WHERE key = 'state.cursor'",
    "DELETE FROM fields",
    "UPDATE segments SET side = 'x' WHERE side = 'whitening'",
])  # fmt: skip
def test_check_and_verify_notice_what_no_transaction_wrote(filled: Store, path: Path, statement: str) -> None:
    filled.close()
    with closing(sqlite3.connect(path / catalogue.CATALOGUE, isolation_level=None)) as db:
        db.execute(statement)
    assert filled.check() != []
    with pytest.raises(FormatError):
        Store.open(path, verify=True).segments()[0].arrays()


def test_swapped_rows_are_noticed(filled: Store, path: Path) -> None:
    """Each row is sound in itself, and every count is right."""
    first, third = 1 << 32, (1 << 32) + 2
    for table in ("rows", "contents"):
        for old, new in ((first, -1), (third, first), (-1, third)):
            edit(path, f"UPDATE {table} SET key = {new} WHERE key = {old}")
    assert [row.id for row in Store.open(path).rows([0, 2])] == ["c", "a"]
    assert Store.open(path).check() == [
        "catalogue.sqlite does not hold the rows that were committed; restore it from a copy"
    ]
