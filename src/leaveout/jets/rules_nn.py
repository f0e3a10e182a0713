"""Rules for neural-network layers and losses: embedding, softmax, norms, convolution, pooling, cross-entropy."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import leaveout.jets.series as S
from leaveout.jets.products import matmul
from leaveout.jets.series import Series
from leaveout.jets.table import aten, constant, from_end, note_nonsmooth, operand, rule, space_of, wrap
from leaveout.jets.tensor import Jet, Space, unsupported

# --- embedding, softmax ------------------------------------------------------------------------------------------


@rule(aten.embedding.default)
def _embedding(func: Any, args: Any, kwargs: dict) -> Jet:
    weight, index = args[:2]
    h = weight.h.index_select(2, index.reshape(-1))
    return Jet(weight.c[index], h.view(*h.shape[:2], *index.shape, -1), weight.space)


@rule(aten.embedding_dense_backward.default)
def _embedding_backward(func: Any, args: Any, kwargs: dict) -> Jet:
    g, index, n, padding = args[0], args[1], args[2], args[3]
    if args[4]:
        raise unsupported(func, "with scale_grad_by_freq is not supported")
    flat = index.reshape(-1)

    def scatter(t: Tensor, lead: tuple[int, ...]) -> Tensor:
        rows = t.reshape(*lead, flat.numel(), t.shape[-1])
        out = rows.new_zeros(*lead, n, t.shape[-1]).index_add_(len(lead), flat, rows)
        if padding >= 0:
            out.select(len(lead), padding).zero_()
        return out

    return Jet(scatter(g.c, ()), scatter(g.h, tuple(g.h.shape[:2])), g.space)


def _sum_along(a: Series, dim: int) -> Series:
    return a.map(lambda t: t.sum(dim, keepdim=True))


def softmax(x: Series, dim: int, safe: bool = False) -> Series:
    """exp(x - max x_0) over its sum; -inf in the constant term gives exact zeros. safe: also where all are -inf, else NaN."""
    top = x.c.amax(dim, keepdim=True)
    if not safe:
        e = S.exp(Series(x.c - top, x.h))
        return S.divide(e, _sum_along(e, dim))
    none = top == -math.inf
    e = S.exp(Series(x.c - top.masked_fill(none, 0.0), x.h))
    total = _sum_along(e, dim)
    return S.divide(e, Series(total.c + none, total.h))


def log_softmax(x: Series, dim: int) -> Series:
    """The logarithm of `softmax`, without its rounding."""
    shifted = Series(x.c - x.c.amax(dim, keepdim=True), x.h)
    return S.add(shifted, S.log(_sum_along(S.exp(shifted), dim)), -1)


@rule(aten._softmax.default, aten._safe_softmax.default)
def _softmax(func: Any, args: Any, kwargs: dict) -> Jet:
    x, dim = args[:2]
    return wrap(softmax(x.series, from_end(dim, x.c.dim()), func is aten._safe_softmax.default), x.space)


@rule(aten._log_softmax.default)
def _log_softmax(func: Any, args: Any, kwargs: dict) -> Jet:
    x, dim = args[:2]
    return wrap(log_softmax(x.series, from_end(dim, x.c.dim())), x.space)


@rule(aten._softmax_backward_data.default)
def _softmax_backward(func: Any, args: Any, kwargs: dict) -> Jet:
    """y (g - sum g y)."""
    g, y, dim = operand(args[0]), operand(args[1]), from_end(args[2], args[1].dim())
    gy = S.multiply(g, y)
    total = _sum_along(gy, dim)
    return wrap(S.add(gy, S.multiply(y, total), -1), space_of(args))


@rule(aten._log_softmax_backward_data.default)
def _log_softmax_backward(func: Any, args: Any, kwargs: dict) -> Jet:
    """g - exp(y) sum g."""
    g, y, dim = operand(args[0]), operand(args[1]), from_end(args[2], args[1].dim())
    total = _sum_along(g, dim) if isinstance(g, Series) else g.sum(dim, keepdim=True)
    probabilities = S.exp(y) if isinstance(y, Series) else y.exp()
    return wrap(S.add(g, S.multiply(probabilities, total), -1), space_of(args))


# --- losses ------------------------------------------------------------------------------------------------------


def _class_weights(target: Tensor, weight: Tensor | None, ignore: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Safe class indices, and the weight of each entry (0 where the label is ignored)."""
    valid = target != ignore
    index = torch.where(valid, target, 0)
    w = valid.to(like.dtype) if weight is None else torch.where(valid, weight[index], 0.0)
    return index, w


