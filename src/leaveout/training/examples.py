"""Examples of a recipe: rows of text to tokens, and labelled examples of classifiers, read and checked.

Rows are cut at a limit, which is counted, and queries never are. Labelled examples are pairs (features, label).
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from leaveout.corpus import Corpus, Row
from leaveout.corpus.chat import Template
from leaveout.corpus.rows import in_words
from leaveout.corpus.tokens import RowTokens, pair_tokens
from leaveout.errors import FormatError
from leaveout.tables import shorten

IGNORED = -100
TEXTS = {"text", "prompt_text", "prompt", "completion", "response", "instruction", "input", "output", "messages"}
"""Fields of rows that their tokens stand for, where these are given."""


@dataclass(frozen=True)
class Asked:
    """A row, in the form of the examples, that is a query: it is never cut."""

    row: Any


def asked(rows: Sequence[Any]) -> list[Asked]:
    """The rows as queries."""
    return [row if isinstance(row, Asked) else Asked(row) for row in rows]


def unmarked(row: Any) -> Any:
    """A row or query as it was given."""
    return row.row if isinstance(row, Asked) else row


def as_row(row: Any) -> Row:
    """A row of text, given as such, as a text, or as a dictionary."""
    row = unmarked(row)
    return row if isinstance(row, Row) else next(iter(Corpus.open([row])))


@dataclass(frozen=True)
class RowEncoder:
    """How the rows of a language model's recipe become token ids and labels [examples, tokens].

    limit    tokens of an example, the recipe's `max_tokens`
    context  tokens that the model reads
    """

    tokenizer: Any
    template: Template
    limit: int
    context: int

    def sides(self, row: Any) -> list[RowTokens]:
        """The tokens of an example, cut at the limit, or of a query; of a preference row those of both its answers.

        Raises: FormatError for one without a token to learn, or longer than the model's context.
        """
        limit, one = None if isinstance(row, Asked) else self.limit, as_row(row)
        if limit is None and one.pair is not None:
            raise FormatError(
                "A query is a preference row: ask what tells its answers apart, Contrast(chosen, rejected)."
            )
        given = given_tokens(one, limit)
        found = [given] if given else pair_tokens(one, self.tokenizer, self.template, limit)
        for side in found:
            if (length := len(side.ids)) > self.context:
                if limit is None:
                    raise too_long(one, f"{length} tokens", self.context)
                raise FormatError(
                    f"Row {side.row.id} has {length} tokens within max_tokens = {limit}, but the model reads at most "
                    f"{self.context}: set max_tokens to {self.context} or less."
                )
        return found

    def encode(self, rows: Sequence[Any]) -> tuple[Tensor, Tensor]:
        """Ids and labels of examples and queries [rows, tokens], labels only where a row is learned; of preference rows
        those of the chosen and of the rejected answer, [rows, 2, tokens].
        """
        found = [self.sides(row) for row in rows]
        ids, labels = self._padded([side for sides in found for side in sides])
        shape = (len(rows), len(found[0])) if len(found[0]) > 1 else (len(rows),)
        return ids.unflatten(0, shape), labels.unflatten(0, shape)

    def _padded(self, rows: Sequence[RowTokens]) -> tuple[Tensor, Tensor]:
        """Ids and labels, which are IGNORED where nothing is learned; padding stands at the end."""
        longest, fill = max(len(row.ids) for row in rows), self.tokenizer.pad_token_id or 0
        labels = [[IGNORED] * longest for _ in rows]
        for row, own in zip(rows, labels, strict=True):
            for place in row.learned:
                own[place] = row.ids[place]
        return torch.tensor([row.ids + [fill] * (longest - len(row.ids)) for row in rows]), torch.tensor(labels)


def given_tokens(row: Row, limit: int | None) -> RowTokens | None:
    """The tokens that a row itself has in `input_ids`, of which it learns those with a label (all without `labels`).

    Raises: FormatError for labels that are not the tokens' own or -100, and where nothing is learned.
    """
    if "input_ids" not in row.raw:
        return None
    ids = [int(i) for i in row.raw["input_ids"]]
    labels = [int(i) for i in row.raw.get("labels", ids)]
    if len(labels) != len(ids) or any(label not in (own, IGNORED) for own, label in zip(ids, labels, strict=True)):
        raise FormatError(
            f"Row {row.id!r} has `labels` that are not its `input_ids`, or -100 where nothing is learned: give labels of "
            "the tokens themselves, not shifted."
        )
    kept = len(ids) if limit is None else min(len(ids), limit)
    learned = [i for i in range(1, kept) if labels[i] != IGNORED]
    if not learned:
        raise FormatError(f"Row {row.id!r} has no token to learn among the first {kept} `labels`: leave it out.")
    return RowTokens(row, ids[:kept], [(0, 0)] * kept, learned, len(ids) - kept)


def row_of_tokens(
    row: Mapping[str, Any], name: str, tokens: tuple[Sequence[int], Sequence[int]], tokenizer: Any
) -> Any:
    """A row whose tokens and labels are given: its text is read back from them, and other fields that name it are kept."""
    own = {k: v for k, v in row.items() if isinstance(v, (str, int, float, bool)) and k not in TEXTS}
    ids, labels = map(list, tokens)
    return {"id": name, **own, "text": tokenizer.decode(ids), "input_ids": ids, "labels": labels}


def too_long(query: Row, length: str, most: int) -> FormatError:
    """The refusal of a query that would have to be cut; with both numbers."""
    return FormatError(
        f"The query {shorten(in_words(query), 40)!r} has {length}, but the model reads at most {most}: ask a shorter one."
    )


# --- labelled examples ------------------------------------------------------------------------------------------------


def read_arrays(path: Path, units: str | None = None) -> tuple[tuple[Any, ...], tuple[str, ...]]:
    """Examples and units of an .npz file with arrays x [examples, ...] and y [examples], and one named as `units`.

    Raises: FormatError with the file, the example and the value for what is none.
    """
    arrays = _loaded(path)
    for name in ("x", "y", *([units] if units else [])):
        if name not in arrays:
            has = f"it has {', '.join(sorted(arrays))}" if arrays else "it is empty"
            raise FormatError(f"{path} has no array {name!r}, {has}: a classifier's examples are x [n, ...] and y [n].")
    x, y = arrays["x"], arrays["y"]
    for name in ("y", *([units] if units else [])):
        if len(arrays[name].shape) == 0 or x.ndim == 0 or len(arrays[name]) != len(x):
            shapes = f"x {list(x.shape)} and {name} {list(arrays[name].shape)}"
            raise FormatError(f"{path} has {shapes}: both need one entry for each example.")
    if x.ndim < 2 or x.dtype.kind not in "biuf":
        raise FormatError(f"{path} has x {list(x.shape)} of {x.dtype}: it must be numbers [examples, features].")
    if y.ndim > 1:
        raise FormatError(f"{path} has y {list(y.shape)}: it must be [examples], one class each{_column(y)}.")
    labels = y.tolist()
    features = torch.from_numpy(x.astype(x.dtype.newbyteorder("=")))
    for i, label in enumerate(labels):
        class_of(label, f"{path}, example {i}")
        check_features(features[i], features.shape[1:], f"{path}, example {i}")
    names = tuple(str(u) for u in arrays[units].tolist()) if units else ()
    return tuple(zip(features, labels, strict=True)), names


def class_of(label: Any, where: str, classes: int | None = None) -> int:
    """The class that a label names, a whole number from 0, below `classes` if these are known.

    Raises: FormatError, which begins with `where`.
    """
    value = label.detach().cpu().numpy() if isinstance(label, torch.Tensor) else label
    if isinstance(value, (np.generic, np.ndarray)):
        value = value.item() if value.size == 1 and value.ndim == 0 else value.tolist()
    if not isinstance(value, (int, float)) or value != value or value < 0 or value != int(min(value, 2**31)):
        hint = f" ({_hint(value)})" if _hint(value) else ""
        raise FormatError(f"{where}: the label is {value!r}, but classes are whole numbers from 0{hint}.")
    if classes is not None and value >= classes:
        raise FormatError(
            f"{where}: the label is {int(value)}, but the model has {classes} classes, 0 to {classes - 1}."
        )
    return int(value)


def check_features(features: Any, shape: Sequence[int], where: str) -> None:
    """Raises: FormatError, which begins with `where`, for another shape than the recipe's, or a number that is not finite."""
    x = torch.as_tensor(features)
    if tuple(x.shape) != tuple(shape):
        raise FormatError(f"{where}: the features have the shape {list(x.shape)}, but the recipe's are {list(shape)}.")
    if x.is_floating_point() and not bool(x.isfinite().all()):
        at = (~x.isfinite()).nonzero()[0].tolist()
        raise FormatError(f"{where}: the feature {at} is {float(x[tuple(at)])}: replace it or leave the example out.")


