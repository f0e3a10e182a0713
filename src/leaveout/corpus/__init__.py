"""Rows of training data, streamed from JSONL, JSON, Parquet, Hugging Face datasets or a Python list.

A row has exactly one form: `text`, whose beginning may be given as `prompt_text`; `prompt` (or `prompt_text`) and
`completion` (or `response`); `instruction`, `input` and `output`; or chat `messages`. Its other fields are metadata.
A bad row stops the reading, unless `skip_bad` counts and lists it.

Conventions: only a newline ends a line of JSONL, blank lines are not rows, a byte order mark at the start of a file is
not text, and text is never normalised. Spans count characters. Ids may repeat here: the index refuses that.
"""

import random
from collections.abc import Iterator
from typing import Any

from leaveout.corpus.chat import render
from leaveout.corpus.rows import BadRow, Row, read_row
from leaveout.corpus.sources import Source, source_of
from leaveout.errors import FormatError

__all__ = ["Corpus", "Row", "render"]

_LISTED = 100  # bad rows whose messages are kept


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
    def open(cls, source: Any, *, units: str | None = None, skip_bad: bool = False) -> "Corpus":
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
