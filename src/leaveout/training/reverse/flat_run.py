"""A training run on one flat state, which can be stepped forward, put back, and gone through twice by reverse mode."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leaveout.errors import UnsupportedError
from leaveout.jets import install
from leaveout.models import full_precision, sent
from leaveout.training.batching import agree, tried
from leaveout.training.formulas import plain_attention
from leaveout.training.loop import Part, Steps, make_optimizer, spared_by_decay
from leaveout.training.memory import flushed_denormals, kept_memory
from leaveout.training.norms import norms_of
from leaveout.training.queries import Queries, Query, query_function
from leaveout.training.recipe import Recipe
from leaveout.training.reverse.adjoints import clip_adjoint
from leaveout.training.reverse.blocks import BlockedPass, Blocks
from leaveout.training.tasks import Parameters, rows_are_separate, task_of

MOMENTS = {"sgd": (), "momentum": ("momentum_buffer",), "adam": ("exp_avg", "exp_avg_sq")}
NO_REVERSE = "Reverse mode does not support this model ({}): measure it with retrainings instead."
NEAR, ROUGH = 0.02, 1e-3
"""How far differences of gradients may be from their derivative: of its size (kinks), and of the gradient (rounding)."""
SecondPass = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Cotangents of a gradient [queries, parameters] -> Hessian-vector products, and slopes along each example's weight."""


@contextmanager
def passes(device: torch.device) -> Iterator[None]:
    """What forward and backward passes of all orders need while they run: attention that has derivatives, and their pace."""
    with plain_attention(), full_precision(), kept_memory(device), flushed_denormals(device):
        yield


@contextmanager
def refused() -> Iterator[None]:
    """Tells what torch says of a second pass that it cannot make. Raises: UnsupportedError."""
    try:
        yield
    except (RuntimeError, NotImplementedError) as error:
        raise UnsupportedError(NO_REVERSE.format(" ".join(str(error).split())[:200])) from error


