"""Where rows come from: JSONL, JSON, Parquet, Hugging Face datasets, Python lists; each streamed as raw values."""

# Values of rows come from outside: isinstance narrows Any to containers of unknown values.
# pyright: reportUnknownVariableType=false, reportUnknownMemberType=false, reportUnknownArgumentType=false

from __future__ import annotations

import codecs
import gzip
import json
import os
import random
import sys
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from leaveout.corpus.rows import BadRow, Row, kind_of, names_of, read_row
from leaveout.errors import FormatError, needs

_FILES = ".jsonl, .ndjson or .json (also .gz), .parquet, or a directory of .parquet files or from `save_to_disk`"
_LISTED = 100  # bad rows whose messages are kept
_CHATS = ("messages", "tools", "prompt", "chosen", "rejected")  # fields that hold messages, or may
_BATCH = 256  # Arrow rows that become Python objects at a time


@dataclass(frozen=True)
class Source:
    """Where rows come from; `read` gives the place of each row and its raw value, or why it has none (a BadRow)."""

    name: str
    read: Callable[[], Iterable[tuple[str, Any]]]
    count: Callable[[], int]


def source_of(source: Any) -> Source:
    if isinstance(source, str | os.PathLike):
        return _path_source(Path(source))
    datasets = sys.modules.get("datasets")  # whoever has a Dataset has imported it
    if datasets and isinstance(source, datasets.Dataset):
        return _dataset_source(f"dataset of {len(source)} rows", source)
    if datasets and isinstance(source, datasets.DatasetDict | datasets.IterableDatasetDict):
        raise TypeError(f"a {type(source).__name__} is several corpora, pick one of its splits: {names_of(source)}")
    if datasets and isinstance(source, datasets.IterableDataset):
        raise TypeError("an IterableDataset has no length, save it as JSONL and open that file")
    if isinstance(source, Sequence) and not isinstance(source, bytes | bytearray | memoryview):
        name = f"{type(source).__name__} of {len(source)} rows"
        return Source(name, partial(_numbered, name, source), partial(len, source))
    raise TypeError(
        f"{kind_of(source)} is not a corpus, give a path, a datasets.Dataset, or a list of dicts or of texts"
    )


def _dataset_source(name: str, dataset: Any) -> Source:
    batches = partial(dataset.with_format("arrow").iter, batch_size=_BATCH)
    return Source(name, partial(_arrow_rows, {name: batches}), partial(len, dataset))


def _path_source(path: Path) -> Source:
    name = path.name or str(path.resolve())
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist, give a file or directory of rows")
    if (path / "dataset_dict.json").is_file():
        raise FormatError(f"{name} holds several splits of a dataset, give the directory of one of them")
    if (path / "state.json").is_file() and (path / "dataset_info.json").is_file():
        return _dataset_source(name, needs("datasets", "A saved dataset", extra="data").load_from_disk(str(path)))
    kind = path.name.lower()
    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path] if kind.endswith(".parquet") else []
    if files:
        needs("pyarrow.parquet", "Parquet", extra="data")
        parts = {path.name: partial(_parquet, path) for path in files}
        return Source(name, partial(_arrow_rows, parts), partial(_parquet_count, files))
    kind = kind.removesuffix(".gz")
    if path.is_file() and kind.endswith((".jsonl", ".ndjson")):
        return Source(name, partial(_jsonl, path), partial(_count, _lines, path))
    if path.is_file() and kind.endswith(".json"):
        return Source(name, partial(_json, path), partial(_count, _json, path))
    raise FormatError(f"{name} is not of a known kind, give {_FILES}")


@contextmanager
def _opened(path: Path) -> Generator[Any]:
    """The file, unpacked or as Parquet; damage is a FormatError at whatever moment it shows."""
    opener: Any = partial(open, mode="rb")
    damage: tuple[type[Exception], ...] = ()
    if path.suffix.lower() == ".gz":
        opener, damage = gzip.open, (EOFError, zlib.error, gzip.BadGzipFile)
    if path.suffix.lower() == ".parquet":
        # with its defaults pyarrow holds a whole row group: 123 MB instead of 3 MB for a group of 120 MB, and slower
        opener = partial(
            needs("pyarrow.parquet", "Parquet", extra="data").ParquetFile, pre_buffer=False, buffer_size=2**16
        )
        damage = (needs("pyarrow", "Parquet", extra="data").ArrowException, OSError)
    try:
        with opener(path) as file:
            yield file
    except damage as error:
        if isinstance(error, OSError) and error.errno:  # the system's own errors say enough
            raise
        raise FormatError(f"{path.name} is cut off or damaged ({error}), copy or write it again") from error


def _count(read: Callable[[Path], Iterable[Any]], path: Path) -> int:
    return sum(1 for _ in read(path))


