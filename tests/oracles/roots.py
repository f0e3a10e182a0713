"""A second engine for the same series: ordinary complex copies at roots of unity, and a discrete Fourier transform.

A training run is an analytic function of z. Train `points` copies at z_n = radius * exp(2 pi i n / points); then
a_r = mean over n of f(z_n) z_n^-r, exact up to a_{r + points} radius^points. It shares no code with the series engine
and is its oracle, and it is the way to high degrees, where its cost grows linearly instead of quadratically.

The gradient of a real model is traced once into a graph of ATen operations on real tensors; evaluating that graph with
complex numbers is the analytic continuation (torch's own complex autograd would conjugate).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter
from torch.fx.experimental.proxy_tensor import make_fx

from leaveout.training.loop import Steps
from leaveout.training.recipe import Recipe
from leaveout.training.tasks import Batch, Parameters, task_of

aten = torch.ops.aten
Tensors = dict[str, Tensor]
Loss = Callable[[nn.Module, Any], Tensor]
"""Per-example losses [examples] of a model on a batch."""


def nodes(points: int, radius: float) -> Tensor:
    """The points z_n, complex128 [points]."""
    angles = torch.arange(points, dtype=torch.float64) * (2 * math.pi / points)
    return torch.polar(torch.full_like(angles, radius), angles)


def coefficients(values: Tensor, radius: float, degree: int) -> Tensor:
    """Taylor coefficients [degree + 1, ...] from values [points, ...] at `nodes(points, radius)`."""
    points = values.shape[0]
    if degree >= points:
        raise ValueError(f"degree {degree} needs more than {degree} points, got {points}")
    spectrum = torch.fft.fft(values.to(torch.complex128), dim=0)[: degree + 1] / points
    scale = radius ** -torch.arange(degree + 1, dtype=torch.float64)
    return spectrum * scale.view(-1, *[1] * (values.dim() - 1))


# --- a real graph on complex numbers -----------------------------------------------------------------------------


def complex_erf(z: Tensor) -> Tensor:
    """erf of complex numbers (Abramowitz and Stegun 7.1.29; 1e-15 relative for |Im z| < 6)."""
    if not z.is_complex():
        return z.erf()
    x, y = z.real, z.imag
    small = x.abs() < 1e-9
    safe = torch.where(small, 1.0, x)
    decay = torch.exp(-x * x)
    cos, sin = torch.cos(2 * x * y), torch.sin(2 * x * y)
    first_re = torch.where(small, x * y * y, (1 - cos) / (2 * safe))
    first_im = torch.where(small, y, sin / (2 * safe))
    # sum of b_n, b_n cosh(n y) and n b_n sinh(n y), with b_n = exp(-n^2 / 4) / (n^2 + 4 x^2)
    up, down, rise, fall, four_x2 = y.exp(), (-y).exp(), 1.0, 1.0, 4 * x * x
    plain = cosh = sinh = torch.zeros_like(x)
    for n in range(1, 33):
        rise, fall = rise * up, fall * down
        bell = (math.exp(-n * n / 4) / 2) / (four_x2 + n * n)
        plain, cosh, sinh = plain + bell, cosh + bell * (rise + fall), sinh + n * bell * (rise - fall)
    tail = 2 / math.pi * decay
    re = x.erf() + decay / math.pi * first_re + tail * (4 * x * plain - 2 * x * cosh * cos + sinh * sin)
    im = decay / math.pi * first_im + tail * (2 * x * cosh * sin + sinh * cos)
    return torch.complex(re, im)


def _erf_slope(z: Tensor) -> Tensor:
    return torch.exp(-z * z / 2) / math.sqrt(2 * math.pi)


def _gelu(z: Tensor, approximate: str = "none") -> Tensor:
    if approximate == "tanh":
        return 0.5 * z * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))
    return 0.5 * z * (1 + complex_erf(z / math.sqrt(2)))


def _gelu_backward(g: Tensor, z: Tensor, approximate: str = "none") -> Tensor:
    if approximate == "tanh":
        t = torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))
        slope = math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * z**2)
        return g * (0.5 * (1 + t) + 0.5 * z * (1 - t * t) * slope)
    return g * (0.5 * (1 + complex_erf(z / math.sqrt(2))) + z * _erf_slope(z))


def _softmax(z: Tensor, dim: int, _: bool = False) -> Tensor:
    e = torch.exp(z - z.real.amax(dim, keepdim=True))
    return e / e.sum(dim, keepdim=True)


def _log_softmax(z: Tensor, dim: int, _: bool = False) -> Tensor:
    z = z - z.real.amax(dim, keepdim=True)
    return z - z.exp().sum(dim, keepdim=True).log()


def _layer_norm(z: Tensor, shape: Sequence[int], weight: Any, bias: Any, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    dims = tuple(range(-len(shape), 0))
    mean = z.mean(dims, keepdim=True)
    rstd = 1 / torch.sqrt(((z - mean) ** 2).mean(dims, keepdim=True) + eps)
    out = (z - mean) * rstd
    out = out if weight is None else out * weight
    return (out if bias is None else out + bias), mean, rstd


def _layer_norm_backward(
    g: Tensor, z: Tensor, shape: Sequence[int], mean: Tensor, rstd: Tensor, weight: Any, _: Any, __: Any
) -> tuple:
    dims = tuple(range(-len(shape), 0))
    n = math.prod(shape)
    hat = (z - mean) * rstd
    gw = g if weight is None else g * weight
    dz = rstd / n * (n * gw - gw.sum(dims, keepdim=True) - hat * (gw * hat).sum(dims, keepdim=True))
    rest = tuple(range(g.dim() - len(shape)))
    return dz, (g * hat).sum(rest), g.sum(rest)


def _nll(z: Tensor, target: Tensor, _weight: Any, reduction: int, ignore: int) -> tuple[Tensor, Tensor]:
    keep = target != ignore
    picked = -z.gather(1, torch.where(keep, target, 0).unsqueeze(1)).squeeze(1) * keep
    total = keep.sum().to(z.real.dtype)
    return (picked, picked.sum() / total, picked.sum())[reduction], total


def _nll_backward(g: Tensor, z: Tensor, target: Tensor, _w: Any, reduction: int, ignore: int, total: Tensor) -> Tensor:
    keep = target != ignore
    hot = -nn.functional.one_hot(torch.where(keep, target, 0), z.shape[1]) * keep.unsqueeze(1)
    g = g.unsqueeze(1) if reduction == 0 else g
    return hot * g / (total if reduction == 1 else 1)


def _embedding_backward(g: Tensor, index: Tensor, n: int, _padding: int, _scale: bool) -> Tensor:
    hot = nn.functional.one_hot(index.reshape(-1), n).to(g.dtype)
    return hot.mT @ g.reshape(-1, g.shape[-1])


def _bilinear_parts(op: Any) -> Callable[..., Any]:
    """A bilinear operation of two complex tensors from its real version: (a + ib)(c + id)."""

    def apply(a: Tensor, b: Tensor, *rest: Any) -> Tensor:
        a, b = (t if t.is_complex() else t + 0j for t in (a, b))
        re = op(a.real, b.real, *rest) - op(a.imag, b.imag, *rest)
        return torch.complex(re, op(a.real, b.imag, *rest) + op(a.imag, b.real, *rest))

    return apply


def _convolution(x: Tensor, w: Tensor, bias: Any, *rest: Any) -> Tensor:
    out = _bilinear_parts(lambda a, b: aten.convolution(a, b, None, *rest))(x, w)
    return out if bias is None else out + bias.view(-1, 1, 1)


def _convolution_backward(g: Tensor, x: Tensor, w: Tensor, _sizes: Any, *rest: Any) -> tuple:
    settings = rest[:-1]
    real = [t.real if t.is_complex() else t for t in (x, w)]
    dx = _bilinear_parts(
        lambda a, b: aten.convolution_backward(a, real[0], b, None, *settings, [True, False, False])[0]
    )(g, w)
    dw = _bilinear_parts(
        lambda a, b: aten.convolution_backward(a, b, real[1], None, *settings, [False, True, False])[1]
    )(g, x)
    return dx, dw, g.sum((0, 2, 3))


def _linear_parts(op: Any) -> Callable[..., Any]:
    """A linear operation of one complex tensor by its parts."""
    return lambda z, *rest: torch.complex(op(z.real, *rest), op(z.imag, *rest))


def _avg_pool_backward(g: Tensor, z: Tensor, *rest: Any) -> Tensor:
    return _linear_parts(lambda part: aten.avg_pool2d_backward(part, torch.zeros_like(z.real), *rest))(g)


CONTINUED: dict[Any, Callable[..., Any]] = {
    aten.erf.default: complex_erf,
    aten.gelu.default: _gelu,
    aten.gelu_backward.default: _gelu_backward,
    aten.silu.default: lambda z: z / (1 + torch.exp(-z)),
    aten.silu_backward.default: lambda g, z: g / (1 + torch.exp(-z)) * (1 + z * (1 - 1 / (1 + torch.exp(-z)))),
    aten.tanh_backward.default: lambda g, y: g * (1 - y * y),
    aten.sigmoid.default: lambda z: 1 / (1 + torch.exp(-z)),
    aten.sigmoid_backward.default: lambda g, y: g * (1 - y) * y,
    aten._softmax.default: _softmax,
    aten._log_softmax.default: _log_softmax,
    aten._softmax_backward_data.default: lambda g, y, dim, _: y * (g - (g * y).sum(dim, keepdim=True)),
    aten._log_softmax_backward_data.default: lambda g, y, dim, _: g - y.exp() * g.sum(dim, keepdim=True),
    aten.native_layer_norm.default: _layer_norm,
    aten.native_layer_norm_backward.default: _layer_norm_backward,
    aten.nll_loss_forward.default: _nll,
    aten.nll_loss_backward.default: _nll_backward,
    aten.mse_loss.default: lambda z, y, reduction=1: ((z - y) ** 2, ((z - y) ** 2).mean(), ((z - y) ** 2).sum())[
        reduction
    ],
    aten.embedding_dense_backward.default: _embedding_backward,
    aten.convolution.default: _convolution,
    aten.convolution_backward.default: _convolution_backward,
    aten.avg_pool2d.default: _linear_parts(aten.avg_pool2d),
    aten.avg_pool2d_backward.default: _avg_pool_backward,
    aten._to_copy.default: lambda z, **_: z,
    aten.detach.default: lambda z: z,
}
"""What an operation is between complex numbers, where torch has no version of its own or one that conjugates."""


class _Continuation(Interpreter):
    """Runs a traced real graph with complex tensors; real constants join as complex ones."""

    def call_function(self, target: Any, args: tuple, kwargs: dict) -> Any:
        tensors = [a for a in args if isinstance(a, Tensor)]
        tensors += [t for a in args if isinstance(a, (list, tuple)) for t in a if isinstance(t, Tensor)]
        if not any(t.is_complex() for t in tensors):
            return super().call_function(target, args, kwargs)
        if target in CONTINUED:
            return CONTINUED[target](*args, **kwargs)
        return super().call_function(target, tuple(_lifted(a) for a in args), kwargs)


def _lifted(a: Any) -> Any:
    if isinstance(a, Tensor) and a.is_floating_point():
        return a.to(torch.complex128)
    return type(a)(_lifted(x) for x in a) if isinstance(a, (list, tuple)) else a


class Gradient:
    """Loss and gradient of a real model, continued to complex parameters and weights, for many copies at once."""

    def __init__(self, model: nn.Module, loss: Loss, trained: Sequence[str] | None = None) -> None:
        self.model, self.loss = model.double(), loss
        own = dict(model.named_parameters())
        names = list(own) if trained is None else list(trained)
        self.start = {name: own[name].detach().clone() for name in names}
        self._graphs: dict[Any, GraphModule] = {}

    def __call__(self, params: Tensors, batch: Any, weights: Tensor) -> tuple[Tensors, Tensor]:
        """Shapes: params [copies, *shape], weights [copies, examples] -> gradients alike, losses [copies, examples]."""
        graph = self._graph(batch, weights.shape[1])
        run = torch.vmap(lambda p, w: _Continuation(graph).run(p, w, *_leaves(batch)), in_dims=(0, 0))
        grads, losses = run(list(params.values()), weights)
        return dict(zip(params, grads, strict=True)), losses

    def _graph(self, batch: Any, examples: int) -> GraphModule:
        key = tuple(tuple(t.shape) for t in _leaves(batch))
        if key not in self._graphs:
            names = list(self.start)

            def weighted(values: list[Tensor], weights: Tensor, *leaves: Tensor) -> tuple[Tensor, Tensor]:
                run = _Bound(self.model, self.loss, _rebuilt(batch, leaves))
                named = {f"model.{name}": value for name, value in zip(names, values, strict=True)}
                losses = torch.func.functional_call(run, named, (), tie_weights=True)
                return (losses * weights).sum(), losses

            gradient = torch.func.grad(weighted, has_aux=True)
            start = [t.clone() for t in self.start.values()]
            ones = torch.ones(examples, dtype=torch.float64)
            self._graphs[key] = _flattened(make_fx(gradient)(start, ones, *_leaves(batch)))
        return self._graphs[key]


class _Bound(nn.Module):
    """The losses of one batch as a module, so that parameters can be given by name."""

    def __init__(self, model: nn.Module, loss: Loss, batch: Any) -> None:
        super().__init__()
        self.model, self.loss, self.batch = model, loss, batch

    def forward(self) -> Tensor:
        return self.loss(self.model, self.batch)


def _flattened(graph: GraphModule) -> GraphModule:
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph


def _leaves(batch: Any) -> list[Tensor]:
    if isinstance(batch, Tensor):
        return [batch]
    parts = batch.values() if isinstance(batch, Mapping) else batch
    return [t for t in parts if isinstance(t, Tensor)]


def _rebuilt(batch: Any, leaves: Sequence[Tensor]) -> Any:
    """The batch with other tensors in the places of its own."""
    if isinstance(batch, Tensor):
        return leaves[0]
    it = iter(leaves)
    if isinstance(batch, Mapping):
        return {k: next(it) if isinstance(v, Tensor) else v for k, v in batch.items()}
    return type(batch)(next(it) if isinstance(v, Tensor) else v for v in batch)


# --- optimizers of analytic functions: g * g, never |g|^2 --------------------------------------------------------


@dataclass
class Sgd:
    """torch.optim.SGD, for complex parameters."""

    lr: float = 0.1
    momentum: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        self.buffers: Tensors = {}

    def step(self, params: Tensors, grads: Tensors) -> None:
        for name, g in grads.items():
            d = g + self.weight_decay * params[name]
            if self.momentum:
                old = self.buffers.get(name)
                self.buffers[name] = d if old is None else self.momentum * old + d
                d = d + self.momentum * self.buffers[name] if self.nesterov else self.buffers[name]
            params[name] = params[name] - self.lr * d


@dataclass
class Adam:
    """torch.optim.Adam and AdamW (`decoupled`), or the paper's (`eps_inside`), for complex parameters."""

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    decoupled: bool = False
    eps_inside: bool = False

    def __post_init__(self) -> None:
        self.moments: dict[str, tuple[Tensor, Tensor]] = {}
        self.t = 0

    def step(self, params: Tensors, grads: Tensors) -> None:
        self.t += 1
        b1, b2 = self.betas
        for name, g in grads.items():
            theta = params[name]
            if self.decoupled:
                theta = theta * (1 - self.lr * self.weight_decay)
            else:
                g = g + self.weight_decay * theta
            m, v = self.moments.get(name, (torch.zeros_like(g), torch.zeros_like(g)))
            m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
            self.moments[name] = (m, v)
            mean, square = m / (1 - b1**self.t), v / (1 - b2**self.t)
            root = torch.sqrt(square + self.eps) if self.eps_inside else torch.sqrt(square) + self.eps
            params[name] = theta - self.lr * mean / root


