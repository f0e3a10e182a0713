"""Rules for moving, adding and multiplying, and for writing in place."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

import leaveout.jets.series as S
from leaveout.jets.products import matmul
from leaveout.jets.series import Series
from leaveout.jets.table import (
    TABLE,
    Rule,
    all_from_end,
    as_jet,
    aten,
    constant,
    from_end,
    note_nonsmooth,
    operand,
    padded,
    rule,
    space_of,
    wrap,
    write,
)
from leaveout.jets.tensor import Jet, Space, unsupported

# --- views -------------------------------------------------------------------------------------------------------


def _same_shape(h: Tensor, shape: Iterable[int]) -> list[int]:
    return [h.shape[0], h.shape[1], *shape]


@rule(aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten._reshape_alias.default)
def _view(func: Any, args: Any, kwargs: dict) -> Jet:
    x = args[0]
    c = func(x.c, *args[1:], **kwargs)
    shape = _same_shape(x.h, c.shape)
    if x.h.is_contiguous():
        return Jet(c, x.h.view(shape), x.space)
    try:
        return Jet(c, x.h.view(shape), x.space)
    except RuntimeError:  # strides that no view has
        out = Jet(c, x.h.reshape(shape), x.space)
        out.partly_copied = func is aten.view.default
        x.partly_copied |= out.partly_copied
        return out


@rule(aten.expand.default)
def _expand(func: Any, args: Any, kwargs: dict) -> Jet:
    x = args[0]
    c = func(x.c, *args[1:], **kwargs)
    return Jet(c, S.aligned(x.h, c.dim()).expand(_same_shape(x.h, c.shape)), x.space)


@rule(aten.detach.default, aten.alias.default, aten.lift_fresh.default)
def _alias(func: Any, args: Any, kwargs: dict) -> Jet:
    return Jet(args[0].c.detach(), args[0].h, args[0].space)


@rule(aten.t.default)
def _t(func: Any, args: Any, kwargs: dict) -> Jet:
    x = args[0]
    return Jet(x.c.t(), x.h.mT if x.c.dim() == 2 else x.h, x.space)


@rule(aten.transpose.int)
def _transpose(func: Any, args: Any, kwargs: dict) -> Jet:
    x, a, b = args
    rank = x.c.dim()
    return Jet(x.c.transpose(a, b), x.h.transpose(from_end(a, rank), from_end(b, rank)), x.space)


@rule(aten.permute.default)
def _permute(func: Any, args: Any, kwargs: dict) -> Jet:
    x, dims = args
    return Jet(x.c.permute(dims), x.h.permute(0, 1, *(d % x.c.dim() + 2 for d in dims)), x.space)


@rule(aten.unsqueeze.default)
def _unsqueeze(func: Any, args: Any, kwargs: dict) -> Jet:
    x, dim = args
    return Jet(x.c.unsqueeze(dim), x.h.unsqueeze(dim if dim < 0 else dim + 2), x.space)


@rule(aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default)
def _squeeze(func: Any, args: Any, kwargs: dict) -> Jet:
    x = args[0]
    dims = all_from_end(args[1] if len(args) > 1 else None, x.c.dim())
    gone = [d for d in dims if x.c.shape[d] == 1]
    return Jet(func(*(constant(a) for a in args)), x.h.squeeze(gone) if gone else x.h, x.space)


def _along(dim_position: int, default: int) -> Rule:
    """Rule for a view or linear map whose axis is argument `dim_position`; may give several results."""

    def apply(func: Any, args: Any, kwargs: dict) -> Any:
        x = args[0]
        args = list(args)  # type: ignore[assignment]
        while len(args) <= dim_position:
            args.append(default if len(args) == dim_position else None)  # type: ignore[attr-defined]
        dim = from_end(args[dim_position], x.c.dim())
        c = func(x.c, *args[1:], **kwargs)
        h = func(x.h, *args[1:dim_position], dim, *args[dim_position + 1 :], **kwargs)
        if isinstance(c, (list, tuple)):
            return [Jet(*part, x.space) for part in zip(c, h, strict=True)]
        return Jet(c, h, x.space)

    return apply


rule(aten.slice.Tensor, aten.select.int, aten.narrow.default)(_along(1, 0))
rule(aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default)(_along(2, 0))
rule(aten.unbind.int, aten.cumsum.default, aten.index_select.default)(_along(1, 0))


@rule(aten.diagonal.default)
def _diagonal(func: Any, args: Any, kwargs: dict) -> Jet:
    x, offset, a, b = padded(args, 0, 0, 1)
    rank = x.c.dim()
    h = x.h.diagonal(offset, from_end(a, rank), from_end(b, rank))
    return Jet(x.c.diagonal(offset, a, b), h, x.space)


# --- maps that are linear in one argument ------------------------------------------------------------------------


@rule(aten.neg.default, aten.clone.default, aten.tril.default, aten.triu.default, aten.constant_pad_nd.default)
def _same_on_both(func: Any, args: Any, kwargs: dict) -> Jet:
    """Operations that act on the last axes (or on all alike)."""
    x = args[0]
    if func is aten.constant_pad_nd.default and len(args) > 2 and args[2] != 0:
        return Jet(func(*map(constant, args)), func(x.h, args[1], 0), x.space)
    if func is aten.clone.default:
        kwargs = {} if kwargs.get("memory_format") is torch.preserve_format else kwargs
        kwargs = {} if kwargs.get("memory_format") is torch.channels_last else kwargs
    return Jet(func(x.c, *args[1:], **kwargs), func(x.h, *args[1:], **kwargs), x.space)


@rule(aten._to_copy.default)
def _to_copy(func: Any, args: Any, kwargs: dict) -> Any:
    """A run has one precision, so casts between floating types change nothing; a cast to integers has no series."""
    x, dtype = args[0], kwargs.get("dtype")
    if dtype is not None and not dtype.is_floating_point:
        note_nonsmooth(func, x.space)
        return func(x.c, **kwargs)
    device = kwargs.get("device") or x.c.device
    return Jet(x.c.to(device, copy=True), x.h.to(device, copy=True), x.space)


@rule(aten.flip.default, aten.roll.default)
def _flip(func: Any, args: Any, kwargs: dict) -> Jet:
    x, *rest = args
    if func is aten.roll.default and len(rest) == 1:
        raise unsupported(func, "without dims is not supported")
    dims = all_from_end(rest[-1], x.c.dim())
    return Jet(func(*map(constant, args)), func(x.h, *rest[:-1], dims), x.space)


@rule(aten.sum.default, aten.sum.dim_IntList, aten.mean.default, aten.mean.dim)
def _reduce(func: Any, args: Any, kwargs: dict) -> Jet:
    x = args[0]
    dims = all_from_end(args[1] if len(args) > 1 else None, x.c.dim())
    keep = bool(args[2]) if len(args) > 2 else False
    total = Series(*(_sum(t, dims, keep) for t in (x.c, x.h)))
    if func in (aten.mean.default, aten.mean.dim):
        total = total.map(lambda t: t / math.prod(x.c.shape[d] for d in dims))
    return wrap(total, x.space)


def _sum(t: Tensor, dims: list[int], keep: bool) -> Tensor:
    return t.sum(dims, keep) if dims else t.clone()


@rule(aten.cat.default, aten.stack.default)
def _cat(func: Any, args: Any, kwargs: dict) -> Jet:
    dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
    tensors = [t for t in args[0] if tuple(t.shape) != (0,)]  # torch lets empty vectors stand for nothing
    space = space_of(tensors)
    rank = tensors[0].dim() + (func is aten.stack.default)
    c = func([constant(t) for t in tensors], dim)
    like = next(t.h for t in tensors if isinstance(t, Jet))
    h = func([t.h if isinstance(t, Jet) else S.zeros(t, like).h for t in tensors], from_end(dim, rank))
    return wrap(Series(c, h), space)


@rule(aten.gather.default)
def _gather(func: Any, args: Any, kwargs: dict) -> Jet:
    x, dim, index = args[:3]
    dim = from_end(dim, x.c.dim())
    return Jet(x.c.gather(dim, index), x.h.gather(dim, index.expand(*x.h.shape[:2], *index.shape)), x.space)


@rule(aten.scatter_add.default, aten.scatter_add_.default)
def _scatter_add(func: Any, args: Any, kwargs: dict) -> Jet:
    x, dim, index, source = args
    dim = from_end(dim, x.dim())
    target = _target(func, x, space_of(args))
    target.c.scatter_add_(dim, index, constant(source))
    if isinstance(source, Jet):
        target.h.scatter_add_(dim, index.expand(*target.h.shape[:2], *index.shape), source.h)
    return target


@rule(aten.index_add.default, aten.index_add_.default)
def _index_add(func: Any, args: Any, kwargs: dict) -> Jet:
    x, dim, index, source = args
    dim, alpha = from_end(dim, x.dim()), kwargs.get("alpha", 1)
    target = _target(func, x, space_of(args))
    target.c.index_add_(dim, index, constant(source), alpha=alpha)
    if isinstance(source, Jet):
        target.h.index_add_(dim, index, source.h, alpha=alpha)
    return target


@rule(aten.diagonal_backward.default)
def _diagonal_backward(func: Any, args: Any, kwargs: dict) -> Jet:
    g, sizes, offset, a, b = args
    rank = len(sizes)
    h = g.h.new_zeros(_same_shape(g.h, sizes))
    h.diagonal(offset, from_end(a, rank), from_end(b, rank)).copy_(g.h)
    return Jet(func(*map(constant, args)), h, g.space)


@rule(aten.slice_backward.default, aten.select_backward.default)
def _scatter_backward(func: Any, args: Any, kwargs: dict) -> Jet:
    g, sizes, dim, *rest = args
    dim = dim % len(sizes)
    h = func(g.h, _same_shape(g.h, sizes), dim + 2, *rest)
    return Jet(func(g.c, sizes, dim, *rest), h, g.space)


@rule(aten.index.Tensor)
def _index(func: Any, args: Any, kwargs: dict) -> Jet:
    x, indices = args
    keys = _index_keys(func, indices)
    return Jet(x.c[keys], x.h[(slice(None), slice(None), *keys)], x.space)


@rule(aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default)
def _index_put(func: Any, args: Any, kwargs: dict) -> Jet:
    x, indices, values = args[:3]
    accumulate = args[3] if len(args) > 3 else False
    target = _target(func, x, space_of((x, values)))
    keys = _index_keys(func, indices)
    target.c.index_put_(_filled(keys, target.c), constant(values), accumulate)
    h_keys = (slice(None), slice(None), *keys)
    update = values.h if isinstance(values, Jet) else target.h.new_zeros(())
    grid = _filled(h_keys, target.h)
    target.h.index_put_(grid, update.expand(target.h[h_keys].shape), accumulate)
    return target


def _target(func: Any, x: Any, space: Space) -> Jet:
    """What is written into: x itself where the operation works in place, else a copy."""
    if func._schema.is_mutable:
        return as_jet(x, func)
    return wrap(x.series.map(torch.clone), space) if isinstance(x, Jet) else space.constant(x)


def _index_keys(func: Any, indices: Any) -> tuple:
    """Index tensors as a key; scattered ones would move the result's axes in front of the series axes."""
    places = [i for i, index in enumerate(indices) if index is not None]
    if places != list(range(places[0], places[0] + len(places))):
        raise unsupported(func, "with index tensors on separated axes is not supported")
    return tuple(slice(None) if index is None else index for index in indices)


