"""The table of rules, ATen operation -> what it does to power series, and what a rule is written with.

A rule has the signature rule(func, args, kwargs) -> result, and sees jets, plain tensors (constants) and numbers.
The direction and coefficient axes come first in `Jet.h`, so an axis counted from the end is the same for c and h, and
an axis counted from the front moves by two.

Adding an operation: one function under `@rule(...)`, and one line in tests/jets/test_rules.py. From another package: see
`leaveout.plugins`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from leaveout.jets.series import Series
from leaveout.jets.tensor import TABLE, Jet, Rule, Space, unsupported

aten = torch.ops.aten


def rule(*ops: Any) -> Callable[[Rule], Rule]:
    """Enter a rule into the table for these operations."""

    def enter(function: Rule) -> Rule:
        for op in ops:
            TABLE[op] = function
        return function

    return enter


def space_of(args: Iterable[Any]) -> Space:
    """The space of the first jet among arguments (also inside lists)."""
    for a in args:
        if isinstance(a, Jet):
            return a.space
        if isinstance(a, (list, tuple)) and any(isinstance(x, Jet) for x in a):
            return space_of(a)
    raise AssertionError("no jet among the arguments")


def operand(a: Any) -> Any:
    """A jet as its Series, anything else as it is."""
    return Series(a.c, a.h) if isinstance(a, Jet) else a


def constant(a: Any) -> Any:
    """A jet's constant term, anything else as it is."""
    return a.c if isinstance(a, Jet) else a


def wrap(s: Series, space: Space) -> Jet:
    """A Series as a jet. A run has one precision: results of mixed precision return to it."""
    c = s.c if s.c.dtype == space.real_dtype else s.c.to(space.real_dtype)
    return Jet(c, s.h, space)


def of_one(function: Callable[[Series], Series]) -> Rule:
    """The rule of an operation that is a function of one series."""
    return lambda func, args, kwargs: wrap(function(args[0].series), args[0].space)


def padded(args: Any, *defaults: Any) -> Any:
    """The first argument and as many more as there are defaults, which stand for those that are missing."""
    return (*args, *defaults[len(args) - 1 :])


def note_nonsmooth(func: Any, space: Space) -> None:
    """Counts a call of an operation with a kink, for the warnings of the run."""
    name = func.name().removeprefix("aten::")
    space.nonsmooth[name] = space.nonsmooth.get(name, 0) + 1


def from_end(dim: int, rank: int) -> int:
    """An axis counted from the end, the same for c and h."""
    return dim if dim < 0 else dim - max(rank, 1)


def all_from_end(dims: Any, rank: int) -> list[int]:
    """Axes of a reduction counted from the end; none given means all."""
    if dims is None or (isinstance(dims, (list, tuple)) and not dims):
        return list(range(-rank, 0))
    return [from_end(d, rank) for d in ([dims] if isinstance(dims, int) else dims)]


def as_jet(x: Any, func: Any) -> Jet:
    """x as a jet that may be written into."""
    if not isinstance(x, Jet):
        raise unsupported(func, "would write a series into an ordinary tensor, which cannot hold one")
    if x.partly_copied:
        raise unsupported(func, "writes into a view that does not share its coefficients with its base")
    return x


def write(x: Any, result: Series, func: Any) -> Jet:
    """Put a result into an existing jet, through all its views."""
    target = as_jet(x, func)
    target.c.copy_(result.c)
    target.h.copy_(result.h)
    return target
