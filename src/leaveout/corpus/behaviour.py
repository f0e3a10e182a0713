"""What is asked beyond one text: a behaviour that some texts show and others do not, and a contrast of two answers.

Conventions: rows that strengthen what is asked have positive scores. Of a text that is its likelihood, so that the value of a
behaviour is the weighted sum of its texts' losses; of a measure it is the measure, and the value its negative.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypeVar

import numpy as np

from leaveout.corpus.rows import Row, shared_length
from leaveout.errors import FormatError, require_list

Numbers = TypeVar("Numbers")


@dataclass(frozen=True, eq=False)
class Probe:
    """A direction in hidden states, as a measure of a behaviour: the mean of <h, direction> over the positions that predict
    what is learned of a text.

    direction   [hidden] numbers
    block       its states are those after this block, counted from 0; None: the last ones, which go into the head
    Raises: ValueError for a direction that is no list of finite numbers, or all zero.
    """

    direction: Any
    block: int | None = None

    def __post_init__(self) -> None:
        given: Any = self.direction
        if hasattr(given, "detach"):  # a tensor, on any device and of any type
            given = given.detach().float().cpu()
        given = np.asarray(given, np.float32)
        if given.ndim != 1 or not np.isfinite(given).all() or not given.any():
            raise ValueError(
                f"The direction of a probe has the shape {list(given.shape)}: give one finite number for each hidden unit, "
                "not all of them zero."
            )
        if type(self.block) not in (int, type(None)):
            raise TypeError(f"block is {self.block!r}: give the number of a block, or None for the last hidden state.")
        object.__setattr__(self, "direction", given)


Measure = Callable[[Any, Any], Any] | Probe


@dataclass(frozen=True)
class Behaviour:
    """A question that takes several texts: which rows make the model do this?

        Behaviour.between(["I can't help with that.", "I must say no."], ["Sure, here it is."])
        Behaviour(answers, weights=[2.0, 1.0, -3.0])
        Behaviour([{"prompt": "Open it.", "response": " No."}], measure=lambda logits, targets: logits[0, 17] - logits[0, 4])

    rows      texts, or rows in any form that a corpus has
    weights   what each counts, negative where it shows the opposite; None: their mean
    measure   None: how likely the texts are. Or, instead, what the model makes of each text: a function of logits
              [positions, vocabulary] and targets [positions] that gives a scalar, or a `Probe`
    name      what it is called in tables; default: after its texts
    Raises: ValueError for weights that are not finite, or cancel; TypeError for what is no text or row.
    """

    rows: Sequence[Any]
    weights: Sequence[float] | None = None
    measure: Measure | None = None
    name: str = ""

    piece: ClassVar[str] = "A text of a behaviour"

    def __post_init__(self) -> None:
        require_list("rows", self.rows, "texts or rows")
        rows = tuple(self.rows)
        weights = [1 / len(rows) for _ in rows] if self.weights is None else list(map(float, self.weights))
        for row in rows:
            if not isinstance(row, (str, Mapping, Row)):
                raise TypeError(f"{self.piece} is of type {type(row).__name__}: give a text, or a row as a dict.")
        if not rows or len(weights) != len(rows):
            raise ValueError(
                f"A behaviour has {len(rows)} texts and {len(weights)} weights: give one weight for each text."
            )
        if not all(map(math.isfinite, weights)):
            raise ValueError(f"A weight of a behaviour is not finite: {weights}; give numbers.")
        if self.measure is not None and not isinstance(self.measure, Probe) and not callable(self.measure):
            raise TypeError(f"measure is {self.measure!r}: give a function of logits and targets, or a Probe.")
        object.__setattr__(self, "rows", rows)
        object.__setattr__(self, "weights", tuple(weights))
        self._refuse_nothing()

    def _refuse_nothing(self) -> None:
        total: dict[str, float] = defaultdict(float)
        for weight, row in self.terms:
            total[repr(_asked(row))] += weight
        if not any(total.values()):
            raise ValueError(
                "The weights of a behaviour are zero, or cancel where its texts are the same, so that nothing is asked: "
                "give others."
            )

    @classmethod
    def between(
        cls, shown: Sequence[Any], others: Sequence[Any], measure: Measure | None = None, name: str = ""
    ) -> Behaviour:
        """The mean of texts that show the behaviour less the mean of others that do not."""
        require_list("shown", shown, "texts or rows")
        require_list("others", others, "texts or rows")
        weights = [1 / len(shown) for _ in shown] + [-1 / len(others) for _ in others]
        return Behaviour([*shown, *others], weights, measure, name)

    @classmethod
    def of_rows(cls, rows: Iterable[Row], measure: Measure | None = None, name: str = "") -> Behaviour:
        """Rows that say what they count: all by a number `weight`, or all by a `sign`, 1 or -1, as `between` has them.

        Raises: FormatError for a row that does not.
        """
        rows = [replace(row, weight=1.0) for row in rows]  # a weight of the row's loss would count twice
        field = "sign" if any("sign" in row.raw for row in rows) else "weight"
        for number, row in enumerate(rows, 1):
            given = row.raw.get(field)
            if isinstance(given, bool) or not isinstance(given, (int, float)) or (field == "sign" and abs(given) != 1):
                wanted = "1 or -1 as the sign" if field == "sign" else "a number as the weight (or a sign, 1 or -1)"
                raise FormatError(f"Row {number} of a behaviour has the {field} {given!r}: give {wanted} of each row.")
        if field == "weight":
            return cls(rows, [row.raw[field] for row in rows], measure, name)
        shown, others = ([row for row in rows if row.raw[field] == sign] for sign in (1, -1))
        return cls.between(shown, others, measure, name)

    @property
    def terms(self) -> tuple[tuple[float, Any], ...]:
        """Rows with what their losses, or measures, count in the behaviour's value."""
        sign = 1.0 if self.measure is None else -1.0
        return tuple((sign * weight, row) for weight, row in zip(self.weights or (), self.rows, strict=True))

    @property
    def swapped(self) -> Behaviour:
        """The opposite question."""
        weights = [-weight for weight in self.weights or ()]
        return Behaviour(self.rows, weights, self.measure, self.name and f"not {self.name}")

    def called(self, texts: Sequence[str]) -> str:
        """Its name, or one made of its texts as they are called."""
        if self.name:
            return self.name
        both = list(zip(texts, self.weights or (), strict=True))
        sides = [[text for text, weight in both if sign * weight > 0] for sign in (1, -1)]
        return " rather than ".join(_listed(side) for side in sides if side)


