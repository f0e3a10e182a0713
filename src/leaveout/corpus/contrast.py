"""A question with two answers: why this one and not that one?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from leaveout.corpus.rows import Row


@dataclass(frozen=True)
class Contrast:
    """Asks what makes `answer` likelier than `against`: its loss is that of the first less that of the second.

        Contrast({"prompt": "Capital of Norway?", "response": " Bergen"}, {"prompt": "Capital of Norway?", "response": " Oslo"})

    Both are texts, or rows in any form that a corpus has. Rows that favour `answer` have positive scores, rows that favour
    `against` negative ones; what both share counts for nothing.
    Raises: ValueError if both are the same; TypeError for what is no text or row.
    """

    answer: Any
    against: Any

    def __post_init__(self) -> None:
        for side in self.sides:
            if not isinstance(side, (str, Mapping, Row)):
                raise TypeError(
                    f"A side of a contrast is of type {type(side).__name__}: give a text, or a row as a dict."
                )
        if _asked(self.answer) == _asked(self.against):
            raise ValueError("Both answers of a contrast are the same, so that nothing tells them apart: give two.")

    @property
    def sides(self) -> tuple[Any, Any]:
        """Answer, and what it is held against."""
        return self.answer, self.against

    @property
    def swapped(self) -> Contrast:
        """The same question the other way round."""
        return Contrast(self.against, self.answer)


def _asked(side: Any) -> Any:
    """A side without its name, so that equal ones ask the same."""
    if isinstance(side, Row):
        return side.content_hash
    return {"text": side} if isinstance(side, str) else {key: value for key, value in side.items() if key != "id"}


def sides_of(query: Any) -> tuple[Any, ...]:
    """What a query consists of: itself, or both sides of a contrast."""
    return query.sides if isinstance(query, Contrast) else (query,)