def clip(grads: Tensors, limit: float) -> Tensors:
    """Scale to a global norm of `limit`, if the norm at z = 0 (the mean over the circle) is above it."""
    copies = next(iter(grads.values())).shape[0]
    norm = torch.sqrt(sum(((g * g).reshape(copies, -1).sum(1) for g in grads.values()), torch.zeros(())))
    factor = limit / (norm + 1e-6)
    if factor.mean().real >= 1:
        return grads
    return {k: g * factor.view(-1, *[1] * (g.dim() - 1)) for k, g in grads.items()}


@dataclass
class Circle:
    """Where and how a run is evaluated: radius and number of points, gradient clipping, learning rate per step."""

    points: int
    radius: float = 1.0
    clip_norm: float | None = None
    schedule: Callable[[int], float] | None = None


def train(
    gradient: Gradient, batches: Sequence[Any], psi: Sequence[Tensor] | Tensor, optimizer: Sgd | Adam, circle: Circle,
    shares: Sequence[Tensor] | None = None,
) -> Tensors:  # fmt: skip
    """Parameters [points, *shape] trained with weights 1 - z psi: the loss of a step is sum(shares (1 - z psi) losses).

    Shapes: psi, shares [steps][examples], the direction's entry of each example of each batch, complex, and what its loss
    counts in that of the batch; default: 1 / examples of the batch.
    """
    z = nodes(circle.points, circle.radius)
    params = {k: v.to(torch.complex128).expand(circle.points, *v.shape).clone() for k, v in gradient.start.items()}
    for step, batch in enumerate(batches):
        weights = (1 - z[:, None] * psi[step][None, :]) * (1 / len(psi[step]) if shares is None else shares[step])
        grads, _ = gradient(params, batch, weights)
        if circle.clip_norm is not None:
            grads = clip(grads, circle.clip_norm)
        if circle.schedule is not None:
            optimizer.lr = circle.schedule(step)
        optimizer.step(params, grads)
    return params


