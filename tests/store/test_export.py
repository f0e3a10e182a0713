"""An export can be read without leaveout, comes back bit for bit, and is not trusted."""

import json
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from leaveout.errors import FormatError, LeaveoutError
from leaveout.store import Store, segment

from .stores import Killed, Steps, contents, flip, record, vectors


@pytest.fixture
def exported(filled: Store, tmp_path: Path) -> Path:
    assert filled.export(tmp_path / "export") == {"rows": 4, "files": 2, "sides": 1}
    return tmp_path / "export"


def everything(store: Store) -> object:
    arrays = [
        {name: values[slice(None) if live is None else live].tobytes() for name, values in part.arrays().items()}
        for part in store.segments()
        for live in [part.live()]
    ]
    sides = {
        name: {n: (a.dtype, a.shape, a.tobytes()) for n, a in (store.side(name) or {}).items()}
        for name in store.info()["sides"]
    }
    return contents(store), arrays, sides, store.settings, store.state("cursor"), list(store.iter_rows())


def test_export_is_plain_files(filled: Store, exported: Path) -> None:
    names = [
        "manifest.json",
        "rows-00001.safetensors",
        "rows-00002.safetensors",
        "rows.jsonl",
        "side-00001.safetensors",
    ]
    assert sorted(file.name for file in exported.iterdir()) == names
    lines = [json.loads(line) for line in (exported / "rows.jsonl").read_text().splitlines()]
    assert lines[1] == {
        "id": "c", "text": "the text of c", "unit": "unit of c", "meta": {"source": "web"}, "content_hash": "hash of c",
        "extra": {"spans": [[0, 1]]}, "raw": "", "file": "rows-00001.safetensors", "row": 1,
    }  # fmt: skip
    for line in lines:
        row = load_file(exported / line["file"])["vector"][line["row"]]
        assert row.tobytes() == contents(filled)[line["id"]][1]
    assert json.loads((exported / "manifest.json").read_text())["settings"] == {"width": 16}


def test_export_comes_back_bit_for_bit(filled: Store, tmp_path: Path) -> None:
    strange = [record("\0é\x1f\u2028", '"\n\r\\\x85', nothing=None, big=2**70, small=5e-324, true=True, text="\u2029")]
    filled.put(strange, {"odd": np.array([[np.nan, -0.0, np.inf]], np.float64), "bits": np.array([[255]], np.uint8)})
    filled.delete(["d", "e"])  # a segment without a live row
    filled.put([record("x", "")], vectors(["x"]))
    filled.purge()
    filled.export(tmp_path / "export")
    with Store.from_export(tmp_path / "new", tmp_path / "export") as store:
        assert store.check() == [] and store.n_rows == 4 and store.state("purge") is None
        store.export(tmp_path / "again")
    one, other = ({f.name: f.read_bytes() for f in (tmp_path / name).iterdir()} for name in ("export", "again"))
    assert one == other
    found, wanted = Store.open(tmp_path / "new"), Store.open(filled.path)
    assert list(found.iter_rows()) == list(wanted.iter_rows()) and found.settings == wanted.settings
    for ours, theirs in zip(found.segments(), wanted.segments(), strict=True):
        assert {n: (a.dtype, a.tobytes()) for n, a in ours.arrays().items()} == {
            n: (a.dtype, a.tobytes()) for n, a in theirs.arrays().items()
        }


def test_empty_store_is_exported(tmp_path: Path) -> None:
    with Store.create(tmp_path / "store", {"a": 1}) as store:
        store.export(tmp_path / "export")
    with Store.from_export(tmp_path / "new", tmp_path / "export") as new:
        assert new.settings == {"a": 1} and len(new) == 0 and new.check() == []


