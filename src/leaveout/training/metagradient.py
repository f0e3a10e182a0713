"""The exact first-order effect of every unit on every query, by reverse mode through the recorded training run.

With A the gradient of a query with respect to the optimizer's state after a step, one step back is: the update's own
adjoint turns A into b, the cotangent of the batch gradient; a second backward pass through that gradient turns b into
the Hessian-vector product H b, which is added to A, and into b . grad l_i / batch size, the share of each example in
the batch. All queries go back together. States of the forward run are kept as far as memory allows and recomputed
from the nearest kept one where it does not (the binomial schedule of Griewank and Walther, Algorithm 799).

Source: arXiv 2503.13751 (metagradient), 2504.16430 (the effect of a weight on the trained model); METHODS A1, A4.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from leaveout.errors import StabilityError, UnsupportedError
from leaveout.training.memory import COPIES, available_memory, kept_bytes, kept_memory
from leaveout.training.recipe import Recipe
from leaveout.training.tasks import task_of
from leaveout.training.train import (
    Parameters,
    Queries,
    RunOptions,
    flushed_denormals,
    make_optimizer,
    micro_batches,
    own_parameters,
)

MOMENTS = {"sgd": (), "momentum": ("momentum_buffer",), "adam": ("exp_avg", "exp_avg_sq")}
SecondPass = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Cotangents of a gradient [queries, parameters] -> Hessian-vector products, and slopes along each example's weight."""


