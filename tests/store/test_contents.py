"""What is put into a store comes out of it, at the version that a reader has opened."""

import os
import pickle
import re
import stat
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from leaveout.errors import FormatError, MismatchError
from leaveout.store import Record, Store, catalogue

from .stores import DTYPES, bytes_of, contents, put, record


@pytest.mark.parametrize("shape", [(5,), (5, 3), (5, 2, 1, 3)])
def test_put_keeps_every_dtype_bit_for_bit(path: Path, shape: tuple[int, ...]) -> None:
    raw = np.random.default_rng(0).integers(0, 256, (*shape, 8), np.uint8)
    arrays = {f"of.{name}": raw[..., : np.dtype(name).itemsize].copy().view(name)[..., 0] for name in DTYPES}
    arrays["strided"] = np.arange(20.0).reshape(5, 4)[:, ::2]
    with Store.create(path, {}) as store:
        store.put([record(str(i)) for i in range(5)], arrays)
    (part,) = Store.open(path).segments()
    header = int.from_bytes(part.path.read_bytes()[:8], "little")
    assert (header + 8) % 64 == 0
    for found in (part.arrays(), load_file(part.path)):
        assert found.keys() == arrays.keys()
        for name, array in arrays.items():
            assert found[name].dtype == array.dtype and found[name].shape == array.shape
            assert found[name].tobytes() == array.tobytes(), name
    assert all(not array.flags.writeable and array.flags.aligned for array in part.arrays().values())


def test_reopened_store_is_the_same(filled: Store, path: Path) -> None:
    filled.close()
    for store in (filled, Store.open(path), pickle.loads(pickle.dumps(Store.open(path)))):
        assert contents(store).keys() == {"a", "c", "d", "e"}
        assert (store.settings, store.version, store.n_rows, len(store)) == ({"width": 16}, 5, 5, 4)
        assert store.state("cursor") == {"rows": 5} and store.state("nothing") is None
        side = store.side("whitening") or {}
        assert side["mean"].tolist() == [0, 1, 2] and side["scale"] == 2 and store.side("nothing") is None
        assert [(part.first, part.n_rows) for part in store.segments()] == [(0, 3), (3, 2)]
        assert store.numbers(["e", "a", "e"]).tolist() == [4, 0, 4]
        assert [row.id for row in store.rows([4, 0, 4])] == ["e", "a", "e"]
        assert store.rows([3]) == [record("d", source="books", year=1999)]
        assert store.has(["a", "b", "x"]) == {"a"} and store.check() == []
        assert store.rows([]) == [] and store.numbers([]).tolist() == []


def test_empty_store_round_trips(path: Path) -> None:
    Store.create(path, {}).close()
    store = Store.open(path)
    assert (len(store), store.version, store.segments(), store.ids(), store.check()) == (0, 0, [], [], [])
    assert store.numbers_where("id = 'a'").size == 0 and store.numbers([]).size == 0


def test_info_counts(filled: Store, path: Path) -> None:
    info = filled.info()
    assert info.pop("bytes") == sum(file.stat().st_size for file in path.iterdir())
    assert info.pop("created").startswith("20")
    assert info == {
        "rows": 4,
        "deleted": 1,
        "segments": 2,
        "arrays": [
            {"name": "length", "dtype": "int32", "width": [], "rows": 5},
            {"name": "vector", "dtype": "float16", "width": [16], "rows": 5},
        ],
        "sides": ["whitening"],
        "fields": ["source", "year"],
        "version": 5,
        "format": 3,
    }


def test_side_is_replaced_and_its_old_file_removed(filled: Store, path: Path) -> None:
    old, reader = {file.name for file in path.glob("*.safetensors")}, Store.open(path)
    filled.put_side("whitening", {"mean": np.zeros(2, np.int8)})
    assert (filled.side("whitening") or {}).keys() == {"mean"}
    assert len(old - {file.name for file in path.glob("*.safetensors")}) == 1
    with pytest.raises(MismatchError, match=r"replaced since the store was opened \(call refresh\)"):
        reader.side("whitening")
    reader.refresh()
    assert (reader.side("whitening") or {})["mean"].tolist() == [0, 0] and reader.check() == []


def test_files_get_the_umask(path: Path) -> None:
    before = os.umask(0o002)
    try:
        with Store.create(path, {}) as store:
            put(store, "a")
    finally:
        os.umask(before)
    assert {stat.S_IMODE(file.stat().st_mode) for file in path.iterdir()} == {0o664}


GOOD = np.zeros((2, 1), np.float32)
REFUSED_PUTS = {
    "no rows": (ValueError, "put needs 1 to", [], {"x": GOOD[:0]}),
    "no arrays": (ValueError, "at least one array", [record("x"), record("y")], {}),
    "too short": (ValueError, r"'x' has shape \[1, 1\] for 2 records", [record("x"), record("y")], {"x": GOOD[:1]}),
    "no width": (ValueError, "each axis must be at least 1", [record("x"), record("y")], {"x": np.zeros((2, 0))}),
    "complex": (ValueError, "dtype complex128", [record("x"), record("y")], {"x": np.zeros(2, complex)}),
    "big-endian": (ValueError, "dtype >f4", [record("x"), record("y")], {"x": GOOD.astype(">f4")}),
    "array name": (ValueError, "array name '../x'", [record("x"), record("y")], {"../x": GOOD}),
    "twice": (FormatError, "'x' comes twice", [record("x"), record("x")], {"x": GOOD}),
    "already there": (FormatError, "'a' is in the store already", [record("x"), record("a")], {"x": GOOD}),
    "nested": (FormatError, "row 'x': metadata field 'f' is list", [record("x", f=[1]), record("y")], {"x": GOOD}),
    "nul": (FormatError, "metadata field", [record("x", **{"a\0b": 1}), record("y")], {"x": GOOD}),
    "nan": (FormatError, "'x' cannot be stored", [record("x", f=float("nan")), record("y")], {"x": GOOD}),
    "surrogate": (FormatError, "'x' cannot be stored", [record("x", "\ud800"), record("y")], {"x": GOOD}),
    "many fields": (
        FormatError,
        "more than 256 metadata fields",
        [record("x", **{f"f{i}": 1 for i in range(255)}), record("y")],
        {"x": GOOD},
    ),
}


