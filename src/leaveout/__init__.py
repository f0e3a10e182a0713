"""Which training data made the model do this, and what would it do without it?

The public names load on first use, so that `import leaveout` and the command line's help need no torch. They stand in one
table, `__init__.pyi`.
"""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

from leaveout.errors import meant

__version__ = "0.2.0"

_TABLE = Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8")
_PLACES = {name: place for place, name in re.findall(r"^from (\S+) import (\w+)", _TABLE, re.MULTILINE)}
__all__ = list(_PLACES)  # pyright: ignore[reportUnsupportedDunderAll] - checkers read the table itself


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'leaveout' has no attribute {name!r}: {meant(name, __all__)}see dir(leaveout)")
    return getattr(importlib.import_module(_PLACES[name]), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
