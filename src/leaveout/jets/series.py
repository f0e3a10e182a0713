"""Arithmetic on truncated power series, for many directions at once.

A series is a_0 + a_1 z + ... + a_p z^p with plain coefficients (no factorials). The constant term `c` [*shape] is real
and shared by all directions; `h` [degree, directions, *shape] holds a_1 ... a_p, complex or real. Products with a
shared term cost two real products per complex coefficient, and the directions join the batch of every matrix product:
one multiplication costs 2p(p+1) real ones per direction. Nonlinear functions use the recurrences that follow from
their differential equations (Griewank and Walther, "Evaluating Derivatives", chapter 13).

Arguments named `a`, `b` may be a Series or a plain tensor (a constant: no series), unless the docstring says otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

TWO_OVER_SQRT_PI = 2 / math.sqrt(math.pi)


class Series(NamedTuple):
    """A truncated power series: constant term c [*shape], coefficients h [degree, directions, *shape]."""

    c: Tensor
    h: Tensor

    @property
    def degree(self) -> int:
        """The highest power of z."""
        return self.h.shape[0]

    @property
    def directions(self) -> int:
        """How many directions share the constant term."""
        return self.h.shape[1]

    def map(self, linear: Callable[[Tensor], Tensor]) -> Series:
        """Apply a map that is linear and indifferent to leading axes."""
        return Series(linear(self.c), linear(self.h))


Operand = Series | Tensor | float


def constant_term(a: Any) -> Any:
    """The constant term of a Series; anything else is its own."""
    return a.c if isinstance(a, Series) else a


def zeros(c: Tensor, h_like: Tensor) -> Series:
    """The constant series with value c, of the degree, directions and dtype of h_like [degree, directions, ...]."""
    return Series(c, h_like.new_zeros(*h_like.shape[:2], *c.shape))


# --- coefficients times shared real tensors ----------------------------------------------------------------------


def _real(h: Tensor) -> Tensor:
    """h seen as real numbers, with a last axis of 2 when it is complex."""
    return torch.view_as_real(h) if h.is_complex() else h


def _twice(c: Tensor, h: Tensor) -> Tensor:
    """c laid out to multiply `_real(h)`: on a CPU contiguous pairs, 7 times faster than broadcasting over the last axis."""
    if not h.is_complex():
        return c.to(h.dtype)
    real = h.dtype.to_real()
    c = c if c.dtype == real else c.to(real)
    return torch.stack((c, c), -1) if h.is_cpu else c.unsqueeze(-1)


def aligned(h: Tensor, rank: int) -> Tensor:
    """h with its shape padded in front to `rank` axes, so that it broadcasts as its constant term does."""
    missing = rank + 2 - h.dim()
    return h if missing <= 0 else h.reshape(*h.shape[:2], *[1] * missing, *h.shape[2:])


def scaled(h: Tensor, c: Tensor | float) -> Tensor:
    """Coefficients times a shared real tensor or number (broadcasting)."""
    if not isinstance(c, Tensor):
        return h * c
    if c.dim() == 0 and not c.requires_grad and c.is_cpu:  # elsewhere a number would be waited for
        return h * c.item()
    h = aligned(h, c.dim())
    product = _real(h) * _twice(c, h)
    return torch.view_as_complex(product) if h.is_complex() else product


def add_scaled_(out: Tensor, h: Tensor, c: Tensor, value: float = 1.0) -> Tensor:
    """out += value * h * c in place, for a shared real tensor c."""
    _real(out).addcmul_(_real(aligned(h, out.dim() - 2)), _twice(c, h), value=value)
    return out


# --- ring operations ---------------------------------------------------------------------------------------------


def add(a: Operand, b: Operand, alpha: float = 1.0) -> Series:
    """a + alpha * b; at least one is a Series."""
    ca, cb = constant_term(a), constant_term(b)
    c = torch.add(ca, cb, alpha=alpha) if isinstance(ca, Tensor) else torch.add(alpha * cb, ca)
    rank = c.dim()
    if isinstance(a, Series) and isinstance(b, Series):
        return Series(c, torch.add(aligned(a.h, rank), aligned(b.h, rank), alpha=alpha))
    if isinstance(a, Series):
        h = aligned(a.h, rank)
    else:
        assert isinstance(b, Series)
        h = aligned(b.h, rank)
        h = h if alpha == 1 else h * alpha
    return Series(c, h.expand(*h.shape[:2], *c.shape))


def _cauchy(left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    """out_k += sum over 0 < i < k of left_i right_{k-i}, elementwise; left and right are h parts."""
    degree = out.shape[0]
    for k in range(2, degree + 1):
        for i in range(1, k):
            out[k - 1].addcmul_(left[i - 1], right[k - i - 1])
    return out


def multiply(a: Operand, b: Operand) -> Series:
    """a * b elementwise with broadcasting; at least one is a Series."""
    if not isinstance(b, Series):
        a, b = b, a
    assert isinstance(b, Series)
    if not isinstance(a, Series):
        h = scaled(b.h, a)
        return Series(a * b.c, h)
    if a is b:
        return square(a)
    c = a.c * b.c
    rank = c.dim()
    left, right = aligned(a.h, rank), aligned(b.h, rank)
    if b.c.shape == c.shape:
        left, right, a, b = right, left, b, a
    if a.c.shape == c.shape:
        h = scaled(left, b.c)
    else:
        h = left.new_zeros(*left.shape[:2], *c.shape)
        add_scaled_(h, left, b.c)
    add_scaled_(h, right, a.c)
    return Series(c, _cauchy(left, right, h))


def square(a: Series) -> Series:
    """a * a, with each mixed product formed once."""
    h = scaled(a.h, 2 * a.c)
    for k in range(2, a.degree + 1):
        for i in range(1, (k + 1) // 2):
            h[k - 1].addcmul_(a.h[i - 1], a.h[k - i - 1], value=2)
        if k % 2 == 0:
            h[k - 1].addcmul_(a.h[k // 2 - 1], a.h[k // 2 - 1])
    return Series(a.c * a.c, h)


def divide(a: Operand, b: Operand) -> Series:
    """a / b elementwise with broadcasting: q_k = (a_k - sum over i > 0 of b_i q_{k-i}) / b_0."""
    if not isinstance(b, Series):
        assert isinstance(a, Series)
        return multiply(a, 1 / (b.to(a.c.dtype) if isinstance(b, Tensor) else b))
    c = constant_term(a) / b.c
    inverse, rank = 1 / b.c, c.dim()
    q = b.h.new_zeros(*b.h.shape[:2], *c.shape)
    if isinstance(a, Series):
        add_scaled_(q, aligned(a.h, rank), inverse)
    ratio = aligned(scaled(b.h, inverse), rank)
    add_scaled_(q, ratio, c, value=-1)
    for k in range(2, b.degree + 1):
        for i in range(1, k):
            q[k - 1].addcmul_(ratio[i - 1], q[k - i - 1], value=-1)
    return Series(c, q)


# --- functions of one series -------------------------------------------------------------------------------------


def exp(a: Series) -> Series:
    """k e_k = sum over i of i a_i e_{k-i}."""
    e0 = a.c.exp()
    e = scaled(a.h, e0)
    for k in range(2, a.degree + 1):
        for i in range(1, k):
            e[k - 1].addcmul_(a.h[i - 1], e[k - i - 1], value=i / k)
    return Series(e0, e)


def log(a: Series) -> Series:
    """a_0 l_k = a_k - (1/k) sum over 0 < i < k of i l_i a_{k-i}."""
    ratio = scaled(a.h, 1 / a.c)
    out = ratio.clone()
    for k in range(2, a.degree + 1):
        for i in range(1, k):
            out[k - 1].addcmul_(out[i - 1], ratio[k - i - 1], value=-i / k)
    return Series(a.c.log(), out)


def power(a: Series, exponent: float) -> Series:
    """a ** exponent for a real number: a_0 y_k = sum over i > 0 of (exponent i/k - (k-i)/k) a_i y_{k-i}.

    Small whole exponents are products, so that a_0 = 0 is allowed there.
    """
    if exponent == 2:
        return square(a)
    if exponent == int(exponent) and 1 <= exponent <= 8:
        out = a
        for _ in range(int(exponent) - 1):
            out = multiply(out, a)
        return out
    y0 = a.c**exponent
    h = scaled(binomial(scaled(a.h, 1 / a.c), exponent), y0)
    return Series(y0, _settle_zeros(h, a) if exponent > 0 else h)


def _settle_zeros(h: Tensor, a: Series) -> Tensor:
    """0 ** exponent is 0 where the whole series is zero (a gradient that never flowed); elsewhere a_0 = 0 stays NaN."""
    dead = a.c == 0
    if dead.is_cpu and not bool(dead.any()):
        return h
    silent = dead & (a.h == 0).all(dim=0).all(dim=0)
    return torch.where(silent, h.new_zeros(()), h)


def binomial(r: Tensor, exponent: float) -> Tensor:
    """Coefficients 1..p of (1 + r(z)) ** exponent, for the h part r of a series without constant term."""
    y = r * exponent
    for k in range(2, r.shape[0] + 1):
        for i in range(1, k):
            y[k - 1].addcmul_(r[i - 1], y[k - i - 1], value=(exponent * i - (k - i)) / k)
    return y


def sqrt(a: Series) -> Series:
    """The square root; see `power`."""
    return power(a, 0.5)


def rsqrt(a: Series) -> Series:
    """One over the square root; see `power`."""
    return power(a, -0.5)


def compose(taylor: Sequence[Tensor], a: Series) -> Series:
    """f(a) from the Taylor coefficients of f at the constant term: taylor[k] = f^(k)(a_0) / k!, k = 0..degree.

    The Taylor coefficients are shared by all directions, so only the powers of a - a_0 cost complex products.
    """
    degree = a.degree
    out = scaled(a.h, taylor[1])
    powers = {1: a.h}
    for j in range(2, degree + 1):
        i = j // 2 if j % 2 == 0 else 1
        powers[j] = _monomial_product(powers[i], i, powers[j - i], j - i, degree)
        add_scaled_(out[j - 1 :], powers[j], taylor[j])
    return Series(taylor[0], out)


def _monomial_product(left: Tensor, i: int, right: Tensor, j: int, degree: int) -> Tensor:
    """Product of two series that start at z^i and z^j (stored from there on), up to z^degree."""
    n = degree - i - j + 1
    out = left[:n] * right[:1]
    for k in range(1, n):
        for s in range(k):
            out[k].addcmul_(left[s], right[k - s])
    return out


Step = Callable[[list[Tensor], int], Tensor]


def _taylor(f0: Tensor, degree: int, step: Step) -> list[Tensor]:
    """Taylor coefficients from a recurrence: step(coefficients so far, k) gives coefficient k."""
    out = [f0]
    for k in range(1, degree + 1):
        out.append(step(out, k))
    return out


def _convolve(left: Sequence[Tensor], right: Sequence[Tensor], k: int) -> Tensor:
    """Coefficient k of a product."""
    total = left[0] * right[k]
    for i in range(1, k + 1):
        total = total + left[i] * right[k - i]
    return total


def taylor_tanh(x: Tensor, degree: int) -> list[Tensor]:
    """y' = 1 - y^2."""
    return _taylor(x.tanh(), degree, lambda y, k: ((1.0 if k == 1 else 0.0) - _convolve(y, y, k - 1)) / k)


