"""Matrix products of power series: one large product where a factor is shared, small ones per direction elsewhere.

Which form is fastest depends on the shapes; every choice here was measured (benchmarks/LOG.md).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from leaveout.jets.series import Series, constant_term


def matmul(a: Series | Tensor, b: Series | Tensor) -> Series:
    """Matrix product of the last two axes as a truncated Cauchy product.

    Shapes: a [*batch, n, k], b [*batch, k, m] with the same batch axes (or none) -> [*batch, n, m].
    Cost: the products with a shared constant term are one matrix product over all coefficients and directions.
    """
    left, right = constant_term(a), constant_term(b)
    if left.is_cpu and left.dim() == 3 and _tiny(left.shape, right.shape):
        product = matmul(_each(a, _block_diagonal), _each(b, lambda t: t.flatten(-3, -2)))
        return product.map(lambda t: t.unflatten(-2, left.shape[:2]))
    h = None
    if isinstance(a, Series):
        h = _times_shared(a.h, right)
    if isinstance(b, Series):
        h = _shared_times(left, b.h, h)
    assert h is not None
    if isinstance(a, Series) and isinstance(b, Series):
        for k in range(2, a.degree + 1):
            out = _flat_batch(h[k - 1])
            for i in range(1, k):
                out.baddbmm_(_flat_batch(a.h[i - 1]), _flat_batch(b.h[k - i - 1]))
    return Series(torch.matmul(left, right), h)


def _each(a: Series | Tensor, linear: Callable[[Tensor], Tensor]) -> Series | Tensor:
    return a.map(linear) if isinstance(a, Series) else linear(a)


SMALLEST_PRODUCT = 400
"""Below this many multiply-adds torch leaves a CPU's matrix library for a plain loop, 5 to 10 times slower a product."""


def _tiny(left: Sequence[int], right: Sequence[int]) -> bool:
    """Is one batched product per direction better done as one product with a block-diagonal matrix?"""
    batch, n, k = left
    return batch > 1 and n * k * right[-1] < SMALLEST_PRODUCT and batch * k <= 32


def _block_diagonal(t: Tensor) -> Tensor:
    """[..., batch, n, k] -> [..., batch * n, batch * k]."""
    batch, n, k = t.shape[-3:]
    out = t.new_zeros(*t.shape[:-3], batch, n, batch, k)
    out.diagonal(dim1=-4, dim2=-2).copy_(t.movedim(-3, -1))
    return out.flatten(-4, -3).flatten(-2, -1)


def _flat_batch(h: Tensor) -> Tensor:
    """[..., n, m] as [batch, n, m]."""
    return h if h.dim() == 3 else h.reshape(-1, *h.shape[-2:])


WIDE = 96
"""From this width on, real and imaginary parts are multiplied separately: half the work is worth two copies."""


def _is_wide(h: Tensor, c: Tensor) -> bool:
    return h.is_complex() and c.dim() == 2 and min(c.shape) >= WIDE


def _planes(h: Tensor) -> Tensor:
    """Real and imaginary parts [2 * degree * directions, n, k]; a transposed matrix stays transposed in memory."""
    turned = not h.is_contiguous() and h.mT.is_contiguous()
    source = h.mT if turned else h
    parts = torch.stack((source.real, source.imag)).flatten(0, 2)
    return parts.mT if turned else parts


def _times_shared(h: Tensor, c: Tensor) -> Tensor:
    """h [degree, directions, *batch, n, k] times shared c [*batch, k, m]."""
    shape = (*h.shape[:-1], c.shape[-1])
    if h.dim() == 4 and _is_wide(h, c):
        parts = _planes(h)
        product = (
            parts.view(-1, parts.shape[-1]) @ c if parts.is_contiguous() else torch.bmm(parts, _repeated(c, parts))
        )
        return torch.complex(*product.view(2, *shape).unbind(0))
    if c.dim() == 2 and h.is_contiguous():
        return (h.view(-1, h.shape[-1]) @ c.to(h.dtype)).view(shape)
    return torch.bmm(_flat_batch(h), _expanded(c.to(h.dtype), h)).view(shape)


def _shared_times(c: Tensor, h: Tensor, out: Tensor | None) -> Tensor:
    """out + shared c [*batch, n, k] times h [degree, directions, *batch, k, m]."""
    shape = (*h.shape[:-2], c.shape[-2], h.shape[-1])
    flat = _flat_batch(h)
    if h.is_complex() and flat.is_contiguous():  # a real matrix from the left does not mix the two parts of a number
        left, right = _expanded(c, h), torch.view_as_real(flat).flatten(-2)
        if out is None:
            return torch.view_as_complex(torch.bmm(left, right).view(*shape, 2))
        torch.view_as_real(_flat_batch(out)).flatten(-2).baddbmm_(left, right)
        return out
    if h.dim() == 4 and _is_wide(h, c):
        parts = _planes(h)
        product = torch.complex(*torch.bmm(_repeated(c, parts), parts).view(2, *shape).unbind(0))
        return product if out is None else out.add_(product)
    left = _expanded(c.to(h.dtype), h)
    return (torch.bmm(left, flat) if out is None else _flat_batch(out).baddbmm_(left, flat)).view(shape)


def _repeated(c: Tensor, batch: Tensor) -> Tensor:
    """A shared matrix once for each matrix of a batch, without a copy."""
    return c.expand(batch.shape[0], *c.shape)


def _expanded(c: Tensor, h: Tensor) -> Tensor:
    """c [*batch, n, k] repeated (without a copy where possible) for each coefficient and direction of h."""
    return _flat_batch(c.expand(*h.shape[:2], *c.shape))