class FlatRun:
    """A training run whose whole state is one tensor `state` [1 + moments, parameters], and behind them running statistics.

    Its first row holds the parameters, and the model's own parameters are views of it. Parameters that the loss does
    not use get no gradient, and PyTorch's optimizers then leave them alone: they are constants here.
    """

    def __init__(self, recipe: Recipe, device: str | torch.device = "cpu") -> None:
        self.recipe, self.task = recipe, task_of(recipe, device)
        self.device = self.task.device
        self.trained_on, self.unit_of = Steps(recipe, self.task, mixed=False), recipe.unit_of.to(self.device)
        self.steps = len(self.trained_on)
        if not self.steps:
            raise ValueError("the recipe takes no step: give epochs, steps or order that make at least one")
        # How the second pass goes: examples at a time (None: as they are trained on), and through which blocks.
        self.micro_batch: int | None = None
        self.blocks: Blocks | None = None
        self.running: Parameters = {n: p for n, p in self.task.parameters().items() if n in self.task.running}
        own = {name: p for name, p in self.task.parameters().items() if name not in self.running}
        self.trained_on.follows = False
        unused = self._unused(own)
        self.idle = [own[name] for name in unused]
        spared = spared_by_decay(recipe, self.task)
        self.names = sorted((name for name in own if name not in unused), key=spared.__contains__)
        self.params = [own[name] for name in self.names]
        self.sizes = [p.numel() for p in self.params]
        name = recipe.optimizer.name
        self.kind = name if name != "sgd" else "momentum" if recipe.optimizer.momentum else "sgd"
        moments = MOMENTS["adam" if "adam" in name else self.kind]
        aside = sum(p.numel() for p in self.running.values())
        self.state = self.params[0].new_zeros(1 + len(moments), sum(self.sizes) + aside)
        self.core[0] = self.flat([p.detach() for p in self.params])
        # As `data`, so that autograd does not take a step of the optimizer for a change of what it still needs.
        views = dict(zip(self.names, self.shaped(self.core[0].data), strict=True))
        for name, row in zip(self.running, self.aside(self.state[0, sum(self.sizes) :]), strict=True):
            row.copy_(self.running[name].detach())
            views[name] = row
        install(self.task.model, {name: view.data for name, view in views.items()})
        self.params = [self.task.parameters()[name] for name in self.names]
        self.running = {name: self.task.parameters()[name] for name in self.running}
        # Weight decay leaves the last ones alone, which are a parameter of their own for the optimizer.
        sizes = [sum(p.numel() for n, p in own.items() if n in self.names and (n in spared) == last) for last in (0, 1)]
        parts = [[nn.Parameter(row)] if len(row) else [] for row in self.core[0].split(sizes)]
        self.thetas = [theta for part in parts for theta in part]
        self.optimizer = make_optimizer(recipe, parts[0], spared=parts[1])
        rows = [row for row in self.core.split(sizes, 1) if row.shape[1]]
        for theta, row in zip(self.thetas, rows, strict=True):
            self.optimizer.state[theta].update(zip(moments, row[1:], strict=True))
        self.group = dict(self.optimizer.param_groups[0])
        if spared and self.group.get("weight_decay"):
            decays = (
                torch.full((n,), g["weight_decay"]) for n, g in zip(sizes, self.optimizer.param_groups, strict=True)
            )
            self.group["weight_decay"] = torch.cat(list(decays)).to(self.state)
        self.left: list[float] = []  # of each running statistic, after the part that was gone through last
        # Whether several cotangents, and several examples, give right numbers as one batch: None before it was tried.
        self.cotangents_together: bool | None = None
        self.separate_examples: bool | None = None

    @property
    def core(self) -> Tensor:
        """The state without running statistics [1 + moments, parameters]."""
        return self.state[:, : sum(self.sizes)]

    def aside(self, ends: Tensor) -> list[Tensor]:
        """The running statistics, or their cotangents, of the ends of rows of the state [..., statistics], in their shapes."""
        sizes = [p.numel() for p in self.running.values()]
        parts = ends.split(sizes, -1) if sizes else ()
        return [v.view((*ends.shape[:-1], *p.shape)) for v, p in zip(parts, self.running.values(), strict=True)]

    def go(self, micro_batch: int | None, by_blocks: bool, together: bool | None) -> None:
        """Says how the second pass goes. Raises: UnsupportedError where the model has no blocks that it could go by."""
        self.micro_batch, self.cotangents_together = micro_batch, together
        self.blocks = Blocks(self.task.model, self.params) if by_blocks else None

    def require_second_pass(self) -> None:
        """Goes back through a part of the first step, and compares with what must come out.

        A gradient that is written by hand may have no derivative, or silently lack a part of it. It is linear in the
        weights of examples, so that the slopes along them sum to the gradient; and its change along a line is known
        from two gradients.
        Raises: UnsupportedError, with what torch says, where reverse mode would fail or be wrong.
        """
        part = self.parts(0)[0]
        with refused():
            gradient = self.part_gradient(part, 0)
            draw = torch.Generator().manual_seed(0)
            along = torch.randn(len(gradient), generator=draw, dtype=gradient.dtype).to(self.device)
            along = along * self.core[0].abs().mean()
            if not bool(gradient.isfinite().all()) or not self._linear_in_weights(part, along, gradient):
                raise UnsupportedError(NO_REVERSE.format("its gradient is not linear in the weights of examples"))
            changes = [self._change(part, along, 10.0**-k) for k in (2, 3, 4, 5)]
            ways = [change / change.norm().clamp_min(torch.finfo(gradient.dtype).tiny) for change in changes]
            products, _ = self.second_pass(part, 0)[1](F.pad(torch.stack(ways), (0, self.state.shape[1] - len(gradient))))
        wrong = [
            abs(float(product @ along - change.norm())) > NEAR * float(change.norm()) + ROUGH * float(gradient.norm())
            for product, change, other in zip(products, changes, changes[1:], strict=False)
            if (change - other).norm() <= NEAR * change.norm()  # else the line is too steep or too flat to tell
        ]
        if wrong and all(wrong):
            raise UnsupportedError(NO_REVERSE.format("the derivative of its gradient is not how the gradient changes"))

    def _linear_in_weights(self, part: Part, cotangent: Tensor, gradient: Tensor) -> bool:
        """Whether slopes along all weights sum to the gradient itself."""
        if self.blocks is not None:
            slopes = self._blocked_pass(part, 0, self.blocks)[1](cotangent[None])[1]
        else:
            weights = self._ones(part)
            grads = self._gradients(self._loss(part, weights), 0, create_graph=True)
            shaped = self.shaped(cotangent)
            (slopes,) = torch.autograd.grad(grads, [weights], shaped, allow_unused=True, materialize_grads=True)
        limit = 1e-3 * cotangent.norm() * gradient.norm()
        return bool((slopes.sum() - cotangent @ gradient).abs() <= limit)

    def _change(self, part: Part, along: Tensor, step: float) -> Tensor:
        """Slope of a part's gradient along a line, from two gradients."""
        start, found = self.core[0].clone(), []
        for sign in (1.0, -1.0):
            self.core[0] = start + sign * step * along
            found.append(self.part_gradient(part, 0))
        self.core[0] = start
        return (found[0] - found[1]) / (2 * step)

    def _unused(self, own: Parameters) -> list[str]:
        grads = torch.autograd.grad(self._loss(self.parts(0)[0]), list(own.values()), allow_unused=True)
        return [name for name, g in zip(own, grads, strict=True) if g is None]

    def units_of(self, numbers: Sequence[int]) -> Tensor:
        """The place of each example's unit [examples], where the run is."""
        return self.unit_of[sent(torch.tensor(numbers), self.device)]

    def parts(self, step: int) -> list[Part]:
        """The micro-batches of a step, as they are gone through here."""
        parts, size = self.trained_on.parts(step), self.micro_batch
        return parts if size is None else [piece for part in parts for piece in part.pieces(size)]

    def _loss(self, part: Part, weights: Tensor | None = None) -> Tensor:
        return self.trained_on.loss(part, None if weights is None else lambda places: weights)

    def _ones(self, part: Part) -> Tensor:
        """Weights of a part's examples, to be derived for."""
        return self.state.new_ones(len(part.numbers)).requires_grad_()

    @staticmethod
    def flat(tensors: Any) -> Tensor:
        """Tensors in the order of the parameters as one vector [parameters]."""
        return torch.cat([t.reshape(-1) for t in tensors])

    def shaped(self, vector: Tensor) -> list[Tensor]:
        """A vector [parameters] in the shapes of the model's parameters."""
        return [v.view(p.shape) for v, p in zip(vector.split(self.sizes), self.params, strict=True)]

    def parameters(self) -> Parameters:
        """A copy of the trained parameters by name, constants included, on the CPU."""
        return {name: p.detach().clone().cpu() for name, p in self.task.parameters().items()}

    def gradient(self, step: int) -> Tensor:
        """The gradient [parameters] of a step, before clipping."""
        return functools.reduce(Tensor.add_, (self.part_gradient(part, step) for part in self.parts(step)))

    def part_gradient(self, part: Part, step: int) -> Tensor:
        """What a part adds to the gradient [parameters] of its step."""
        if self.blocks is not None:
            return self.flat(self._used(self._blocked(part, self.blocks).gradient, step))
        return self.flat(self._gradients(self._loss(part), step))

    @functools.cached_property
    def divisible(self) -> bool:
        """Whether the examples of a micro-batch can be gone through apart (with the masks that they have in it)."""
        separate = self.task.separate and not self.recipe.packed
        return separate and rows_are_separate(self.recipe.with_(dropout=None), self.task)

    def _blocked(self, part: Part, blocks: Blocks) -> BlockedPass:
        weights = self._ones(part)
        again = functools.partial(self.trained_on.passing, part)
        return BlockedPass(blocks, lambda w: self._loss(part, w), weights, again, part.seed is not None)

    def share(self, part: Part, place: int) -> Tensor:
        """What one example of a part adds to the gradient of its step [parameters]."""
        only = self.state.new_zeros(len(part.numbers))
        only[place] = 1.0
        return self.flat(self._gradients(self.trained_on.loss(part, lambda places: only, share=True), 0))

    def _gradients(self, loss: Tensor, step: int, create_graph: bool = False) -> list[Tensor]:
        inputs = [*self.params, *self.idle]
        grads = torch.autograd.grad(loss, inputs, create_graph=create_graph, allow_unused=True)
        return self._used(grads, step)

    def _used(self, grads: Sequence[Tensor | None], step: int) -> list[Tensor]:
        """Gradients of the trained parameters, all of which must be there, and of the idle ones, none of which may be."""
        used = [g for g in grads[: len(self.params)] if g is not None]
        if len(used) < len(self.params) or any(g is not None for g in grads[len(self.params) :]):
            raise UnsupportedError(
                f"At step {step} the loss uses other parameters than at the first step: name those it always uses in "
                "`trained`."
            )
        return used

    def advance(self, step: int, gradient: Tensor | None = None) -> None:
        """Take a step forward, with its gradient if that is known already."""
        gradient = self.gradient(step) if gradient is None else gradient.clone()
        gradient, _ = clip_adjoint(gradient, self.recipe.clip_norm)
        for theta, grad in zip(self.thetas, gradient.split([len(t) for t in self.thetas]), strict=True):
            theta.grad = grad
            if len(self.state) == 3:
                count: Any = step if self.kind == "paper-adam" else torch.tensor(float(step))
                self.optimizer.state[theta]["step"] = count
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.rate(step, self.steps)
        if self.running:
            self._follow(step)
        self.optimizer.step()

    def _follow(self, step: int) -> None:
        """Takes the running statistics a step forward."""
        self.trained_on.follows = True
        with torch.no_grad():
            for part in self.parts(step):
                self._loss(part)
        self.trained_on.follows = False

    def moved(self, number: int) -> tuple[list[Tensor], list[float]]:
        """What the norms' last pass adds to the running statistics, with its graph, and what is left of these before it.

        number: of the part of a step that was passed, whose earlier parts have moved them already; taken once
        """
        added, left = list[Tensor](), list[float]()
        for norm in norms_of(self.task.model):
            passes = norm.made
            if norm.momentum is not None:
                rates = [norm.momentum] * len(passes)
            else:
                before = float(norm.num_batches_tracked) + number * len(passes)  # type: ignore[arg-type]
                rates = [1 / (before + k + 1) for k in range(len(passes))]
            shares = [rate * math.prod(1 - later for later in rates[k + 1 :]) for k, rate in enumerate(rates)]
            for place in (0, 1):
                zero = next(self.task.model.parameters()).new_zeros(norm.num_features)
                added.append(sum((one[place] * share for one, share in zip(passes, shares, strict=True)), zero))
                left.append(math.prod(1 - rate for rate in rates))
            if norm.momentum is None:  # the count of batches, which no weight changes
                added.append(norm.num_batches_tracked.detach())  # type: ignore[union-attr]
                left.append(1.0)
            norm.made = []
        return added, left

    def second_pass(self, part: Part, step: int, number: int = 0) -> tuple[Tensor, SecondPass]:
        """The gradient of a part of a batch, and the function that goes back through it (once).

        Where there are running statistics, cotangents are as rows of the state; number: of the part in its step
        """
        if self.blocks is not None:
            return self._blocked_pass(part, step, self.blocks)
        # The weight of an example alone scales the whole gradient, and needs no graph of its own.
        alone = len(part.numbers) == 1 and not self.running
        weights = self._ones(part)
        grads = self._gradients(self._loss(part, None if alone else weights), step, create_graph=True)
        inputs, gradient = [*self.params] if alone else [*self.params, weights], self.flat([g.detach() for g in grads])
        added, self.left = self.moved(number)
        followed = [i for i, value in enumerate(added) if value.requires_grad]
        outs = [*grads, *(added[i] for i in followed)]

        def one(cotangent: Tensor, again: bool) -> tuple[Tensor, Tensor]:
            cotangent, ends = cotangent[: sum(self.sizes)], cotangent[sum(self.sizes) :]
            aside = self.aside(ends)
            found = torch.autograd.grad(
                outs, inputs, [*self.shaped(cotangent), *(aside[i] for i in followed)], retain_graph=again,
                allow_unused=True, materialize_grads=True,
            )  # fmt: skip
            slopes = (cotangent @ gradient)[None] if alone else found[-1]
            return self.flat(found[: len(self.params)]), slopes

        def each(cotangents: Tensor, again: bool = False) -> tuple[Tensor, Tensor]:
            last = len(cotangents) - 1
            products, slopes = torch.empty_like(cotangents[:, : sum(self.sizes)]), []
            for i, c in enumerate(cotangents):
                products[i], slope = one(c, again or i < last)
                slopes.append(slope)
            return products, torch.stack(slopes)

        def together(cotangents: Tensor, again: bool = False) -> tuple[Tensor, Tensor]:
            return torch.vmap(lambda c: one(c, again))(cotangents)

        def back(cotangents: Tensor) -> tuple[Tensor, Tensor]:
            if len(cotangents) > 2 and self.cotangents_together is None:
                two = cotangents[:2]
                found = tried(lambda: together(two, again=True))
                self.cotangents_together = found is not None and agree(found, each(two, again=True))
            return (together if len(cotangents) > 2 and self.cotangents_together else each)(cotangents)

        return gradient, back

    def _blocked_pass(self, part: Part, step: int, blocks: Blocks) -> tuple[Tensor, SecondPass]:
        first = self._blocked(part, blocks)
        gradient = self.flat(self._used(first.gradient, step))

        def back(cotangents: Tensor) -> tuple[Tensor, Tensor]:
            products, slopes = first.back([self.shaped(c) for c in cotangents])
            return torch.stack([self.flat(p) for p in products]), torch.stack(slopes)

        return gradient, back

    def count(self, queries: Queries) -> int:
        """How many numbers are asked for."""
        with torch.no_grad():
            return self._values(queries).numel() if callable(queries) else len(queries)

    def values(self, queries: Queries) -> Tensor:
        """Losses [queries] at the present parameters."""
        with torch.no_grad():
            if callable(queries):
                return self._values(queries).double()
            return torch.stack([self._value(q) for q in queries]).double() if queries else self.state.new_zeros(0)

    def _value(self, query: Any) -> Tensor:
        """A query alone: a row, or a `Query`."""
        if isinstance(query, Query):
            return query_function(self.task, [query])(self.task.model)[0]
        return self.task.loss(self.task.model, self.task.encode_queries([query]))[0]

    def _values(self, queries: Callable[[nn.Module], Tensor]) -> Tensor:
        values = queries(self.task.model)
        if values.dim() != 1:
            raise ValueError(f"wanted a query function that gives a vector, got the shape {tuple(values.shape)}")
        return values

    def query_gradients(self, queries: Queries, part: slice, aside: bool = False) -> tuple[Tensor, Tensor]:
        """Losses [queries] of some of the queries at the present parameters, and gradients [queries, parameters].

        aside: those of the running statistics stand behind them
        """
        inputs = [*self.params, *(p.requires_grad_() for p in self.running.values())] if aside else self.params
        many = callable(queries)  # which makes one graph for all; others hold one at a time
        values = list(self._values(queries)[part]) if many else (self._value(q) for q in queries[part])
        rows, losses = [], []
        for value in values:
            grads = torch.autograd.grad(value, inputs, retain_graph=many, allow_unused=True, materialize_grads=True)
            rows.append(self.flat(grads))
            losses.append(value.detach().double())
        for p in self.running.values():
            p.requires_grad_(False)
        if not rows:
            return self.state.new_zeros(0, dtype=torch.float64), self.state.new_zeros(0, sum(self.sizes))
        return torch.stack(losses), torch.stack(rows)