def test_export_refuses_a_directory_with_anything_else_and_a_damaged_store(
    filled: Store, exported: Path, tmp_path: Path
) -> None:
    with pytest.raises(FormatError, match=r"is not empty: it holds 'manifest.json'; choose another"):
        filled.export(exported)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").touch()
    with pytest.raises(FormatError, match=r"holds 'notes.txt'"):
        filled.export(tmp_path / "mine")
    flip(filled.segments()[1].path, -1)
    with pytest.raises(FormatError, match="is damaged; nothing was exported"):
        filled.export(tmp_path / "new")
    with pytest.raises(FormatError, match=r"has no manifest.json: .*killed before its end; export"):
        Store.from_export(tmp_path / "x", tmp_path / "new")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_killed_export_and_import_are_finished_by_the_same_call(filled: Store, tmp_path: Path, after: bool) -> None:
    wanted = everything(filled)[0]  # type: ignore[index]
    for name in ("export", "import"):
        for die_at in range(1, 200):
            directory, path = tmp_path / f"{name} {die_at}", tmp_path / f"{name} store {die_at}"
            if name == "import":
                filled.export(directory)
            with pytest.MonkeyPatch.context() as patch:
                steps = Steps(patch, die_at, after)
                with suppress(Killed):
                    filled.export(directory) if name == "export" else Store.from_export(path, directory).close()
            if steps.seen < die_at:
                break
            if not (directory / "manifest.json").exists():
                filled.export(directory)
            with Store.from_export(path, directory) as store:
                assert contents(store) == wanted and store.check() == [] and store.side("whitening")
                assert store.state("cursor") == {"rows": 5}
        assert die_at > 6


def test_import_refuses_a_store_of_something_else(filled: Store, exported: Path, tmp_path: Path) -> None:
    filled.close()
    with pytest.raises(FormatError, match="already holds another store; choose another"):
        Store.from_export(filled.path, exported)
    Store.from_export(tmp_path / "new", exported).close()
    Store.from_export(tmp_path / "new", exported).close()  # nothing left to do
    with Store.open(tmp_path / "new", write=True) as store:
        store.delete(["a"])
    with pytest.raises(FormatError, match="already holds another store"):
        Store.from_export(tmp_path / "new", exported)


def manifest(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        found = json.loads((path / "manifest.json").read_text())
        change(found)
        (path / "manifest.json").write_text(json.dumps(found))

    return apply


def rows(change: Callable[[list[dict[str, Any]]], object]) -> Callable[[Path], None]:
    """Changes rows.jsonl, and the manifest so that size and hash are right again."""

    def apply(path: Path) -> None:
        lines = [json.loads(line) for line in (path / "rows.jsonl").read_text().splitlines()]
        change(lines)
        text = "".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines)
        n_bytes, hashes = segment.write_pieces(path / "rows.jsonl", [text.encode()])
        manifest(lambda found: found["rows"].update(bytes=n_bytes, xxh3=hashes.hex()))(path)

    return apply


def arrays(path: Path) -> None:
    """A file of three rows, well described but for their number."""
    save_file({"vector": np.zeros((3, 2), np.float16)}, path / "rows-00001.safetensors")
    data = (path / "rows-00001.safetensors").read_bytes()
    _, hashes = segment.write_pieces(path / "rows-00001.safetensors", [data])
    manifest(lambda found: found["files"][0].update(bytes=len(data), xxh3=hashes.hex()))(path)


def linked(name: str) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        shutil.move(path / name, path.parent / "outside")
        (path / name).symlink_to(path.parent / "outside")

    return apply


def named(name: object) -> Callable[[Path], None]:
    return manifest(lambda found: found["files"][0].update(name=name))


