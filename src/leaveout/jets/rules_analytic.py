"""Rules for functions of one tensor: analytic ones, and those with kinks that follow the constant term's branch."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import leaveout.jets.series as S
from leaveout.jets.series import Series
from leaveout.jets.table import (
    all_from_end,
    aten,
    constant,
    note_nonsmooth,
    of_one,
    operand,
    padded,
    rule,
    space_of,
    wrap,
)
from leaveout.jets.tensor import Jet, unsupported

Taylor = Callable[[Tensor, int], list[Tensor]]

rule(aten.exp.default)(of_one(S.exp))
rule(aten.log.default)(of_one(S.log))
rule(aten.sqrt.default)(of_one(S.sqrt))
rule(aten.rsqrt.default)(of_one(S.rsqrt))
rule(aten.reciprocal.default)(of_one(lambda x: S.power(x, -1.0)))


@rule(aten.log1p.default)
def _log1p(func: Any, args: Any, kwargs: dict) -> Jet:
    x = args[0].series
    return wrap(Series(x.c.log1p(), S.log(S.add(x, 1.0)).h), args[0].space)


@rule(aten.expm1.default)
def _expm1(func: Any, args: Any, kwargs: dict) -> Jet:
    x = args[0].series
    return wrap(Series(x.c.expm1(), S.exp(x).h), args[0].space)


@rule(aten.pow.Tensor_Scalar)
def _pow(func: Any, args: Any, kwargs: dict) -> Jet:
    x, exponent = args
    if exponent == 0:
        return x.space.constant(torch.ones_like(x.c))
    return wrap(S.power(x.series, float(exponent)), x.space)


@rule(aten.linalg_vector_norm.default)
def _norm(func: Any, args: Any, kwargs: dict) -> Jet:
    x, order, dims, keep = padded(args, 2, None, False)
    if order != 2:
        raise unsupported(func, f"of order {order} is not supported (only 2)")
    axes = all_from_end(dims, x.c.dim())
    total = S.square(x.series).map(lambda t: t.sum(axes, keep) if axes else t)
    return wrap(S.sqrt(total), x.space)


# --- compositions: Taylor coefficients at the shared constant term -----------------------------------------------


def taylor_gelu(x: Tensor, degree: int) -> list[Tensor]:
    """x (1 + erf(x / sqrt 2)) / 2."""
    erf = S.taylor_erf(x / math.sqrt(2), degree)
    cdf = [0.5 * e / math.sqrt(2) ** k for k, e in enumerate(erf)]
    cdf[0] = cdf[0] + 0.5
    return S.times_argument(cdf, x)


def taylor_gelu_tanh(x: Tensor, degree: int) -> list[Tensor]:
    """x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))) / 2; the inner polynomial is composed by a one-direction series."""
    a, b = math.sqrt(2 / math.pi), 0.044715
    inner = [a * (x + b * x**3), a * (1 + 3 * b * x**2), 3 * a * b * x, torch.full_like(x, a * b)]
    inner = (inner + [torch.zeros_like(x)] * degree)[: max(degree, 1) + 1]
    u = Series(inner[0], torch.stack(inner[1:]).unsqueeze(1))
    t = S.tanh(u)
    half = [0.5 * (1 + t.c), *(0.5 * t.h[k, 0] for k in range(degree))]
    return S.times_argument(half, x)


def taylor_silu(x: Tensor, degree: int) -> list[Tensor]:
    """x sigmoid(x)."""
    return S.times_argument(S.taylor_sigmoid(x, degree), x)


def taylor_softplus(x: Tensor, degree: int) -> list[Tensor]:
    """log(1 + exp(x)), whose derivative is the sigmoid."""
    slope = S.taylor_sigmoid(x, degree)
    return [torch.nn.functional.softplus(x), *(slope[k - 1] / k for k in range(1, degree + 1))]


def taylor_logsigmoid(x: Tensor, degree: int) -> list[Tensor]:
    """-softplus(-x)."""
    return [(-1) ** (k + 1) * t for k, t in enumerate(taylor_softplus(-x, degree))]


COMPOSED: dict[Any, Taylor] = {
    aten.tanh.default: S.taylor_tanh,
    aten.sigmoid.default: S.taylor_sigmoid,
    aten.erf.default: S.taylor_erf,
    aten.sin.default: S.taylor_sin,
    aten.cos.default: lambda x, degree: S.taylor_sin(x, degree, 1),
    aten.silu.default: taylor_silu,
}


@rule(*COMPOSED)
def _composed(func: Any, args: Any, kwargs: dict) -> Jet:
    x = args[0]
    return wrap(S.compose(COMPOSED[func](x.c, x.space.degree), x.series), x.space)


@rule(aten.gelu.default)
def _gelu(func: Any, args: Any, kwargs: dict) -> Jet:
    x = args[0]
    return wrap(S.compose(_gelu_taylor(kwargs)(x.c, x.space.degree), x.series), x.space)


def _gelu_taylor(kwargs: dict) -> Taylor:
    return taylor_gelu_tanh if kwargs.get("approximate", "none") == "tanh" else taylor_gelu


@rule(aten.softplus.default)
def _softplus(func: Any, args: Any, kwargs: dict) -> Jet:
    _only_default_softplus(func, args[1:])
    x = args[0]
    return wrap(S.compose(taylor_softplus(x.c, x.space.degree), x.series), x.space)


def _only_default_softplus(func: Any, rest: tuple) -> None:
    if rest and rest[0] != 1:
        raise unsupported(func, "with beta other than 1 is not supported")


@rule(aten.log_sigmoid_forward.default)
def _logsigmoid(func: Any, args: Any, kwargs: dict) -> tuple[Jet, Tensor]:
    x = args[0]
    out = S.compose(taylor_logsigmoid(x.c, x.space.degree), x.series)
    return wrap(out, x.space), x.c.new_empty(0)


def _chain(g: Any, x: Any, taylor: Taylor) -> Series:
    """g * f'(x) for Taylor coefficients of f."""
    if not isinstance(x, Series):
        return S.multiply(g, S.derivative(taylor(x, 1))[0])
    return S.multiply(g, S.compose(S.derivative(taylor(x.c, x.degree + 1)), x))


