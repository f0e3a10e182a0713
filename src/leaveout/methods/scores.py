"""Scores of rows and of units, and their files: those of another tool, read and put in the order of our rows, and our own.

.npy    an array [query, train]; it has no ids, so that its shape is all that can be checked
.csv    a header with the columns query, id and score; one line for each pair
.jsonl  objects with the fields query, id and score; one line for each pair
.parquet, .arrow    columns of these names; a row for each pair
Positive must mean that the row helps the query; negate the scores of a tool that has it the other way round.
"""

from __future__ import annotations

import contextlib
import csv
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import ArrayLike

from leaveout.corpus.writers import write_table
from leaveout.errors import FormatError, MismatchError, UnsupportedError, needs
from leaveout.files import replacing
from leaveout.training.recipe import Recipe

FIELDS = ("query", "id", "score")


def checked_scores(recipe: Recipe, scores: ArrayLike, n_queries: int, what: str = "scores") -> np.ndarray:
    """Scores [query, example] or [query, unit] as an array.

    Raises: MismatchError for another shape; FormatError for what is no array, or a score that is not finite.
    """
    try:
        values = np.asarray(scores)
    except (TypeError, ValueError, RuntimeError) as error:  # lists of several lengths, tensors of torch with a gradient
        raise FormatError(f"The {what} are no array of numbers ({error}): give one for every query and row.") from None
    examples, units = len(recipe.examples), len(recipe.unit_names)
    if values.ndim != 2 or len(values) != n_queries or values.shape[1] not in (examples, units):
        raise MismatchError(
            f"The {what} have the shape {values.shape}: give [query, example], here [{n_queries}, {examples}]"
            + (f", or [query, unit], here [{n_queries}, {units}]." if units != examples else ".")
        )
    if values.dtype.kind not in "biuf":
        raise FormatError(f"The {what} are {values.dtype}, not numbers: give one for every query and row.")
    if not np.isfinite(values).all():
        raise FormatError(f"The {what} hold a number that is not finite: give one for every query and row.")
    return values


def by_unit(recipe: Recipe, scores: ArrayLike, n_queries: int, what: str = "scores") -> np.ndarray:
    """Scores [query, unit] float64 from those of units, or of examples, which are summed over each unit.

    Raises: as `checked_scores`.
    """
    values = checked_scores(recipe, scores, n_queries, what).astype(np.float64)
    if values.shape[1] == len(recipe.unit_names):
        return values
    out = np.zeros((n_queries, len(recipe.unit_names)))
    np.add.at(out.T, recipe.unit_of.numpy(), values.T)
    return out


def load_scores(path: str | Path, query_ids: Sequence[str], train_ids: Sequence[str]) -> np.ndarray:
    """Scores [query, train] float32 in the order of the ids.

    Memory: the array, and one byte for each of its numbers. Other text of the file is not held.
    Raises: FormatError for a file that is not of its form or a score that is not finite; MismatchError for another shape, an
            id that is not asked for, a pair that stands twice or is missing; UnsupportedError for another kind of file;
            ValueError if an id is asked for twice.
    """
    path = Path(path)
    rows, columns = numbers_of("query", query_ids), numbers_of("train", train_ids)
    require_form(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no file of scores at {path}: give the path of one.")
    if path.suffix == ".npy":
        return _array(path, (len(query_ids), len(train_ids)))
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


def save_scores(path: str | Path, scores: ArrayLike, query_ids: Sequence[str], train_ids: Sequence[str]) -> Path:
    """Writes finite scores [query, train] as float32 in the form that the file's name asks for; `load_scores` reads it.

    A file that is there is replaced only once the new one is whole.
    Raises: UnsupportedError for another kind of file; FileExistsError for a directory, FileNotFoundError where there is none;
            MismatchError for another shape; FormatError for a score that is not finite in float32; ValueError if an id stands
            twice.
    """
    path, values = Path(path), np.asarray(scores, np.float64)
    numbers_of("query", query_ids)
    numbers_of("train", train_ids)
    require_place(path)
    if values.shape != (len(query_ids), len(train_ids)):
        raise MismatchError(f"The scores have the shape {values.shape}, wanted {(len(query_ids), len(train_ids))}.")
    if not (np.abs(values) <= np.finfo(np.float32).max).all():
        raise FormatError("A score is not finite in float32, so that no reader could rank it.")
    with replacing(path) as part:
        _write(part, path.suffix, values.astype(np.float32), query_ids, train_ids)
    return path


def _write(part: Path, kind: str, values: np.ndarray, query_ids: Sequence[str], train_ids: Sequence[str]) -> None:
    if kind == ".npy":
        with part.open("wb") as file:
            np.save(file, values)
        return
    if kind in (".parquet", ".arrow"):
        pyarrow: Any = needs("pyarrow", f"A file of {kind}", extra="data")
        names = (np.repeat(np.array(query_ids, object), len(train_ids)), [*train_ids] * len(query_ids), values.ravel())
        write_table(part, pyarrow.table(dict(zip(FIELDS, names, strict=True))), kind)
        return
    with part.open("w", encoding="utf-8", newline="") as file:
        write = csv.writer(file).writerow if kind == ".csv" else _object_writer(file)
        if kind == ".csv":
            write(FIELDS)
        for query, line in zip(query_ids, values, strict=True):
            for name, score in zip(train_ids, line.tolist(), strict=True):
                write((query, name, score))


def require_form(path: Path) -> None:
    """Raises: UnsupportedError if the name of a file of scores ends otherwise."""
    if path.suffix not in (".npy", *_READERS):
        raise UnsupportedError(f"{path} is not a file of scores: give .npy, {', '.join(_READERS)}.")


def require_place(path: Path) -> None:
    """Raises: UnsupportedError, FileExistsError or FileNotFoundError if a file of scores cannot be written there."""
    require_form(path)
    if path.is_dir():
        raise FileExistsError(f"{path} is a directory: give a file for the scores.")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"There is no directory {path.parent}: make it first.")


