"""Truncated power series as tensors: ordinary torch code runs on them, derivatives come out."""

from leaveout.jets import rules  # noqa: F401  (fills the table)
from leaveout.jets.series import Series
from leaveout.jets.tensor import Jet, Space, install, restore

__all__ = ["Jet", "Series", "Space", "install", "restore"]
