"""One row's entry in the catalogue, and its strings there."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from leaveout.errors import FormatError
from leaveout.store import catalogue
from leaveout.store.catalogue import CATALOGUE

_SCALARS = (str, int, float, type(None))
_JSON = json.JSONEncoder(ensure_ascii=False, allow_nan=False)
_C_JSON = json.encoder.c_make_encoder and json.encoder.c_make_encoder(  # type: ignore[attr-defined]
    None, _JSON.default, json.encoder.encode_basestring, None, ": ", ", ", False, False, False
)

COLUMNS = "rows.id, rows.unit, contents.text, rows.meta, contents.content_hash, contents.extra, contents.raw, contents.checksum"
SOURCE = "rows JOIN contents ON contents.key = rows.key"


@dataclass(frozen=True)
class Record:
    """One row's entry in the catalogue. meta: field -> string, number, bool or None. extra: a small JSON object. raw: the
    row as it came, a JSON object as text; "" where there was none.
    """

    id: str
    text: str
    unit: str
    meta: dict[str, Any] = field(default_factory=dict)
    content_hash: str = ""
    extra: dict[str, Any] = field(default_factory=dict)
    raw: str = ""

    @property
    def row(self) -> dict[str, Any]:
        """The row as it came, with all its fields; types that JSON lacks in ISO form."""
        return json.loads(self.raw) if self.raw else {}


def serialized(record: Record) -> tuple[str, str, str, str, str, str, str, bytes]:
    """A record as the catalogue's strings: id, unit, text, meta, content hash, extra, raw; and their checksum.

    Raises: FormatError if it is not valid Unicode and JSON.
    """
    for name, value in record.meta.items():
        if not isinstance(name, str) or "\0" in name or not isinstance(value, _SCALARS):
            text = f"row {record.id!r}: metadata field {name!r} is {type(value).__name__}"
            raise FormatError(f"{text}; fields have plain names, and are strings, numbers, bools or None")
    try:
        meta, extra = _encoded(record.meta), _encoded(record.extra)
        strings = (record.id, record.unit, record.text, meta, record.content_hash, extra, record.raw)
        return *strings, catalogue.checksum(*strings)
    except (TypeError, ValueError, AttributeError, RecursionError) as error:
        raise FormatError(f"row {record.id!r} cannot be stored: {error}") from None


def _encoded(value: dict[str, Any]) -> str:
    """JSON; `_JSON.encode` makes a new encoder at every call, which doubles its cost."""
    return "".join(_C_JSON(value, 0)) if _C_JSON else _JSON.encode(value)


def deserialized(strings: Sequence[Any]) -> Record:
    """A record from the columns COLUMNS and the checksum.

    Raises: FormatError if the checksum is not that of the strings, or they are not JSON.
    """
    id, unit, text, meta, content_hash, extra, raw, digest = strings
    if not all(isinstance(part, str) for part in strings[:-1]) or catalogue.checksum(*strings[:-1]) != digest:
        raise FormatError(f"the catalogue's entry of row {id!r} is damaged; restore {CATALOGUE} from a copy")
    try:
        found = Record(id, text, unit, json.loads(meta), content_hash, json.loads(extra), raw)
    except (ValueError, RecursionError):
        found = None
    if found is None or not isinstance(found.meta, dict) or not isinstance(found.extra, dict):
        raise FormatError(f"the catalogue's entry of row {id!r} is not JSON; restore {CATALOGUE} from a copy")
    return found
