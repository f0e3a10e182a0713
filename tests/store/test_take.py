"""`take` brings over the live rows of a segment of another store, each once, as one transaction or not at all."""

import shutil
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from leaveout.errors import FormatError
from leaveout.store import Record, Store

from .stores import Killed, Steps, contents, expected, flip, put, record, sql


def take_all(store: Store, other: Path) -> int:
    theirs = Store.open(other, verify=True)
    return sum(store.take(theirs, part) for part in theirs.segments())


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """Segments f-h with g deleted, and c (another row than that of `filled`) with i."""
    with Store.create(tmp_path / "other", {"width": 16}) as store:
        put(store, "f", "g", "h", colour="red")
        put(store, "c", "i", source="elsewhere")
        store.delete(["g"])
    return tmp_path / "other"


def test_take_brings_live_rows_once_and_ours_stay(filled: Store, other: Path) -> None:
    before, theirs = contents(filled), contents(Store.open(other))
    kept = {file.name: file.read_bytes() for file in other.iterdir()}
    assert take_all(filled, other) == 3 and filled.version == 7
    assert contents(filled) == before | {id: theirs[id] for id in "fhi"}
    assert filled.info()["fields"] == ["source", "year", "colour"] and filled.numbers_where("colour = 'red'").size == 2
    assert take_all(filled, other) == 0 and filled.version == 7 and filled.check() == []
    assert {file.name: file.read_bytes() for file in other.iterdir()} == kept


def test_take_into_and_from_an_empty_store(filled: Store, tmp_path: Path) -> None:
    Store.create(tmp_path / "empty", {"width": 16}).close()
    assert take_all(filled, tmp_path / "empty") == 0 and filled.version == 5
    with Store.create(tmp_path / "copy", {"width": 16}) as copy:
        take_all(copy, filled.path)
        assert contents(copy) == contents(filled) and copy.n_rows == 4


def test_take_brings_a_row_that_was_deleted_here(filled: Store, tmp_path: Path) -> None:
    with Store.create(tmp_path / "other", {"width": 16}) as store:
        put(store, "b")
    assert take_all(filled, tmp_path / "other") == 1 and contents(filled)["b"] == expected("b")["b"]


def test_take_chooses_and_renames(filled: Store, other: Path) -> None:
    theirs = Store.open(other)
    seen: list[str] = []

    def choose(records: list[Record]) -> list[Record | None]:
        seen.extend(one.id for one in records)
        return [replace(one, id=f"their {one.id}") if one.id in "hci" else None for one in records]

    before, wanted = contents(filled), contents(theirs)
    assert sum(filled.take(theirs, part, choose) for part in theirs.segments()) == 3 and seen == list("fhci")
    assert filled.take(theirs, theirs.segments()[0], lambda records: [None] * len(records)) == 0
    renamed = {f"their {id}": (replace(wanted[id][0], id=f"their {id}"), wanted[id][1]) for id in "hci"}
    assert contents(filled) == before | renamed and filled.version == 7


def test_take_refuses_ids_that_are_here_or_come_twice(filled: Store, other: Path) -> None:
    theirs = Store.open(other)
    with pytest.raises(FormatError, match="'c' is in the store already"):
        filled.take(theirs, theirs.segments()[1], lambda records: records)
    with pytest.raises(FormatError, match="'x' comes twice"):
        filled.take(theirs, theirs.segments()[1], lambda records: [replace(one, id="x") for one in records])
    with pytest.raises(ValueError, match="open for reading only"):
        Store.open(filled.path).take(theirs, theirs.segments()[0])
    with Store.create(other.parent / "fields", {}) as wide:
        wide.put([record("x", **{f"f{n}": 1 for n in range(255)})], {"vector": np.zeros(1)})
    with pytest.raises(FormatError, match="more than 256 metadata fields"):
        take_all(filled, other.parent / "fields")
    assert filled.version == 5 and filled.check() == []


def test_take_refuses_what_is_damaged(filled: Store, other: Path, tmp_path: Path) -> None:
    damages = [
        lambda copy: flip(copy / "00000001-00000001.safetensors", -1),
        sql("UPDATE contents SET text = upper(text) WHERE text LIKE '%of h'"),
    ]
    for number, damage in enumerate(damages):
        damage(copy := shutil.copytree(other, tmp_path / str(number)))
        with pytest.raises(FormatError, match="is damaged"):
            take_all(filled, copy)
    assert filled.version == 5 and filled.check() == []


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_killed_take_is_finished_by_the_same_calls(filled: Store, other: Path, tmp_path: Path, after: bool) -> None:
    filled.close()
    before = contents(filled)
    wanted = before | {id: row for id, row in contents(Store.open(other)).items() if id != "c"}
    segments_of = {frozenset(before), frozenset(before) | set("fh"), frozenset(wanted)}
    seen = set()
    for die_at in range(1, 200):
        copy = shutil.copytree(filled.path, tmp_path / f"at {die_at}")
        with Store.open(copy, write=True) as store, pytest.MonkeyPatch.context() as patch:
            steps = Steps(patch, die_at, after)
            with suppress(Killed):
                take_all(store, other)
        if steps.seen < die_at:
            break
        seen.add(frozenset(contents(Store.open(copy))))
        with Store.open(copy, write=True) as store:
            take_all(store, other)
            assert contents(store) == wanted and store.check() == [] and not list(copy.glob("*.tmp"))
    assert die_at > 10 and seen | {frozenset(wanted)} == segments_of  # before its last step the last commit is not seen