# --- recipes: one direction trained as complex copies ---


def train_recipe(recipe: Recipe, psi: Tensor, circle: Circle, queries: Sequence[Any] = ()) -> tuple[Parameters, Tensor]:
    """One direction psi [units] by complex copies: parameters [points, *shape], query losses [points, queries].

    `coefficients` turns both into series. The independent engine: slower at low degrees, the way to high ones.
    """
    task, s = task_of(recipe), recipe.optimizer
    if recipe.kind == "causal-lm":  # whose fused attention has no complex form
        task.model.set_attn_implementation("eager")
    gradient = Gradient(task.model, task.loss, task.trained)
    chosen: dict[str, Any] = {k: v for k, v in (("betas", s.betas), ("eps", s.eps)) if v is not None}
    optimizer: Sgd | Adam
    if s.name == "sgd":
        optimizer = Sgd(s.lr, s.momentum, s.nesterov, s.weight_decay)
    else:
        decay = {"weight_decay": s.weight_decay, "decoupled": s.name == "adamw"}
        optimizer = Adam(s.lr, **chosen, **decay, eps_inside=s.name == "paper-adam")
    steps = Steps(recipe.with_(dtype="float64"), task)
    parts = [steps.parts_of(batch, 1)[0] for batch in steps.batches]  # copies do not accumulate: one part a step
    batches = [_doubled(steps.fed(part)[0]) for part in parts]
    circle.schedule = lambda step: recipe.rate(step, len(steps))
    circle.clip_norm = recipe.clip_norm
    entries = psi.to(torch.complex128)[recipe.unit_of]
    along = [entries[list(part.numbers)] for part in parts]
    shares = [(torch.ones(len(p.numbers)) if p.sizes is None else p.sizes).double() / p.divisor for p in parts]
    params = train(gradient, batches, along, optimizer, circle, shares)
    ones = torch.ones(circle.points, 1, dtype=torch.complex128)
    losses = [gradient(params, _doubled(task.encode_queries([q])), ones)[1] for q in queries]
    return params, torch.cat(losses, 1) if losses else torch.zeros(circle.points, 0)


def _doubled(batch: Batch) -> Batch:
    return tuple(t.double() if t.is_floating_point() else t for t in batch)
