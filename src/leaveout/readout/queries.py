"""Queries: texts or rows that are asked about, and their signatures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from leaveout.corpus import Corpus, Row

QueryRow = str | Mapping[str, Any] | Row


@dataclass(frozen=True)
class Queries:
    """Signatures of queries, with what they were made with.

    Shapes: vectors [queries, unprojected or stored width] float32.
    """

    vectors: Tensor
    texts: tuple[str, ...]
    fingerprint: str

    def __len__(self) -> int:
        return len(self.texts)


def query_row(query: QueryRow, number: int) -> Row:
    """A query as a row. Raises: TypeError if it is neither a text nor a row."""
    if isinstance(query, Row):
        return query
    if not isinstance(query, (str, Mapping)):
        raise TypeError(f"Query {number + 1} is of type {type(query).__name__}: give a text, or a row as a dict.")
    raw = {"text": query} if isinstance(query, str) else {key: value for key, value in query.items() if key != "id"}
    rows = list(Corpus.open([raw]))
    return replace(rows[0], id=f"query {number + 1}", number=number)
