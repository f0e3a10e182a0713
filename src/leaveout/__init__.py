"""Which training data made the model do this, and what would it do without it?

The public names load on first use, so that `import leaveout` and the command line's help need no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from leaveout.corpus import Corpus, Row
from leaveout.errors import FormatError, LeaveoutError, MismatchError, StabilityError, UnsupportedError

if TYPE_CHECKING:
    from leaveout.readout.explain import Explanation
    from leaveout.readout.index import Index, Queries
    from leaveout.readout.model import load_readout
    from leaveout.readout.search import Hit
    from leaveout.readout.settings import PRESETS, Channel, SignatureSettings

__version__ = "0.1.0"

_LAZY = {
    "Channel": "leaveout.readout.settings",
    "Explanation": "leaveout.readout.explain",
    "Hit": "leaveout.readout.search",
    "Index": "leaveout.readout.index",
    "PRESETS": "leaveout.readout.settings",
    "Queries": "leaveout.readout.index",
    "SignatureSettings": "leaveout.readout.settings",
    "load_readout": "leaveout.readout.model",
}

__all__ = [
    "PRESETS",
    "Channel",
    "Corpus",
    "Explanation",
    "FormatError",
    "Hit",
    "Index",
    "LeaveoutError",
    "MismatchError",
    "Queries",
    "Row",
    "SignatureSettings",
    "StabilityError",
    "UnsupportedError",
    "load_readout",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'leaveout' has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