@pytest.mark.parametrize(("error", "match", "records", "arrays"), REFUSED_PUTS.values(), ids=REFUSED_PUTS)
def test_refused_put_writes_nothing(
    filled: Store, error: type, match: str, records: list[Record], arrays: dict[str, np.ndarray]
) -> None:
    before = bytes_of(filled.path)
    with pytest.raises(error, match=match):
        filled.put(records, arrays)
    assert bytes_of(filled.path) == before
    put(filled, "after")
    assert filled.check() == []


def test_unknown_rows_are_named(filled: Store) -> None:
    for wanted, match in (([5], "there is no row 5"), ([-1], "there is no row -1"), ([0, 1], "row 1 was deleted")):
        with pytest.raises(ValueError, match=match):
            filled.rows(wanted)
    with pytest.raises(ValueError, match="no row has the id 'b'"):
        filled.numbers(["a", "b"])
    with pytest.raises(TypeError, match="must be integers, not float64"):
        filled.rows([0.5])


def test_create_refuses_what_is_there(filled: Store, path: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other/file").touch()
    filled.close()
    for place, match in (
        (path, "already holds a store"),
        (tmp_path / "other", "not empty"),
        (tmp_path / "other/file", "is a file"),
    ):
        with pytest.raises(FormatError, match=match):
            Store.create(place, {})
    with pytest.raises(TypeError, match="must be a dict, not list"):
        Store.create(tmp_path / "new", [])
    assert not (tmp_path / "new").exists()


def test_delete_hides_a_row_at_once_and_its_id_can_come_back(filled: Store) -> None:
    assert filled.delete(["a", "x", "b"]) == 1 and filled.delete(["a"]) == 0
    assert filled.version == 6 and contents(filled).keys() == {"c", "d", "e"}
    assert filled.numbers_where("id IN ('a', 'c')").tolist() == [2]
    put(filled, "b", "a")
    assert list(contents(filled)) == ["c", "d", "e", "b", "a"]
    filled.delete(["a"])
    filled.purge()
    assert list(contents(filled)) == ["c", "d", "e", "b"] and filled.check() == []


def test_reader_sees_one_version(filled: Store, path: Path) -> None:
    reader, before = Store.open(path), contents(filled)
    stream = reader.iter_rows()
    assert next(stream).id == "a"
    filled.delete(["a", "e"])
    put(filled, "a", "f", new_field=1)
    assert (
        contents(reader) == before
        and reader.numbers_where("text LIKE 'the%'").size == 4
        and reader.numbers(["a"]) == [0]
    )
    assert [row.id for row in stream] == ["c", "d", "e"]
    with pytest.raises(ValueError, match="unknown column"):
        reader.numbers_where("new_field = 1")
    reader.refresh()
    assert contents(reader) == contents(filled) and reader.numbers_where("new_field = 1").tolist() == [5, 6]


def test_reader_of_a_purged_store_is_told(filled: Store, path: Path) -> None:
    reader = Store.open(path)
    first, stream, old_stream = reader.segments()[0], reader.iter_rows(), reader.iter_rows()
    assert next(old_stream).id == "a"
    opened, kept = first.arrays()["vector"], first.arrays()["vector"].tobytes()
    filled.purge()
    assert opened.tobytes() == kept
    use: list[Callable[[], object]] = [
        first.arrays, first.live, lambda: reader.rows([0]), lambda: next(stream), lambda: reader.numbers(["a"]),
        lambda: reader.numbers_where("1"), reader.ids, lambda: reader.has(["a"]),
    ]  # fmt: skip
    for call in use:
        with pytest.raises(MismatchError, match="purged"):
            call()
    reader.refresh()
    assert contents(reader) == contents(filled)
    with pytest.raises(MismatchError, match="purged"):
        list(old_stream)


def test_threads_share_a_reader_while_a_writer_works(filled: Store, path: Path) -> None:
    failures: list[BaseException] = []

    def read() -> None:
        try:
            for _ in range(30):
                reader = Store.open(path)
                assert contents(reader).keys() >= {"a", "c", "d", "e"}
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=read) for _ in range(2)]
    for thread in threads:
        thread.start()
    for number in range(20):
        put(filled, f"new {number}")
    for thread in threads:
        thread.join()
    assert not failures and len(contents(filled)) == 24


def test_documented_snippet_reads_a_store(filled: Store, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(
        r"```python\n(.*?)```", (Path(__file__).parents[2] / "docs/reference/format.md").read_text(), re.DOTALL
    )
    monkeypatch.chdir(path.parent)
    names: dict[str, dict[str, np.ndarray]] = {}
    exec(code, names)
    names["db"].close()
    assert {id: row.tobytes() for id, row in names["vectors"].items()} == {
        id: v for id, (_, v) in contents(filled).items()
    }


def test_put_writes_a_whole_number_of_batches_and_the_rest(tmp_path: Path) -> None:
    n_rows = 2 * catalogue._LINES + 1
    with Store.create(tmp_path / "store", {}) as store:
        records = [Record(str(n), f"text {n}", "unit") for n in range(n_rows)]
        store.put(records, {"x": np.arange(n_rows)})
        assert list(store.iter_rows()) == records and store.check() == []