def _class_axis(rank: int) -> int:
    return -1 if rank == 1 else 1 - rank


@rule(aten.nll_loss_forward.default, aten.nll_loss2d_forward.default)
def _nll(func: Any, args: Any, kwargs: dict) -> tuple[Jet, Tensor]:
    x, target, weight, reduction, ignore = args
    axis = _class_axis(x.c.dim())
    index, w = _class_weights(target, weight, ignore, x.c)
    total = w.sum()
    index = index.unsqueeze(axis)

    def pick(t: Tensor) -> Tensor:
        lead = t.shape[: t.dim() - x.c.dim()]
        return t.gather(axis, index.expand(*lead, *index.shape)).squeeze(axis)

    losses = Series(-pick(x.c) * w, S.scaled(pick(x.h), -w))
    if reduction != 0:
        axes = list(range(-w.dim(), 0))
        losses = losses.map(lambda t: t.sum(axes) if axes else t)
    if reduction == 1:
        losses = losses.map(lambda t: t / total)
    return wrap(losses, x.space), total


@rule(aten.nll_loss_backward.default, aten.nll_loss2d_backward.default)
def _nll_backward(func: Any, args: Any, kwargs: dict) -> Any:
    g, x, target, weight, reduction, ignore, total = args
    axis = _class_axis(x.dim())
    index, w = _class_weights(target, weight, ignore, constant(x))
    where = -torch.zeros_like(constant(x)).scatter(axis, index.unsqueeze(axis), w.unsqueeze(axis))
    if reduction == 1:
        where = where / total
    if not isinstance(g, Jet):
        return where * (g.unsqueeze(axis) if reduction == 0 else g)
    per_entry = g.series.map(lambda t: t.unsqueeze(axis)) if reduction == 0 else g.series
    return wrap(S.multiply(per_entry, where), g.space)


@rule(aten.mse_loss.default)
def _mse(func: Any, args: Any, kwargs: dict) -> Jet:
    squares = S.square(S.add(operand(args[0]), operand(args[1]), -1))
    return wrap(_reduced(squares, args[2] if len(args) > 2 else 1), space_of(args))


def _reduced(a: Series, reduction: int) -> Series:
    if reduction == 0:
        return a
    axes = list(range(-a.c.dim(), 0))
    factor = 1 / a.c.numel() if reduction == 1 else 1
    return a.map(lambda t: t.sum(axes) * factor if axes else t)


@rule(aten.mse_loss_backward.default)
def _mse_backward(func: Any, args: Any, kwargs: dict) -> Jet:
    g, x, y, reduction = operand(args[0]), operand(args[1]), operand(args[2]), args[3]
    difference = S.add(x, y, -1) if isinstance(x, Series) or isinstance(y, Series) else x - y
    factor = 2 / args[1].numel() if reduction == 1 else 2
    return wrap(S.multiply(S.multiply(g, difference), factor), space_of(args))


# --- norms: axes counted from the end ----------------------------------------------------------------------------


def _mean(a: Series, axes: list[int]) -> Series:
    n = math.prod(a.c.shape[d] for d in axes)
    return a.map(lambda t: t.sum(axes, keepdim=True) / n)


def normalise(x: Series, axes: list[int], eps: float) -> tuple[Series, Series, Series]:
    """(x - mean) / sqrt(variance + eps), the mean, and the reciprocal deviation."""
    mean = _mean(x, axes)
    centred = S.add(x, mean, -1)
    rstd = S.rsqrt(S.add(_mean(S.square(centred), axes), eps))
    return S.multiply(centred, rstd), mean, rstd