def _object_writer(file: IO[str]) -> Callable[[Sequence[object]], object]:
    return lambda values: file.write(json.dumps(dict(zip(FIELDS, values, strict=True))) + "\n")


def numbers_of(what: str, ids: Sequence[str]) -> dict[str, int]:
    """Place of every id. Raises: ValueError if one stands twice."""
    if len(set(ids)) != len(ids):
        raise ValueError(f"a {what} id stands twice among those asked for: ids must tell rows apart.")
    return {str(name): i for i, name in enumerate(ids)}


def read_objects(path: Path, fields: Sequence[str]) -> Iterator[tuple[int, tuple[object, ...]]]:
    """Line number and fields of every object of a JSONL file. Raises: FormatError for a line that lacks one of them."""
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}: give one with an object of {', '.join(fields)} a line.")
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
        csv.field_size_limit(2**31 - 1)  # a query without an id is called by its whole text
        reader = csv.DictReader(file)
        if missing := [name for name in FIELDS if name not in (reader.fieldnames or ())]:
            raise FormatError(f"{path} has no column {missing[0]!r}: its header needs query, id and score.")
        for record in reader:
            yield reader.line_num, (record["query"], record["id"], record["score"])


def _jsonl(path: Path) -> Lines:
    for line, (query, name, score) in read_objects(path, FIELDS):
        yield line, (str(query), str(name), score)


def _arrow(path: Path) -> Lines:
    pyarrow: Any = needs("pyarrow", f"A file of {path.suffix}", extra="data")
    try:
        if path.suffix == ".parquet":
            table = needs("pyarrow.parquet", "Parquet", extra="data").read_table(path, columns=[*FIELDS])
        else:
            with pyarrow.memory_map(str(path)) as file:
                table = pyarrow.ipc.open_file(file).read_all()
        pairs = zip(*(table[name].to_pylist() for name in FIELDS), strict=True)
    except (pyarrow.ArrowException, KeyError) as error:
        raise FormatError(f"{path} has no columns query, id and score that can be read ({error}).") from None
    for line, (query, name, score) in enumerate(pairs, 1):
        yield line, (str(query), str(name), score)


def _number(path: Path, line: int, score: object) -> float:
    number = float("nan")
    if isinstance(score, (str, int, float)) and not isinstance(score, bool):
        with contextlib.suppress(ValueError, OverflowError):
            number = float(score)
    if not abs(number) <= float(np.finfo(np.float32).max):
        raise FormatError(f"{path}, line {line}: {score!r} is not a finite score.")
    return number


_READERS = {".csv": _csv, ".jsonl": _jsonl, ".parquet": _arrow, ".arrow": _arrow}
