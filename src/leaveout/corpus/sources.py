"""Where rows come from: files, directories of them, Hugging Face datasets and Python lists; each streamed as raw values."""

# Values of rows come from outside: isinstance narrows Any to containers of unknown values.
# pyright: reportUnknownVariableType=false, reportUnknownMemberType=false, reportUnknownArgumentType=false

from __future__ import annotations

import os
import random
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

from leaveout.corpus.readers import (
    KINDS,
    TEXT_ROWS,
    Read,
    TextRows,
    counted,
    dataset_rows,
    kind_of_file,
    numbered,
    reader_of,
    without_padding,
)
from leaveout.corpus.rows import BadRow, Row, in_own_names, kind_of, names_of, read_row, renamed
from leaveout.errors import FormatError, choices, needs, require_whole

_FILES = f"a file of {', '.join(KINDS)} (all but Parquet also .gz), a directory of them or from `save_to_disk`"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_LISTED = 100  # bad rows whose messages are kept


@dataclass(frozen=True)
class Reading:
    """How a source is read.

    columns    our name of a field -> its own, such as {"prompt": "question", "response": "answer"}
    split      of a dataset that has several, such as train or train[:1000]
    subset, revision   of a dataset of the Hub
    limit      the first so many rows, bad ones included; a dataset of the Hub is then streamed, unless a part of a split is named
    text_rows  what a row is in plain text: a paragraph, a line, or a whole file
    """

    columns: Mapping[str, str] = field(default_factory=dict)
    split: str | None = None
    subset: str | None = None
    revision: str | None = None
    limit: int | None = None
    text_rows: TextRows = "paragraph"

    def __post_init__(self) -> None:
        columns: Any = self.columns  # callers may have no type checker
        if not isinstance(columns, Mapping) or not all(
            isinstance(name, str) for pair in columns.items() for name in pair
        ):
            raise TypeError(f"columns is {columns!r}: give our name -> its own, such as {{'prompt': 'question'}}.")
        if self.limit is not None:
            require_whole("limit", self.limit, 1)
        if self.text_rows not in TEXT_ROWS:
            raise ValueError(f"text_rows is {self.text_rows!r}: {choices(self.text_rows, TEXT_ROWS)}")


@dataclass(frozen=True)
class Source:
    """Where rows come from; `read` gives the place of each row and its raw value, or why it has none (a BadRow)."""

    name: str
    read: Callable[[], Read]
    count: Callable[[], int]
    notes: tuple[str, ...] = ()  # what was not read, for people


def source_of(given: Any, reading: Reading) -> Source:
    """Raises: as `Corpus.open`."""
    source = _place_source(given, reading) if isinstance(given, str | os.PathLike) else _object_source(given, reading)
    if reading.limit is not None:
        source = replace(
            source, read=(first := partial(_first, source.read, reading.limit)), count=partial(counted, first)
        )
    if reading.columns:
        source = replace(source, read=partial(_renamed, source.read, reading.columns))
    return source


def _object_source(given: Any, reading: Reading) -> Source:
    datasets = sys.modules.get("datasets")  # whoever has a Dataset has imported it
    if datasets and isinstance(given, datasets.DatasetDict | datasets.IterableDatasetDict):
        return _dataset_source(f"a {type(given).__name__}", given, reading)
    _refuse(reading, "split", "subset", "revision")
    if datasets and isinstance(given, datasets.Dataset):
        return _dataset_source(f"dataset of {len(given)} rows", given, reading)
    if datasets and isinstance(given, datasets.IterableDataset):
        return _dataset_source("IterableDataset", given, reading)
    if isinstance(given, Sequence) and not isinstance(given, bytes | bytearray | memoryview):
        name = f"{type(given).__name__} of {len(given)} rows"
        return Source(name, partial(numbered, name, given), partial(len, given))
    raise TypeError(f"{kind_of(given)} is not a corpus, give a path, a dataset, or a list of dicts or of texts")