HOSTILE: dict[str, tuple[str, Callable[[Path], object]]] = {
    "absolute": ("manifest.json is damaged", named("/etc/passwd")),
    "parent": ("manifest.json is damaged", named("../rows-00001.safetensors")),
    "inner": ("manifest.json is damaged", named("rows-00001.safetensors/../../x")),
    "newline": ("manifest.json is damaged", named("rows-00001.safetensors\n")),
    "side for rows": ("manifest.json is damaged", named("side-00001.safetensors")),
    "twice": ("manifest.json is damaged", named("rows-00002.safetensors")),
    "no name": ("manifest.json is damaged", named(None)),
    "other rows": ("manifest.json is damaged", manifest(lambda found: found["rows"].update(name="/etc/passwd"))),
    "huge count": ("manifest.json is damaged", manifest(lambda found: found["files"][0].update(rows=2**40))),
    "huge counts": ("has shape .2. but the catalogue says 2000000000", manifest(
        lambda found: (found["files"][0].update(rows=2 * 10**9), found["rows"].update(rows=2 * 10**9 + 2)))),
    "no rows": ("manifest.json is damaged", manifest(lambda found: found["files"][0].update(rows=0))),
    "count of text": ("manifest.json is damaged", manifest(lambda found: found["files"][0].update(rows="2"))),
    "huge size": ("manifest.json is damaged", manifest(lambda found: found["files"][0].update(bytes=2**61))),
    "negative size": ("manifest.json is damaged", manifest(lambda found: found["rows"].update(bytes=-1))),
    "other count": ("manifest.json is damaged", manifest(lambda found: found["rows"].update(rows=5))),
    "no hash": ("manifest.json is damaged", manifest(lambda found: found["files"][0].update(xxh3=""))),
    "hash of text": ("manifest.json is damaged", manifest(lambda found: found["files"][0].update(xxh3="x" * 16))),
    "settings": ("manifest.json is damaged", manifest(lambda found: found.update(settings=[]))),
    "list": ("manifest.json is damaged", lambda path: (path / "manifest.json").write_text("[]")),
    "deep": ("manifest.json is damaged", lambda path: (path / "manifest.json").write_text("[" * 500_000)),
    "not JSON": ("manifest.json is damaged", lambda path: (path / "manifest.json").write_bytes(b"\xff{")),
    "version": ("is not of a leaveout export of version 2", manifest(lambda found: found.update(version=3))),
    "linked manifest": ("cannot be read as a plain file", linked("manifest.json")),
    "linked file": ("cannot be read as a plain file", linked("rows-00001.safetensors")),
    "linked rows": ("cannot be read as a plain file", linked("rows.jsonl")),
    "fifo": ("is not a plain file", lambda path: ((path / "rows.jsonl").unlink(), os.mkfifo(path / "rows.jsonl"))),
    "flipped": ("rows-00002.safetensors: block 0 .* is damaged", lambda path: flip(path / "rows-00002.safetensors", -1)),
    "flipped text": ("rows.jsonl: block 0 .* is damaged", lambda path: flip(path / "rows.jsonl", 9)),
    "missing": ("rows-00002.safetensors is not there", lambda path: (path / "rows-00002.safetensors").unlink()),
    "rows of the file": ("has shape .3, 2. but the catalogue says 2 rows", arrays),
    "line of another row": ("has no sound line for row 0 of rows-00001", rows(lambda lines: lines.reverse())),
    "fewer lines": ("rows.jsonl ends too early", rows(lambda lines: lines.pop())),
    "more lines": ("more lines than the manifest says", rows(lambda lines: lines.append(lines[0]))),
    "line cut": ("ends too early", rows(lambda lines: lines.append(lines.pop()["id"]))),
    "no line": ("no sound line for row 0", rows(lambda lines: lines.insert(0, "\n"))),
    "id of a number": ("no sound line for row 0", rows(lambda lines: lines[0].update(id=1))),
    "meta of a list": ("no sound line for row 0", rows(lambda lines: lines[0].update(meta=[]))),
    "nested meta": ("metadata field 'x' is list", rows(lambda lines: lines[0].update(meta={"x": []}))),
    "same id": ("the id 'a' comes twice", rows(lambda lines: lines[1].update(id="a"))),
}  # fmt: skip


@pytest.mark.parametrize(("match", "change"), HOSTILE.values(), ids=HOSTILE)
def test_hostile_export_is_refused(
    exported: Path, tmp_path: Path, match: str, change: Callable[[Path], object]
) -> None:
    change(exported)
    with pytest.raises(LeaveoutError, match=match) as caught:
        Store.from_export(tmp_path / "new", exported)
    assert "\n" not in str(caught.value)
    assert {entry.name for entry in tmp_path.iterdir()} <= {"store", "export", "new", "outside"}


@settings(deadline=None, max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_changed_manifest_is_imported_or_refused(exported: Path, tmp_path: Path, data: st.DataObject) -> None:
    text = bytearray((exported / "manifest.json").read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(text) - 1))
        text[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    kept = (exported / "manifest.json").read_bytes()
    (exported / "manifest.json").write_bytes(text)
    try:
        with suppress(LeaveoutError):
            Store.from_export(tmp_path / "new", exported).close()
    finally:
        (exported / "manifest.json").write_bytes(kept)
        shutil.rmtree(tmp_path / "new", ignore_errors=True)
    assert {entry.name for entry in tmp_path.iterdir()} <= {"store", "export"}