def _filled(keys: tuple, target: Tensor) -> Any:
    """Full index tensors, one an axis, for a key of slices and adjacent index tensors."""
    axes = []
    advanced = [k for k in keys if isinstance(k, Tensor)]
    if advanced and advanced[0].dtype == torch.bool:
        advanced = list(advanced[0].nonzero(as_tuple=True))
        first = next(i for i, k in enumerate(keys) if isinstance(k, Tensor))
        keys = (*keys[:first], *advanced, *keys[first + 1 :])
    advanced = list(torch.broadcast_tensors(*advanced))
    first = next(i for i, k in enumerate(keys) if isinstance(k, Tensor))
    rank = target.dim() - len(advanced) + advanced[0].dim()
    for axis in range(target.dim()):
        if first <= axis < first + len(advanced):
            index, at = advanced[axis - first], first
            shape = [1] * at + list(index.shape) + [1] * (rank - at - index.dim())
        else:
            index = torch.arange(target.shape[axis], device=target.device)
            at = axis if axis < first else axis - len(advanced) + advanced[0].dim()
            shape = [1] * at + [target.shape[axis]] + [1] * (rank - at - 1)
        axes.append(index.reshape(shape))
    return axes


@rule(aten.masked_fill.Scalar, aten.masked_fill.Tensor, aten.masked_fill_.Scalar, aten.masked_fill_.Tensor)
def _masked_fill(func: Any, args: Any, kwargs: dict) -> Jet:
    x, mask, value = args
    c = torch.where(mask, value, x.c)
    h = torch.where(mask, x.h.new_zeros(()), S.aligned(x.h, c.dim()))
    result = Series(c.to(x.c.dtype), h)
    return write(x, result, func) if func._schema.is_mutable else wrap(result, x.space)