def _normalise_backward(g: Series, xhat: Series, rstd: Series, axes: list[int]) -> Series:
    """rstd (g - mean g - xhat mean(g xhat)), the gradient of `normalise`."""
    inner = S.add(g, _mean(g, axes), -1)
    inner = S.add(inner, S.multiply(xhat, _mean(S.multiply(g, xhat), axes)), -1)
    return S.multiply(inner, rstd)


def _affine(x: Series, weight: Any, bias: Any, shape: Callable[[Tensor], Tensor]) -> Series:
    if weight is not None:
        x = S.multiply(x, _shaped(weight, shape))
    return x if bias is None else S.add(x, _shaped(bias, shape))


def _shaped(a: Any, shape: Callable[[Tensor], Tensor]) -> Any:
    """A per-channel vector put where it belongs; `shape` looks at the last axes only."""
    a = operand(a)
    return a.map(shape) if isinstance(a, Series) else shape(a)


def _sum_to(a: Series, rank: int) -> Series:
    """Sum over all but the last `rank` axes."""
    axes = list(range(-a.c.dim(), -rank))
    return a.map(lambda t: t.sum(axes)) if axes else a


def _series(a: Any, space: Any) -> Series:
    return a.series if isinstance(a, Jet) else space.constant(a).series


@rule(aten.native_layer_norm.default)
def _layer_norm(func: Any, args: Any, kwargs: dict) -> tuple[Jet, Jet, Jet]:
    x, shape, weight, bias, eps = args
    space = space_of(args)
    axes = list(range(-len(shape), 0))
    xhat, mean, rstd = normalise(_series(x, space), axes, eps)
    out = _affine(xhat, weight, bias, lambda t: t)
    return wrap(out, space), wrap(mean, space), wrap(rstd, space)


@rule(aten.native_layer_norm_backward.default)
def _layer_norm_backward(func: Any, args: Any, kwargs: dict) -> tuple:
    g, x, shape, mean, rstd, weight, _bias, mask = args
    space = space_of(args)
    axes = list(range(-len(shape), 0))
    g, rstd = _series(g, space), _series(rstd, space)
    xhat = S.multiply(S.add(_series(x, space), _series(mean, space), -1), rstd)
    scaled = g if weight is None else S.multiply(g, operand(weight))
    return _wanted(
        space, mask, lambda: _normalise_backward(scaled, xhat, rstd, axes),
        lambda: _sum_to(S.multiply(g, xhat), len(shape)), lambda: _sum_to(g, len(shape)),
    )  # fmt: skip


@rule(aten._fused_rms_norm.default)
def _rms_norm(func: Any, args: Any, kwargs: dict) -> tuple[Jet, Jet]:
    """As GPUs have it: the norm, and the reciprocal root of the mean square."""
    x, shape, weight, eps = args
    space = space_of(args)
    x, axes = _series(x, space), list(range(-len(shape), 0))
    eps = torch.finfo(space.real_dtype).eps if eps is None else eps
    rstd = S.rsqrt(S.add(_mean(S.square(x), axes), eps))
    return wrap(_affine(S.multiply(x, rstd), weight, None, lambda t: t), space), wrap(rstd, space)


@rule(aten._fused_rms_norm_backward.default)
def _rms_norm_backward(func: Any, args: Any, kwargs: dict) -> tuple:
    """rstd (g w - xhat mean(g w xhat))."""
    g, x, shape, rstd, weight, mask = args
    space = space_of(args)
    g, x, rstd = (_series(a, space) for a in (g, x, rstd))
    xhat, axes = S.multiply(x, rstd), list(range(-len(shape), 0))
    scaled = g if weight is None else S.multiply(g, operand(weight))

    def of_input() -> Series:
        across = S.multiply(xhat, _mean(S.multiply(scaled, xhat), axes))
        return S.multiply(S.add(scaled, across, -1), rstd)

    return _wanted(space, mask, of_input, lambda: _sum_to(S.multiply(g, xhat), len(shape)))


def _wanted(space: Space, mask: Any, *gradients: Callable[[], Series]) -> tuple:
    """The gradients that autograd asks for, None in the place of the others."""
    return tuple(wrap(make(), space) if asked else None for asked, make in zip(mask, gradients, strict=True))


