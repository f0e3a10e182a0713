"""Rules for the fused optimizer steps of torch.optim (`fused=True`), and the step they share.

One fused step reads and writes each coefficient of parameter, gradient and moments once, in blocks of directions that
fit the cache; the same arithmetic as a chain of torch operations moves about ten times as much memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import leaveout.jets.series as S
from leaveout.jets.series import Series
from leaveout.jets.table import aten, rule
from leaveout.jets.tensor import Jet, unsupported

BLOCK = 16384
"""Elements of one coefficient in a block: larger ones leave the cache, smaller ones pay more for Python."""


@dataclass(frozen=True)
class AdamStep:
    """Numbers of one Adam step. `eps_inside`: sqrt(v / c2 + eps), else sqrt(v / c2) + eps, with c2 = 1 - beta2^t."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    step: int
    eps_inside: bool = False
    weight_decay: float = 0.0
    decoupled: bool = False

    @property
    def corrections(self) -> tuple[float, float]:
        """1 - beta1^t and 1 - beta2^t."""
        return 1 - self.beta1**self.step, 1 - self.beta2**self.step


def adam_step_(param: Series, grad: Series, mean: Series, square: Series, settings: AdamStep) -> None:
    """One Adam step in place on series: param, first moment `mean`, second moment `square` (of g * g, never |g|^2).

    Shapes: all alike. The constant terms follow the ordinary real step; the coefficients follow its series.
    """
    old_c = param.c.clone()
    grad_c = grad.c + settings.weight_decay * old_c if settings.weight_decay and not settings.decoupled else grad.c
    mean.c.lerp_(grad_c, 1 - settings.beta1)
    square.c.mul_(settings.beta2).addcmul_(grad_c, grad_c, value=1 - settings.beta2)
    shared = _SharedFactors.of(grad_c, mean.c, square.c, settings)
    if settings.decoupled and settings.weight_decay:
        param.c.mul_(1 - settings.lr * settings.weight_decay)
    param.c.sub_(shared.update)
    theta, g, m, v = (_flat(a.h) for a in (param, grad, mean, square))
    factors = shared.laid_out(param.h)
    blocks = _blocks(theta.shape[1], theta.shape[2]) if theta.is_cpu else [(slice(None), slice(None))]
    for rows, columns in blocks:
        here = (slice(None), rows, columns)
        _adam_block_(theta[here], g[here], m[here], v[here], factors[:, columns], settings)


def _flat(h: Tensor) -> Tensor:
    """Coefficients as real numbers [degree, directions, parameters, 2] (last axis 1 for real directions)."""
    real = torch.view_as_real(h) if h.is_complex() else h.unsqueeze(-1)
    return real.reshape(*h.shape[:2], -1, real.shape[-1])