@rule(aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf)
def _where(func: Any, args: Any, kwargs: dict) -> Jet:
    condition, a, b = args
    if isinstance(condition, Jet):
        raise unsupported(func, "with a series as its condition is not supported")
    space = space_of(args)
    c = torch.where(condition, constant(a), constant(b))
    zero = torch.zeros((), dtype=space.dtype, device=condition.device)
    parts = [S.aligned(t.h, c.dim()) if isinstance(t, Jet) else zero for t in (a, b)]
    return wrap(Series(c, torch.where(condition, *parts)), space)


# --- constants ---------------------------------------------------------------------------------------------------


@rule(aten.zeros_like.default, aten.empty_like.default, aten.new_zeros.default, aten.new_empty.default)
def _zeros(func: Any, args: Any, kwargs: dict) -> Any:
    """Fresh buffers are jets: optimizer state and gradient buffers will hold series."""
    x, dtype = args[0], kwargs.get("dtype")
    if dtype is not None and not dtype.is_floating_point:
        return func(x.c, *args[1:], **kwargs)
    shape = args[1] if len(args) > 1 else x.shape
    return wrap(S.zeros(x.c.new_zeros(shape), x.h), x.space)


@rule(aten.new_empty_strided.default, aten.empty_strided.default)
def _empty_strided(func: Any, args: Any, kwargs: dict) -> Jet:
    return wrap(S.zeros(args[0].c.new_zeros(args[1]), args[0].h), args[0].space)