def check_examples(examples: Sequence[Any]) -> None:
    """Raises: FormatError with the number of the first example that is no pair (features, label) like the first one."""
    shape: Sequence[int] | None = None
    for i, example in enumerate(examples):
        shape = check_pair(example, f"Example {i} of the recipe", shape)


def check_pair(example: Any, where: str, shape: Sequence[int] | None = None, classes: int | None = None) -> torch.Size:
    """The shape of an example's features.

    Raises: FormatError, which begins with `where`, for what is no pair of features, of this shape, and one of the classes.
    """
    if not isinstance(example, (tuple, list)) or len(example) != 2 or isinstance(example[0], (str, bytes)):
        raise FormatError(
            f"{where} is {type(example).__name__}: an example of a classifier is a pair (features, label)."
        )
    found = torch.as_tensor(example[0]).shape
    check_features(example[0], found if shape is None else shape, where)
    class_of(example[1], where, classes)
    return found


def _loaded(path: Path) -> dict[str, np.ndarray]:
    try:
        with open(path, "rb") as handle, np.load(handle, allow_pickle=False) as data:
            return {name: data[name] for name in data.files}
    except ValueError as error:
        if "allow_pickle" in str(error) and zipfile.is_zipfile(path):
            raise FormatError(
                f"{path} holds Python objects: save x as numbers and y as whole numbers from 0."
            ) from None
    except (OSError, zipfile.BadZipFile, EOFError, TypeError, AttributeError):
        pass
    raise FormatError(f"{path} is not an .npz file with arrays x and y: write it with numpy.savez(path, x=x, y=y).")


def _column(y: np.ndarray) -> str:
    if y.shape[1:] == (1,):
        return " (y[:, 0])"
    return " (one-hot: y.argmax(1))" if y.ndim == 2 and y.dtype.kind in "biuf" and (y.sum(1) == 1).all() else ""


def _hint(value: Any) -> str:
    if isinstance(value, str):
        return "number the classes, such as numpy.unique(y, return_inverse=True)[1]"
    if isinstance(value, list):
        return "give the place of the one" if sum(v == 1 for v in value) == 1 else "give one number an example"
    if isinstance(value, (int, float)) and value == -1:
        return "of two classes -1 and 1, give 0 and 1"
    return ""