def _channels_last_but(n: int) -> Callable[[Tensor], Tensor]:
    """A per-channel vector as [..., channels, 1 * n]."""
    return lambda t: t.reshape(*t.shape, *[1] * n)


@rule(aten.native_group_norm.default)
def _group_norm(func: Any, args: Any, kwargs: dict) -> tuple[Jet, Jet, Jet]:
    x, weight, bias, n, _c, _hw, groups, eps = args
    space = space_of(args)
    x = _series(x, space)
    xhat, mean, rstd = normalise(_grouped(x, n, groups), [-1], eps)
    xhat = _reshaped(xhat, x.c.shape)
    out = _affine(xhat, weight, bias, _channels_last_but(x.c.dim() - 2))
    flat = [_reshaped(a, (n, groups)) for a in (mean, rstd)]
    return wrap(out, space), wrap(flat[0], space), wrap(flat[1], space)


def _reshaped(a: Series, shape: Any) -> Series:
    return Series(a.c.reshape(shape), a.h.reshape(*a.h.shape[:2], *shape))


def _grouped(a: Series, n: int, groups: int) -> Series:
    return _reshaped(a, (n, groups, a.c.numel() // (n * groups)))


@rule(aten.native_group_norm_backward.default)
def _group_norm_backward(func: Any, args: Any, kwargs: dict) -> tuple:
    g, x, mean, rstd, weight, n, _c, _hw, groups, mask = args
    space = space_of(args)
    g, x, mean, rstd = (_series(a, space) for a in (g, x, mean, rstd))
    shape = x.c.shape
    mean, rstd = (_reshaped(a, (n, groups, 1)) for a in (mean, rstd))
    xhat = S.multiply(S.add(_grouped(x, n, groups), mean, -1), rstd)
    per_channel = _channels_last_but(len(shape) - 2)
    scaled = g if weight is None else S.multiply(g, _shaped(weight, per_channel))
    return _wanted(
        space, mask, lambda: _reshaped(_normalise_backward(_grouped(scaled, n, groups), xhat, rstd, [-1]), shape),
        lambda: _per_channel_sum(S.multiply(g, _reshaped(xhat, shape))), lambda: _per_channel_sum(g),
    )  # fmt: skip


def _per_channel_sum(a: Series) -> Series:
    """[examples, channels, ...] -> [channels]."""
    rank = a.c.dim()
    axes = [-rank, *range(2 - rank, 0)]
    return a.map(lambda t: t.sum(axes))


@rule(aten.native_batch_norm.default, aten.cudnn_batch_norm.default)
def _batch_norm(func: Any, args: Any, kwargs: dict) -> tuple:
    """Evaluation form: a fixed affine map per channel."""
    x, weight, bias, mean, var, training, _momentum, eps = args
    if training or mean is None:
        raise unsupported(func, "in training form mixes the examples of a batch; call model.eval() for the stored one")
    space = space_of(args)
    per_channel = _channels_last_but(x.dim() - 2)
    xhat = _fixed_normal(_series(x, space), mean, var, eps, per_channel)
    empty = mean.new_empty(0)
    return wrap(_affine(xhat, weight, bias, per_channel), space), empty, empty


def _fixed_normal(x: Series, mean: Tensor, var: Tensor, eps: float, shape: Callable[[Tensor], Tensor]) -> Series:
    return S.multiply(S.add(x, shape(mean), -1), shape((var + eps).rsqrt()))


@rule(aten.native_batch_norm_backward.default)
def _batch_norm_backward(func: Any, args: Any, kwargs: dict) -> tuple:
    g, x, weight, mean, var, _m, _r, _training, eps, mask = args
    space = space_of(args)
    g = _series(g, space)
    per_channel = _channels_last_but(x.dim() - 2)
    xhat = _fixed_normal(_series(x, space), mean, var, eps, per_channel)
    grad_x = S.multiply(g, per_channel((var + eps).rsqrt()))
    grad_x = grad_x if weight is None else S.multiply(grad_x, _shaped(weight, per_channel))
    return _wanted(
        space, mask, lambda: grad_x, lambda: _per_channel_sum(S.multiply(g, xhat)), lambda: _per_channel_sum(g)
    )


# --- convolution: patches times filters --------------------------------------------------------------------------


def _conv_geometry(func: Any, args: Any) -> dict[str, Any]:
    """Arguments of unfold for a convolution, in one dimension as of an image of one line; raises for what is not covered."""
    stride, padding, dilation, transposed = args[:4]
    if transposed or len(stride) > 2:
        raise unsupported(func, "other than in one or two dimensions and not transposed is not supported")
    line = len(stride) == 1
    found = {"stride": (1, *stride) if line else stride, "dilation": (1, *dilation) if line else dilation}
    return {"padding": (0, *padding) if line else tuple(padding), **{name: tuple(own) for name, own in found.items()}}


def _as_image(a: Any, line: bool) -> Any:
    """[..., W] of a convolution in one dimension as an image [..., 1, W] of one line."""
    return _mapped(a, lambda t: t.unsqueeze(-2)) if line else a


def _as_line(a: Any, line: bool) -> Any:
    """The other way."""
    return _mapped(a, lambda t: t.squeeze(-2)) if line else a


def _patches(x: Tensor, kernel: tuple[int, ...], groups: int, geometry: dict) -> Tensor:
    """[*lead, N, C, H, W] -> [*lead, groups, C / groups * kernel, N * places]."""
    lead, (n, c) = x.shape[:-4], x.shape[-4:-2]
    cols = F.unfold(x.reshape(-1, *x.shape[-3:]), kernel, **geometry)
    cols = cols.view(*lead, n, groups, c // groups * math.prod(kernel), -1)
    return cols.movedim(-4, -2).flatten(-2)


def _from_patches(cols: Tensor, n: int, size: tuple, kernel: tuple[int, ...], geometry: dict) -> Tensor:
    """The transpose of `_patches`: sum patches back into [*lead, N, C, H, W]."""
    lead = cols.shape[:-3]
    parts = cols.unflatten(-1, (n, -1)).movedim(-2, -4).flatten(-3, -2)
    image = F.fold(parts.reshape(-1, *parts.shape[-2:]), size, kernel, **geometry)
    return image.view(*lead, n, -1, *size)


def _rows(y: Tensor, groups: int) -> Tensor:
    """[*lead, N, O, H, W] -> [*lead, groups, O / groups, N * H * W]."""
    y = y.flatten(-2).unflatten(-2, (groups, -1))
    return y.movedim(-4, -2).flatten(-2)


def _filters(w: Tensor, groups: int) -> Tensor:
    """[*lead, O, C / groups, kh, kw] -> [*lead, groups, O / groups, C / groups * kh * kw]."""
    return w.flatten(-3).unflatten(-2, (groups, -1))


def _mapped(a: Any, f: Callable[[Tensor], Tensor]) -> Any:
    return a.map(f) if isinstance(a, Series) else f(a)


@rule(aten.convolution.default)
def _convolution(func: Any, args: Any, kwargs: dict) -> Jet:
    geometry, line, bias, groups = _conv_geometry(func, args[3:7]), len(args[3]) == 1, args[2], args[8]
    x, w = (_as_image(operand(a), line) for a in args[:2])
    ones = (1,) * line
    kernel = (*ones, *args[1].shape[2:])
    n, out_shape = args[0].shape[0], _conv_shape((*ones, *args[0].shape[2:]), kernel, geometry)
    cols = _mapped(x, lambda t: _patches(t, kernel, groups, geometry))
    rows = matmul(_mapped(w, lambda t: _filters(t, groups)), cols)

    def image(t: Tensor) -> Tensor:
        t = t.unflatten(-1, (n, -1)).movedim(-2, -4).flatten(-3, -2)
        return t.unflatten(-1, out_shape).contiguous()

    out = rows.map(image)
    return wrap(_as_line(_affine(out, None, bias, _channels_last_but(2)), line), space_of(args))


def _conv_shape(size: Any, kernel: tuple[int, ...], geometry: dict) -> list[int]:
    """Height and width of a convolution's result."""
    steps = zip(size, kernel, geometry["stride"], geometry["padding"], geometry["dilation"], strict=True)
    return [(length + 2 * pad - gap * (k - 1) - 1) // step + 1 for length, k, step, pad, gap in steps]


@rule(aten.convolution_backward.default)
def _convolution_backward(func: Any, args: Any, kwargs: dict) -> tuple:
    groups, mask, line = args[9], args[10], len(args[4]) == 1
    space, geometry = space_of(args), _conv_geometry(func, args[4:8])
    g, x, w = (_as_image(operand(a), line) for a in args[:3])
    ones = (1,) * line
    kernel = (*ones, *args[2].shape[2:])
    rows = _mapped(g, lambda t: _rows(t, groups))
    grads: list[Any] = [None, None, None]
    if mask[0]:
        n, size = args[1].shape[0], (*ones, *args[1].shape[2:])
        cols = matmul(_mapped(w, lambda t: _filters(t, groups).mT), rows)
        grads[0] = wrap(_as_line(cols.map(lambda t: _from_patches(t, n, size, kernel, geometry)), line), space)
    if mask[1]:
        cols = _mapped(x, lambda t: _patches(t, kernel, groups, geometry).mT)
        flat = matmul(rows, cols)
        grads[1] = wrap(_reshaped(flat, tuple(args[2].shape)), space)
    if mask[2]:
        grads[2] = wrap(_per_channel_sum(g), space) if isinstance(g, Series) else g.sum((0, 2, 3))
    return tuple(grads)


# --- pooling -----------------------------------------------------------------------------------------------------


def _fold_real(h: Tensor, image_rank: int, real_map: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply a linear map of real images [N, *image] to coefficients [..., *image]."""
    real = torch.view_as_real(h).movedim(-1, 0) if h.is_complex() else h.unsqueeze(0)
    flat = real.reshape(-1, *real.shape[real.dim() - image_rank :])
    out = real_map(flat)
    out = out.view(*real.shape[: real.dim() - image_rank], *out.shape[1:])
    return torch.complex(out[0], out[1]) if h.is_complex() else out[0]


@rule(aten.avg_pool2d.default, aten._adaptive_avg_pool2d.default)
def _avg_pool(func: Any, args: Any, kwargs: dict) -> Jet:
    x, *rest = args
    return Jet(func(x.c, *rest, **kwargs), _fold_real(x.h, 3, lambda t: func(t, *rest, **kwargs)), x.space)


@rule(aten.avg_pool2d_backward.default, aten._adaptive_avg_pool2d_backward.default)
def _avg_pool_backward(func: Any, args: Any, kwargs: dict) -> Jet:
    g, x, *rest = args
    image = constant(x)

    def backward(t: Tensor) -> Tensor:
        return func(t, image.new_zeros(t.shape[0], *image.shape[1:]), *rest, **kwargs)

    return Jet(backward(g.c), _fold_real(g.h, 3, backward), g.space)


@rule(aten.max_pool2d_with_indices.default)
def _max_pool(func: Any, args: Any, kwargs: dict) -> tuple[Jet, Tensor]:
    x, *rest = args
    c, index = func(x.c, *rest, **kwargs)
    note_nonsmooth(func, x.space)
    flat = index.flatten(-2)
    h = x.h.flatten(-2).gather(-1, flat.expand(*x.h.shape[:2], *flat.shape)).unflatten(-1, index.shape[-2:])
    return Jet(c, h, x.space), index


@rule(aten.max_pool2d_with_indices_backward.default)
def _max_pool_backward(func: Any, args: Any, kwargs: dict) -> Jet:
    g, x, index = args[0], args[1], args[-1]
    shape, flat = tuple(x.shape), index.flatten(-2)

    def scatter(t: Tensor) -> Tensor:
        lead = t.shape[: t.dim() - len(shape)]
        out = t.new_zeros(*lead, *shape[:-2], shape[-2] * shape[-1])
        return out.scatter_add_(-1, flat.expand(*lead, *flat.shape), t.flatten(-2)).unflatten(-1, shape[-2:])

    return Jet(scatter(g.c), scatter(g.h), g.space)