def _numbered(name: str, rows: Iterable[Any]) -> Iterator[tuple[str, Any]]:
    return ((f"{name}, row {number}", row) for number, row in enumerate(rows, 1))


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines that are not blank, with their numbers from 1."""
    with _opened(path) as file:
        for number, line in enumerate(file, 1):
            line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            if line.strip():
                yield number, line.rstrip()


def _jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    for number, line in _lines(path):
        try:
            raw = _loads(line)
            if isinstance(raw, str):
                raw = BadRow('is text, not an object with fields, write {"text": ...}')
        except BadRow as bad:
            raw = bad
        yield f"{path.name}, line {number}", raw


def _json(path: Path) -> Iterator[tuple[str, Any]]:
    with _opened(path) as file:
        data = file.read()
    try:
        rows = _loads(data.removeprefix(codecs.BOM_UTF8))
        if not isinstance(rows, list):
            raise BadRow(f"is {kind_of(rows)}, not a list of rows")
    except BadRow as bad:
        raise FormatError(f"{path.name} {bad}; if it has one row a line, name it .jsonl") from None
    return _numbered(path.name, rows)


def _loads(data: bytes) -> Any:
    try:
        return json.loads(data.decode(), object_pairs_hook=_object)
    except UnicodeDecodeError as error:
        raise BadRow(f"is not valid UTF-8 (byte {error.start + 1} is {data[error.start]:#04x})") from None
    except json.JSONDecodeError as error:
        raise BadRow(f"is not valid JSON ({error.msg} at character {error.pos + 1})") from None
    except (ValueError, RecursionError) as error:
        raise BadRow(f"is not valid JSON ({error})") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise BadRow("is not valid JSON (an object has the same field twice)")
    return fields


def _arrow_rows(parts: Mapping[str, Callable[[], Iterable[Any]]]) -> Iterator[tuple[str, Any]]:
    """The rows of all parts, numbered one part at a time; a part is what reads its Arrow batches."""
    for name, read in parts.items():
        rows = chain.from_iterable(map(_python_rows, read()))
        yield from _numbered(name, map(_without_padding, rows))


def _without_padding(row: Any) -> Any:
    """The row without the nulls that Arrow puts into chats for each field that only other objects have."""
    if not isinstance(row, dict):
        return row
    return {name: _dense(value) if name in _CHATS else value for name, value in row.items()}


def _dense(value: Any) -> Any:
    if isinstance(value, list):
        return [_dense(item) for item in value]
    if isinstance(value, dict):
        return {name: _dense(item) for name, item in value.items() if item is not None}
    return value


def _python_rows(batch: Any) -> list[Any]:
    try:
        return batch.to_pylist()
    except ValueError as error:  # a value that Python cannot hold, such as text that is not UTF-8
        if batch.num_rows == 1:
            return [BadRow(f"cannot be read ({error})")]
        return [row for index in range(batch.num_rows) for row in _python_rows(batch.slice(index, 1))]


def _parquet(path: Path) -> Iterator[Any]:
    with _opened(path) as file:
        yield from file.iter_batches(batch_size=_BATCH)


def _parquet_count(files: list[Path]) -> int:
    total = 0
    for path in files:
        with _opened(path) as file:
            total += file.metadata.num_rows
    return total


class Corpus:
    """The rows of one source, in order; it can be iterated any number of times.

    After a complete iteration, `problems` has the messages of the bad rows that it skipped (the first 100), and
    `n_skipped` counts all of them.
    """

    def __init__(self, source: Source, units: str | None = None, skip_bad: bool = False) -> None:
        self.name = source.name
        self.units = units
        self.skip_bad = skip_bad
        self.problems: list[str] = []
        self.n_skipped = 0
        self._source = source
        self._length: int | None = None

    @classmethod
    def open(cls, source: Any, *, units: str | None = None, skip_bad: bool = False) -> Corpus:
        """The corpus of a file, a directory, a `datasets.Dataset`, or a list of dicts or of texts.

        `units` names the field whose value says which rows are deleted together. A corpus comes back as it is, or, when
        options are given, as a new one over the same source.
        Cost: a .json file is parsed as a whole on each iteration; everything else is streamed.
        Raises: FileNotFoundError if there is no such path, FormatError for an unknown kind of file, TypeError for an
        object of another kind, UnsupportedError if a package is missing.
        """
        if not isinstance(source, Corpus):
            return cls(source_of(source), units, skip_bad)
        if units is None and not skip_bad:
            return source
        return cls(source._source, source.units if units is None else units, skip_bad or source.skip_bad)

    def __iter__(self) -> Iterator[Row]:
        """Raises: FormatError at a bad row, without `skip_bad`, and wherever a file turns out to be damaged."""
        problems: list[str] = []
        n_skipped = 0
        for number, (place, raw) in enumerate(self._source.read()):
            try:
                row = read_row(raw, number, self.units)
            except BadRow as bad:
                if not self.skip_bad:
                    raise FormatError(f"{place}: {bad}") from None
                n_skipped += 1
                if len(problems) < _LISTED:
                    problems.append(f"{place}: {bad}")
                continue
            yield row
        self.problems, self.n_skipped = problems, n_skipped

    def __len__(self) -> int:
        """Number of rows that an iteration visits, bad ones included."""
        if self._length is None:
            self._length = self._source.count()
        return self._length

    def sample(self, n: int, seed: int) -> list[Row]:
        """A uniform random sample of n rows, in source order; all rows if there are fewer.

        Cost: one pass over the source, n rows of memory.
        """
        if n < 0:
            raise ValueError(f"a sample cannot have {n} rows, ask for 0 or more")
        chance = random.Random(seed)
        kept: list[Row] = []
        for seen, row in enumerate(self):
            if seen < n:
                kept.append(row)
            elif (slot := chance.randrange(seen + 1)) < n:
                kept[slot] = row
        return sorted(kept, key=lambda row: row.number)