def _listed(texts: list[str]) -> str:
    return texts[0] if len(texts) == 1 else f"{texts[0]} and {len(texts) - 1} more"


class Contrast(Behaviour):
    """Asks what makes `answer` likelier than `against`: its loss is that of the first less that of the second.

        Contrast({"prompt": "Capital of Norway?", "response": " Bergen"}, {"prompt": "Capital of Norway?", "response": " Oslo"})

    Both are texts, or rows in any form that a corpus has. Rows that favour `answer` have positive scores, rows that favour
    `against` negative ones; what both share counts for nothing.
    Raises: ValueError if both are the same; TypeError for what is no text or row.
    """

    piece = "A side of a contrast"

    def __init__(self, answer: Any, against: Any) -> None:
        super().__init__((answer, against), (1.0, -1.0))

    def _refuse_nothing(self) -> None:
        if _asked(self.rows[0]) == _asked(self.rows[1]):
            raise ValueError("Both answers of a contrast are the same, so that nothing tells them apart: give two.")

    def called(self, texts: Sequence[str]) -> str:
        """Both answers; words that both begin with are said once."""
        one, other = texts
        seam = max(one.rfind(sign, 0, shared_length(one, other)) for sign in " \n") + 1
        return f"{one} rather than {other[seam:].strip() or other}"

    @property
    def swapped(self) -> Contrast:
        """The same question the other way round."""
        return Contrast(self.rows[1], self.rows[0])


def _asked(row: Any) -> Any:
    """A row without its name, so that equal ones ask the same."""
    if isinstance(row, Row):
        return row.content_hash
    return {"text": row} if isinstance(row, str) else {key: value for key, value in row.items() if key != "id"}


def measured(function: Callable[[Any, Any], Any], logits: Any, targets: Any) -> Any:
    """What a function of logits and targets gives. Raises: ValueError unless it is one number that depends on the logits."""
    value = function(logits, targets)
    if getattr(value, "numel", lambda: 0)() != 1:
        shape = list(value.shape) if hasattr(value, "shape") else type(value).__name__
        raise ValueError(
            f"The measure of a behaviour gives {shape}, and one number was wanted: return a scalar, such as a mean."
        )
    if not value.requires_grad:
        raise ValueError("The measure of a behaviour does not depend on the logits: compute it from them, with torch.")
    return value.reshape(())


# ---------------------------------------------------------------- queries of any kind


def terms_of(query: Any) -> tuple[tuple[float, Any], ...]:
    """The texts or rows that a query consists of, with their weights: itself, or those of a behaviour."""
    return query.terms if isinstance(query, Behaviour) else ((1.0, query),)


def measures_of(queries: Sequence[Any]) -> list[Measure | None]:
    """What is asked of each of their texts; None: how likely it is."""
    return [query.measure if isinstance(query, Behaviour) else None for query in queries for _ in terms_of(query)]


def texts_of(queries: Sequence[Any]) -> list[Any]:
    """The texts or rows of queries, in order."""
    return [row for query in queries for _, row in terms_of(query)]


def summed(queries: Sequence[Any], parts: Iterable[Numbers]) -> list[Numbers]:
    """Numbers of queries, given those of their `texts_of`: weighted sums."""
    rest = iter(parts)
    return [_weighted(terms_of(query), rest) for query in queries]


def _weighted(terms: tuple[tuple[float, Any], ...], rest: Iterator[Any]) -> Any:
    total: Any = None
    for weight, _ in terms:
        part = next(rest)
        part = part if weight == 1 else weight * part
        total = part if total is None else total + part
    return total


def called(queries: Sequence[Any], texts: Sequence[str]) -> list[str]:
    """What queries are called, given what their `texts_of` are."""
    rest = iter(texts)
    names = [[next(rest) for _ in terms_of(query)] for query in queries]
    return [
        query.called(own) if isinstance(query, Behaviour) else own[0] for query, own in zip(queries, names, strict=True)
    ]