@rule(
    aten.ones_like.default, aten.full_like.default, aten.new_ones.default, aten.new_full.default,
    aten.isnan.default, aten.isinf.default,
)  # fmt: skip
def _plain(func: Any, args: Any, kwargs: dict) -> Tensor:
    return func(*(constant(a) for a in args), **kwargs)


COMPARISONS = [
    getattr(getattr(aten, name), kind) for name in ("eq", "ne", "lt", "le", "gt", "ge") for kind in ("Scalar", "Tensor")
]


@rule(*COMPARISONS, aten.argmax.default, aten.argmin.default, aten.sign.default, aten.sgn.default,
      aten.floor.default, aten.ceil.default, aten.round.default)  # fmt: skip
def _piecewise_constant(func: Any, args: Any, kwargs: dict) -> Tensor:
    note_nonsmooth(func, space_of(args))
    return func(*(constant(a) for a in args), **kwargs)


# --- ring operations ---------------------------------------------------------------------------------------------


@rule(aten.add.Tensor, aten.add.Scalar, aten.sub.Tensor, aten.sub.Scalar)
def _add(func: Any, args: Any, kwargs: dict) -> Jet:
    alpha = kwargs.get("alpha", args[2] if len(args) > 2 else 1)
    sign = -1 if func in (aten.sub.Tensor, aten.sub.Scalar) else 1
    return wrap(S.add(operand(args[0]), operand(args[1]), sign * alpha), space_of(args))


@rule(aten.rsub.Scalar, aten.rsub.Tensor)
def _rsub(func: Any, args: Any, kwargs: dict) -> Jet:
    return wrap(S.add(operand(args[1]), operand(args[0]), -1), space_of(args))


@rule(aten.mul.Tensor, aten.mul.Scalar)
def _mul(func: Any, args: Any, kwargs: dict) -> Jet:
    return wrap(S.multiply(operand(args[0]), operand(args[1])), space_of(args))