def taylor_sigmoid(x: Tensor, degree: int) -> list[Tensor]:
    """y' = y - y^2."""
    return _taylor(x.sigmoid(), degree, lambda y, k: (y[k - 1] - _convolve(y, y, k - 1)) / k)


def taylor_gauss(x: Tensor, degree: int) -> list[Tensor]:
    """exp(-x^2), from y' = -2 x y."""
    return _taylor(torch.exp(-x * x), degree, lambda y, k: -2 * (x * y[k - 1] + (y[k - 2] if k > 1 else 0.0)) / k)


def taylor_erf(x: Tensor, degree: int) -> list[Tensor]:
    """erf, from its derivative 2 / sqrt(pi) exp(-x^2)."""
    gauss = taylor_gauss(x, max(degree - 1, 0))
    return [x.erf(), *(TWO_OVER_SQRT_PI * gauss[k - 1] / k for k in range(1, degree + 1))]


def taylor_sin(x: Tensor, degree: int, shift: int = 0) -> list[Tensor]:
    """sin(x + shift pi/2): derivatives run through sin, cos, -sin, -cos."""
    cycle = [x.sin(), x.cos(), -x.sin(), -x.cos()]
    return [cycle[(k + shift) % 4] / math.factorial(k) for k in range(degree + 1)]


def times_argument(taylor: Sequence[Tensor], x: Tensor) -> list[Tensor]:
    """Taylor coefficients of x f(x) from those of f."""
    return [x * taylor[0], *(x * taylor[k] + taylor[k - 1] for k in range(1, len(taylor)))]


def derivative(taylor: Sequence[Tensor]) -> list[Tensor]:
    """Taylor coefficients of f' (one fewer) from those of f."""
    return [k * taylor[k] for k in range(1, len(taylor))]


def tanh(a: Series) -> Series:
    """The hyperbolic tangent."""
    return compose(taylor_tanh(a.c, a.degree), a)


def sigmoid(a: Series) -> Series:
    """1 / (1 + exp(-a))."""
    return compose(taylor_sigmoid(a.c, a.degree), a)


def erf(a: Series) -> Series:
    """The error function."""
    return compose(taylor_erf(a.c, a.degree), a)


def sin(a: Series) -> Series:
    """The sine."""
    return compose(taylor_sin(a.c, a.degree), a)


def cos(a: Series) -> Series:
    """The cosine."""
    return compose(taylor_sin(a.c, a.degree, shift=1), a)