@rule(aten.silu_backward.default, aten.log_sigmoid_backward.default, aten.gelu_backward.default)
def _composed_backward(func: Any, args: Any, kwargs: dict) -> Jet:
    plain = {aten.silu_backward.default: taylor_silu, aten.log_sigmoid_backward.default: taylor_logsigmoid}
    return wrap(_chain(operand(args[0]), operand(args[1]), plain.get(func, _gelu_taylor(kwargs))), space_of(args))


@rule(aten.softplus_backward.default)
def _softplus_backward(func: Any, args: Any, kwargs: dict) -> Jet:
    _only_default_softplus(func, args[2:])
    return wrap(_chain(operand(args[0]), operand(args[1]), taylor_softplus), space_of(args))


@rule(aten.tanh_backward.default)
def _tanh_backward(func: Any, args: Any, kwargs: dict) -> Jet:
    """g (1 - y^2), from the output y."""
    g, y = operand(args[0]), operand(args[1])
    slope = S.add(1.0, S.square(y), -1) if isinstance(y, Series) else 1 - y * y
    return wrap(S.multiply(g, slope), space_of(args))


@rule(aten.sigmoid_backward.default)
def _sigmoid_backward(func: Any, args: Any, kwargs: dict) -> Jet:
    """g (y - y^2), from the output y."""
    g, y = operand(args[0]), operand(args[1])
    slope = S.add(y, S.square(y), -1) if isinstance(y, Series) else y - y * y
    return wrap(S.multiply(g, slope), space_of(args))


# --- kinks: the branch of the constant term ----------------------------------------------------------------------


def _masked(x: Any, c: Tensor, mask: Tensor, func: Any, space: Any) -> Jet:
    """Value c with the coefficients of x where mask holds (a factor: 0, 1 or a slope)."""
    note_nonsmooth(func, space)
    return wrap(Series(c, S.scaled(x.h, mask.to(c.dtype))), space)


@rule(aten.relu.default)
def _relu(func: Any, args: Any, kwargs: dict) -> Jet:
    x = args[0]
    return _masked(x, x.c.relu(), x.c > 0, func, x.space)


@rule(aten.leaky_relu.default)
def _leaky_relu(func: Any, args: Any, kwargs: dict) -> Jet:
    x, slope = args[0], args[1] if len(args) > 1 else 0.01
    return _masked(x, func(x.c, slope), torch.where(x.c > 0, 1.0, slope), func, x.space)


@rule(aten.threshold_backward.default, aten.leaky_relu_backward.default, aten.hardtanh_backward.default)
def _kink_backward(func: Any, args: Any, kwargs: dict) -> Jet:
    """Linear in the gradient, with the mask of the constant term."""
    g, x = args[0], constant(args[1])
    space = space_of(args)
    mask = func(torch.ones_like(x), x, *args[2:])
    note_nonsmooth(func, space)
    if not isinstance(g, Jet):
        return space.constant(g * mask)
    return wrap(S.multiply(g.series, mask), space)


@rule(aten.abs.default)
def _abs(func: Any, args: Any, kwargs: dict) -> Jet:
    x = args[0]
    return _masked(x, x.c.abs(), x.c.sign(), func, x.space)


@rule(aten.clamp.default, aten.clamp_min.default, aten.clamp_max.default, aten.hardtanh.default)
def _clamp(func: Any, args: Any, kwargs: dict) -> Jet:
    x = args[0]
    c = func(x.c, *args[1:], **kwargs)
    return _masked(x, c, c == x.c, func, x.space)


@rule(aten.maximum.default, aten.minimum.default)
def _maximum(func: Any, args: Any, kwargs: dict) -> Jet:
    a, b = args
    space = space_of(args)
    note_nonsmooth(func, space)
    first = constant(a) >= constant(b) if func is aten.maximum.default else constant(a) <= constant(b)
    c = func(constant(a), constant(b))
    zero = torch.zeros((), dtype=space.dtype, device=c.device)
    parts = [S.aligned(t.h, c.dim()) if isinstance(t, Jet) else zero for t in (a, b)]
    return wrap(Series(c, torch.where(first, *parts)), space)


@rule(aten.amax.default, aten.max.dim, aten.min.dim, aten.amin.default)
def _max_along(func: Any, args: Any, kwargs: dict) -> Any:
    """The entry where the constant term is largest (smallest)."""
    x, dims, keep = args[0], args[1] if len(args) > 1 else [], args[2] if len(args) > 2 else False
    axes = all_from_end(dims, x.c.dim())
    if len(axes) != 1:
        raise unsupported(func, "over several axes is not supported")
    note_nonsmooth(func, x.space)
    pick = x.c.argmax if func in (aten.amax.default, aten.max.dim) else x.c.argmin
    index = pick(axes[0], keepdim=True)
    c = x.c.gather(axes[0], index)
    h = x.h.gather(axes[0], index.expand(*x.h.shape[:2], *index.shape))
    if not keep:
        c, h, index = c.squeeze(axes[0]), h.squeeze(axes[0]), index.squeeze(axes[0])
    out = wrap(Series(c, h), x.space)
    return (out, index) if func in (aten.max.dim, aten.min.dim) else out