@dataclass(frozen=True)
class ReversePlan:
    """Bytes of going back with `together` queries at a time and `checkpoints` kept states."""

    state: int  # one kept state: parameters and the optimizer's moments
    per_query: int  # cotangents and what the second backward pass holds
    queries: int
    together: int
    checkpoints: int
    limit: int

    @property
    def peak(self) -> int:
        """Together with the present state."""
        return self.state * (self.checkpoints + 1) + self.per_query * self.together

    @property
    def rounds(self) -> int:
        return -(-self.queries // self.together)


@dataclass
class Effects:
    """First-order effects of units on queries.

    effects  d loss_q / d x_u at x = 0, where unit u has weight 1 - x_u: float64 [queries, units], nats
    base     losses of the model trained on everything: float64 [queries], nats
    checkpoints  states kept at the same time; fewer than steps + 1 means that steps were recomputed
    """

    effects: np.ndarray
    base: np.ndarray
    cpu_seconds: float
    checkpoints: int
    memory: ReversePlan


def metagradient(
    recipe: Recipe, queries: Queries, options: RunOptions | None = None, *, memory: int | None = None
) -> Effects:
    """The derivative of each query's loss with respect to the removal of each unit, positive = removing raises it.

    `memory`: bytes of kept states and cotangents, default options.memory, else half of what is free; beyond it only
    the model, its batches and the result (8 bytes a query and unit). Nothing is written to options.directory.
    Guarantee: the coefficients of `train_jets` at degree 1 are psi @ effects.T, up to rounding. Where a gradient has
    always been exactly zero, the root in Adam has no derivative and counts as constant.
    Cost: on microgpt about 4, 5 and 10 plain trainings for 1, 20 and 100 queries; each round repeats the forward run.
    Raises: UnsupportedError if not even one query and two states fit; StabilityError if an effect overflows.
    """
    options = options or RunOptions()
    began = time.process_time()
    with sdpa_kernel(SDPBackend.MATH), kept_memory(), flushed_denormals():
        run = FlatRun(recipe)
        n_queries = run.count(queries)
        plan = plan_reverse(run, n_queries, memory if memory is not None else options.memory)
        effects = torch.zeros(n_queries, len(recipe.unit_names), dtype=torch.float64)
        base = torch.zeros(n_queries, dtype=torch.float64)
        total, hidden = plan.rounds * run.steps, not options.progress
        with tqdm(total=total, desc="metagradient", unit="step", disable=hidden, file=sys.stderr) as bar:
            for first in range(0, n_queries, plan.together):
                part = slice(first, first + plan.together)
                reverse = Reverse(run, queries, part, effects[part], base[part], bar)
                walk_back(run, plan.checkpoints, reverse.visit)
    if not bool(effects.isfinite().all()):
        raise StabilityError("The metagradient overflowed: the run is not stable; use a lower lr or a larger eps.")
    return Effects(effects.numpy(), base.numpy(), time.process_time() - began, plan.checkpoints, plan)


# --- the run on flat vectors -------------------------------------------------------------------------------------


class FlatRun:
    """A training run whose whole state is one tensor `state` [1 + moments, parameters].

    Its first row holds the parameters, and the model's own parameters are views of it. Parameters that the loss does
    not use get no gradient, and PyTorch's optimizers then leave them alone: they are constants here.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe, self.task = recipe, task_of(recipe)
        self.batches, self.unit_of = recipe.batches(), recipe.unit_of
        self.steps = len(self.batches)
        if not self.steps:
            raise ValueError("the recipe takes no step: give epochs, steps or order that make at least one")
        own: Parameters = own_parameters(self.task)
        unused = self._unused(own)
        self.idle = [own[name] for name in unused]
        self.names = [name for name in own if name not in unused]
        self.params = [own[name] for name in self.names]
        self.sizes = [p.numel() for p in self.params]
        name = recipe.optimizer.name
        self.kind = name if name != "sgd" else "momentum" if recipe.optimizer.momentum else "sgd"
        moments = MOMENTS["adam" if "adam" in name else self.kind]
        self.state = torch.zeros(1 + len(moments), sum(self.sizes), dtype=recipe.real_dtype)
        self.state[0] = self.flat([p.detach() for p in self.params])
        for p, values in zip(self.params, self.state[0].split(self.sizes), strict=True):
            p.data = values.view_as(p)
        self.theta = nn.Parameter(self.state[0])
        self.optimizer = make_optimizer(recipe, [self.theta])
        self.optimizer.state[self.theta].update(zip(moments, self.state[1:], strict=True))

    def _unused(self, own: Parameters) -> list[str]:
        part = next(micro_batches(self.batches[0], self.recipe.accumulate))
        grads = torch.autograd.grad(self._loss(part), list(own.values()), allow_unused=True)
        return [name for name, g in zip(own, grads, strict=True) if g is None]

    def _loss(self, part: tuple[int, ...], weights: Tensor | None = None) -> Tensor:
        losses = self.task.loss(self.task.model, self.task.encode([self.recipe.examples[i] for i in part]))
        return (losses if weights is None else losses * weights).sum() / self.recipe.batch_size

    @staticmethod
    def flat(tensors: Any) -> Tensor:
        return torch.cat([t.reshape(-1) for t in tensors])

    def shaped(self, vector: Tensor) -> list[Tensor]:
        """A vector [parameters] in the shapes of the model's parameters."""
        return [v.view(p.shape) for v, p in zip(vector.split(self.sizes), self.params, strict=True)]

    def parameters(self) -> Parameters:
        """A copy of the trained parameters by name, constants included."""
        return {name: p.detach().clone() for name, p in own_parameters(self.task).items()}

    def gradient(self, step: int) -> Tensor:
        """The gradient [parameters] of a step, before clipping."""
        parts = micro_batches(self.batches[step], self.recipe.accumulate)
        return torch.stack([self.flat(self._gradients(self._loss(part), step)) for part in parts]).sum(0)

    def _gradients(self, loss: Tensor, step: int, create_graph: bool = False) -> list[Tensor]:
        inputs = [*self.params, *self.idle]
        grads = torch.autograd.grad(loss, inputs, create_graph=create_graph, allow_unused=True)
        used = [g for g in grads[: len(self.params)] if g is not None]
        if len(used) < len(self.params) or any(g is not None for g in grads[len(self.params) :]):
            raise UnsupportedError(
                f"At step {step} the loss uses other parameters than at the first step: name those it always uses in "
                "`trained`."
            )
        return used

    def advance(self, step: int, gradient: Tensor | None = None) -> None:
        """Take a step forward, with its gradient if that is known already."""
        self.theta.grad = self.gradient(step) if gradient is None else gradient.clone()
        if self.recipe.clip_norm is not None:
            nn.utils.clip_grad_norm_([self.theta], self.recipe.clip_norm)
        self.optimizer.param_groups[0]["lr"] = self.recipe.rate(step, self.steps)
        if len(self.state) == 3:
            count: Any = step if self.kind == "paper-adam" else torch.tensor(float(step))
            self.optimizer.state[self.theta]["step"] = count
        self.optimizer.step()

    def second_pass(self, part: tuple[int, ...], step: int) -> tuple[Tensor, SecondPass]:
        """The gradient of a part of a batch, and the function that goes back through it (once)."""
        alone = len(part) == 1  # then its weight scales the whole gradient, and needs no graph of its own
        weights = torch.ones(len(part), dtype=self.recipe.real_dtype, requires_grad=True)
        grads = self._gradients(self._loss(part, None if alone else weights), step, create_graph=True)
        inputs, gradient = [*self.params] if alone else [*self.params, weights], self.flat([g.detach() for g in grads])

        def one(cotangent: Tensor) -> tuple[Tensor, Tensor]:
            found = torch.autograd.grad(
                grads, inputs, self.shaped(cotangent), allow_unused=True, materialize_grads=True
            )
            slopes = (cotangent @ gradient)[None] if alone else found[-1]
            return self.flat(found[: len(self.params)]), slopes

        return gradient, torch.vmap(one)

    def count(self, queries: Queries) -> int:
        with torch.no_grad():
            return self._values(queries).numel() if callable(queries) else len(queries)

    def _values(self, queries: Callable[[nn.Module], Tensor]) -> Tensor:
        values = queries(self.task.model)
        if values.dim() != 1:
            raise ValueError(f"wanted a query function that gives a vector, got the shape {tuple(values.shape)}")
        return values

    def query_gradients(self, queries: Queries, part: slice) -> tuple[Tensor, Tensor]:
        """Losses [queries] of some of the queries at the present parameters, and gradients [queries, parameters]."""
        task = self.task
        if callable(queries):
            losses = list(self._values(queries)[part])
        else:
            losses = [task.loss(task.model, task.encode([q]))[0] for q in queries[part]]
        rows = torch.zeros(len(losses), sum(self.sizes), dtype=self.recipe.real_dtype)
        for row, loss in zip(rows, losses, strict=True):
            grads = torch.autograd.grad(
                loss, self.params, retain_graph=callable(queries), allow_unused=True, materialize_grads=True
            )
            row.copy_(self.flat(grads))
        return torch.tensor([v.item() for v in losses], dtype=torch.float64), rows


# --- memory, and the order in which steps are visited ------------------------------------------------------------


def plan_reverse(run: FlatRun, queries: int, limit: int | None = None) -> ReversePlan:
    """How many queries go back together and how many states are kept, for `limit` bytes.

    Raises: UnsupportedError if not even one query and two states fit.
    """
    limit = limit if limit is not None else available_memory() // 2
    bytes_each = run.recipe.real_dtype.itemsize
    vector = sum(run.sizes) * bytes_each
    state = len(run.state) * vector
    # Cotangents, b, the products twice, and two temporaries; the second pass goes through both halves of the first one.
    # Measured on perceptrons of 4e4 to 4e5 parameters, batches of 8 to 256: the process grew by 0.7 to 1.2 of the plan.
    per_query = (COPIES[run.kind] + 4) * vector + 4 * kept_bytes(run.recipe, run.task)
    together = max(1, min(queries, limit // 2 // per_query))
    checkpoints = min((limit - together * per_query) // state - 1, run.steps + 1)
    if checkpoints < 2:
        raise UnsupportedError(
            f"Going back needs {(3 * state + per_query) / 1e9:.2f} GB at least and {limit / 1e9:.2f} GB are allowed: "
            "train fewer parameters (LoRA, named modules), or use a smaller batch (accumulate)."
        )
    return ReversePlan(state, per_query, queries, together, checkpoints, limit)


def walk_back(run: FlatRun, checkpoints: int, visit: Callable[[int], None]) -> None:
    """Call visit(step) for step = last + 1 .. 0 with the state before it in `run`, which begins and ends at its start."""
    kept = [(0, run.state.clone())]
    for step in range(run.steps, -1, -1):
        at = kept[-1][0]
        run.state.copy_(kept[-1][1])
        while at < step:
            free = checkpoints - len(kept)
            until = at + next_kept(step + 1 - at, free)
            for number in range(at, until):
                run.advance(number)
            at = until
            if free:
                kept.append((at, run.state.clone()))
        if kept[-1][0] == step:
            kept.pop()
        visit(step)


def next_kept(length: int, free: int) -> int:
    """How far to run before the next state is kept, with `length` states to visit and `free` places left.

    Source: Griewank and Walther, Algorithm 799 (ACM TOMS 26, 2000): s places and r repetitions reach C(s + r, s) states.
    """
    if free == 0:
        return length - 1
    repeats = 1
    while math.comb(free + 1 + repeats, repeats) < length:
        repeats += 1
    late = length - math.comb(free + repeats - 1, repeats - 1)
    return min(math.comb(free + repeats, repeats - 1), max(1, late))


# --- one step back -----------------------------------------------------------------------------------------------


@dataclass
class Reverse:
    """Goes back over the steps for some of the queries, adding to effects [queries, units]; fills base [queries]."""

    run: FlatRun
    queries: Queries
    part: slice
    effects: Tensor
    base: Tensor
    bar: Any

    def visit(self, step: int) -> None:
        if step == self.run.steps:
            self.base[:], gradients = self.run.query_gradients(self.queries, self.part)
            # One cotangent [queries, parameters] for each row of the state.
            self.cotangents = [gradients, *(torch.zeros_like(gradients) for _ in self.run.state[1:])]
            return
        self._back(step)
        self.bar.update()

    def _back(self, step: int) -> None:
        run, recipe = self.run, self.run.recipe
        parts = list(micro_batches(run.batches[step], recipe.accumulate))
        # One part at a time holds its graph: with several, the whole gradient is needed before going back through any.
        passes = [run.second_pass(parts[0], step)] if len(parts) == 1 else []
        gradient = passes[0][0] if passes else run.gradient(step)
        clipped, unclip = clip_adjoint(gradient, recipe.clip_norm)
        b = unclip(self._update_adjoint(step, clipped))
        for i, part in enumerate(parts):
            _, back = passes[i] if passes else run.second_pass(part, step)
            products, slopes = back(b)
            self.cotangents[0] += products
            self.effects.index_add_(1, run.unit_of[list(part)], slopes.double(), alpha=-1)

    def _update_adjoint(self, step: int, gradient: Tensor) -> Tensor:
        """Take the cotangents of the state back over the optimizer's update; gives that of its gradient."""
        group = self.run.optimizer.param_groups[0]
        rate = self.run.recipe.rate(step, self.run.steps)
        if self.run.kind in ("sgd", "momentum"):
            return sgd_adjoint(self.cotangents, rate, group)
        form = AdamForm(self.run.kind, rate, step, group)
        return form.adjoint(self.cotangents, gradient, self.run.state)


def clip_adjoint(gradient: Tensor, limit: float | None) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """A gradient [parameters] clipped to a norm as clip_grad_norm_ does it, and the adjoint of that."""
    norm = gradient.norm()
    if limit is None or limit / (norm + 1e-6) >= 1:
        return gradient, lambda b: b
    factor = limit / (norm + 1e-6)

    def adjoint(b: Tensor) -> Tensor:
        return b * factor - torch.outer(b @ gradient, gradient * (factor / (norm * (norm + 1e-6))))

    return gradient * factor, adjoint


def sgd_adjoint(cotangents: list[Tensor], rate: float, group: dict[str, Any]) -> Tensor:
    """theta' = theta - rate * d, with d = g, the buffer u' = mu u + g, or g + mu u' (Nesterov); g has the decay in."""
    a, decay = cotangents[0], group["weight_decay"]
    b = a * -rate
    if len(cotangents) == 2:
        mu, u = group["momentum"], cotangents[1]
        u.add_(b, alpha=mu if group["nesterov"] else 1.0)
        b = b + u if group["nesterov"] else u.clone()
        u.mul_(mu)
    a.add_(b, alpha=decay)
    return b


@dataclass(frozen=True)
class AdamForm:
    """One step of adam, adamw or paper-adam, counted from 0: theta' = theta - rate / c1 * m' / root(v')."""

    kind: str
    rate: float
    step: int
    group: dict[str, Any]

    def moments(self, gradient: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The gradient with coupled decay, and m', v' after the step."""
        beta1, beta2 = self.group["betas"]
        if self.kind == "adam":
            gradient = gradient.add(state[0], alpha=self.group["weight_decay"])
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
            a.add_(b, alpha=self.group["weight_decay"])
        return b
