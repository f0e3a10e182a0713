"""The Jet tensor: a power series that unmodified torch code takes for an ordinary tensor.

`__torch_dispatch__` runs below autograd. Autograd therefore records the ordinary graph of an ordinary real tensor, and
its backward pass, like the forward pass and the optimizer, runs in series arithmetic: every ATen operation is looked up
in one table of rules (see `table`). Views share memory in both parts, so in-place operations mean what they mean
in torch. Shape, dtype and strides that the model sees are those of the constant term.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import leaveout.plugins as plugins
from leaveout.errors import UnsupportedError
from leaveout.jets.series import Series

Rule = Callable[[Any, Any, dict], Any]
TABLE: dict[Any, Rule] = {}
"""ATen operation -> rule; the modules of rules fill it, and plug-ins add to it."""


@dataclass
class Space:
    """What all jets of one run share: truncation, directions, number type; and what the run has noticed.

    `nonsmooth` counts calls of operations that have no derivative somewhere (ReLU, max, clamp): they follow the branch
    of the constant term, and coefficients above degree 1 do not see the kink.
    """

    degree: int
    directions: int
    dtype: torch.dtype = torch.complex128
    nonsmooth: dict[str, int] = field(default_factory=dict)
    real_dtype: torch.dtype = field(init=False)

    def __post_init__(self) -> None:
        if self.degree < 1 or self.directions < 1:
            raise ValueError(f"degree and directions must be at least 1, got {self.degree} and {self.directions}")
        self.real_dtype = self.dtype.to_real()

    def constant(self, c: Tensor) -> Jet:
        """The jet of a tensor that does not depend on z."""
        c = c.detach().to(self.real_dtype).clone()
        return Jet(c, c.new_zeros(self.degree, self.directions, *c.shape, dtype=self.dtype), self)

    def jet(self, c: Tensor, h: Tensor) -> Jet:
        """The jet with constant term c [*shape] and coefficients h [degree, directions, *shape]."""
        wanted = (self.degree, self.directions, *c.shape)
        if tuple(h.shape) != wanted:
            raise ValueError(
                f"wanted coefficients of shape {wanted} (degree, directions, *shape), got {tuple(h.shape)}"
            )
        return Jet(c.to(self.real_dtype), h.to(self.dtype), self)


class Jet(Tensor):
    """A real tensor c with coefficients h [degree, directions, *shape] of z, z^2, ..."""

    c: Tensor
    h: Tensor
    space: Space
    partly_copied: bool  # a view whose coefficients had to be copied: writing into it in place would be lost

    @staticmethod
    def __new__(cls, c: Tensor, h: Tensor, space: Space) -> Jet:
        out = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, c.shape, strides=c.stride(), storage_offset=c.storage_offset(), dtype=c.dtype, device=c.device
        )
        out.c, out.h, out.space, out.partly_copied = c, h, space, False
        return out

    def __init__(self, c: Tensor, h: Tensor, space: Space) -> None:
        pass

    @property
    def series(self) -> Series:
        """Constant term and coefficients, without what makes them a tensor."""
        return Series(self.c, self.h)

    def coefficients(self) -> Tensor:
        """All coefficients, shape [degree + 1, directions, *shape]; the shared constant term is repeated."""
        first = self.c.to(self.h.dtype).expand(1, self.h.shape[1], *self.c.shape)
        return torch.cat([first, self.h])

    def __repr__(self, **_: Any) -> str:
        degree, directions = self.h.shape[:2]
        return f"Jet(shape={tuple(self.shape)}, degree={degree}, directions={directions}, dtype={self.h.dtype})"

    # All work is done below autograd; torch's Python-level hook would cost as much as a small product.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        rule = TABLE.get(func) or _added(func)
        if rule is not None:
            return rule(func, args, kwargs or {})
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            return func.decompose(*args, **(kwargs or {}))
        raise unsupported(func)


def _added(func: Any) -> Rule | None:
    """The rule that another package gives for an operation; it stays in the table.

    Raises: UnsupportedError if it is no function.
    """
    entry = plugins.found("rule").get(str(func))
    if entry is not None:
        found = plugins.load(entry)
        if not callable(found):
            raise UnsupportedError(
                f"The rule of {func} ({entry.value}) is {found!r}: make it a function (func, args, kwargs) -> result."
            )
        TABLE[func] = found
    return TABLE.get(func)


def unsupported(func: Any, why: str = "has no rule for power series") -> UnsupportedError:
    """The error for an operation that a jet cannot do, with the place it was called from."""
    return UnsupportedError(
        f"{func} {why} ({_caller()}): write this part of the model with supported operations "
        "(docs/explanation/jets.md lists them), or add one row to leaveout.jets.table.TABLE by a rule of your own."
    )


def _caller() -> str:
    """The innermost nn.Module on the Python stack; autograd's backward pass has none."""
    frame = sys._getframe(1)
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, nn.Module):
            return f"in module {type(owner).__name__}, {frame.f_code.co_filename}:{frame.f_lineno}"
        frame = frame.f_back
    node = torch._C._current_autograd_node()
    return f"in the backward pass of {node.name()}" if node is not None else "outside any module"


def install(model: nn.Module, jets: Mapping[str, Tensor]) -> dict[str, nn.Parameter]:
    """Put jets, or other tensors, in the place of a model's parameters; returns what was replaced, for `restore`.

    A parameter that occurs under several names (tied weights) is replaced everywhere. Names must be those of
    `model.named_parameters()`; the others stay ordinary tensors that carry no series.
    """
    replaced = {}
    own = dict(model.named_parameters(remove_duplicate=False))
    for name, jet in jets.items():
        old = own[name]
        new = nn.Parameter(jet, requires_grad=old.requires_grad)
        _swap(model, old, new)
        replaced[name] = old
    return replaced


def restore(model: nn.Module, replaced: dict[str, nn.Parameter]) -> None:
    """Undo `install`."""
    own = dict(model.named_parameters(remove_duplicate=False))
    for name, old in replaced.items():
        _swap(model, own[name], old)


def _swap(model: nn.Module, old: nn.Parameter, new: nn.Parameter) -> None:
    for module in model.modules():
        for key, value in module._parameters.items():
            if value is old:
                module._parameters[key] = new