@rule(aten.div.Tensor, aten.div.Scalar, aten.true_divide.Tensor)
def _div(func: Any, args: Any, kwargs: dict) -> Jet:
    if not isinstance(args[1], Jet) and not isinstance(args[1], Tensor):
        return Jet(args[0].c / args[1], args[0].h / args[1], args[0].space)
    return wrap(S.divide(operand(args[0]), operand(args[1])), space_of(args))


@rule(aten.mm.default, aten.bmm.default)
def _matmul(func: Any, args: Any, kwargs: dict) -> Jet:
    return wrap(matmul(operand(args[0]), operand(args[1])), space_of(args))


@rule(aten.mv.default)
def _mv(func: Any, args: Any, kwargs: dict) -> Jet:
    a, b = operand(args[0]), operand(args[1])
    b = b.map(lambda t: t.unsqueeze(-1)) if isinstance(b, Series) else b.unsqueeze(-1)
    return wrap(matmul(a, b).map(lambda t: t.squeeze(-1)), space_of(args))


@rule(aten.dot.default, aten.vdot.default)
def _dot(func: Any, args: Any, kwargs: dict) -> Jet:
    return wrap(S.multiply(operand(args[0]), operand(args[1])).map(lambda t: t.sum(-1)), space_of(args))


@rule(aten.addmm.default, aten.baddbmm.default)
def _addmm(func: Any, args: Any, kwargs: dict) -> Jet:
    bias, a, b = map(operand, args)
    alpha, beta = kwargs.get("alpha", 1), kwargs.get("beta", 1)
    if not (isinstance(a, Series) or isinstance(b, Series)):
        return wrap(S.add(torch.matmul(a, b) * alpha, bias, beta), space_of(args))
    product = matmul(a, b)
    if isinstance(bias, Series) and alpha == 1:
        c = torch.add(product.c, bias.c, alpha=beta)
        return wrap(Series(c, product.h.add_(S.aligned(bias.h, c.dim()), alpha=beta)), space_of(args))
    product = product if alpha == 1 else S.multiply(product, alpha)
    return wrap(S.add(product, bias, beta), space_of(args))


@rule(aten.addcmul.default)
def _addcmul(func: Any, args: Any, kwargs: dict) -> Jet:
    x, a, b = (operand(t) for t in args[:3])
    product = S.multiply(a, b) if isinstance(a, Series) or isinstance(b, Series) else a * b
    return wrap(S.add(x, product, kwargs.get("value", 1)), space_of(args))


@rule(aten.addcdiv.default)
def _addcdiv(func: Any, args: Any, kwargs: dict) -> Jet:
    x, a, b = (operand(t) for t in args[:3])
    ratio = S.divide(a, b) if isinstance(a, Series) or isinstance(b, Series) else a / b
    return wrap(S.add(x, ratio, kwargs.get("value", 1)), space_of(args))


@rule(aten.lerp.Scalar)
def _lerp(func: Any, args: Any, kwargs: dict) -> Jet:
    a, b, weight = operand(args[0]), operand(args[1]), args[2]
    return wrap(S.add(S.multiply(a, 1 - weight) if isinstance(a, Series) else a * (1 - weight), b, weight),
                space_of(args))  # fmt: skip


# --- writing in place --------------------------------------------------------------------------------------------


IN_PLACE = {
    aten.add_.Tensor: aten.add.Tensor, aten.add_.Scalar: aten.add.Scalar, aten.sub_.Tensor: aten.sub.Tensor,
    aten.mul_.Tensor: aten.mul.Tensor, aten.mul_.Scalar: aten.mul.Scalar, aten.div_.Tensor: aten.div.Tensor,
    aten.div_.Scalar: aten.div.Scalar, aten.addcmul_.default: aten.addcmul.default,
    aten.addcdiv_.default: aten.addcdiv.default, aten.lerp_.Scalar: aten.lerp.Scalar,
    aten.neg_.default: aten.neg.default, aten.relu_.default: aten.relu.default,
    aten.clamp_.default: aten.clamp.default, aten.sqrt_.default: aten.sqrt.default,
    aten.exp_.default: aten.exp.default, aten.tanh_.default: aten.tanh.default,
    aten.sigmoid_.default: aten.sigmoid.default, aten.silu_.default: aten.silu.default,
    aten.addmm_.default: aten.addmm.default, aten.maximum.out: aten.maximum.default,
    aten.reciprocal_.default: aten.reciprocal.default, aten.pow_.Scalar: aten.pow.Tensor_Scalar,
    aten.leaky_relu_.default: aten.leaky_relu.default, aten.hardtanh_.default: aten.hardtanh.default,
}  # fmt: skip


