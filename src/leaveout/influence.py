"""Influence through the whole model: a query's gradient over all trained parameters, turned by what the run's optimizer and
curvature would do to it, and rows scored along it by two forward passes each.

    x = P^1/2 f(H) P^1/2 g,   H = P^1/2 G P^1/2,   f(h) = (1 - exp(-T h)) / h

g is the query's gradient, G the Gauss-Newton matrix of the mean loss of a sample of rows, P the optimizer's metric
(1 / (sqrt(v) + eps) of Adam's second moments v, 1 of plain gradient descent), and T the sum of the run's learning rates: how
far training with a constant G and P would have carried a row's gradient. f is taken by Lanczos steps, one product with G each.
A row's score is <its gradient, x> = (loss(theta + eta x) - loss(theta - eta x)) / (2 eta) + O(eta^2).

Only losses, logits and ordinary backward passes are asked of the model, so that any architecture and any adapter will do:
what a product needs of the derivative of logits is a central difference, too.
Sources: the segment formula of SOURCE, arXiv 2405.12186, in Adam's metric; Lanczos functions, Golub and Van Loan 4th ed., 10.1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from leaveout.errors import FormatError

STEP = 0.01
"""Of a central difference: how far it moves the logits, relative to their spread. In float32 its error is about 1e-4."""
CUT = 0.5
"""Quantile to which the metric is cut: tokens that were never or hardly met have second moments near 0, and would get all of
the weight that the length of the run allows. A cut at .9 was as good on one bank by retraining, and ruined another."""
DRAWS, DRAWN = 40, 16
"""Batches of rows, and rows in each, whose gradients estimate second moments."""


@dataclass(frozen=True)
class Predictions:
    """Logits [positions, vocabulary] at the learned positions of a batch, with the target, the row of the batch and the weight in
    that row's loss of each [positions].
    """

    logits: Tensor
    target: Tensor
    row: Tensor
    weight: Tensor

    def losses(self, n_rows: int) -> Tensor:
        """The rows' losses [n_rows], summed in float64."""
        own = torch.nn.functional.cross_entropy(self.logits, self.target, reduction="none").double() * self.weight
        return own.new_zeros(n_rows).index_add_(0, self.row, own)


@dataclass(frozen=True)
class Batch:
    """Rows that a model sees at once: whatever its `predictions` take, and how many rows they are."""

    inputs: Any
    n_rows: int


class WholeModel:
    """A model with its trained parameters in one vector [parameters].

    predictions     parameters by name and the inputs of a batch -> Predictions
    """

    def __init__(
        self, parameters: Mapping[str, Tensor], predictions: Callable[[dict[str, Tensor], Any], Predictions]
    ) -> None:
        self.shapes = {name: p.shape for name, p in parameters.items()}
        self.theta = torch.cat([p.detach().flatten() for p in parameters.values()])
        self.predictions = predictions

    def named(self, flat: Tensor) -> dict[str, Tensor]:
        """Parameters by name, as views of a vector."""
        sizes = [shape.numel() for shape in self.shapes.values()]
        return {name: x.view(shape) for (name, shape), x in zip(self.shapes.items(), flat.split(sizes), strict=True)}

    def at(self, flat: Tensor, batch: Batch) -> Predictions:
        """What the model says of a batch with these parameters."""
        return self.predictions(self.named(flat), batch.inputs)

    def gradient(self, batches: Sequence[Batch]) -> Tensor:
        """Gradient [parameters] of the sum of the rows' losses."""
        total = torch.zeros_like(self.theta)
        for batch in batches:
            theta = self.theta.clone().requires_grad_()
            total += torch.autograd.grad(self.at(theta, batch).losses(batch.n_rows).sum(), theta)[0]
        return total

    def slope(self, value: Callable[[dict[str, Tensor]], Tensor]) -> Tensor:
        """Gradient [parameters] of a scalar function of the parameters by name."""
        theta = self.theta.clone().requires_grad_()
        return torch.autograd.grad(value(self.named(theta)), theta)[0]

    @torch.no_grad()
    def moved(self, x: Tensor, eta: float, batch: Batch) -> Tensor:
        """(loss(theta + eta x) - loss(theta - eta x)) / (2 eta) of each row [rows]."""
        ahead, behind = (
            self.at(self.theta + by * x, batch).losses(batch.n_rows) for by in (eta, -eta)
        )  # fmt: skip
        return (ahead - behind) / (2 * eta)

    @torch.no_grad()
    def step(self, x: Tensor, batch: Batch) -> float:
        """How far to go along a direction so that logits move by STEP of their spread."""
        norm = _length(x)
        if not 0 < norm < math.inf:
            return 1.0
        eta = 1e-3 * float(self.theta.norm()) / norm
        for _ in range(3):
            ahead, behind = (self.at(self.theta + by * x, batch).logits for by in (eta, -eta))
            spread = float((ahead - ahead.mean(1, keepdim=True)).square().mean().sqrt())
            change = float((ahead - behind).square().mean().sqrt()) / 2
            if not change > 0:
                return eta
            eta *= min(max(STEP * spread / change, 1e-3), 1e3)
        return eta