def _refuse(reading: Reading, *names: str) -> None:
    """Raises: ValueError for an option of other sources."""
    for name in names:
        if (value := getattr(reading, name)) is not None:
            kinds = "a dataset that has splits" if name == "split" else "a dataset of the Hub"
            raise ValueError(f"{name} is {value!r}, but only {kinds} has a {name}: leave it out")


def _place_source(given: str | os.PathLike[str], reading: Reading) -> Source:
    path = Path(given)
    name = path.name or str(path.resolve())
    if not path.exists():
        if is_hub_id(str(given)):
            return _hub_source(str(given), reading)
        raise FileNotFoundError(
            f"{path} does not exist, give a file or directory of rows, or a dataset of the Hub as owner/name"
        )
    _refuse(reading, "subset", "revision")
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return _dataset_source(
            name, needs("datasets", "A saved dataset", extra="data").load_from_disk(str(path)), reading
        )
    _refuse(reading, "split")
    if path.is_dir():
        return _directory_source(path, name, reading)
    if (found := reader_of(path, name, reading.columns.values(), reading.text_rows)) is None:
        raise FormatError(f"{name} is not of a known kind, give {_FILES}")
    return Source(name, *found)


def is_hub_id(text: str) -> bool:
    """Whether a text that is no path names a dataset of the Hub."""
    path = Path(text)
    return bool(_HUB_ID.fullmatch(text)) and kind_of_file(path) is None and not path.parent.exists()


def _directory_source(path: Path, name: str, reading: Reading) -> Source:
    """The files of rows in a directory and below it, by their names; hidden files, and those about the others, are none."""
    below = sorted(file.relative_to(path) for file in path.rglob("*") if file.is_file())
    shown = [file for file in below if not any(part.startswith((".", "_", "README")) for part in file.parts)]
    found = {
        file: reader_of(path / file, file.as_posix(), reading.columns.values(), reading.text_rows) for file in shown
    }
    readers = [reader for reader in found.values() if reader is not None]
    if not readers:
        raise FormatError(f"{name} is not of a known kind, give {_FILES}")
    others = [file.as_posix() for file, reader in found.items() if reader is None]
    note = f"{name} also has files that were not read, as none of that name holds rows: {names_of(others)}."
    reads, counts = zip(*readers, strict=True)
    return Source(name, partial(_chained, reads), partial(_summed, counts), (note,) if others else ())


def _chained(reads: Sequence[Callable[[], Read]]) -> Read:
    return chain.from_iterable(read() for read in reads)


def _summed(counts: Sequence[Callable[[], int]]) -> int:
    return sum(count() for count in counts)


def _first(read: Callable[[], Read], limit: int) -> Read:
    return islice(read(), limit)


def _renamed(read: Callable[[], Read], columns: Mapping[str, str]) -> Iterator[tuple[str, Any]]:
    for place, raw in read():
        try:
            yield place, renamed(raw, columns)
        except BadRow as bad:
            yield place, bad


# ---------------------------------------------------------------- datasets


def _hub_source(id: str, reading: Reading) -> Source:
    datasets = needs("datasets", "A dataset of the Hub", extra="data")
    streaming = reading.limit is not None and "[" not in (reading.split or "")
    split = None if streaming else reading.split
    try:
        found = datasets.load_dataset(id, reading.subset, split=split, revision=reading.revision, streaming=streaming)
    except Exception as error:  # of the network, of the Hub, and of whatever reads the files there
        raise FormatError(
            f"{id} is no path here, and cannot be loaded from the Hub ({' '.join(str(error).split())}): check its name, "
            "subset, split, revision and the connection."
        ) from error
    return _dataset_source(id, found, reading if split is None else replace(reading, split=None))


def _dataset_source(name: str, found: Any, reading: Reading) -> Source:
    """The rows of a dataset, or of one split of several."""
    dataset = _one_split(name, found, reading.split) if isinstance(found, Mapping) else found
    if hasattr(dataset, "__len__"):
        return Source(name, partial(dataset_rows, name, dataset), partial(len, dataset))
    read = partial(_streamed, name, dataset.with_format(None))
    return Source(name, read, partial(counted, read))


def _streamed(name: str, dataset: Iterable[Any]) -> Iterator[tuple[str, Any]]:
    return numbered(name, map(without_padding, dataset))


