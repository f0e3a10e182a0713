"""What may be asked: each request a dataclass, which says what it is read from, what is refused, and its JSON schema.

Conventions: sizes are limited here and nowhere else, so that the longest question is known.
"""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from leaveout.errors import choices

TEXT = 20_000  # characters of any text
LONGEST = {"k": 100, "ids": 100, "only": 1_000, "queries": 100, "sets": 100}
"""The largest number, or the longest list, by field."""
SET = 100_000  # units of one set

Request = TypeVar("Request")


@dataclass(frozen=True)
class Question:
    """An answer, after a prompt or without one.

    answer   the text that is asked about
    prompt   what stands before it, as context only
    against  another answer after the same prompt: why the first and not this one?
    form     how both make a row: text, prompt, instruction or messages; none: as most rows are
    """

    answer: str
    prompt: str | None = None
    against: str | None = None
    form: str | None = None


@dataclass(frozen=True)
class Ask(Question):
    """Which rows push an answer up or down most.

    k         rows of each kind
    where     an SQL expression over id, unit, text and fields: only rows that satisfy it are ranked
    field     with `only`: the field, or `unit`, whose values are ticked
    only      rows whose `field` has one of these values, as `sources` names them
    group_by  field, or `unit`: of each value only the best row
    """

    k: int = 10
    where: str | None = None
    field: str | None = None
    only: list[str] | None = None
    group_by: str | None = None


@dataclass(frozen=True)
class Explain(Question):
    """Which words of rows answer which words of the answer.

    ids  of the rows, as `ask` gave them
    """

    ids: list[str] = ()  # type: ignore[assignment]


@dataclass(frozen=True)
class WhatIf:
    """The loss of answers under the model trained without some of its data.

    sets      what is left out: lists of units or of ids of examples, each list for itself
    queries   names of the run's queries
    answer, prompt, against   a question beside them, as in `ask`
    curve     also the way from 0 to 100 % of each set
    meaning   same-run or new-run: what "without" means; a new run where the noise of runs was measured
    """

    sets: list[list[str]]
    queries: list[str] | None = None
    answer: str | None = None
    prompt: str | None = None
    against: str | None = None
    curve: bool = False
    meaning: str | None = None


def read(kind: type[Request], body: Any) -> Request:
    """A request from a JSON value. Raises: ValueError that names the field and what it must be."""
    if not isinstance(body, Mapping):
        raise ValueError("The request must be a JSON object with fields.")
    hints = get_type_hints(kind)
    known = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    for name in body:
        if name not in known:
            raise ValueError(f"There is no field {name!r}: {choices(name, known)}.")
    for field in fields(kind):  # type: ignore[arg-type]
        if field.name in body:
            _check(field.name, body[field.name], hints[field.name])
        elif field.default is MISSING:
            raise ValueError(f"The field {field.name!r} is missing.")
    return kind(**body)


def _check(name: str, value: Any, hint: Any, inner: bool = False) -> None:
    """Raises: ValueError if a value is not of the type that is wanted, or too long."""
    kinds = get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if type(None) in kinds and value is None:
        return
    kind: Any = kinds[0]
    if get_origin(kind) is list:
        if not isinstance(value, list):
            raise ValueError(f"{name} must be a list.")
        most = SET if inner else LONGEST[name]
        if len(value) > most:
            raise ValueError(f"{name} has {len(value)} entries: give at most {most}.")
        for entry in value:
            _check(name, entry, get_args(kind)[0], inner=True)
        return
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        wanted = {str: "a text", int: "a whole number", bool: "true or false"}[kind]
        raise ValueError(f"{name} must be {wanted}, not {type(value).__name__}.")
    if kind is str and len(value) > TEXT:
        raise ValueError(f"{name} has {len(value)} characters: give at most {TEXT}.")
    if kind is int and not 1 <= value <= LONGEST[name]:
        raise ValueError(f"{name} is {value}: give a number from 1 to {LONGEST[name]}.")


def schema(kind: type) -> dict[str, Any]:
    """The JSON schema of a request."""
    hints = get_type_hints(kind)
    found: dict[str, Any] = {
        "type": "object",
        "description": " ".join((kind.__doc__ or "").split()),
        "properties": {field.name: _schema_of(field.name, hints[field.name]) for field in fields(kind)},
        "additionalProperties": False,
    }
    if required := [field.name for field in fields(kind) if field.default is MISSING]:
        found["required"] = required
    return found


def _schema_of(name: str, hint: Any, inner: bool = False) -> dict[str, Any]:
    kinds = get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    kind = kinds[0]
    if get_origin(kind) is list:
        most = SET if inner else LONGEST[name]
        found: dict[str, Any] = {"items": _schema_of(name, get_args(kind)[0], inner=True), "maxItems": most}
    elif kind is str:
        found = {"maxLength": TEXT}
    else:
        found = {"minimum": 1, "maximum": LONGEST[name]} if kind is int else {}
    named = {str: "string", int: "integer", bool: "boolean"}.get(kind, "array")
    return {"type": [named, "null"] if type(None) in kinds else named, **found}
