"""Scores of an index as columns of the dataset that it was made of."""

# A Dataset of Hugging Face is Any.

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from leaveout.corpus import Corpus
from leaveout.errors import MismatchError


def with_columns(dataset: Any, ids: Sequence[str], scores: np.ndarray, columns: Sequence[str], corpus: Corpus) -> Any:
    """A `datasets.Dataset` with a column for each query, its rows' `scores` [query, id]; `corpus`: its rows as they were read.

    Raises: MismatchError for a row that has no score, ValueError for a column that is there, or not one for each query.
    """
    if len(columns) != len(scores) or (taken := [name for name in columns if name in dataset.column_names]):
        wrong = f"the dataset has {taken[0]!r}" if len(columns) == len(scores) else f"there are {len(scores)} queries"
        raise ValueError(f"columns is {list(columns)}, but {wrong}: give a new name for each query")
    place = {id: number for number, id in enumerate(ids)}
    found = [(row.id, place.get(row.id)) for row in corpus]
    if missing := [id for id, number in found if number is None]:
        raise MismatchError(
            f"{len(missing)} rows of the dataset are not in the index, the first is {missing[0]!r}: append them first."
        )
    order = [number for _, number in found if number is not None]
    for name, line in zip(columns, scores, strict=True):
        dataset = dataset.add_column(name, line[order].tolist())
    return dataset
