"""Adjoints of what an optimizer's step does to its state: clipping, SGD with momentum, and the forms of Adam.

Cotangents are [queries, parameters], one for each row of the state (parameters, moments), and are changed in place.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


def clip_adjoint(gradient: Tensor, limit: float | None) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """A gradient [parameters] clipped to a norm as clip_grad_norm_ does it, and the adjoint of that."""
    norm = gradient.norm()
    if limit is None or (gradient.is_cpu and limit / (norm + 1e-6) >= 1):
        return gradient, lambda b: b
    # On other devices nobody waits for the norm: where nothing is clipped, the factor is 1 and its slope 0.
    factor = (limit / (norm + 1e-6)).clamp(max=1.0)
    slope = torch.where(factor < 1, factor / (norm * (norm + 1e-6)), 0.0)

    def adjoint(b: Tensor) -> Tensor:
        return b * factor - torch.outer(b @ gradient, gradient * slope)

    return gradient * factor, adjoint


def plus(x: Tensor, y: Tensor, factor: float | Tensor) -> Tensor:
    """x + factor * y in place, for one factor or one for each parameter."""
    return x.addcmul_(y, factor) if isinstance(factor, Tensor) else x.add_(y, alpha=factor)


def sgd_adjoint(cotangents: list[Tensor], rate: float, group: dict[str, Any]) -> Tensor:
    """theta' = theta - rate * d, with d = g, the buffer u' = mu u + g, or g + mu u' (Nesterov); g has the decay in."""
    a, decay = cotangents[0], group["weight_decay"]
    b = a * -rate
    if len(cotangents) == 2:
        mu, u = group["momentum"], cotangents[1]
        u.add_(b, alpha=mu if group["nesterov"] else 1.0)
        b = b + u if group["nesterov"] else u.clone()
        u.mul_(mu)
    plus(a, b, decay)
    return b


@dataclass(frozen=True)
class AdamForm:
    """One step of adam, adamw or paper-adam, counted from 0: theta' = theta - rate / c1 * m' / root(v').

    group   numbers of the optimizer; its weight_decay is one, or one for each parameter
    """

    kind: str
    rate: float
    step: int
    group: dict[str, Any]

    def moments(self, gradient: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The gradient with coupled decay, and m', v' after the step."""
        beta1, beta2 = self.group["betas"]
        if self.kind == "adam":
            gradient = plus(gradient.clone(), state[0], self.group["weight_decay"])
        square = (state[2] * beta2).addcmul_(gradient, gradient, value=1 - beta2)
        return gradient, state[1].lerp(gradient, 1 - beta1), square

    def root(self, square: Tensor) -> tuple[Tensor, Tensor]:
        """root(v') and its derivative."""
        correction = 1 - self.group["betas"][1] ** (self.step + 1)
        if self.kind == "paper-adam":
            root = (square / correction + self.group["eps"]).sqrt_()
            return root, 0.5 / correction / root
        plain = (square / correction).sqrt_()
        return plain + self.group["eps"], torch.where(plain > 0, 0.5 / correction / plain, 0.0)

    def adjoint(self, cotangents: list[Tensor], gradient: Tensor, state: Tensor) -> Tensor:
        """Cotangents of theta', m', v' [queries, parameters] become those of theta, m, v; gives that of g."""
        a, m, v = cotangents
        beta1, beta2 = self.group["betas"]
        gradient, mean, square = self.moments(gradient, state)
        root, slope = self.root(square)
        size = self.rate / (1 - beta1 ** (self.step + 1)) / root
        m.addcmul_(a, size, value=-1)
        v.addcmul_(a, size * mean * slope / root)
        b = (m * (1 - beta1)).addcmul_(v, gradient * (2 * (1 - beta2)))
        m.mul_(beta1)
        v.mul_(beta2)
        if self.kind == "adamw":
            a.mul_(1 - self.rate * self.group["weight_decay"])
        elif self.kind == "adam":
            plus(a, b, self.group["weight_decay"])
        return b