def _length(x: Tensor) -> float:
    """Its squares would leave float32 where the numbers do not."""
    return float(torch.linalg.vector_norm(x, dtype=torch.float64))


# ---------------------------------------------------------------- the optimizer's metric


def second_moments(
    model: WholeModel, rows: Callable[[Sequence[int]], Sequence[Batch]], n_rows: int, seed: int = 0
) -> Tensor:
    """Second moments [parameters] of the gradients of random batches of a sample: what Adam would have gathered here.

    `rows` gives the batches of rows of the sample by number. Cost: DRAWS * DRAWN rows, forwards and backwards.
    """
    chance = torch.Generator().manual_seed(seed)
    total = torch.zeros_like(model.theta)
    size = min(DRAWN, n_rows)
    for _ in range(DRAWS):
        numbers = torch.randperm(n_rows, generator=chance)[:size].tolist()
        total += (model.gradient(rows(numbers)) / size).square_()
    return total / DRAWS


def adam_metric(moments: Tensor, eps: float = 1e-8) -> Tensor:
    """1 / (sqrt(v) + eps) [parameters] of second moments, cut to the CUT quantile of those that are not 0.

    Raises: FormatError for moments that are all zero, or not finite.
    """
    met = moments > 0
    if not bool(met.any()) or not bool(torch.isfinite(moments).all()):
        raise FormatError(
            "The second moments are zero or not finite: give the optimizer state of a run that has trained."
        )
    metric = 1 / (moments.clamp_min(0).sqrt() + eps)
    some = metric[met]
    limit = torch.quantile(some[:: max(1, len(some) // 100_000)].float(), CUT)
    return metric.clamp_max(limit.to(metric))


# ---------------------------------------------------------------- curvature


def gauss_newton(
    model: WholeModel, sample: Sequence[Batch], vectors: Sequence[Tensor], n_rows: int | None = None
) -> list[Tensor]:
    """Products [parameters] of the Gauss-Newton matrix of the sample's mean row loss with vectors.

    n_rows  where its batches hold pieces of rows: how many rows these are
    Cost a batch: a forward pass, and for each vector two more and a backward pass.
    """
    n_rows = n_rows or sum(batch.n_rows for batch in sample)
    found = [torch.zeros_like(model.theta) for _ in vectors]
    steps = [model.step(x, sample[0]) for x in vectors]
    for batch in sample:
        theta = model.theta.clone().requires_grad_()
        here = model.at(theta, batch)
        p = here.logits.detach().softmax(1)
        weight = (here.weight / n_rows).to(p.dtype)[:, None]
        for number, (x, step) in enumerate(zip(vectors, steps, strict=True)):
            with torch.no_grad():
                ahead, behind = (model.at(model.theta + by * x, batch).logits for by in (step, -step))
                change = (ahead - behind) / (2 * step)
                back = p * (change - (p * change).sum(1, keepdim=True)) * weight
            more = number + 1 < len(vectors)
            found[number] += torch.autograd.grad(here.logits, theta, back, retain_graph=more)[0]
    return found


@dataclass(frozen=True)
class Run:
    """What the optimizer of a run does to a gradient.

    rates   the sum of its learning rates over all steps; half or twice as much changes little
    metric  [parameters], see `adam_metric`; None: 1, as for gradient descent (with momentum m, rates count 1 / (1 - m) times)
    steps   products with the Gauss-Newton matrix
    """

    rates: float
    metric: Tensor | None = None
    steps: int = 6


def refined(
    model: WholeModel, sample: Sequence[Batch], gradients: Sequence[Tensor], run: Run, n_rows: int | None = None
) -> list[Tensor]:
    """Directions [parameters] of queries, from their gradients; see the head of this file. `n_rows`: as of `gauss_newton`.

    Cost:   `run.steps` products of `gauss_newton` a query; the sample's own forward passes are shared by all.
    Memory: `run.steps` + 3 vectors of all parameters a query.
    """
    root = None if run.metric is None else run.metric.sqrt()
    scaled = (lambda x: x) if root is None else (lambda x: root * x)
    queries = [_Lanczos(scaled(gradient)) for gradient in gradients]
    for _ in range(run.steps):
        going = [query for query in queries if not query.done]
        if not going:
            break
        products = gauss_newton(model, sample, [scaled(query.basis[-1]) for query in going], n_rows)
        for query, product in zip(going, products, strict=True):
            query.add(scaled(product))
    return [scaled(query.function(lambda h: _segment(run.rates, h))) for query in queries]


def _segment(total: float, h: Tensor) -> Tensor:
    """(1 - exp(-T h)) / h, T where h is 0."""
    h = h.clamp_min(1e-12 * max(float(h.max()), 1e-30))
    return -torch.expm1(-total * h) / h


class _Lanczos:
    """The Krylov space of one vector, and functions of the matrix on it."""

    def __init__(self, start: Tensor) -> None:
        self.length = _length(start)
        self.basis = [start / self.length] if self.length > 0 else [start]
        self.alpha: list[float] = []
        self.beta: list[float] = []
        self.done = not self.length > 0

    def add(self, product: Tensor) -> None:
        """The matrix times the last vector of the basis."""
        self.alpha.append(float(product @ self.basis[-1]))
        rest = product
        for _ in range(2):  # against loss of orthogonality
            for vector in self.basis:
                rest = rest - (vector @ rest) * vector
        self.beta.append(float(rest.norm()))
        if self.beta[-1] > 1e-6 * max(abs(a) for a in self.alpha):
            self.basis.append(rest / self.beta[-1])
        else:
            self.done = True

    def function(self, of: Callable[[Tensor], Tensor]) -> Tensor:
        """of(matrix) times the start."""
        if not self.alpha:
            return self.basis[0] * 0
        off = torch.tensor(self.beta[:-1], dtype=torch.float64)
        small = torch.diag(torch.tensor(self.alpha, dtype=torch.float64)) + torch.diag(off, 1) + torch.diag(off, -1)
        values, vectors = torch.linalg.eigh(small)
        weights = self.length * (vectors * of(values)) @ vectors[0]
        return sum((w * v for w, v in zip(weights.tolist(), self.basis, strict=False)), torch.zeros_like(self.basis[0]))


# ---------------------------------------------------------------- rows


@dataclass(frozen=True)
class Along:
    """A direction with the step that rows are scored with.

    error   of scores on a few rows between this step and twice as much, relative to their length
    """

    x: Tensor
    eta: float
    error: float

    @classmethod
    def of(cls, model: WholeModel, x: Tensor, batch: Batch) -> Along:
        """The step of a few that changes least when it is doubled. Cost: 8 forward passes of the batch, or 14."""
        eta = model.step(x, batch)
        found: dict[float, Tensor] = {}

        def error(eta: float) -> float:
            for by in (eta, 2 * eta):
                if by not in found:
                    found[by] = model.moved(x, by, batch)
            both = found[eta], found[2 * eta]
            return float((both[1] - both[0]).norm() / both[0].norm().clamp_min(1e-300))

        errors = {eta: error(eta)}
        if errors[eta] > 0.02:
            errors |= {by: error(by) for by in (eta / 4, 4 * eta)}
        best = min(errors, key=lambda by: errors[by])
        return cls(x, best, errors[best])


def row_scores(model: WholeModel, batches: Sequence[Batch], along: Sequence[Along]) -> Iterator[Tensor]:
    """Scores [queries, rows] float64 of the rows of one batch after another. Cost: two forward passes a row and query."""
    for batch in batches:
        yield torch.stack([model.moved(one.x, one.eta, batch) for one in along])
