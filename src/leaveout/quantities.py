"""Numbers with units, as people write them: 4GB, 10min."""

from __future__ import annotations

import re
from collections.abc import Mapping

BYTES = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
SECONDS = {"": 1, "s": 1, "m": 60, "min": 60, "h": 3600}


def quantity(text: str, units: Mapping[str, int], name: str) -> int:
    """The number of a text such as 4GB or 10min, in the smallest of the units (BYTES or SECONDS).

    Raises: ValueError, which calls it `name`, for a text of another form.
    """
    found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([a-zA-Z]*)\s*", text)
    if found is None or found[2].lower() not in units:
        known = ", ".join(f"1{unit}" for unit in units if unit)
        raise ValueError(f"{name} must be a number with a unit ({known}), got {text!r}")
    return int(float(found[1]) * units[found[2].lower()])


def byte_count(given: int | str | None, name: str) -> int | None:
    """Bytes that were given as a number, or as a text such as 4GB. Raises: ValueError, which calls it `name`."""
    return quantity(given, BYTES, name) if isinstance(given, str) else given


def amount(n_bytes: int) -> str:
    """Bytes for people."""
    for unit in ("GB", "MB", "kB"):
        if n_bytes >= BYTES[unit.lower()]:
            return f"{n_bytes / BYTES[unit.lower()]:.3g} {unit}"
    return f"{n_bytes} B"