def _one_split(name: str, found: Mapping[str, Any], split: str | None) -> Any:
    """Raises: FormatError where it must be said which, or there is none of that name."""
    if split is None and len(found) == 1:
        return next(iter(found.values()))
    if split is not None and split in found:
        return found[split]
    wanted = (
        f"{name} has several splits, say which by split (--split)"
        if split is None
        else f"{name} has no split {split!r}"
    )
    problem = FormatError(f"{wanted}: {choices(split, found)}, or a part such as {next(iter(found))}[:1000].")
    if split is None or not all(hasattr(one, "__len__") for one in found.values()):
        raise problem
    datasets = needs("datasets", "A dataset", extra="data")
    try:
        parts = datasets.ReadInstruction.from_spec(split).to_absolute({one: len(rows) for one, rows in found.items()})
    except (ValueError, AssertionError):
        raise problem from None
    return datasets.concatenate_datasets([found[part.splitname].select(range(part.from_, part.to)) for part in parts])


class Corpus:
    """The rows of one source, in order; it can be iterated any number of times.

    After a complete iteration, `problems` has the messages of the bad rows that it skipped (the first 100), and
    `n_skipped` counts all of them.
    """

    def __init__(
        self, source: Source, units: str | None = None, skip_bad: bool = False, columns: Mapping[str, str] | None = None
    ) -> None:
        self.name = source.name
        self.notes = source.notes
        self.units = units
        self.columns = dict(columns or {})
        self.skip_bad = skip_bad
        self.problems: list[str] = []
        self.n_skipped = 0
        self._source = source
        self._length: int | None = None

    @classmethod
    def open(
        cls,
        source: Any,
        *,
        units: str | None = None,
        skip_bad: bool = False,
        columns: Mapping[str, str] | None = None,
        split: str | None = None,
        subset: str | None = None,
        revision: str | None = None,
        limit: int | None = None,
        text_rows: TextRows = "paragraph",
    ) -> Corpus:
        """The corpus of a file, a directory of files, a dataset or its id on the Hub, or a list of dicts or of texts.

            Corpus.open("owner/name", split="train", limit=10_000, columns={"prompt": "question", "response": "answer"})

        units       field whose value says which rows are deleted together
        skip_bad    count and list bad rows instead of stopping at the first
        columns     our name of a field -> the name that it has there, for rows in a form that is not known
        split       of a dataset with several, such as train or train[:1000]; subset, revision: of one on the Hub
        limit       the first so many rows, bad ones included; a dataset of the Hub is then streamed
        text_rows   a row of plain text is a paragraph, a line (blank ones are none), or a whole file

        A corpus comes back as it is, or, with other units or `skip_bad`, as a new one over the same source.
        Cost: a .json file is parsed as a whole on each iteration; everything else is streamed. The length of a table, a
        text and a stream is known after one more pass.
        Raises: FileNotFoundError if there is no such path, FormatError for an unknown kind of file, TypeError for an
        object of another kind, UnsupportedError if a package is missing.
        """
        reading = Reading(columns or {}, split, subset, revision, limit, text_rows)
        if not isinstance(source, Corpus):
            return cls(source_of(source, reading), units, skip_bad, columns)
        if reading != Reading():
            raise ValueError("a corpus is open already: say how it is read where it is opened")
        if units is None and not skip_bad:
            return source
        units = source.units if units is None else units
        return cls(source._source, units, skip_bad or source.skip_bad, source.columns)

    def __iter__(self) -> Iterator[Row]:
        """Raises: FormatError at a bad row, without `skip_bad`, and wherever a file turns out to be damaged."""
        problems: list[str] = []
        n_skipped = 0
        for number, (place, raw) in enumerate(self._source.read()):
            try:
                row = read_row(raw, number, self.units)
            except BadRow as bad:
                problem = f"{place}: {in_own_names(str(bad), raw)}"
                if not self.skip_bad:
                    raise FormatError(problem) from None
                n_skipped += 1
                if len(problems) < _LISTED:
                    problems.append(problem)
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
