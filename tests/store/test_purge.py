"""After a purge no byte of a purged row is left, and this is proved."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from leaveout.errors import FormatError
from leaveout.store import Store, catalogue, purge, segment

from .stores import Killed, bytes_of, contents, flip, put, record, vectors

LONG = " ".join(f"word{n * n}" for n in range(2_000))  # over several pages of SQLite


def test_purge_removes_text_and_vector_from_all_files(path: Path) -> None:
    secret, arrays = "a secret of 26 characters!", vectors(["gone", "live", "long"], 300)
    with Store.create(path, {}) as store:
        texts = {"gone": secret, "live": "nothing of interest", "long": LONG}
        store.put([record(id, text, **{f"field of {id}": f"meta of {id}"}) for id, text in texts.items()], arrays)
        planted = [secret, LONG[500:900], LONG[-300:], "meta of gone", "field of gone", "hash of gone", "unit of long"]
        planted = [text.encode() for text in planted] + [arrays["vector"][0].tobytes(), arrays["vector"][2].tobytes()]
        store.delete(["gone", "long"])
        assert all(piece in bytes_of(path) for piece in planted)
        assert store.purge() == {"rows": 2, "segments": 1, "files": 1}
        assert not any(piece in bytes_of(path) for piece in planted)
        assert arrays["vector"][1].tobytes() in bytes_of(path) and b"nothing of interest" in bytes_of(path)
        with catalogue.reading(path) as db:
            assert db.execute("PRAGMA freelist_count").fetchone() == (0,)
        assert store.n_rows == 1 and store.purge() == {"rows": 0, "segments": 0, "files": 0}
        assert store.numbers(["live"]) == [0] and store.check() == []
        store.delete(["live"])
        assert store.purge()["rows"] == 1 and store.segments() == [] and not list(path.glob("*.safetensors"))


def test_purge_killed_before_its_end_is_finished_at_the_next_open(
    filled: Store, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(catalogue, "vacuum", lambda path: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        filled.purge()
    assert b"the text of b" not in bytes_of(path)  # zeros, even before the catalogue is rewritten
    assert "a purge was stopped before its end; open the store for writing once" in filled.check()
    filled.close()
    monkeypatch.undo()
    with Store.open(path, write=True) as store:
        assert store.check() == [] and contents(store).keys() == {"a", "c", "d", "e"}


@pytest.mark.parametrize("step", ["vacuum", "raw", "writing"])
@pytest.mark.parametrize("planted", [False, True])
def test_purge_killed_after_its_commit_is_proved_at_the_next_open(
    filled: Store, path: Path, monkeypatch: pytest.MonkeyPatch, step: str, planted: bool
) -> None:
    """The texts are gone by then: the scan must know what to look for from the disk."""
    secret = "a text of which no copy may stay"
    filled.put([record("t", secret)], vectors(["t"]))
    filled.delete(["t"])
    file = path / "copy.txt"
    if planted:
        file.write_text(f"mine: {secret}")
    real = getattr(catalogue, step)
    calls = iter([real] if step == "writing" else [])  # the first one commits the purge

    def dying(path: Path) -> object:
        for method in calls:
            return method(path)
        raise Killed

    monkeypatch.setattr(catalogue, step, dying)
    with pytest.raises(Killed):
        filled.purge()
    filled.close()
    monkeypatch.undo()
    assert secret.encode() not in bytes_of(path).replace(b"mine: " + secret.encode(), b"")
    assert any("a purge was stopped before its end" in text for text in Store.open(path).check())
    with Store.open(path, write=True) as store:
        proof = store.state("purge")
        assert (proof["version"], proof["rows"], proof["segments"], proof["files"] > 0) == (8, 2, 2, not planted)
        assert ("copy.txt still holds bytes" in proof["problem"]) if planted else (store.check() == [])
        file.unlink(missing_ok=True)
    with Store.open(path, write=True) as store:
        assert store.check() == [] and store.state("purge")["problem"] is None
        assert {part.name for part in store._snapshot.files} == {file.name for file in path.glob("*.safetensors")}


def test_unproved_purge_is_proved_together_with_the_next_one(filled: Store, path: Path) -> None:
    texts = ["the first text that is purged", "the second text that is purged"]
    filled.put([record("s", texts[0]), record("t", texts[1])], vectors(["s", "t"]))
    (path / "copy.txt").write_text(texts[0])
    for id in ("s", "t"):
        filled.delete([id])
        with pytest.raises(FormatError, match=r"copy\.txt still holds bytes"):
            filled.purge()
    (path / "copy.txt").write_text(texts[1])
    filled.close()
    with Store.open(path, write=True) as store:
        assert "copy.txt" in store.state("purge")["problem"]
        (path / "copy.txt").unlink()
        put(store, "u")
        store.delete(["u"])
        assert store.purge()["rows"] == 1 and store.check() == []
    with (
        pytest.raises(ValueError, match="the state 'purge' is set by purge only"),
        Store.open(path, write=True) as store,
    ):
        store.set_state("purge", 1)


def test_purge_lets_live_copies_be(path: Path) -> None:
    same = {"vector": np.tile(np.arange(64, dtype=np.float32), (3, 1))}
    with Store.create(path, {}) as store:
        texts = {"a": "the very same text", "b": "the very same text", "c": "once more: the very same text, and more"}
        store.put([record(id, text) for id, text in texts.items()], same)
        store.put([record("d", quotes="the very same text")], {"vector": same["vector"][:1]})
        store.delete(["a", "c"])
        assert store.purge()["rows"] == 2
        store.delete(["b"])
        assert store.purge()["rows"] == 1 and store.ids() == ["d"] and store.check() == []


@pytest.mark.parametrize("what", ["text", "vector"])
def test_purge_reports_bytes_that_remain(filled: Store, path: Path, what: str) -> None:
    copied = b"the text of b" + b"!" * 9 if what == "text" else vectors(["b"])["vector"].tobytes()
    filled.put([record("t", "the text of b!!!!!!!!!")], vectors(["t"]))
    (path / "notes").mkdir()
    (path / "notes/copy.bin").write_bytes(b"x" * 101 + copied)
    filled.delete(["t"])
    with pytest.raises(FormatError, match=r"notes/copy.bin still holds bytes of them; remove this file"):
        filled.purge()
    assert any("the last purge is not proved; open the store for writing once" in text for text in filled.check())
    proof = filled.state("purge")
    assert filled.n_rows == 4 and proof["rows"] == 2 and "notes/copy.bin still holds" in proof["problem"]
    filled.close()
    Store.open(path, write=True).close()  # scans again, and finds it again
    assert "not proved" in Store.open(path).check()[0]
    (path / "notes/copy.bin").unlink()
    with Store.open(path, write=True) as store:
        assert store.check() == [] and store.state("purge") == {**proof, "problem": None, "files": 1}


def test_purge_refuses_a_segment_that_is_not_the_live_rows(filled: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    write = segment.write
    before = contents(filled)

    def shifted(path: Path, arrays: dict[str, np.ndarray], keep: np.ndarray | None = None) -> tuple[int, bytes]:
        return write(path, arrays, None if keep is None else np.roll(keep, 1))

    monkeypatch.setattr(segment, "write", shifted)
    with pytest.raises(FormatError, match="is not the live rows of"):
        filled.purge()
    assert contents(filled) == before


def test_purge_does_not_carry_damage_over(filled: Store) -> None:
    flip(filled.segments()[0].path, -1)
    with pytest.raises(FormatError, match="is damaged; nothing was purged"):
        filled.purge()
    assert filled.version == 5 and filled.n_rows == 5


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_traces_are_found_like_substrings(data: st.DataObject) -> None:
    pieces = data.draw(st.lists(st.binary(min_size=16, max_size=128), min_size=1, max_size=5))
    parts = st.one_of(
        st.binary(max_size=30), st.sampled_from(pieces), st.sampled_from(pieces).map(lambda piece: piece[:-1])
    )
    haystack = b"".join(data.draw(st.lists(parts, max_size=20)))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(haystack)), max_size=4)))
    chunks = [haystack[a:b] for a, b in zip([0, *cuts], [*cuts, len(haystack)], strict=True)]
    for piece in pieces:
        traces = purge.Traces()
        for other in pieces:
            traces.add(other, variety=2)
        alone = purge.Traces()
        alone.add(piece, variety=2)
        known = alone.found([piece])
        assert (known <= traces.found(chunks)) == (piece in haystack or not known)
