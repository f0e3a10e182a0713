"""Truncated power series as tensors: ordinary torch code runs on them, derivatives come out."""

from leaveout.jets import rules, rules_analytic, rules_nn, rules_optim  # noqa: F401  (they fill the table)
from leaveout.jets.series import Series
from leaveout.jets.tensor import Jet, Space, install, restore

__all__ = ["Jet", "Series", "Space", "install", "restore"]
