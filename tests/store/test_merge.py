"""A merge brings over the live rows of another store, each once, or nothing."""

import shutil
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from leaveout.errors import FormatError, MismatchError
from leaveout.store import Store, merge

from .stores import Killed, Steps, contents, expected, flip, put, record, sql, vectors


@pytest.fixture(autouse=True)
def small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merge, "_PAGE", 2)


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """Segments f-h with g deleted, c (equal to the row of `filled`) with i, and two sides."""
    with Store.create(tmp_path / "other", {"width": 16}) as store:
        put(store, "f", "g", "h", colour="red")
        put(store, "c", "i", source="elsewhere")
        store.put_side("whitening", {"mean": np.arange(3.0), "scale": np.array(2.0)})
        store.put_side("extra", {"x": np.ones(2)})
        store.set_state("cursor", "theirs")
        store.set_state("note", [1])
        store.delete(["g"])
    return tmp_path / "other"


def test_merge_brings_live_rows_once(filled: Store, other: Path) -> None:
    before, theirs = contents(filled), contents(Store.open(other))
    kept = {file.name: file.read_bytes() for file in other.iterdir()}
    assert filled.merge(other) == {"rows": 3, "skipped": 1, "segments": 2, "sides": 1, "states": 1}
    assert contents(filled) == before | {id: theirs[id] for id in "fhi"}
    assert filled.rows(filled.numbers(["c"]))[0].meta == {"source": "web"}  # what is here stays
    assert (filled.side("whitening") or {})["mean"].tolist() == [0, 1, 2] and filled.state("cursor") == {"rows": 5}
    assert (filled.side("extra") or {})["x"].tolist() == [1, 1] and filled.state("note") == [1]
    assert filled.info()["fields"] == ["source", "year", "colour"] and filled.select("colour = 'red'").size == 2
    version = filled.version
    assert filled.merge(other) == {"rows": 0, "skipped": 4, "segments": 0, "sides": 0, "states": 0}
    assert filled.version == version and filled.check() == []
    assert {file.name: file.read_bytes() for file in other.iterdir()} == kept


def test_merge_with_an_empty_store_changes_nothing(filled: Store, tmp_path: Path) -> None:
    Store.create(tmp_path / "empty", {"width": 16}).close()
    assert set(filled.merge(tmp_path / "empty").values()) == {0} and filled.version == 5
    with Store.create(tmp_path / "copy", {"width": 16}) as copy:
        copy.merge(filled.path)
        assert contents(copy) == contents(filled) and copy.n_rows == 4


def test_merge_brings_a_row_that_was_deleted_here(filled: Store, tmp_path: Path) -> None:
    with Store.create(tmp_path / "other", {"width": 16}) as store:
        put(store, "b")
    assert filled.merge(tmp_path / "other")["rows"] == 1 and contents(filled)["b"] == expected("b")["b"]


DIFFERENT = {
    "text": ([record("a", "another text")], vectors(["a"])),
    "content hash": ([record("a").__class__("a", "the text of a", "u", {}, "another hash", {})], vectors(["a"])),
    "one bit": ([record("a")], {**vectors(["a"]), "length": np.array([0], np.int32)}),
    "dtype": ([record("a")], {**vectors(["a"]), "length": np.array([1], np.uint32)}),
    "shape": ([record("a")], {**vectors(["a"]), "vector": vectors(["a"])["vector"].reshape(1, 4, 4)}),
    "array name": ([record("a")], {"vector": vectors(["a"])["vector"], "size": np.array([1], np.int32)}),
    "fewer arrays": ([record("a")], {"vector": vectors(["a"])["vector"]}),
}


@pytest.mark.parametrize("what", DIFFERENT)
def test_merge_refuses_an_id_with_different_contents(filled: Store, tmp_path: Path, what: str) -> None:
    with Store.create(tmp_path / "other", {"width": 16}) as store:
        put(store, "new")
        store.put(*DIFFERENT[what])
    with pytest.raises(FormatError, match=r"the id 'a' is in .*store and in .*other with different contents; delete"):
        filled.merge(tmp_path / "other")
    assert filled.version == 5 and filled.check() == []
    filled.delete(["a"])
    assert filled.merge(tmp_path / "other")["rows"] == 2


def test_merge_refuses_what_cannot_be_one_store(filled: Store, other: Path, tmp_path: Path) -> None:
    Store.create(tmp_path / "wide", {"width": 17}).close()
    with pytest.raises(MismatchError, match=r"has the setting width = 17 but .*store has 16; build it again"):
        filled.merge(tmp_path / "wide")
    for number, side in enumerate(
        [{"mean": np.arange(3.0)}, {"mean": np.arange(3.0), "scale": np.array(3.0)}, {"mean": np.arange(4.0)}]
    ):
        with Store.create(tmp_path / f"side {number}", {"width": 16}) as store:
            put(store, "n")
            store.put_side("whitening", side)
        with pytest.raises(
            MismatchError, match=r"the side 'whitening' of .*side . differs from that of .*build one of"
        ):
            filled.merge(tmp_path / f"side {number}")
    (tmp_path / "link").symlink_to(filled.path)
    with pytest.raises(ValueError, match="is the store itself"):
        filled.merge(tmp_path / "link")
    with Store.create(tmp_path / "fields", {"width": 16}) as store:
        store.put([record("x", **{f"f{n}": 1 for n in range(255)})], vectors(["x"]))
    with pytest.raises(FormatError, match="together the stores have 257 metadata fields"):
        filled.merge(tmp_path / "fields")
    with pytest.raises(ValueError, match="open for reading only"):
        Store.open(filled.path).merge(other)
    damages = [
        lambda copy: flip(copy / "00000002-00000002.safetensors", -1),
        sql("UPDATE contents SET text = upper(text) WHERE text LIKE '%of i'"),
    ]
    for number, damage in enumerate(damages):
        damage(copy := shutil.copytree(other, tmp_path / str(number)))
        with pytest.raises(FormatError, match="is damaged"):
            filled.merge(copy)
    assert filled.version == 5 and filled.check() == []


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_killed_merge_is_finished_by_the_same_call(filled: Store, other: Path, tmp_path: Path, after: bool) -> None:
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
                store.merge(other)
        if steps.seen < die_at:
            break
        seen.add(frozenset(contents(Store.open(copy))))
        with Store.open(copy, write=True) as store:
            store.merge(other)
            assert contents(store) == wanted and store.check() == [] and not list(copy.glob("*.tmp"))
            assert store.side("extra") and store.state("note") == [1]
    assert die_at > 10 and seen == segments_of