def _blocks(directions: int, parameters: int) -> Iterator[tuple[slice, slice]]:
    """Whole directions while they fit into a block, else parts of one."""
    if parameters > BLOCK:
        for row in range(directions):
            for start in range(0, parameters, BLOCK):
                yield slice(row, row + 1), slice(start, start + BLOCK)
        return
    rows = max(1, BLOCK // max(1, parameters))
    for start in range(0, directions, rows):
        yield slice(start, start + rows), slice(None)


@dataclass(frozen=True)
class _SharedFactors:
    """Real tensors [*shape] that all directions multiply with; made after the constant moments were updated."""

    twice_grad: Tensor  # 2 (1 - beta2) g_0
    mean: Tensor  # m_0
    ratio: Tensor  # v_k times this are the coefficients under the root, relative to the constant one
    rate: Tensor  # the update is rate * (m times a series that starts with 1)
    offset: Tensor  # with eps outside: deviation / (deviation + eps), in front of the root's coefficients

    @property
    def update(self) -> Tensor:
        return self.rate * self.mean

    @classmethod
    def of(cls, grad: Tensor, mean: Tensor, square: Tensor, settings: AdamStep) -> _SharedFactors:
        c1, c2 = settings.corrections
        if settings.eps_inside:
            inside = square / c2 + settings.eps
            ratio, root, offset = 1 / (c2 * inside), inside.rsqrt(), torch.ones_like(grad)
        else:
            deviation = (square / c2).sqrt()
            # A gradient that never flowed has deviation 0 and zero coefficients: its ratio must not be infinite.
            ratio = torch.where(square > 0, 1 / square, 0.0)
            root, offset = 1 / (deviation + settings.eps), deviation / (deviation + settings.eps)
        return cls(2 * (1 - settings.beta2) * grad, mean.clone(), ratio, settings.lr / c1 * root, offset)

    def laid_out(self, h: Tensor) -> Tensor:
        """The five factors [5, parameters, 2 or 1], to multiply coefficients seen as real numbers."""
        rows = torch.stack([self.twice_grad, self.mean, self.ratio, self.rate, self.offset]).view(5, -1, 1)
        return rows.expand(-1, -1, 2).contiguous() if h.is_complex() else rows


def _adam_block_(param: Tensor, grad: Tensor, mean: Tensor, square: Tensor, factors: Tensor, s: AdamStep) -> None:
    """The coefficients 1..p of one block, in place; all as real numbers [degree, directions, parameters, 2 or 1]."""
    twice_grad, mean_0, ratio, rate, offset = factors.unbind(0)
    if s.weight_decay and not s.decoupled:
        grad = torch.add(grad, param, alpha=s.weight_decay)
    mean.lerp_(grad, 1 - s.beta1)
    square.mul_(s.beta2).addcmul_(grad, twice_grad)
    g, v, m = _coefficients(grad), _coefficients(square), _coefficients(mean)
    for k in range(2, len(g) + 1):
        for i in range(1, k // 2 + 1):
            v[k - 1].addcmul_(g[i - 1], g[k - i - 1], value=(1 if 2 * i == k else 2) * (1 - s.beta2))
    relative = square * ratio
    inverse = _binomial(relative, -0.5) if s.eps_inside else _binomial(_binomial(relative, 0.5).mul_(offset), -1.0)
    update = torch.addcmul(mean, inverse, mean_0)
    u, r = _coefficients(update), _coefficients(inverse)
    for k in range(2, len(u) + 1):
        for i in range(1, k):
            u[k - 1].addcmul_(m[i - 1], r[k - i - 1])
    if s.decoupled and s.weight_decay:
        param.mul_(1 - s.lr * s.weight_decay)
    param.addcmul_(update, rate, value=-1)


def _coefficients(real: Tensor) -> tuple[Tensor, ...]:
    """Coefficient 1..p as complex (or real) tensors that share memory."""
    return (torch.view_as_complex(real) if real.shape[-1] == 2 else real).unbind(0)


def _binomial(real: Tensor, exponent: float) -> Tensor:
    """(1 + r) ** exponent as `series.binomial`, with few calls: r and result as real numbers."""
    out = real * exponent
    r, y = _coefficients(real), _coefficients(out)
    for k in range(2, len(r) + 1):
        for i in range(1, k):
            y[k - 1].addcmul_(r[i - 1], y[k - i - 1], value=(exponent * i - (k - i)) / k)
    return out


@rule(aten._fused_adam_.default, aten._fused_adamw_.default)
def _fused_adam(func: Any, args: Any, kwargs: dict) -> None:
    params, grads, means, squares, _maxima, steps = args
    if kwargs["amsgrad"] or kwargs["maximize"]:
        raise unsupported(func, "with amsgrad or maximize is not supported")
    for p, g, m, v, step in zip(params, grads, means, squares, steps, strict=True):
        settings = AdamStep(
            kwargs["lr"], kwargs["beta1"], kwargs["beta2"], kwargs["eps"], int(step), False,
            kwargs["weight_decay"], func is aten._fused_adamw_.default,
        )  # fmt: skip
        adam_step_(p.series, gradient_of(g, p), m.series, v.series, settings)


def gradient_of(g: Any, p: Jet) -> Series:
    """The gradient of a jet as a series; a plain one is constant."""
    return g.series if isinstance(g, Jet) else S.zeros(g, p.h)
