"""Scores that another tool has made, read from a file and put in the order of our rows.

.npy    an array [query, train]; it has no ids, so that its shape is all that can be checked
.csv    a header with the columns query, id and score; one line for each pair
.jsonl  objects with the fields query, id and score; one line for each pair
Positive must mean that the row helps the query; negate the scores of a tool that has it the other way round.
"""

from __future__ import annotations

import contextlib
import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from leaveout.errors import FormatError, MismatchError, UnsupportedError

FIELDS = ("query", "id", "score")


def load_scores(path: str | Path, query_ids: Sequence[str], train_ids: Sequence[str]) -> np.ndarray:
    """Scores [query, train] float32 in the order of the ids.

    Memory: the array, and one byte for each of its numbers. Other text of the file is not held.
    Raises: FormatError for a file that is not of its form or a score that is not finite; MismatchError for another shape, an
            id that is not asked for, a pair that stands twice or is missing; UnsupportedError for another kind of file;
            ValueError if an id is asked for twice.
    """
    path = Path(path)
    rows, columns = numbers_of("query", query_ids), numbers_of("train", train_ids)
    if path.suffix == ".npy":
        return _array(path, (len(query_ids), len(train_ids)))
    if path.suffix not in _READERS:
        raise UnsupportedError(f"{path} is not a file of scores: give .npy, .csv or .jsonl.")
    scores = np.zeros((len(rows), len(columns)), np.float32)
    seen = np.zeros(scores.shape, bool)
    for line, (query, name, score) in _READERS[path.suffix](path):
        if query not in rows or name not in columns:
            wrong = f"query {query!r}" if query not in rows else f"row {name!r}"
            raise MismatchError(
                f"{path}, line {line}: {wrong} is not asked for: give scores of this corpus and these queries."
            )
        place = rows[query], columns[name]
        if seen[place]:
            raise MismatchError(
                f"{path}, line {line}: the pair {query!r}, {name!r} stands there twice: keep one score."
            )
        scores[place], seen[place] = _number(path, line, score), True
    if not seen.all():
        first = np.argwhere(~seen)[0]
        pair = f"{query_ids[first[0]]!r}, {train_ids[first[1]]!r}"
        raise MismatchError(f"{path} lacks {int((~seen).sum())} pairs, the first is {pair}: every row needs a score.")
    return scores


def numbers_of(what: str, ids: Sequence[str]) -> dict[str, int]:
    """Place of every id. Raises: ValueError if one stands twice."""
    if len(set(ids)) != len(ids):
        raise ValueError(f"a {what} id stands twice among those asked for: ids must tell rows apart.")
    return {str(name): i for i, name in enumerate(ids)}


def read_objects(path: Path, fields: Sequence[str]) -> Iterator[tuple[int, tuple[object, ...]]]:
    """Line number and fields of every object of a JSONL file. Raises: FormatError for a line that lacks one of them."""
    with path.open(encoding="utf-8") as file:
        for line, text in enumerate(file, 1):
            if not text.strip():
                continue
            try:
                record = json.loads(text)
                found = tuple(record[name] for name in fields)
            except (ValueError, TypeError, KeyError):
                named = f"{', '.join(fields[:-1])} and {fields[-1]}"
                raise FormatError(f"{path}, line {line} is no object with {named}.") from None
            yield line, found


def _array(path: Path, shape: tuple[int, int]) -> np.ndarray:
    try:
        scores = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise FormatError(f"{path} is not an array that can be read without unpickling: {error}.") from None
    if scores.shape != shape:
        raise MismatchError(f"{path} has shape {scores.shape}, wanted [query, train] = {shape}.")
    if scores.dtype.kind not in "fiu":
        raise FormatError(f"{path} holds {scores.dtype}, not numbers.")
    if not (np.abs(scores) <= np.finfo(np.float32).max).all():
        raise FormatError(f"{path} has a score that is not finite in float32: rank only finite scores.")
    return np.array(scores, np.float32)


Lines = Iterator[tuple[int, tuple[str, str, object]]]


def _csv(path: Path) -> Lines:
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if missing := [name for name in FIELDS if name not in (reader.fieldnames or ())]:
            raise FormatError(f"{path} has no column {missing[0]!r}: its header needs query, id and score.")
        for record in reader:
            yield reader.line_num, (record["query"], record["id"], record["score"])


def _jsonl(path: Path) -> Lines:
    for line, (query, name, score) in read_objects(path, FIELDS):
        yield line, (str(query), str(name), score)


def _number(path: Path, line: int, score: object) -> float:
    number = float("nan")
    if isinstance(score, (str, int, float)) and not isinstance(score, bool):
        with contextlib.suppress(ValueError, OverflowError):
            number = float(score)
    if not abs(number) <= float(np.finfo(np.float32).max):
        raise FormatError(f"{path}, line {line}: {score!r} is not a finite score.")
    return number


_READERS = {".csv": _csv, ".jsonl": _jsonl}