@rule(*IN_PLACE)
def _in_place(func: Any, args: Any, kwargs: dict) -> Jet:
    kwargs = dict(kwargs)
    target = kwargs.pop("out", args[0])
    plain = IN_PLACE[func]
    if not any(isinstance(a, Jet) for a in args) or not isinstance(target, Jet):
        raise unsupported(func, "would write a series into an ordinary tensor, which cannot hold one")
    result = TABLE[plain](plain, args, kwargs) if plain in TABLE else plain(*args, **kwargs)
    return write(target, result.series, func)


@rule(aten.add_.Tensor)
def _add_in_place(func: Any, args: Any, kwargs: dict) -> Jet:
    x, y, alpha = as_jet(args[0], func), args[1], kwargs.get("alpha", 1)
    x.c.add_(constant(y), alpha=alpha)
    if isinstance(y, Jet):
        x.h.add_(S.aligned(y.h, x.c.dim()), alpha=alpha)
    return x


@rule(aten.mul_.Scalar, aten.div_.Scalar, aten.zero_.default)
def _scale_in_place(func: Any, args: Any, kwargs: dict) -> Jet:
    x = as_jet(args[0], func)
    func(x.c, *args[1:])
    func(x.h, *args[1:])
    return x


@rule(aten.mul_.Tensor, aten.div_.Tensor)
def _mul_in_place(func: Any, args: Any, kwargs: dict) -> Jet:
    if (isinstance(args[1], Tensor) and args[1].dim() > 0) or isinstance(args[1], Jet):
        return _in_place(func, args, kwargs)
    factor = args[1]
    waits = isinstance(factor, Tensor) and not factor.is_cpu
    return _scale_in_place(func, (args[0], factor if waits else float(factor)), {})


@rule(aten.lerp_.Scalar)
def _lerp_in_place(func: Any, args: Any, kwargs: dict) -> Jet:
    x, y, weight = as_jet(args[0], func), args[1], args[2]
    x.c.lerp_(constant(y), weight)
    x.h.mul_(1 - weight)
    if isinstance(y, Jet):
        x.h.add_(y.h, alpha=weight)
    return x


@rule(aten.copy_.default)
def _copy_in_place(func: Any, args: Any, kwargs: dict) -> Jet:
    x, y = as_jet(args[0], func), args[1]
    x.c.copy_(constant(y))
    if isinstance(y, Jet):
        x.h.copy_(S.aligned(y.h, x.c.dim()))
    else:
        x.h.zero_()
    return x


@rule(aten.fill_.Scalar, aten.bernoulli_.float)
def _fill_in_place(func: Any, args: Any, kwargs: dict) -> Jet:
    """Overwrite with constants; a dropout mask is drawn as in the plain run, one for all directions."""
    x = as_jet(args[0], func)
    func(x.c, *args[1:], **kwargs)
    x.h.zero_()
    return x


@rule(aten._local_scalar_dense.default)
def _item(func: Any, args: Any, kwargs: dict) -> Any:
    raise unsupported(func, "would turn a series into a Python number (use `jet.c` for the constant term)")


@rule(aten._foreach_mul_.Tensor, aten._foreach_mul_.Scalar, aten._foreach_mul_.ScalarList)
def _foreach_mul(func: Any, args: Any, kwargs: dict) -> None:
    factors = args[1] if isinstance(args[1], (list, tuple)) else [args[1]] * len(args[0])
    for x, factor in zip(args[0], factors, strict=True):
        x.mul_(factor)


@rule(aten._foreach_norm.Scalar)
def _foreach_norm(func: Any, args: Any, kwargs: dict) -> list[Tensor]:
    order = args[1] if len(args) > 1 else 2
    return [torch.linalg.vector_norm(x, order) for x in args[0]]
